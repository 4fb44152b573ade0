"""What a task of Ray may raise, made in the task."""

import os
from collections.abc import Callable

from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError
from fsspec.exceptions import FSTimeoutError
from s3fs.errors import translate_boto_error

from pipelines.commits import StoreError


def reply(status: int, code: str = "") -> OSError:
    """What s3fs makes of a reply of the server."""
    content = {
        "Error": {"Code": code or str(status), "Message": "so it says"},
        "ResponseMetadata": {"HTTPStatusCode": status},
    }
    return translate_boto_error(ClientError(content, "GetObject"))


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def of_the_teacher() -> BaseException:
    from dmd_core.teacher import TeacherError  # seconds of a worker's time, needed here alone

    return TeacherError("the teacher is now\nanother one: why?")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "ours": of_the_teacher,
    "ours, of a refusal": lambda: caused(StoreError("cannot create"), reply(403, "AccessDenied")),
    "ours, of a busy store": lambda: caused(StoreError("cannot be read"), reply(503, "SlowDown")),
    "no server": lambda: EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
    "no credentials": NoCredentialsError,
    "timeout": FSTimeoutError,
    "slow down": lambda: reply(503, "SlowDown"),
    "bad gateway": lambda: reply(502),
    "not found": lambda: reply(404, "NoSuchKey"),
    "bug": lambda: ZeroDivisionError("division by zero"),
}


def raise_in_map(batch: dict, name: str) -> dict:
    raise ERRORS[name]()


class FailsInMaking:
    def __init__(self, name: str) -> None:
        raise ERRORS[name]()

    def __call__(self, batch: dict) -> dict:
        return batch


def raise_in_task(name: str) -> None:
    raise ERRORS[name]()


def end_process() -> None:
    os._exit(1)
