"""Due slots against a search minute by minute; one tick against a table in memory."""

import json
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from cluster.schedule import (
    Claim,
    Entry,
    Job,
    Result,
    ScheduleError,
    check_entry,
    decode_claim,
    decode_entry,
    decode_result,
    encode,
    find_due,
    next_slot,
    parse_slot,
    slot_key,
    slots_after,
)
from cluster.scheduler import Event, SlotState, tick_entry
from cluster.submit import SubmitError

BERLIN = "Europe/Berlin"
MINUTE = timedelta(minutes=1)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def made_entry(**changes) -> Entry:
    fields = {
        "name": "nightly",
        "generation": 1,
        "expression": "0 * * * *",
        "timezone": "UTC",
        "verb": "regenerate",
        "arguments": ("--config", "my.yaml"),
        "created": utc("2026-03-01 00:30"),
    }
    return Entry(**fields | changes)


# ------------------------------------------------------------------------ due slots


def matches(field: str, value: int, lowest: int, highest: int) -> bool:
    """The cron rules for one field, written down once more in another way."""
    for term in field.split(","):
        span, _, step = term.partition("/")
        if span == "*":
            low, high = lowest, highest
        else:
            low, _, high = span.partition("-")
            low, high = int(low), int(high or (highest if step else low))
        if low <= value <= high and (value - low) % int(step or 1) == 0:
            return True
    return False


def on_the_wall(expression: str, wall: datetime) -> bool:
    minute, hour, day, month, weekday = expression.split()
    by_day = matches(day, wall.day, 1, 31)
    by_weekday = matches(weekday, wall.isoweekday() % 7, 0, 7)
    either = by_day and by_weekday if "*" in (day[0], weekday[0]) else by_day or by_weekday
    return (
        matches(minute, wall.minute, 0, 59)
        and matches(hour, wall.hour, 0, 23)
        and matches(month, wall.month, 1, 12)
        and either
    )


def reference(expression: str, timezone: str, start: datetime, end: datetime) -> list[datetime]:
    """Every due minute in (start, end] by looking at each; skipped and repeated hours as in cron.

    A fixed time is due once a day: at its first showing, or right after the gap that hides it.
    """
    zone, found, shown = ZoneInfo(timezone), [], set()
    fixed = not any(field.startswith("*") for field in expression.split()[:2])
    moment, before = start - timedelta(days=1), None
    while (moment := moment + MINUTE) <= end:
        wall = moment.astimezone(zone).replace(tzinfo=None, fold=0)
        walls = [wall]
        if fixed and before is not None and wall - before > MINUTE:  # the clocks skipped some
            skipped = int((wall - before) / MINUTE)
            walls = [before + n * MINUTE for n in range(1, skipped + 1)]
        before = max(wall, before) if fixed and before else wall
        due = any(on_the_wall(expression, w) for w in walls)
        if fixed and wall in shown:
            due = False
        shown.add(wall)
        if due and moment > start:
            found.append(moment)
    return found


SPRING = (utc("2026-03-28 12:00"), utc("2026-03-30 12:00"))  # 02:00 → 03:00 on the 29th
AUTUMN = (utc("2026-10-24 12:00"), utc("2026-10-26 12:00"))  # 03:00 → 02:00 on the 25th


@pytest.mark.parametrize("span", [SPRING, AUTUMN], ids=["spring", "autumn"])
@pytest.mark.parametrize("timezone", [BERLIN, "UTC"])
@pytest.mark.parametrize(
    "expression",
    [
        "0 3 * * *",
        "30 2 * * *",
        "15 1,2,3 * * *",
        "*/20 * * * *",
        "30 * * * *",
        "*/30 2 * * *",
        "0 0 29 3 1",
        "10 4 * * 1-5",
        "0 12 25-31 10 *",
    ],
)
def test_due_slots_are_those_found_minute_by_minute(expression, timezone, span):
    start, end = span
    slots = []
    for slot in slots_after(expression, timezone, start):
        if slot > end:
            break
        slots.append(slot)
    assert slots == reference(expression, timezone, start, end)


