"""What ended a verb: one line for people, and the exit code."""

from typing import NoReturn

from jobs.errors import Exit, JobError

PACKAGES = ("jobs", "pipelines", "dmd_core", "cluster")


def is_ours(error: BaseException) -> bool:
    """Is it of a class of this project? Those are raised in words; any other is a bug."""
    return type(error).__module__.split(".")[0] in PACKAGES


def raise_in_words(error: Exception, endpoint_url: str | None) -> NoReturn:
    """Raise a remote store's error as one line with its exit code; any other as it is."""
    store = f"the store at {endpoint_url}" if endpoint_url else "the store (S3)"
    if no_answer(error):
        line = f"{store} did not answer: {_one_line(error)}; try again"
        raise JobError(line, Exit.TRANSIENT) from error
    if isinstance(error, OSError):
        raise error
    raise JobError(f"{store} cannot be used: {_one_line(error)}") from error


def no_answer(error: BaseException) -> bool:
    """As `pipelines.storage.no_answer`, which `--help` does without."""
    from pipelines import storage

    return storage.no_answer(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
