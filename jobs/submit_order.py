"""A submission as it is before a cluster is asked: checked, weighed and named."""

import argparse
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.job_server import SubmitError
from cluster.package import Package, measure
from cluster.secrets import SecretError, refuse_secrets
from cluster.submit import is_sent, job_environment
from jobs.config import Recipe, yaml_problem
from jobs.errors import Exit, JobError
from jobs.job_client import kept_options
from jobs.job_door import VerbJob, read_job
from pipelines.config import EvaluateSection, TeacherSection

_DIGEST = 10  # characters of it in an id
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # it is part of URLs and file names
_WITHOUT_TEACHER = ("doctor", "inspect", "report", "train-teacher")
_READ_PROMPTS = ("demo", "pairs", "regenerate", "pipeline")
_TRAIN = ("demo", "train", "pipeline")
_EVALUATE = ("demo", "evaluate", "pipeline")
_PERCEPTUAL = ("lpips", "st-lpips")  # as in dmd_core.perceptual, which would load torch
_WORDS = {"", "emoji", "vae", "latents"}  # what a key may say in place of a path


@dataclass(frozen=True)
class Order:
    """Everything of a submission that is known before a cluster is asked. `given`: what the job
    keeps of the command (jobs.job_client.command_of)."""

    job: VerbJob
    id: str
    digest: str
    working_dir: str | None
    package: Package | None
    runtime_env: dict[str, Any]
    given: dict[str, str]

    @property
    def words(self) -> list[str]:
        return [self.job.verb, *self.job.arguments]


def read_order(options: argparse.Namespace) -> Order:
    """Check the whole submission here. Raises `JobError`."""
    verb, rest = options.job, _own(options.rest)
    if options.id and not _ID.fullmatch(options.id):
        raise JobError(f"--id {options.id!r}: expected letters, digits, . _ and -", Exit.USAGE)
    folder = None if options.working_dir == "none" else options.working_dir
    try:
        refuse_secrets(rest, "the arguments")
        runtime_env = _read_runtime_env(options.runtime_env)
        environment = job_environment(folder, runtime_env)
        if verb.startswith("-") or Path(verb).suffix in (".yaml", ".yml"):
            raise JobError(f"{verb!r} is no verb; `dmd submit` is followed by one", Exit.USAGE)
        job, package = read_sent(verb, rest, environment)
    except (SecretError, SubmitError) as error:
        raise JobError(str(error), Exit.USAGE) from error
    digest = _digest(job, runtime_env)
    identity = options.id or f"{verb}-{digest[:_DIGEST]}"
    given = kept_options(options, job)
    return Order(job, identity, digest, folder, package, runtime_env, given)


def read_sent(
    verb: str, arguments: list[str], environment: dict[str, Any], *, done: str = "submitted"
) -> tuple[VerbJob, Package | None]:
    """The job, and what a local working directory of the `environment` weighs: all that the job
    reads by a relative path is in it. Raises `JobError`, and `SubmitError` for too much."""
    folder = environment.get("working_dir")
    job = read_job(verb, arguments, folder, done=done)
    if not is_sent(folder):
        return job, None
    package = measure(folder, environment["excludes"])
    _refuse_left_out(job, package)
    return job, package


def _own(rest: list[str]) -> list[str]:
    """The verb's arguments without the `--` that may set them apart."""
    if "--" not in rest:
        return list(rest)
    cut = rest.index("--")
    return [*rest[:cut], *rest[cut + 1 :]]