@pytest.mark.parametrize(
    "expression", ["30 2 * * *", "0 3 * * *", "*/20 * * * *", "15 1,2,3 * * *"]
)
@pytest.mark.parametrize("span", [SPRING, AUTUMN], ids=["spring", "autumn"])
def test_a_slot_is_the_same_whichever_moment_a_scheduler_looks_from(expression, span):
    """Else two schedulers would give one due time two names, and submit it twice."""
    start, end = span
    every = [s for s, _ in zip(slots_after(expression, BERLIN, start), range(200), strict=False)]
    moment = start
    while (moment := moment + 7 * MINUTE) < end:
        expected = next(slot for slot in every if slot > moment)
        assert next(slots_after(expression, BERLIN, moment)) == expected


def test_missed_slots_coalesce_into_the_newest():
    entry = made_entry()
    assert find_due(entry, None, utc("2026-03-01 00:59")) is None
    due = find_due(entry, None, utc("2026-03-01 05:10"))
    assert due is not None and (due.slot, due.missed) == (utc("2026-03-01 05:00"), 4)
    due = find_due(entry, utc("2026-03-01 03:00"), utc("2026-03-01 05:00"))
    assert due is not None and (due.slot, due.missed) == (utc("2026-03-01 05:00"), 1)
    assert find_due(entry, utc("2026-03-01 05:00"), utc("2026-03-01 05:59")) is None
    assert next_slot(entry, utc("2026-03-01 05:00")) == utc("2026-03-01 06:00")


def test_slots_from_before_a_schedule_was_registered_are_not_its_business():
    entry = made_entry(created=utc("2026-03-01 04:30"))
    due = find_due(entry, utc("2026-03-01 01:00"), utc("2026-03-01 05:10"))
    assert due is not None and due.missed == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"expression": "60 3 * * *"}, "minute '60'"),
        ({"expression": "0 25 * * *"}, "hour '25'"),
        ({"expression": "0 3 0 * *"}, "day-of-month '0'"),
        ({"expression": "0 3 31 2 *"}, "day-of-month '31'"),
        ({"expression": "0 3 * 13 *"}, "month '13'"),
        ({"expression": "0 3 * * 8"}, "day-of-week '8'"),
        ({"expression": "0 3 * *"}, "4 fields"),
        ({"expression": "0 0 3 * * *"}, "6 fields"),
        ({"timezone": "Europe/Atlantis"}, "Europe/Atlantis"),
        ({"timezone": "../../etc/passwd"}, "time zone"),
        ({"name": "../up"}, "name"),
        ({"max_late_s": 0.0}, "max late"),
    ],
)
def test_an_error_names_what_is_wrong(changes, named):
    with pytest.raises(ScheduleError, match=named.replace(".", r"\.")):
        check_entry(made_entry(**changes))


def test_records_survive_their_files():
    entry = made_entry(address="http://head:8265", max_late_s=3600.0)
    stored = json.loads(json.dumps(encode(entry) | {"commit_id": "x"}))
    assert decode_entry(stored, "f") == entry
    assert decode_entry(stored, "f").digest == entry.digest
    job, at = Job("id", None), utc("2026-03-01 05:00")
    claim = Claim("nightly", at, entry.digest, job, 2, at, "me")
    assert decode_claim(json.loads(json.dumps(encode(claim))), "f") == claim
    for result in (Result("submitted", "", at, job), Result("missed", "late", at)):
        assert decode_result(json.loads(json.dumps(encode(result))), "f") == result
    assert parse_slot(slot_key(at)) == at and parse_slot("nonsense") is None
    with pytest.raises(ScheduleError, match=r"entries/x\.json"):
        decode_entry({"name": "x"}, "entries/x.json")


# ------------------------------------------------------------------------ one tick


class MemoryTable:
    """cluster.scheduler.Table in a dictionary."""

    def __init__(self) -> None:
        self.claims: dict[datetime, Claim] = {}
        self.results: dict[datetime, Result] = {}
        self.problems: list[str] = []
        self.is_removed = False

    def removed(self, entry: Entry) -> bool:
        return self.is_removed

    def slots(self, name: str) -> list[SlotState]:
        return [SlotState(s, s in self.results) for s in sorted(self.claims, reverse=True)]

    def claim(self, claim: Claim) -> bool:
        return self.claims.setdefault(claim.slot, claim) is claim

    def settle(self, claim: Claim, result: Result) -> bool:
        return self.results.setdefault(claim.slot, result) is result

    def read_claim(self, name: str, slot: datetime) -> Claim | None:
        return self.claims.get(slot)

    def read_result(self, name: str, slot: datetime) -> Result | None:
        return self.results.get(slot)

    def note_problem(self, claim: Claim, problem: str, now: datetime) -> None:
        self.problems.append(problem)


