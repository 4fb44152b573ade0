"""What a user can do wrong, what may be tried again, and the exit codes that say so."""

import enum
from typing import Any


class Exit(enum.IntEnum):
    """Exit codes of every verb."""

    OK = 0  # also: nothing to do
    BUG = 1
    USAGE = 2  # command line or configuration
    REFUSED = 3  # a precondition does not hold
    TRANSIENT = 4  # try again
    REJECTS = 5  # finished, with more rejected rows than allowed


class JobError(RuntimeError):
    """An error a person can act on: one paragraph, and the exit code.

    `result`: what was found or done nevertheless; `--json` prints it like that of a success.
    """

    def __init__(
        self,
        message: str,
        code: Exit = Exit.REFUSED,
        *,
        result: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.result = result
