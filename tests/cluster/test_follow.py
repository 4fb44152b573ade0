"""A job's log arrives whole and once, whatever happens to the connection."""

import random

import pytest

from cluster.follow import (
    JobGoneError,
    follow,
    last_words,
    progress_title,
    without_old_progress,
)
from cluster.job_server import JobServer, SubmitError
from tests.cluster.fake_job_server import job_server

JOB = "pairs-1"


class Heard:
    """What a listener was told. Every pause of the follower makes the next thing happen."""

    def __init__(self, *happenings) -> None:
        self.told: list[str] = []
        self.events: list[str] = []
        self.waited = 0.0
        self._happenings = iter(happenings)

    def state(self, job) -> None:
        self.events.append(job.status)

    def lines(self, lines: list[str]) -> None:
        self.told += lines

    def lost(self, reason: str) -> None:
        self.events.append("lost")

    def back(self) -> None:
        self.events.append("back")

    def sleep(self, seconds: float) -> None:
        self.waited += seconds
        happens = next(self._happenings, None)
        if happens is not None:
            happens()


@pytest.fixture
def fake():
    with job_server() as running:
        running.start(JOB)
        yield running


def _say(fake, text: str):
    def happens() -> None:
        fake.logs[JOB] = fake.logs.get(JOB, "") + text

    return happens


def _follow(fake, heard: Heard, **options):
    return follow(JobServer(fake.address), JOB, heard, sleep=heard.sleep, **options)


def test_lines_come_once_and_only_when_they_are_whole(fake):
    fake.logs[JOB] = "one\ntw"
    halves: list[list[str]] = []
    heard = Heard(
        lambda: halves.append(list(heard.told)),
        _say(fake, "o\n\nthr"),
        _say(fake, "ee"),
        lambda: fake.end(JOB),
    )
    job = _follow(fake, heard)
    assert halves == [["one"]]
    assert heard.told == ["one", "two", "", "three"]
    assert (job.status, job.exit_code) == ("SUCCEEDED", 0)
    assert heard.events == ["RUNNING", "SUCCEEDED"]


def test_a_lost_connection_is_told_once_and_costs_no_line(fake):
    def away() -> None:
        fake.away = 9
        _say(fake, "said meanwhile\n")()

    fake.logs[JOB] = "before\n"
    quiet = [lambda: None] * 8
    heard = Heard(away, *quiet, _say(fake, "after\n"), lambda: fake.end(JOB))
    _follow(fake, heard)
    assert heard.told == ["before", "said meanwhile", "after"]
    assert heard.events == ["RUNNING", "lost", "back", "SUCCEEDED"]
    assert 60 < heard.waited < 300  # it was asked at growing intervals


def test_a_single_failure_is_nothing_to_tell(fake):
    heard = Heard(lambda: setattr(fake, "away", 1), lambda: None, lambda: fake.end(JOB))
    _follow(fake, heard)
    assert heard.events == ["RUNNING", "SUCCEEDED"]


def test_what_arrives_is_the_log_under_any_weather(fake):
    dice = random.Random(7)
    log = "".join(f"line {i}\n" if i % 3 else f"– {i} ✓\n" for i in range(60)) + "the end"
    cuts = sorted(dice.sample(range(len(log)), 40))
    pieces = [log[a:b] for a, b in zip([0, *cuts], [*cuts, len(log)], strict=True)]
    happenings = []
    for piece in pieces:
        happenings.append(_say(fake, piece))
        if dice.random() < 0.4:
            fault = dice.choice(["away", "broken_logs"])
            count = dice.randint(1, 4)
            happenings.append(lambda fault=fault, count=count: setattr(fake, fault, count))
    heard = Heard(*happenings, lambda: fake.end(JOB, "FAILED", 3))
    job = _follow(fake, heard)
    assert "\n".join(heard.told) == log
    assert job.exit_code == 3


def test_patience_ends_with_an_error_that_says_to_try_again(fake):
    server = JobServer(fake.address)
    fake.away = 10**6
    heard = Heard()
    with pytest.raises(SubmitError, match="does not answer") as caught:
        follow(server, JOB, heard, sleep=heard.sleep, patience_s=100)
    assert caught.value.transient
    assert 100 <= heard.waited < 140
    assert heard.events == ["lost"]


def test_a_head_that_was_started_anew_has_forgotten_the_job(fake):
    heard = Heard(lambda: setattr(fake, "away", 4), *[lambda: None] * 3, fake.jobs.clear)
    with pytest.raises(JobGoneError, match="submit the same command again") as caught:
        _follow(fake, heard)
    assert caught.value.transient


def test_the_log_of_an_ended_job_that_cannot_be_read_ends_the_following(fake):
    fake.logs[JOB] = "one\n"

    def node_is_lost() -> None:
        fake.broken_logs = 10**6
        fake.end(JOB, "FAILED", None)

    heard = Heard(node_is_lost)
    job = _follow(fake, heard)
    assert job.status == "FAILED"
    assert heard.told[0] == "one" and "cannot be read" in heard.told[1]


def test_a_refusal_is_not_waited_out(fake):
    server = JobServer(fake.address)
    fake.jobs[JOB]["status"] = "RUNNING"
    heard = Heard(lambda: fake.jobs[JOB].update(status="no such state"))
    with pytest.raises(SubmitError) as caught:
        follow(server, JOB, heard, sleep=heard.sleep)
    assert not caught.value.transient and heard.waited == 1.0


def test_long_logs_are_asked_for_less_often(fake):
    fake.logs[JOB] = "x" * 2_000_000 + "\n"
    heard = Heard(lambda: fake.end(JOB))
    _follow(fake, heard)
    assert heard.waited == pytest.approx(10, rel=0.01)


def test_progress_is_known_by_its_shape():
    assert progress_title("pairs: 24/120 3.1 pairs/s, 31 s left") == "pairs"
    assert progress_title("✓ pairs: 120 pairs in s3://b/x") is None
    assert progress_title("error: 3/4 of") == "error"
    lines = ["a", "pairs: 1/9 x", "pairs: 2/9 x", "train: 1/9 x", "pairs: 3/9 x", "b"]
    assert without_old_progress(lines) == [
        "a", "pairs: 2/9 x", "train: 1/9 x", "pairs: 3/9 x", "b",
    ]  # fmt: skip
    assert last_words("pairs: 1/9 x\nWARNING something\n\n") == "pairs: 1/9 x"
    assert last_words("pairs: 9/9 x\n✓ pairs: nine\n") == "✓ pairs: nine"
    assert last_words("Traceback\nValueError: x\n") == "ValueError: x"
    assert last_words("") == ""
