"""A run's lease as its workers see it, in other processes than the holder's."""

import logging
from dataclasses import dataclass

from dmd_core.files import store_errors
from pipelines.lease import LeaseLostError, LeaseNotSeenError, check_fence
from pipelines.storage import Store

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fence:
    """`number`: of the lease under which the folder is written."""

    store: Store
    number: int

    def check(self) -> None:
        """Raises `LeaseLostError` when another process has taken over. A store that does not
        answer is a warning: nothing can be written to it either."""
        try:
            check_fence(self.store, self.number)
        except store_errors() as error:
            _logger.warning("%s: the lease cannot be looked at: %s", self.store.url, error)

    def is_seen(self) -> bool:
        """Is the lease in the folder that this process sees, as far as is known?"""
        try:
            self.check()
        except LeaseNotSeenError:
            return False
        except LeaseLostError:
            return True
        return True

    def holds(self) -> bool:
        """Has nobody taken over, as far as is known?"""
        try:
            self.check()
        except LeaseLostError:
            return False
        return True
