"""The `dmd` command: a closed table of verbs, common options, exit codes."""

import argparse
import errno
import importlib
import importlib.metadata
import json
import os
import select
import sys
from types import ModuleType
from typing import Any

from cluster.secrets import without_user_info
from jobs.errors import Exit, JobError
from jobs.failures import is_ours, no_answer, raise_in_words
from jobs.worker_failures import ray_errors, worker_failure

VERBS = {
    "demo": "the whole journey on the shipped teacher: pairs, train, export, evaluate, report",
    "pairs": "run the teacher over a prompt list and seal a noise-latent pair data set",
    "regenerate": "bring the pair data set up to date with prompts and teacher; keep k versions",
    "inspect": "show a pair data set: versions, costs, pictures; verify or compare them",
    "schedule": "run a verb at fixed times on a Ray cluster, such as regenerate every night",
    "train": "distil the teacher into a student of one or a few steps (DMD, DMD2)",
    "export": "write the trained student as a diffusers pipeline folder",
    "evaluate": "measure the student against its teacher on held-out prompts",
    "report": "write one self-contained report.html",
    "train-teacher": "train a teacher: the miniature Stable Diffusion on emoji, or a pixel model",
    "data": "fetch a public data set through its package and check every byte (cifar10)",
    "pipeline": "regenerate, train, export, evaluate, report as one job; skips what is finished",
    "doctor": "check this machine, the store, the cluster and the teacher before money is spent",
    "submit": "run a verb as a job of a Ray cluster and follow it as if it were local",
    "attach": "follow a submitted job again, after the terminal or the connection was lost",
    "jobs": "the jobs of a Ray cluster: state, age, progress",
    "logs": "print what a job of a Ray cluster has said",
    "stop": "stop a job of a Ray cluster",
    "cluster": "start, show and stop a Ray cluster of several nodes on this machine",
}

_OWN_ARGUMENTS = (
    "inspect", "schedule", "train", "export", "pipeline", "doctor", "data",
    "submit", "attach", "jobs", "logs", "stop", "cluster",
)  # fmt: skip
# These work on a cluster, not on a run: no recipe is read for them.
_WITHOUT_RECIPE = ("data", "submit", "attach", "jobs", "logs", "stop", "cluster")
# What follows is the command line of another verb, which it checks itself.
_PASSES_ON = ("submit",)
_DISTRIBUTION = "one-step-dmd"
_UNREAD = 128 + 13  # what a shell shows of a command that ended because nobody read on (SIGPIPE)

_EXAMPLES = """examples:
  dmd demo                                      distil the shipped teacher on this machine
  dmd pairs --config my.yaml --dry-run          show what would be done, and stop
  dmd train --config my.yaml --set train.learning_rate=2e-5
  dmd inspect runs/demo/pairs --sample 16       versions of a data set, and pictures of 16 rows
  dmd regenerate --config my.yaml               after prompts or teacher have changed
  dmd schedule "0 3 * * *" -- regenerate --config my.yaml
  dmd evaluate --config my.yaml --json          machine-readable results on stdout
  python -m jobs.pairs --config my.yaml         the same as `dmd pairs`, nothing installed

To resume anything, run the same command again.
exit codes: 0 done or nothing to do, 1 a bug, 2 usage or configuration, 3 refused,
            4 transient (try again), 5 finished with too many rejected rows"""


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _outcome(options)
        sys.stdout.flush()  # a reader that has left is noticed here, not when Python ends
    except BrokenPipeError:
        return _end_unread()
    return code


def _outcome(options: argparse.Namespace) -> int:
    """The verb's exit code; what it raised is told. Raises BrokenPipeError where nobody reads."""
    default = "emoji" if options.verb == "train-teacher" else "demo"
    try:
        if options.verb in _WITHOUT_RECIPE:
            return _run_without_recipe(options)
        return _run(options, options.config or default)
    except JobError as error:
        if options.json and error.result is not None:
            print(json.dumps(error.result, indent=2))
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on", Exit.TRANSIENT)
    except ray_errors() as error:  # before the others: Ray's are also what the worker raised
        return _fail(*worker_failure(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _is_unread():
            raise
        if error.errno == errno.ENOSPC:
            return _fail(f"the disk is full ({error.filename}); free space and run again")
        return _fail(str(error))
    except ValueError as error:
        if not is_ours(error):
            raise
        return _fail(str(error))
    except RuntimeError as error:
        if not is_ours(error):
            raise
        again = getattr(error, "transient", False) or no_answer(error)
        return _fail(str(error), Exit.TRANSIENT if again else Exit.REFUSED)


def _run(options: argparse.Namespace, config: str) -> int:
    from dmd_core.files import store_errors
    from jobs.session import open_session

    module = _module(options.verb)
    with open_session(config, options.set, quiet=options.json, arguments=options) as session:
        try:
            result = module.plan(session) if options.dry_run else module.run(session)
        except ray_errors() as error:
            print(error, file=sys.stderr)  # goes to the log: Ray's output is redirected still
            raise JobError(*worker_failure(error, session.ray_log)) from error
        except store_errors() as error:
            raise_in_words(error, session.recipe.storage.endpoint_url)
    return _show(result, options)


def _run_without_recipe(options: argparse.Namespace) -> int:
    from jobs.display import Display

    module = _module(options.verb)
    act = module.plan if options.dry_run else module.run
    return _show(act(options, Display(quiet=options.json)), options)


def _show(result: dict[str, Any], options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(result, indent=2))
    elif options.dry_run:
        for key, value in result.items():
            print(f"{key:24} {value}")
    return Exit.OK


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"jobs.{verb.replace('-', '_')}")


def _options(arguments: list[str]) -> argparse.Namespace:
    """The parsed command line; `rest` is what a verb that passes it on did not know itself."""
    parser = _parser(arguments)
    options, rest = parser.parse_known_args(arguments)
    if rest and options.verb not in _PASSES_ON:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    return options


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """The whole command line; only the asked verb's module is imported for arguments of its own."""
    parser = argparse.ArgumentParser(
        prog="dmd",
        description="Turn slow diffusion models into one-step ones (Distribution Matching "
        "Distillation) on Ray.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and stop")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, help_text in VERBS.items():
        verb = verbs.add_parser(
            name,
            help=help_text,
            description=help_text,
            epilog=_EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=name not in _PASSES_ON,
        )
        if name not in _WITHOUT_RECIPE:
            _add_recipe_arguments(verb)
        verb.add_argument("--dry-run", action="store_true", help="print the plan and stop")
        verb.add_argument(
            "--json", action="store_true", help="results as JSON on stdout, no display"
        )
        if name in _OWN_ARGUMENTS and name in arguments:
            _module(name).add_arguments(verb)
    return parser


def _add_recipe_arguments(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--config",
        "--recipe",
        metavar="YAML",
        help="a recipe file, or the name of a shipped one",
    )
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override one setting; may be repeated",
    )


class _Version(argparse.Action):
    """Looked up only where it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        try:
            version = importlib.metadata.version(_DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError:
            version = "of a source tree, not installed"
        print(f"dmd {version}")
        parser.exit()


def _is_unread() -> bool:
    """Has the reader of our output left, as `head` does? Else another connection broke."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _end_unread() -> int:
    """In silence, as other tools do, and without Python's complaint about what is still unsent."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return _UNREAD


def _fail(message: str, code: Exit = Exit.REFUSED) -> int:
    print(f"error: {without_user_info(message)}", file=sys.stderr)
    return code


def verb_main(verb: str) -> int:
    """For `python -m jobs.<verb>`."""
    return main([verb, *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
