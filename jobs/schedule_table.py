"""The table of schedules in a store: small JSON records, each created once and never changed.

entries/<name>.000001.json         a registered job; the number counts what had this name
entries/<name>.000001.removed      ends it; a later entry of that name has the next number
slots/<name>/<slot>.json           the claim of a due slot
slots/<name>/<slot>.result.json    how the slot ended
slots/<name>/<slot>.problem.json   why it is still waiting (overwritten)
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from cluster.schedule import (
    Claim,
    Entry,
    Result,
    ScheduleError,
    decode_claim,
    decode_entry,
    decode_result,
    encode,
    parse_slot,
    slot_key,
)
from cluster.scheduler import SlotState
from dmd_core.files import is_local, write_atomic
from pipelines.commits import (
    StoreError,
    check_create_only,
    create_once,
    delete_if_there,
    list_files,
    new_commit_id,
    read_json,
)
from pipelines.storage import Store

KEPT_SLOTS = 500

_ENTRY = re.compile(r"([a-z0-9-]+)\.(\d{6})\.(json|removed)")


@dataclass(frozen=True)
class SlotRecord:
    """One line of the history. `result` None: claimed, not finished; `problem` says why."""

    claim: Claim
    result: Result | None
    problem: str | None


class ScheduleTable:
    """Schedules kept in `store`; safe for any number of writers (cluster.scheduler.Table)."""

    def __init__(self, store: Store) -> None:
        self.store = store

    # ------------------------------------------------------------------ entries

    def add(self, entry: Entry) -> None:
        """Register `entry`; refused while an entry of that name lives."""
        if not is_local(self.store.fs):
            check_create_only(self.store)
        if not self._create(self._entry_path(entry, "json"), encode(entry)):
            raise ScheduleError(
                f"schedule {entry.name!r} was registered by somebody else at this moment; "
                f"look at it (`dmd schedule list`) or choose another --name"
            )

    def next_generation(self, name: str) -> int:
        """The number of a new entry `name`; `ScheduleError` while one lives."""
        numbers = self._numbers().get(name, {})
        newest = max(numbers, default=0)
        if newest and not numbers[newest]:
            raise ScheduleError(
                f"schedule {name!r} exists; choose another --name, or first "
                f"`dmd schedule remove {name}`"
            )
        return newest + 1

    def remove(self, name: str, now: datetime) -> bool:
        """End the entry `name`; False if there is none. Ends this one, never a later one."""
        numbers = self._numbers().get(name, {})
        newest = max(numbers, default=0)
        if newest == 0 or numbers[newest]:
            return False
        path = self.store.path("entries", f"{name}.{newest:06d}.removed")
        self._create(path, {"removed": now.isoformat()})
        return True

    def names(self) -> list[str]:
        """Every name that was ever registered."""
        return sorted(self._numbers())

    def live(self) -> Iterator[Entry | ScheduleError]:
        """The entries that are not removed; an error in place of one that cannot be read."""
        for name, numbers in sorted(self._numbers().items()):
            newest = max(numbers)
            if numbers[newest]:
                continue
            path = self.store.path("entries", f"{name}.{newest:06d}.json")
            try:
                content = read_json(self.store, path)
                if content is not None:
                    yield decode_entry(content, path)
            except (ScheduleError, StoreError) as error:
                yield ScheduleError(str(error))

    def removed(self, entry: Entry) -> bool:
        return self.store.fs.exists(self._entry_path(entry, "removed"))

    # ------------------------------------------------------------------ slots

    def slots(self, name: str) -> list[SlotState]:
        """The claimed slots, newest first."""
        claimed, settled = set(), set()
        for file in list_files(self.store, self.store.path("slots", name)):
            key, _, kind = file.partition(".")
            slot = parse_slot(key)
            if slot is not None and kind == "json":
                claimed.add(slot)
            elif slot is not None and kind == "result.json":
                settled.add(slot)
        return [SlotState(slot, slot in settled) for slot in sorted(claimed, reverse=True)]

    def claim(self, claim: Claim) -> bool:
        return self._create(self._slot_path(claim.name, claim.slot, "json"), encode(claim))

    def settle(self, claim: Claim, result: Result) -> bool:
        return self._create(self._slot_path(claim.name, claim.slot, "result.json"), encode(result))

    def note_problem(self, claim: Claim, problem: str, now: datetime) -> None:
        content = json.dumps({"problem": problem, "at": now.isoformat()}).encode()
        path = self._slot_path(claim.name, claim.slot, "problem.json")
        write_atomic(self.store.fs, path, content)

    def read_claim(self, name: str, slot: datetime) -> Claim | None:
        path = self._slot_path(name, slot, "json")
        content = read_json(self.store, path)
        return None if content is None else decode_claim(content, path)

    def read_result(self, name: str, slot: datetime) -> Result | None:
        path = self._slot_path(name, slot, "result.json")
        content = read_json(self.store, path)
        return None if content is None else decode_result(content, path)

    def history(self, name: str, limit: int) -> Iterator[SlotRecord]:
        """The newest `limit` slots of `name`, newest first."""
        for state in self.slots(name)[:limit]:
            claim = self.read_claim(name, state.slot)
            if claim is None:
                continue
            result = self.read_result(name, state.slot) if state.settled else None
            problem = None
            if result is None:
                path = self._slot_path(name, state.slot, "problem.json")
                problem = (read_json(self.store, path) or {}).get("problem")
            yield SlotRecord(claim, result, problem)

    def prune(self, name: str) -> None:
        """Forget all but the newest slots of `name`: listing them is part of every tick.

        The newest claim alone says up to when slots are dealt with.
        """
        slots = self.slots(name)
        if len(slots) <= 2 * KEPT_SLOTS:
            return
        for state in slots[KEPT_SLOTS:]:
            for kind in ("json", "problem.json", "result.json"):
                delete_if_there(self.store, self._slot_path(name, state.slot, kind))

    # ------------------------------------------------------------------ paths

    def _create(self, path: str, content: dict[str, Any]) -> bool:
        return create_once(self.store, path, content | {"commit_id": new_commit_id()})

    def _entry_path(self, entry: Entry, kind: str) -> str:
        return self.store.path("entries", f"{entry.name}.{entry.generation:06d}.{kind}")

    def _slot_path(self, name: str, slot: datetime, kind: str) -> str:
        return self.store.path("slots", name, f"{slot_key(slot)}.{kind}")

    def _numbers(self) -> dict[str, dict[int, bool]]:
        """Of each name, its generations and whether each was removed."""
        found: dict[str, dict[int, bool]] = {}
        for file in list_files(self.store, self.store.path("entries")):
            match = _ENTRY.fullmatch(file)
            if match:
                name, number, kind = match.groups()
                numbers = found.setdefault(name, {})
                numbers[int(number)] = kind == "removed" or numbers.get(int(number), False)
        return found
