"""`<run>/health.json`: every warning, rollback and stop of a run, and what followed from it.

A rollback is an event first and an action second: the event holds the step to go back to and the
remedies from there on, and is on the store before anything is restored. From then on the record
alone decides. Every checkpoint holds in its state how many rollbacks had been written when its
networks were trained; `believed` compares that with the events, so checkpoints of the steps that
were given up count for nothing, also one whose writing ended after the event.

- A kill before the event is written: the run goes on from its newest believed checkpoint, sees the
  same lines again (the log is flushed before a checkpoint is saved) and comes to the same verdict.
- A kill after it, before or during the restore: the next start restores the newest believed
  checkpoint, which is that of `to_step`, under `remedies(events)`: where the run would
  have gone on without the kill.
- The same verdict of a repeated step adds no second event.

One worker writes: rank 0 of the run that holds the folder.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dmd_core.files import write_atomic
from pipelines.health_rules import Verdict
from pipelines.health_settings import Action, HealthMetric, HealthSection
from pipelines.storage import Store

HEALTH = "health.json"
_SCHEMA = 1


class HealthRecordError(RuntimeError):
    """A record of health events that cannot be trusted."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HealthEvent(_Model):
    """`step` broke `rule`; `value` is None where the metric was not finite. Of a rollback:
    `to_step` is where the run went on (0: from the start), and both factors are those of all
    rollbacks up to this one. `time`: as the caller writes it."""

    kind: Action
    rule: str
    metric: HealthMetric
    value: float | None
    step: int = Field(ge=0)
    to_step: int | None = Field(default=None, ge=0)
    fake_updates_factor: float = Field(default=1.0, ge=1, allow_inf_nan=False)
    learning_rate_factor: float = Field(default=1.0, gt=0, le=1)
    time: str

    @model_validator(mode="after")
    def _goes_back(self) -> Self:
        if (self.kind == "rollback") != (self.to_step is not None):
            raise ValueError("to_step belongs to a rollback, and to nothing else")
        if self.to_step is not None and self.to_step >= self.step:
            raise ValueError(f"to_step ({self.to_step}) must be before step ({self.step})")
        return self

    def same_finding(self, other: "HealthEvent") -> bool:
        """Do both say the same, whenever they were written?"""
        return self.model_copy(update={"time": ""}) == other.model_copy(update={"time": ""})


class _Record(_Model):
    schema_version: int
    events: tuple[HealthEvent, ...]

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.schema_version != _SCHEMA:
            raise ValueError(
                f"schema_version is {self.schema_version}; this program reads {_SCHEMA}"
            )
        return self


@dataclass(frozen=True)
class Remedies:
    """What the rollbacks so far changed: factors of the recipe's own settings."""

    fake_updates_factor: float = 1.0
    learning_rate_factor: float = 1.0

    def fake_updates(self, of_recipe: int) -> int:
        """Rounded up, but not for the sake of a rounding error of the product."""
        return math.ceil(round(of_recipe * self.fake_updates_factor, 9))


def read_events(store: Store) -> tuple[HealthEvent, ...]:
    """Oldest first; none where the run has no record. Raises HealthRecordError for one that cannot
    be read."""
    path = store.path(HEALTH)
    if not store.fs.exists(path):
        return ()
    content = store.fs.cat_file(path)
    try:
        return _Record.model_validate_json(content).events
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise HealthRecordError(
            f"{store.url}/{HEALTH} is not a record of health events: {where}: {first['msg']}. "
            "Which checkpoints may be believed depends on it: put back the file that the run "
            "wrote, or start again in another run.dir"
        ) from None


def add_event(store: Store, event: HealthEvent) -> tuple[HealthEvent, ...]:
    """All events with this one. On the store when it returns; for the worker that writes the run's
    files. A warning or stop that is there already since the last rollback is not added again."""
    events = read_events(store)
    since_rollback = events[len(events) - _trailing(events) :]
    if any(event.same_finding(known) for known in since_rollback):
        return events
    events += (event,)
    record = _Record(schema_version=_SCHEMA, events=events)
    text = json.dumps(record.model_dump(), indent=1, allow_nan=False) + "\n"
    write_atomic(store.fs, store.path(HEALTH), text.encode())
    return events


def settled(verdict: Verdict, events: Sequence[HealthEvent], section: HealthSection) -> Verdict:
    """The verdict with what is to be done: a rollback beyond `max_rollbacks` is a stop."""
    if verdict.action == "rollback" and len(rollbacks(events)) >= section.max_rollbacks:
        return replace(verdict, action="stop")
    return verdict


def event_of(
    verdict: Verdict,
    events: Sequence[HealthEvent],
    section: HealthSection,
    *,
    time: str,
    to_step: int | None = None,
) -> HealthEvent:
    """The event of a settled verdict after `events`. `to_step`: of a rollback alone."""
    before = remedies(events)
    again = verdict.action == "rollback"
    return HealthEvent(
        kind=verdict.action,
        rule=verdict.rule.words,
        metric=verdict.rule.metric,
        value=verdict.value if math.isfinite(verdict.value) else None,
        step=verdict.step,
        to_step=to_step,
        fake_updates_factor=before.fake_updates_factor
        * (section.fake_updates_factor if again else 1.0),
        learning_rate_factor=before.learning_rate_factor
        * (section.learning_rate_factor if again else 1.0),
        time=time,
    )


def rollbacks(events: Sequence[HealthEvent]) -> list[HealthEvent]:
    """How many there are is what a checkpoint's state holds as `rollbacks`."""
    return [event for event in events if event.kind == "rollback"]


def remedies(events: Sequence[HealthEvent]) -> Remedies:
    """As the last rollback left them."""
    done = rollbacks(events)
    if not done:
        return Remedies()
    return Remedies(done[-1].fake_updates_factor, done[-1].learning_rate_factor)


def believed(events: Sequence[HealthEvent], steps_with_rollbacks: Mapping[int, int]) -> list[int]:
    """The committed steps that may be restored, ascending.

    `steps_with_rollbacks`: step → `rollbacks` in the checkpoint's state. A checkpoint is believed
    when no rollback since it was made goes back to before it. Raises HealthRecordError for one that
    was made after more rollbacks than there are events.
    """
    targets = [event.to_step or 0 for event in rollbacks(events)]
    for step, count in sorted(steps_with_rollbacks.items()):
        if count > len(targets):
            raise HealthRecordError(
                f"the checkpoint of step {step} was saved after {count} rollbacks, but {HEALTH} "
                f"lists {len(targets)}; put back the file that the run wrote, or start again in "
                "another run.dir"
            )
    return [
        step
        for step, count in sorted(steps_with_rollbacks.items())
        if all(step <= target for target in targets[count:])
    ]


def _trailing(events: Sequence[HealthEvent]) -> int:
    """How many events came after the last rollback."""
    count = 0
    for event in reversed(events):
        if event.kind == "rollback":
            break
        count += 1
    return count
