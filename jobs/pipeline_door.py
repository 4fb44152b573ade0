"""Fail at the door of a chain: what a later step would refuse is found before an earlier one has
worked for hours."""

from collections.abc import Callable, Iterable

from jobs.evaluate_checks import check_measurable, held_out_prompts
from jobs.session import Session
from jobs.train_checks import check_before_pairs


class Door:
    """Asks what each step asks at its own start, as far as the steps before it leave nothing that
    this needs. Once for each step; reads, and writes nothing."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._asked: set[str] = set()

    def check(self, steps: Iterable[str]) -> None:
        """`steps`: names of those that may run. Raises what their verbs would."""
        for name in steps:
            if name in _CHECKS and name not in self._asked:
                _CHECKS[name](self._session)
                self._asked.add(name)


def _check_evaluation(session: Session) -> None:
    check_measurable(session, held_out_prompts(session))


_CHECKS: dict[str, Callable[[Session], None]] = {
    "train": check_before_pairs,
    "evaluate": _check_evaluation,
}