class FakeCluster:
    """cluster.scheduler.JobClient: a table of jobs that refuses an id it knows."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}
        self.down: SubmitError | None = None
        self.lose_reply = False

    def submit(self, entry: Entry, job: Job) -> bool:
        if self.down:
            raise self.down
        already = job.submission_id in self.jobs
        self.jobs.setdefault(job.submission_id, "RUNNING")
        if self.lose_reply:
            raise SubmitError("no reply", transient=True)
        return already

    def status(self, job: Job) -> str | None:
        if self.down:
            raise self.down
        return self.jobs.get(job.submission_id)


class World:
    def __init__(self, **changes) -> None:
        self.entry, self.table, self.cluster = made_entry(**changes), MemoryTable(), FakeCluster()

    def tick(self, time: str) -> Event | None:
        now = utc(f"2026-03-01 {time}")
        return tick_entry(self.entry, self.table, self.cluster, now=now, by="test", grace_s=60)

    def outcome(self, time: str) -> str | None:
        event = self.tick(time)
        return None if event is None else event.outcome

    def finish_jobs(self) -> None:
        self.cluster.jobs = dict.fromkeys(self.cluster.jobs, "SUCCEEDED")


@pytest.fixture
def world() -> World:
    return World()


def test_a_due_slot_is_submitted_once_and_its_job_named_after_it(world):
    assert world.tick("00:59") is None
    event = world.tick("01:00")
    assert event == Event(
        "nightly",
        utc("2026-03-01 01:00"),
        "submitted",
        "",
        f"dmd-nightly-20260301T010000Z-{world.entry.digest[:8]}",
    )
    assert list(world.cluster.jobs) == [event.submission_id]
    assert world.tick("01:00") is None and world.tick("01:59") is None


def test_slots_missed_while_nobody_ticked_are_one_job(world):
    event = world.tick("07:20")
    assert event is not None and event.coalesced == 6 and len(world.cluster.jobs) == 1
    assert world.table.claims[event.slot].coalesced == 6


def test_a_slot_is_skipped_while_the_previous_job_runs_and_names_it(world):
    first = world.tick("01:00")
    skipped = [world.tick(time) for time in ("02:00", "03:00")]
    assert [event.outcome for event in skipped] == ["skipped", "skipped"]
    assert all(first.submission_id in event.detail for event in skipped)
    world.finish_jobs()
    assert world.outcome("04:00") == "submitted" and len(world.cluster.jobs) == 2


def test_a_crash_between_claim_and_submission_loses_nothing(world):
    world.cluster.submit = None  # what a killed process does: no more calls
    with pytest.raises(TypeError):
        world.tick("01:00")
    del world.cluster.submit
    assert world.tick("01:00") is None  # it may still be alive
    assert world.outcome("01:02") == "submitted" and len(world.cluster.jobs) == 1


def test_a_crash_between_submission_and_result_submits_nothing_twice(world):
    world.cluster.lose_reply = True
    assert world.outcome("01:00") == "waiting"
    world.cluster.lose_reply = False
    event = world.tick("01:02")
    assert (event.outcome, event.detail) == ("submitted", "the cluster had it already")
    assert len(world.cluster.jobs) == 1


def test_a_crash_is_told_apart_from_a_run_when_the_next_slot_comes_first(world):
    world.cluster.lose_reply = True
    world.tick("01:00")
    world.cluster.lose_reply = False
    assert world.outcome("02:00") == "skipped"  # the job of 01:00 does run
    assert world.table.results[utc("2026-03-01 01:00")].detail == "found on the cluster"


def test_a_slot_that_could_not_be_submitted_gives_way_to_the_next(world):
    world.cluster.down = SubmitError("connection refused", transient=True)
    assert [world.outcome(time) for time in ("01:00", "01:30")] == ["waiting", "waiting"]
    assert world.table.problems == ["connection refused"] * 2
    world.cluster.down = None
    assert world.outcome("02:00") == "submitted" and len(world.cluster.jobs) == 1
    assert world.table.results[utc("2026-03-01 01:00")].outcome == "superseded"
    assert world.tick("02:30") is None


def test_nothing_is_submitted_while_it_is_unknown_whether_the_previous_job_runs(world):
    world.tick("01:00")
    world.cluster.down = SubmitError("timeout", transient=False)
    assert world.outcome("02:00") == "waiting"
    world.cluster.down = None
    assert world.outcome("02:02") == "skipped" and len(world.cluster.jobs) == 1


def test_a_refusal_is_recorded_and_not_tried_again(world):
    world.cluster.down = SubmitError("bad runtime_env", transient=False)
    assert world.outcome("01:00") == "failed"
    world.cluster.down = None
    assert world.tick("01:05") is None and world.outcome("02:00") == "submitted"


def test_the_running_job_is_still_known_after_slots_that_submitted_nothing():
    world = World(max_late_s=600.0)
    first = world.tick("01:00")
    assert world.outcome("02:30") == "missed"
    event = world.tick("03:00")
    assert (event.outcome, event.detail) == ("skipped", f"still running: {first.submission_id}")


class TwoClusters(FakeCluster):
    """The job server at the first address is gone for good."""

    gone: str | None = None

    def status(self, job: Job) -> str | None:
        if self.gone is not None and job.address == self.gone:
            raise SubmitError("connection refused", transient=True)
        return super().status(job)


def test_a_cluster_that_was_replaced_holds_up_no_job_of_the_new_one():
    """The same name, removed and added with another address; the old server never answers."""
    world = World(address="http://old:8265")
    world.cluster = TwoClusters()
    first = world.tick("01:00")
    world.cluster.gone = "http://old:8265"
    created = utc("2026-03-01 01:30")
    world.entry = made_entry(generation=2, address="http://new:8265", created=created)
    event = world.tick("02:00")
    assert event.outcome == "submitted"
    assert event.detail == f"not looked at, for it is on http://old:8265: {first.submission_id}"
    event = world.tick("03:00")
    assert (event.outcome, event.detail[:13]) == ("skipped", "still running")
    world.finish_jobs()
    event = world.tick("04:00")
    assert (event.outcome, event.detail) == ("submitted", "")


def test_a_slot_left_unfinished_on_a_replaced_cluster_is_superseded():
    world = World(address="http://old:8265")
    world.cluster = TwoClusters()
    world.cluster.down = SubmitError("connection refused", transient=True)
    assert world.outcome("01:00") == "waiting"
    world.cluster.down, world.cluster.gone = None, "http://old:8265"
    created = utc("2026-03-01 01:30")
    world.entry = made_entry(generation=2, address="http://new:8265", created=created)
    assert world.outcome("02:00") == "submitted"
    left = world.table.results[utc("2026-03-01 01:00")]
    assert left.outcome == "superseded" and "http://old:8265" in left.detail


def test_a_slot_later_than_allowed_is_recorded_as_missed():
    world = World(max_late_s=600.0)
    assert world.outcome("01:11") == "missed" and world.cluster.jobs == {}
    assert world.outcome("02:10") == "submitted"


def test_an_entry_removed_after_it_was_read_is_not_submitted(world):
    world.table.is_removed = True
    assert world.outcome("01:00") == "removed" and world.cluster.jobs == {}


def test_a_claim_of_an_earlier_entry_of_that_name_is_not_submitted_for_it(world):
    world.cluster.down = SubmitError("down", transient=True)
    world.tick("01:00")
    world.cluster.down = None
    world.entry = made_entry(generation=2, verb="train", created=utc("2026-03-01 01:01"))
    assert world.outcome("01:05") == "removed" and world.cluster.jobs == {}


def test_a_scheduler_that_wakes_up_late_leaves_a_superseded_slot_alone(world):
    """It held the claim of 01:00, slept, and 02:00 was submitted meanwhile."""
    decide = world.table.removed

    def slept(entry: Entry) -> bool:
        world.table.removed = decide
        assert world.outcome("02:00") == "submitted"
        return False

    world.table.removed = slept
    assert world.tick("01:00") is None
    assert len(world.cluster.jobs) == 1
