"""The `dmd` command: a closed table of verbs, common options, exit codes."""

import argparse
import errno
import importlib
import json
import sys
from types import ModuleType
from typing import Any, NoReturn

from cluster.secrets import without_user_info
from jobs.errors import Exit, JobError

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
_PACKAGES = ("jobs", "pipelines", "dmd_core", "cluster")
_STORE_CLIENTS = ("botocore", "aiohttp")
# What s3fs makes of a store's 500. Its cause does not travel back from a worker.
_REMOTE = (f"[Errno {errno.EREMOTEIO}]",) if hasattr(errno, "EREMOTEIO") else ()

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
    except _ray_errors() as error:  # before the others: Ray's are also what the worker raised
        return _fail(*_worker_failure(error))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return _fail(f"the disk is full ({error.filename}); free space and run again")
        return _fail(str(error))
    except ValueError as error:
        if not _is_ours(error):
            raise
        return _fail(str(error))
    except RuntimeError as error:
        if not _is_ours(error):
            raise
        again = getattr(error, "transient", False) or _no_answer(error)
        return _fail(str(error), Exit.TRANSIENT if again else Exit.REFUSED)


def _run(options: argparse.Namespace, config: str) -> int:
    from dmd_core.files import store_errors
    from jobs.session import open_session

    module = _module(options.verb)
    with open_session(config, options.set, quiet=options.json, arguments=options) as session:
        try:
            result = module.plan(session) if options.dry_run else module.run(session)
        except _ray_errors() as error:
            print(error, file=sys.stderr)  # goes to the log: Ray's output is redirected still
            raise
        except store_errors() as error:
            _raise_in_words(error, session.recipe.storage.endpoint_url)
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


def _raise_in_words(error: Exception, endpoint_url: str | None) -> NoReturn:
    """Raise a remote store's error as one line with its exit code; any other as it is."""
    store = f"the store at {endpoint_url}" if endpoint_url else "the store (S3)"
    if _no_answer(error):
        line = f"{store} did not answer: {_one_line(error)}; try again"
        raise JobError(line, Exit.TRANSIENT) from error
    if isinstance(error, OSError):
        raise error
    raise JobError(f"{store} cannot be used: {_one_line(error)}") from error


def _no_answer(error: BaseException) -> bool:
    from pipelines.storage import no_answer  # --help does without it

    return no_answer(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: Exit = Exit.REFUSED) -> int:
    print(f"error: {without_user_info(message)}", file=sys.stderr)
    return code


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in _PACKAGES


def _ray_errors() -> tuple[type[BaseException], ...]:
    """What Ray raises here for failures in its workers; nothing while Ray is not imported."""
    if "ray" not in sys.modules:
        return ()
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    return RayError, TrainingFailedError


def _worker_failure(error: BaseException) -> tuple[str, Exit]:
    """The line that matters of an error that came back from a worker, and the exit code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    kind, _, message = last.partition(": ")
    package = kind.split(".")[0]
    if package in _PACKAGES:
        return message, Exit.REFUSED
    if package in _STORE_CLIENTS or any(number in last for number in _REMOTE):
        return f"a worker's store did not answer: {last}; try again", Exit.TRANSIENT
    if isinstance(error, OSError):
        return message, Exit.REFUSED
    return f"a worker failed: {last} (the whole story is in the run's logs/ray.log)", Exit.BUG


def verb_main(verb: str) -> int:
    """For `python -m jobs.<verb>`."""
    return main([verb, *sys.argv[1:]])


if __name__ == "__main__":
    raise SystemExit(main())
