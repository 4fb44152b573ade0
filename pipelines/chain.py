"""A chain of steps of which the finished ones are skipped.

A step is finished when its record is there: `steps/<step>.json`, written after everything else of
the step. It holds what went in and what came out. The step is skipped as long as the same would go
in and what came out is still there; so a step that runs again and leaves the same does not make
the steps after it run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from dmd_core.files import write_atomic
from pipelines.commits import delete_if_there
from pipelines.manifest_model import canonical_digest
from pipelines.storage import Store

FOLDER = "steps"
_FORMAT = 1
_MOST_CHANGES_NAMED = 4


class RecordError(RuntimeError):
    """A record that cannot be believed; the message names the file."""


@dataclass(frozen=True)
class StepRecord:
    """A finished step. `inputs` and `output` are flat: names → JSON values, digests for what is
    large. `finished`: ISO 8601 by the writer's clock; `seconds`: how long the step took."""

    step: str
    inputs: Mapping[str, Any]
    output: Mapping[str, Any]
    finished: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """`due`: the step must run. `is_new`: it was never finished with such inputs; else what it left
    before is no good any more."""

    due: bool
    why: str
    is_new: bool = False

    @property
    def in_words(self) -> str:
        return f"{'run' if self.due else 'skip'}: {self.why}"


def judge(
    record: StepRecord | None, inputs: Mapping[str, Any], found: Mapping[str, Any] | None
) -> Verdict:
    """Must the step run? `inputs`: what would go in now; `found`: what is there now of its output,
    None: nothing, or not all of it."""
    if record is None:
        return Verdict(True, "not done yet", is_new=True)
    changes = changes_between(record.inputs, inputs)
    if changes:
        return Verdict(True, in_words(changes))
    if found is None:
        return Verdict(True, "its output is gone, or a part of it")
    other = changes_between(record.output, found)
    if other:
        return Verdict(True, f"its output is not what it left: {in_words(other)}")
    return Verdict(False, f"done {record.finished}, nothing has changed")


def changes_between(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Name → (then, now) of what differs; None: was, or is, not given."""
    then, now = _plain(then), _plain(now)
    names = sorted(then.keys() | now.keys())
    return {n: (then.get(n), now.get(n)) for n in names if then.get(n) != now.get(n)}


def in_words(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """One line for people."""
    parts = [f"{name} {_short(then)} → {_short(now)}" for name, (then, now) in changes.items()]
    more = len(parts) - _MOST_CHANGES_NAMED
    return ", ".join(parts[:_MOST_CHANGES_NAMED]) + (f" and {more} more" if more > 0 else "")


# ---------------------------------------------------------------- records


def record_path(store: Store, step: str) -> str:
    return store.path(FOLDER, f"{step}.json")


def read_record(store: Store, step: str) -> StepRecord | None:
    """None: the step was not finished. Raises `RecordError` for a damaged or foreign file."""
    path = record_path(store, step)
    try:
        raw = store.fs.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        return _parse(json.loads(raw), step)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RecordError(
            f"{path} is not the record of a finished step ({error}); remove it, and the step "
            "looks at what is there and does what is missing"
        ) from error


def write_record(store: Store, record: StepRecord) -> None:
    content = asdict(record) | {
        "format": _FORMAT,
        "inputs_digest": canonical_digest(record.inputs),
        "output_digest": canonical_digest(record.output),
    }
    data = json.dumps(content, indent=1, ensure_ascii=False).encode()
    write_atomic(store.fs, record_path(store, record.step), data)


def forget_record(store: Store, step: str) -> None:
    delete_if_there(store, record_path(store, step))


def _parse(content: dict[str, Any], step: str) -> StepRecord:
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r}; this program reads {_FORMAT}")
    record = StepRecord(**{field.name: content[field.name] for field in fields(StepRecord)})
    if record.step != step:
        raise ValueError(f"it is of the step {record.step!r}")
    for name in ("inputs", "output"):
        if canonical_digest(getattr(record, name)) != content[f"{name}_digest"]:
            raise ValueError(f"{name} does not match {name}_digest")
    return record


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(dict(values)))


def _short(value: Any) -> str:
    if value is None:
        return "default"
    if isinstance(value, str):
        return f"{value[:12]}…" if len(value) > 24 else value
    if isinstance(value, Sequence):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)
