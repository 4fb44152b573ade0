"""Nodes that are about to be taken away: a checkpoint at once, once for each notice."""

import logging
from typing import Any

import ray.train

_BETWEEN_S = 5.0  # a notice comes half a minute to two minutes ahead
_logger = logging.getLogger(__name__)


class PreemptionWatch:
    """Every worker has one and calls it at the same steps: they agree on each answer."""

    def __init__(self) -> None:
        self._answered: Any = None
        self._every = 1  # steps

    def pace(self, step_s: float) -> None:
        """`step_s`: seconds of a step, the same number on all workers."""
        self._every = max(1, round(_BETWEEN_S / step_s))

    def calls(self, step: int) -> bool:
        """Is a node of this group about to go, and nothing saved for it yet? Asked every few
        seconds, for the workers wait for each other's answer."""
        if step % self._every:
            return False
        notice = ray.train.get_preemption_info()
        if notice is None or notice == self._answered:
            return False
        self._answered = notice
        _logger.warning("a node is about to be preempted: saving step %d", step)
        return True
