"""The processes that save or restore one checkpoint together, or one process alone."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from dmd_core.checkpoint.format import CheckpointError
from dmd_core.files import store_errors

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """`group`: None with `size` > 1 is the default group. Rank 0 of it is the coordinator."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    together: bool = False  # False: no collective, even if a group exists

    @staticmethod
    def of(group: dist.ProcessGroup | None, alone: bool) -> "Ranks":
        if alone or not dist.is_available() or not dist.is_initialized():
            return Ranks(0, 1)
        return Ranks(dist.get_rank(group), dist.get_world_size(group), group, together=True)

    @staticmethod
    def apart(group: dist.ProcessGroup | None, alone: bool, timeout: timedelta) -> "Ranks":
        """The same ranks on a gloo group of their own, for another thread. Collective."""
        ranks = Ranks.of(group, alone)
        if not ranks.together:
            return ranks
        members = None if group is None else dist.get_process_group_ranks(group)
        own = dist.new_group(members, timeout=timeout, backend="gloo")
        assert isinstance(own, dist.ProcessGroup)  # this rank is one of the members
        return Ranks.of(own, alone=False)

    @property
    def coordinates(self) -> bool:
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """What `make` returns on the coordinator, on every rank; what it raises, too."""
        if not self.together:
            return make()
        if not self.coordinates:
            value, error = self._broadcast((None, None))
            if error is not None:
                raise error
            return value
        try:
            value = make()
        except BaseException as error:  # whatever it is, the others wait to be told
            self._broadcast((None, portable(error)))
            raise
        self._broadcast((value, None))
        return value

    def _broadcast(self, message: tuple) -> tuple:
        source = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        messages = [message]
        dist.broadcast_object_list(messages, src=source, group=self.group)
        return messages[0]


def failure_of(error: CheckpointException) -> BaseException:
    """Why a collective save or load failed, the same on every rank: what nobody expected first,
    then a checkpoint that is wrong, then a store that failed."""
    raised = [failure for _, (failure, _) in sorted(error.failures.items())]
    return min(raised, key=_how_expected)


def _how_expected(error: BaseException) -> int:
    if isinstance(error, CheckpointError):
        return 1
    return 2 if isinstance(error, OSError) else 0


def portable(error: BaseException) -> Exception:
    """Errors of stores often cannot be sent to another process; their text can."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, CheckpointError):
        return type(error)(str(error))
    return OSError(text) if isinstance(error, store_errors()) else RuntimeError(text)
