"""The health rules in the training loop: every worker hears the same verdict, rank 0 writes it down
before anything follows from it."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipelines.health_record import (
    HealthEvent,
    Remedies,
    add_event,
    event_of,
    read_events,
    remedies,
    rollbacks,
    settled,
)
from pipelines.health_rules import HealthMonitor, Verdict
from pipelines.health_settings import HealthSection
from pipelines.storage import Store
from pipelines.workers import Group

_logger = logging.getLogger(__name__)


class StoppedError(RuntimeError):
    """Training that a health rule has ended."""


class HealthWatch:
    """Every worker has one, and calls the same methods at the same points of the loop: the lines
    they look at are the same. `statistics`: see `HealthMonitor`."""

    def __init__(
        self,
        section: HealthSection,
        store: Store,
        group: Group,
        statistics: Mapping[str, float] | None,
    ) -> None:
        self._section, self._store, self._group = section, store, group
        self._monitor = HealthMonitor(section, statistics)
        self._events: tuple[HealthEvent, ...] = ()

    @property
    def remedies(self) -> Remedies:
        """What the rollbacks so far changed."""
        return remedies(self._events)

    @property
    def rollbacks(self) -> int:
        return len(rollbacks(self._events))

    def read(self) -> tuple[HealthEvent, ...]:
        """The run's record, which holds from here on."""
        self._events = self._group.first(lambda: read_events(self._store))
        return self._events

    def replay(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """See the log again up to where the run goes on from."""
        self._monitor.restore(self._group.share(list(lines)))

    def look(self, step: int, metrics: Mapping[str, float]) -> Verdict | None:
        """The gravest rule that this line breaks; None: none."""
        verdict = self._monitor.look(step, metrics)
        return None if verdict is None else settled(verdict, self._events, self._section)

    def record(self, verdict: Verdict, *, to_step: int | None = None) -> None:
        """Write it down. `to_step`: of a rollback; one without it is a stop, for it has
        nothing to go back to. Raises `StoppedError` for a stop."""
        why = ""
        if verdict.action == "rollback" and to_step is None:
            why = f", and no checkpoint from before step {verdict.since_step} is left to go back to"
            verdict = replace(verdict, action="stop")
        self._events = self._group.first(lambda: self._add(verdict, to_step))
        if verdict.action == "stop":
            raise StoppedError(
                f"stopped at step {verdict.step}: {verdict.rule.words} ({verdict.value:g}){why}. "
                f"Look at samples/ and health.json in {self._store.url}; then start again in "
                "another run.dir with a lower train.learning_rate or more train.fake_updates, or "
                "change train.health.rules"
            )

    def needed(self, committed: Sequence[int]) -> set[int]:
        """Of the committed steps those that a rollback may go to."""
        return self._monitor.needed(committed) if self._section.rolls_back else set()

    def _add(self, verdict: Verdict, to_step: int | None) -> tuple[HealthEvent, ...]:
        _logger.warning("health: %s at step %d", verdict.rule.words, verdict.step)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        event = event_of(verdict, self._events, self._section, time=now, to_step=to_step)
        return add_event(self._store, event)
