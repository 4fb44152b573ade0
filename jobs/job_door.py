"""The command line of another verb, checked before it is handed to a cluster."""

import argparse
import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.submit import is_sent
from jobs.config import Recipe, load_recipe, read_settings
from jobs.errors import Exit, JobError

_CONFIG = ("--config", "--recipe")


@dataclass(frozen=True)
class VerbJob:
    """A verb with its arguments as they will stand on the cluster. `recipe` and `settings` (what it
    says, without defaults): None where it exists only there; `file`: its place in the working
    directory, None for a shipped one."""

    verb: str
    arguments: tuple[str, ...]
    options: argparse.Namespace
    recipe: Recipe | None = None
    settings: dict[str, Any] | None = None
    file: str | None = None


def parse_job(verb: str, arguments: list[str], *, done: str) -> argparse.Namespace:
    """Refuse now what would fail there: an unknown verb or argument. `done`: what the job is to be,
    as in "scheduled"."""
    from jobs.cli import _WITHOUT_RECIPE, VERBS

    known = [name for name in VERBS if name not in (*_WITHOUT_RECIPE, "schedule")]
    if verb not in known:
        raise JobError(f"{verb!r} cannot be {done}; expected one of {', '.join(known)}", Exit.USAGE)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(complaint):
            return _parsed([verb, *arguments])
    except SystemExit as stop:
        lines = complaint.getvalue().strip().splitlines() or ["it would print its help and end"]
        last = lines[-1] if stop.code else "it would print its help and end"
        raise JobError(f"the job `{verb}` would not start: {last}", Exit.USAGE) from stop


def read_job(
    verb: str, arguments: list[str], working_dir: str | None, *, done: str = "submitted"
) -> VerbJob:
    """The job with its recipe loaded and, in a local `working_dir`, named by its place there."""
    options = parse_job(verb, arguments, done=done)
    config = options.config or ("emoji" if verb == "train-teacher" else "demo")
    is_file = Path(config).suffix in (".yaml", ".yml")
    sent = is_sent(working_dir)
    if is_file and not sent and not Path(config).is_file():
        return VerbJob(verb, tuple(arguments), options)  # it is on the cluster alone
    recipe, settings = load_recipe(config, options.set), read_settings(config, options.set)
    if not is_file or not sent:
        return VerbJob(verb, tuple(arguments), options, recipe, settings)
    file = _place(config, working_dir or ".")
    moved = arguments if file == config else with_config(arguments, config, file)
    return VerbJob(verb, tuple(moved), options, recipe, settings, file)


def without_program(working_dir: str | None) -> Iterator[str]:
    """A hint where the folder that is sent does not bring what the job runs."""
    if is_sent(working_dir) and not Path(working_dir, "jobs").is_dir():
        yield (
            f"{working_dir} has no folder jobs/: the cluster's own Python must have this project "
            "installed, in this version; or send the checkout"
        )


def relative_folders(recipe: Recipe) -> Iterator[str]:
    """What works here and would not on a cluster, one hint each."""
    for key, folder in (("run.dir", recipe.run.dir), ("pairs.root", recipe.pairs.root)):
        if folder and not folder.startswith("/") and "://" not in folder:
            yield (
                f"{key} is {folder!r}, a folder of one job on one machine; give s3://… or a "
                f"path that all machines share (--set {key}=…)"
            )


def _parsed(words: list[str]) -> argparse.Namespace:
    from jobs.cli import _parser

    return _parser(words).parse_args(words)


def _place(config: str, working_dir: str) -> str:
    try:
        return str(Path(config).resolve().relative_to(Path(working_dir).resolve()))
    except ValueError as error:
        raise JobError(
            f"the recipe {config} lies outside the working directory {working_dir}, so the job "
            "would not find it on the cluster; move it there, or name a folder that holds it "
            "(--working-dir)",
            Exit.USAGE,
        ) from error


def with_config(arguments: list[str], config: str, place: str) -> list[str]:
    """The arguments with the recipe named by its `place`; the last of its options counts."""
    moved = list(arguments)
    for index in reversed(range(len(moved))):
        name, equals, value = moved[index].partition("=")
        if name in _CONFIG and equals and value == config:
            moved[index] = f"{name}={place}"
            return moved
        if moved[index] in _CONFIG and moved[index + 1 : index + 2] == [config]:
            moved[index + 1] = place
            return moved
    raise JobError(f"give the recipe as --config {config}", Exit.USAGE)
