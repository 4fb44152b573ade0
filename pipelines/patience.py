"""For what must be stored now or is lost: a store may be gone for a minute or two."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

PAUSES_S = (5.0, 15.0, 40.0, 60.0)
_logger = logging.getLogger(__name__)

T = TypeVar("T")


def insist(action: Callable[[], T], errors: tuple[type[Exception], ...], what: str) -> T:
    """Do it, again after each pause where it raises one of `errors`; the last one is raised."""
    for pause in PAUSES_S:
        try:
            return action()
        except errors as error:
            _logger.warning("%s: %s; trying again in %g s", what, error, pause)
            time.sleep(pause)
    return action()