def _read_runtime_env(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise JobError(f"--runtime-env {path}: {yaml_problem(error)}", Exit.USAGE) from error
    if not isinstance(content, dict):
        raise JobError(f"--runtime-env {path}: expected a mapping such as `excludes:`", Exit.USAGE)
    if "working_dir" in content:
        raise JobError(
            f"--runtime-env {path}: working_dir is given on the command line, as --working-dir",
            Exit.USAGE,
        )
    excludes = content.get("excludes", [])
    if not isinstance(excludes, list) or not all(isinstance(each, str) for each in excludes):
        raise JobError(
            f"--runtime-env {path}: excludes is {excludes!r}; expected a list of patterns",
            Exit.USAGE,
        )
    from ray.runtime_env import RuntimeEnv

    try:
        RuntimeEnv(**content)
    except (TypeError, ValueError) as error:
        raise JobError(f"--runtime-env {path}: {error}", Exit.USAGE) from error
    return content


def _digest(job: VerbJob, runtime_env: dict[str, Any]) -> str:
    """Of what the job is to do: the same for the same settings, however they were written. Defaults
    are left out: a newer release of this package goes on with the older one's jobs."""
    options = {k: v for k, v in vars(job.options).items() if k not in ("config", "set")}
    said = list(job.arguments) if job.settings is None else job.settings
    content = [job.verb, options, said, runtime_env]
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_left_out(job: VerbJob, package: Package) -> None:
    """Files that the job would look for in its working directory, and that do not travel."""
    if job.file is not None and job.file not in package.files:
        raise JobError(
            f"the recipe {job.file} does not travel with the working directory: .gitignore, "
            ".rayignore or the excludes leave it out",
            Exit.USAGE,
        )
    for key, path in _relative_paths(job):
        found = _files_at(package.folder, path)
        if not found:
            raise JobError(
                f"{key} is {path!r}, and the working directory has no such file; give s3://…, or "
                "a path that all machines share",
                Exit.USAGE,
            )
        missing = [file for file in found if file not in package.files]
        if missing:
            raise JobError(
                f"{key} is {path!r}, but {missing[0]} does not travel with the working directory "
                "(weights, data, ignored files and other folders stay here); put it into a "
                "bucket, or on a path that all machines share",
                Exit.USAGE,
            )


def _teacher_paths(teacher: TeacherSection) -> list[tuple[str, str]]:
    """A hub's id (it has a commit) is no path."""
    path, config = teacher.path, teacher.single_file_config
    named = [] if teacher.revision else [("teacher.path", path)]
    if config and "@" not in config:
        named.append(("teacher.single_file_config", config))
    return named


def _relative_paths(job: VerbJob) -> list[tuple[str, str]]:
    """(key, path) of what this verb reads by a path that is relative here."""
    if job.recipe is None:
        return []
    return [
        (key, path)
        for key, path in dict.fromkeys(_paths(job.verb, job.recipe))
        if path not in _WORDS and ":" not in path and not os.path.isabs(path)
    ]


def _paths(verb: str, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, value) of every file and folder that the verb reads, as the recipe names it."""
    if verb not in _WITHOUT_TEACHER:
        yield from _teacher_paths(recipe.teacher)
    if verb in _READ_PROMPTS:
        yield from _prompt_paths(recipe)
    if verb in _TRAIN:
        yield from _training_paths(recipe)
    if verb in _EVALUATE:
        yield from _evaluation_paths(recipe.evaluate)
        if "@" not in recipe.evaluate.clip_model:
            yield "evaluate.clip_model", recipe.evaluate.clip_model
    if verb == "train-teacher":
        section = recipe.train_teacher
        yield "train_teacher.start_from", section.start_from
        if section.data == "cifar10":
            yield "train_teacher.pixel.path", section.pixel.path


def _prompt_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    prompts = recipe.pairs.prompts
    for each in (prompts,) if isinstance(prompts, str) else prompts:
        yield "pairs.prompts", each


def _training_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """What the stages read, and the evaluations beside them."""
    section = recipe.train
    yield "train.unpaired_prompts", section.unpaired_prompts
    if not section.unpaired_prompts and not section.needs_pairs:
        yield from _prompt_paths(recipe)
    if section.uses_gan:
        yield "train.real_pictures", section.real_pictures
    for _, keys in section.plan():
        if keys.needs_pairs and keys.regression_loss in _PERCEPTUAL:
            yield "train.perceptual_trunk", section.perceptual_trunk
            yield "train.regression_decoder", keys.regression_decoder
    if section.evaluation.steps:
        yield from _evaluation_paths(recipe.evaluate)


def _evaluation_paths(section: EvaluateSection) -> Iterator[tuple[str, str]]:
    yield "evaluate.prompts", section.prompts
    yield "evaluate.real", section.real
    if section.features == "inception":
        yield "evaluate.inception", section.inception


def _files_at(folder: str, path: str) -> list[str]:
    """Files under a path or glob of `folder`, relative to it."""
    found = [Path(each) for each in glob.glob(os.path.join(folder, path))]
    files = [f for each in found for f in ([each] if each.is_file() else each.rglob("*"))]
    return sorted(os.path.relpath(file, folder) for file in files if file.is_file())
