"""`dmd schedule` as it is used: from the command line, on a folder and on an S3 server."""

import json
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from ray.exceptions import RayError

import jobs.schedule
import jobs.schedule_table
from cluster.record import default_folder
from cluster.schedule import Entry, Job, Result, ScheduleError
from cluster.submit import SubmitError, TokenError
from jobs.cli import main
from jobs.errors import Exit
from jobs.schedule_table import ScheduleTable
from jobs.schedule_tick import RayJobs, tick
from pipelines.storage import open_store
from tests.cluster.fake_job_server import job_server, remember
from tests.fault_proxy import Fault, FaultProxy

START = datetime(2026, 3, 1, 0, 30, tzinfo=UTC)


class Jobs:
    """The job server: refuses an id it knows; jobs end when told to."""

    address = "http://fake:8265"

    def __init__(self) -> None:
        self.status_of: dict[str, str] = {}
        self.attempts: Counter[str] = Counter()
        self.submitted: list[list[str]] = []
        self.down = False
        self.die = False
        self._lock = threading.Lock()

    def submit(self, entry: Entry, job: Job) -> bool:
        if self.die:
            raise KeyboardInterrupt
        if self.down:
            raise SubmitError("connection refused", transient=True)
        with self._lock:
            self.attempts[job.submission_id] += 1
            if job.submission_id in self.status_of:
                return True
            self.status_of[job.submission_id] = "RUNNING"
            self.submitted.append([entry.verb, *entry.arguments])
            return False

    def status(self, job: Job) -> str | None:
        return self.status_of.get(job.submission_id)

    def finish(self) -> None:
        self.status_of = dict.fromkeys(self.status_of, "SUCCEEDED")


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path):
    if request.param == "s3":
        return request.getfixturevalue("s3_store")
    return open_store(str(tmp_path / "schedule"))


@pytest.fixture
def table(store) -> ScheduleTable:
    return ScheduleTable(store)


@pytest.fixture
def world(monkeypatch, tmp_path, capfd):
    """`dmd schedule` with a clock that stands still and a job server that is not there."""

    class World:
        def __init__(self) -> None:
            self.now, self.jobs = START, Jobs()

        def dmd(self, *arguments: str) -> tuple[int, str, str]:
            action, *rest = arguments
            code = main(["schedule", action, "--store", str(tmp_path / "s"), *rest])
            captured = capfd.readouterr()
            return code, captured.out, captured.err

    world = World()
    monkeypatch.setattr(jobs.schedule, "_now", lambda: world.now)
    monkeypatch.setattr(jobs.schedule, "RayJobs", lambda address: world.jobs)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # no local cluster
    monkeypatch.chdir(tmp_path)
    return world


def made_entry(**changes) -> Entry:
    entry = Entry("hourly", 1, "0 * * * *", "UTC", "regenerate", ("--json",), START)
    return replace(entry, **changes)


def hour(number: float) -> datetime:
    return START.replace(minute=0) + timedelta(hours=number)


# ------------------------------------------------------------------------ the table


def test_eight_schedulers_at_once_submit_every_slot_exactly_once(table):
    table.add(made_entry())
    table.add(made_entry(name="other", expression="*/30 * * * *"))
    jobs, barrier, slots = Jobs(), threading.Barrier(8, action=lambda: jobs.finish()), 4

    def scheduler() -> list[str]:
        own = ScheduleTable(table.store)
        done = []
        for number in range(1, slots + 1):
            barrier.wait()
            events, problems = tick(own, jobs, hour(number))
            assert not problems
            done += [event.submission_id for event in events]
        return done

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(scheduler) for _ in range(8)]
        reported = Counter(identity for future in running for identity in future.result())
    assert len(jobs.attempts) == 2 * slots
    assert set(jobs.attempts.values()) == set(reported.values()) == {1}
    for name in ("hourly", "other"):
        records = list(table.history(name, 100))
        assert [record.claim.slot for record in records] == [hour(n) for n in range(slots, 0, -1)]
        assert all(record.result.outcome == "submitted" for record in records)


def test_schedulers_that_find_a_dead_ones_claim_together_end_up_with_one_job(table):
    table.add(made_entry())
    jobs = Jobs()
    jobs.die = True
    with pytest.raises(KeyboardInterrupt):
        tick(table, jobs, hour(1))
    jobs.die = False
    assert tick(table, jobs, hour(1)) == ([], [])  # within the grace period
    later = hour(1) + timedelta(minutes=2)
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda _: tick(ScheduleTable(table.store), jobs, later), range(8)))
    assert len(jobs.submitted) == 1
    assert [event.outcome for events, _ in done for event in events] == ["submitted"]


def test_one_name_has_one_entry_and_a_removal_never_ends_a_later_one(table):
    with ThreadPoolExecutor(8) as pool:
        verbs = [f"verb-{index}" for index in range(8)]
        outcomes = list(pool.map(lambda verb: _added(table, made_entry(verb=verb)), verbs))
    assert sum(outcomes) == 1
    (entry,) = table.live()
    assert entry.verb == verbs[outcomes.index(True)]
    with pytest.raises(ScheduleError, match="dmd schedule remove hourly"):
        table.next_generation("hourly")
    assert table.remove("hourly", hour(1)) and not table.remove("hourly", hour(1))
    assert list(table.live()) == [] and table.removed(entry)
    second = made_entry(generation=table.next_generation("hourly"))
    table.add(second)
    assert list(table.live()) == [second] and not table.removed(second)


def _added(table: ScheduleTable, entry: Entry) -> bool:
    try:
        table.add(entry)
    except ScheduleError:
        return False
    return True


def test_an_entry_removed_while_a_tick_reads_it_is_not_submitted(table):
    table.add(made_entry())
    jobs = Jobs()

    class RemovedMeanwhile(ScheduleTable):
        def slots(self, name):
            table.remove(name, hour(1))
            return super().slots(name)

    events, _ = tick(RemovedMeanwhile(table.store), jobs, hour(1))
    assert [event.outcome for event in events] == ["removed"] and not jobs.submitted
    assert tick(table, jobs, hour(2)) == ([], [])


@pytest.fixture
def folder_table(tmp_path) -> ScheduleTable:
    return ScheduleTable(open_store(str(tmp_path / "schedule")))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"address": "ray://head:10001"}, "ray://head:10001"),
        ({"working_dir": "/not/here"}, "/not/here"),
    ],
)
def test_what_one_scheduler_lacks_costs_no_slot_and_holds_up_no_other(folder_table, wrong, named):
    folder_table.add(made_entry(name="a", **wrong))
    folder_table.add(made_entry(name="b"))
    jobs = Jobs()
    events, problems = tick(folder_table, jobs, hour(1))
    assert [event.name for event in events] == ["b"] and folder_table.slots("a") == []
    assert len(problems) == 1 and named in problems[0].text and not problems[0].transient


def test_a_cluster_that_ray_itself_cannot_reach_holds_up_no_other(folder_table, monkeypatch):
    from ray.job_submission import JobSubmissionClient

    connect = JobSubmissionClient.__init__

    def init(self, address, **options) -> None:
        if "broken" in address:
            raise RayError("no GCS there")
        connect(self, address, **options)

    monkeypatch.setattr(JobSubmissionClient, "__init__", init)
    with job_server() as fake:
        folder_table.add(made_entry(name="a", address="http://broken:8265"))
        # As an earlier release stored it.
        folder_table.add(made_entry(name="b", address=fake.address.removeprefix("http://")))
        events, problems = tick(folder_table, RayJobs(None), hour(1))
        assert [event.outcome for event in events] == ["waiting", "submitted"], events
        assert "no GCS there" in events[0].detail and not problems and len(fake.jobs) == 1


def test_a_damaged_entry_is_named_and_holds_up_no_other(table):
    table.add(made_entry(name="good"))
    path = table.store.path("entries", "bad.000001.json")
    table.store.fs.pipe_file(path, b'{"name": "bad"}')
    jobs = Jobs()
    events, problems = tick(table, jobs, hour(1))
    assert [event.name for event in events] == ["good"]
    assert len(problems) == 1 and "bad.000001.json" in problems[0].text


def test_a_store_that_overwrites_is_refused(s3_store, monkeypatch):
    put = s3_store.fs.pipe_file
    monkeypatch.setattr(s3_store.fs, "pipe_file", lambda path, data, mode="": put(path, data))
    with pytest.raises(RuntimeError, match="conditional writes"):
        ScheduleTable(s3_store).add(made_entry())


def test_a_slot_has_one_result(table):
    table.add(made_entry())
    jobs = Jobs()
    tick(table, jobs, hour(1))
    (record,) = table.history("hourly", 10)
    assert not table.settle(record.claim, Result("failed", "again", hour(1)))
    assert table.read_result("hourly", hour(1)) == record.result


# ------------------------------------------------------------------------ the command line


def test_a_night_at_the_command_line(world):
    code, _, said = world.dmd("add", "0 3 * * *", "--timezone", "Europe/Berlin", "--", "regenerate")
    assert code == Exit.OK and "2026-03-01 03:00 Europe/Berlin" in said
    code, out, _ = world.dmd("list")
    assert code == Exit.OK and "regenerate" in out and "0 3 * * *" in out
    world.now = datetime(2026, 3, 1, 1, 59, tzinfo=UTC)  # 02:59 in Berlin
    assert world.dmd("tick")[0] == Exit.OK and not world.jobs.submitted
    world.now = datetime(2026, 3, 1, 2, 0, tzinfo=UTC)
    code, _, said = world.dmd("tick")
    assert code == Exit.OK and "submitted dmd-regenerate-20260301T020000Z-" in said
    assert world.jobs.submitted == [["regenerate"]]
    world.now = datetime(2026, 3, 4, 12, 0, tzinfo=UTC)  # the machine was off
    world.dmd("tick")
    world.jobs.finish()
    world.now += timedelta(days=1)
    world.dmd("tick")
    code, out, _ = world.dmd("history", "--json")
    history = json.loads(out)["history"]
    assert [(line["slot"][:10], line["outcome"], line["coalesced"]) for line in history] == [
        ("2026-03-05", "submitted", 0),
        ("2026-03-04", "skipped", 2),
        ("2026-03-01", "submitted", 0),
    ]
    assert world.dmd("remove", "regenerate")[0] == Exit.OK
    assert "no schedules" in world.dmd("list")[2]
    assert "skipped" in world.dmd("history", "regenerate")[1]  # what happened stays known


def test_the_word_add_may_be_left_out_and_options_stand_anywhere(world):
    store = ["--store", "s"]
    job = ["--", "pairs", "--config", "tiny", "--set", "run.dir=a b"]
    assert main(["schedule", "0 3 * * *", *store, "--name", "short", *job]) == Exit.OK
    assert main(["schedule", "add", *store, "--name", "long", "*/5 * * * *", *job]) == Exit.OK
    _, out, _ = world.dmd("list", "--json")
    listed = json.loads(out)["schedules"]
    assert [line["name"] for line in listed] == ["long", "short"]
    assert listed[1]["job"] == "pairs --config tiny --set 'run.dir=a b'"
    world.now = hour(1)
    world.dmd("tick")
    assert world.jobs.submitted == [["pairs", "--config", "tiny", "--set", "run.dir=a b"]]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["0 25 * * *", "--", "pairs"], "hour '25'"),
        (["0 3 * * *", "--timezone", "Mars", "--", "pairs"], "Mars"),
        (["0 3 * * *", "--", "rm", "-rf", "/"], "'rm' cannot be scheduled"),
        (["0 3 * * *", "--", "schedule", "tick"], "'schedule' cannot be scheduled"),
        (["0 3 * * *", "--", "pairs", "--confg", "x"], "--confg"),
        (["0 3 * * *", "--", "pairs", "--set", "a.secret=x"], "credential"),
        (["0 3 * * *", "--working-dir", "nowhere", "--", "pairs"], "nowhere"),
        (["0 3 * * *", "--address", "ray://head:10001", "--", "pairs"], "ray://head:10001"),
        (["0 3 * * *", "--address", "http://me:word@head:8265", "--", "pairs"], "credential"),
        (["0 3 * * *", "--max-late", "soon", "--", "pairs"], "soon"),
        (["0 3 * * *", "--name", "Über", "--", "pairs"], "Über"),
    ],
)
def test_what_could_never_run_is_refused_at_the_door(world, arguments, named):
    code, _, said = world.dmd("add", *arguments)
    assert code == Exit.USAGE and said.startswith("error: ") and named in said
    assert "no schedules" in world.dmd("list")[2]


@pytest.mark.parametrize(
    ("job", "named"),
    [
        (["pairs", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["pairs", "--config", "mine/wrong.yaml"], "did you mean pairs.steps?"),
        (["pairs", "--config", "mine/my.yaml", "--set", "pairs.step=7"], "pairs.steps?"),
        (["pairs", "--config", "out.yaml"], "outside the working directory"),
        (["pairs", "--config", "mine/my.yaml", "--set", "pairs.prompts=list.parquet"], "travel"),
    ],
)
def test_what_a_sent_folder_lacks_is_refused_at_the_door(world, tmp_path, job, named):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my.yaml").write_text("run: {dir: s3://bucket/run}\n")
    (folder / "wrong.yaml").write_text("pairs: {step: 7}\n")
    (folder / "list.parquet").write_bytes(b"PAR1")
    (tmp_path / "out.yaml").write_text("{}\n")
    code, _, said = world.dmd("add", "0 3 * * *", "--working-dir", "mine", "--", *job)
    assert code == Exit.USAGE and said.startswith("error: ") and named in said
    assert "no schedules" in world.dmd("list")[2]


def test_a_recipe_is_registered_by_its_place_in_the_sent_folder(world, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my.yaml").write_text("run: {dir: s3://bucket/run}\n")
    job = ("pairs", "--config", "mine/my.yaml", "--set", "pairs.steps=7")
    code, _, _ = world.dmd("add", "0 * * * *", "--working-dir", "mine", "--", *job)
    world.now = hour(1)
    world.dmd("tick")
    assert code == Exit.OK
    assert world.jobs.submitted == [["pairs", "--config", "my.yaml", "--set", "pairs.steps=7"]]


def test_a_recipe_that_is_here_is_read_though_it_is_not_sent(world, tmp_path):
    (tmp_path / "wrong.yaml").write_text("pairs: {step: 7}\n")
    code, _, said = world.dmd("add", "0 3 * * *", "--", "pairs", "--config", "wrong.yaml")
    assert code == Exit.USAGE and "did you mean pairs.steps?" in said


def test_what_works_only_on_this_machine_is_pointed_out(world):
    _, _, said = world.dmd("add", "0 3 * * *", "--name", "a", "--", "pairs", "--config", "my.yaml")
    assert "my.yaml must be found there" in said
    _, _, said = world.dmd("add", "0 3 * * *", "--name", "b", "--", "pairs", "--config", "tiny")
    assert "run.dir is 'runs/tiny'" in said and "pairs.root" not in said
    shared = ["--set", "run.dir=s3://bucket/run"]
    for name, root in (("c", ""), ("d", "s3://bucket/pairs"), ("e", "/shared/pairs")):
        job = ("pairs", *shared, "--set", f"pairs.root={root}")
        _, _, said = world.dmd("add", "0 3 * * *", "--name", name, "--", *job)
        assert " is '" not in said and "must be found" not in said
    job = ("pairs", *shared, "--set", "pairs.root=my/pairs")
    _, _, said = world.dmd("add", "0 3 * * *", "--name", "f", "--", *job)
    assert "pairs.root is 'my/pairs'" in said and "--set pairs.root=…" in said
    assert "run.dir is" not in said


def test_a_folder_of_this_machine_in_a_table_of_many_is_pointed_out(
    world, s3_store, s3_options, tmp_path, capfd
):
    (tmp_path / "mine").mkdir()
    remote = ["--store", s3_store.url, "--set", f"storage.endpoint_url={s3_options.endpoint_url}"]
    job = ["0 3 * * *", "--working-dir", "mine", "--", "pairs", "--config", "tiny"]
    assert main(["schedule", "add", *remote, *job]) == Exit.OK
    assert f"{tmp_path}/mine is a folder of this machine" in capfd.readouterr().err
    assert "of this machine" not in world.dmd("add", *job)[2]


def test_an_address_is_kept_as_that_of_a_job_server(world):
    world.dmd("add", "0 3 * * *", "--address", "head:8265", "--", "pairs")
    (listed,) = json.loads(world.dmd("list", "--json")[1])["schedules"]
    assert listed["address"] == "http://head:8265"


def test_a_plan_changes_nothing(world):
    code, out, _ = world.dmd("add", "0 3 * * *", "--dry-run", "--", "pairs")
    assert code == Exit.OK and "2026-03-01 03:00 UTC" in out and "2026-03-03 03:00 UTC" in out
    assert "run.dir is 'runs/demo'" in out
    assert "no schedules" in world.dmd("list")[2]


def test_without_a_job_server_nothing_is_claimed(world):
    world.dmd("add", "0 * * * *", "--", "pairs")
    world.now, world.jobs.address = hour(1), None
    code, _, said = world.dmd("tick")
    assert code == Exit.REFUSED and "--address" in said and not world.jobs.submitted
    assert "no slot was due" in world.dmd("history")[2]
    world.jobs.address = "http://fake:8265"
    assert world.dmd("tick")[0] == Exit.OK and len(world.jobs.submitted) == 1


def test_a_tick_that_could_not_submit_says_so_by_its_exit_code(world):
    world.dmd("add", "0 * * * *", "--", "pairs")
    world.now, world.jobs.down = hour(1), True
    code, _, said = world.dmd("tick")
    assert code == Exit.TRANSIENT and "connection refused" in said
    assert "connection refused" in world.dmd("history")[1]
    world.jobs.down = False
    world.now += timedelta(minutes=2)
    assert world.dmd("tick")[0] == Exit.OK and len(world.jobs.submitted) == 1


def test_a_wrong_token_is_refused_and_costs_no_slot(world, monkeypatch):
    world.dmd("add", "0 * * * *", "--", "pairs")
    world.now = hour(1)

    def submit(entry: Entry, job: Job) -> bool:
        raise TokenError("another token")

    with monkeypatch.context() as wrong:
        wrong.setattr(world.jobs, "submit", submit)
        code, _, said = world.dmd("tick")
    assert code == Exit.REFUSED and "waiting" in said and "another token" in said
    world.now += timedelta(minutes=2)
    assert world.dmd("tick")[0] == Exit.OK and len(world.jobs.submitted) == 1


def test_the_local_cluster_is_found_with_its_token(world, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.schedule, "RayJobs", RayJobs)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another cluster's")
    world.dmd("add", "0 * * * *", "--", "pairs")
    world.now = hour(1)
    with job_server() as fake:
        remember(fake, tmp_path, "secret")
        assert world.dmd("tick")[0] == Exit.OK
        fake.end(next(iter(fake.jobs)))
        world.now = hour(2)
        assert world.dmd("tick")[0] == Exit.OK and len(fake.jobs) == 2


def test_a_damaged_record_of_the_local_cluster_ends_no_scheduler(world, monkeypatch):
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs.schedule, "_sleep", sleep)
    default_folder().mkdir(parents=True)
    (default_folder() / "cluster.json").write_text("{")
    world.dmd("add", "0 * * * *", "--", "pairs")
    world.now = hour(1)
    code, _, said = world.dmd("run")
    assert code == Exit.TRANSIENT and "cluster.json is not the record" in said
    assert len(world.jobs.submitted) == 1  # to another cluster


def test_any_slot_that_failed_for_good_decides_the_exit_code(world, monkeypatch):
    """Whatever the first of them waits for."""
    for name in ("a", "b"):
        world.dmd("add", "0 * * * *", "--name", name, "--", "pairs")
    world.now = hour(1)

    def submit(entry: Entry, job: Job) -> bool:
        raise SubmitError(f"no {entry.name}", transient=entry.name == "a")

    monkeypatch.setattr(world.jobs, "submit", submit)
    code, _, said = world.dmd("tick")
    assert code == Exit.REFUSED and "2 of 2 due slots" in said


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_store_that_does_not_answer_is_worth_another_tick(
    world, s3_store, s3_options, monkeypatch, everywhere
):
    """For all of the table, and for one entry of it."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FaultProxy(s3_store.fs.endpoint_url) as proxy:
        store = ["--store", s3_store.url, "--set", f"storage.endpoint_url={proxy.url}"]
        assert main(["schedule", "add", *store, "0 * * * *", "--", "pairs"]) == Exit.OK
        monkeypatch.setattr(open_store(s3_store.url, proxy.options).fs, "retries", 1)
        world.now = hour(1)
        proxy.inject(Fault.SLOW_DOWN, path="" if everywhere else "slots/", times=1000)
        assert main(["schedule", "tick", *store]) == Exit.TRANSIENT
        assert proxy.hits
        proxy.clear()
        assert main(["schedule", "tick", *store]) == Exit.OK and len(world.jobs.submitted) == 1


def test_a_store_that_refuses_is_not_tried_again(world, monkeypatch):
    world.dmd("add", "0 * * * *", "--", "pairs")

    def refuse(table):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(ScheduleTable, "live", refuse)
    code, _, said = world.dmd("tick")
    assert code == Exit.REFUSED and "Access Denied" in said


def test_the_embedded_loop_goes_on_after_a_restart_and_repeats_no_line(world, monkeypatch):
    world.dmd("add", "0 * * * *", "--", "pairs")
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        """Time passes; jobs end soon; the cluster is down from 02:30 to 03:30, we at even hours."""
        pauses.append(seconds)
        world.now += timedelta(seconds=seconds)
        if world.now.minute in (30, 45) and world.now.second == 0:
            world.jobs.finish()
            world.jobs.down = world.now.hour == 2
            if world.now.hour % 2 == 0 and world.now.minute == 30:
                raise KeyboardInterrupt

    monkeypatch.setattr(jobs.schedule, "_sleep", sleep)
    said = ""
    for _ in range(3):
        code, _, err = world.dmd("run")
        assert code == Exit.TRANSIENT  # interrupted: run the same command again
        said += err
    assert len(world.jobs.submitted) == said.count(": submitted ") == 6
    assert said.count(": waiting ") == 1  # for 03:00, although it was tried every half minute
    assert max(pauses) <= 30 and all(pause > 0 for pause in pauses)


def test_old_slots_are_forgotten_and_never_due_again(table, monkeypatch):
    monkeypatch.setattr(jobs.schedule_table, "KEPT_SLOTS", 3)
    table.add(made_entry())
    cluster = Jobs()
    for number in range(1, 12):
        tick(table, cluster, hour(number))
        cluster.finish()
    assert len(cluster.submitted) == 11
    assert [state.slot for state in table.slots("hourly")] == [
        hour(number) for number in range(11, 11 - len(table.slots("hourly")), -1)
    ]
    assert 3 <= len(table.slots("hourly")) <= 6
    files = table.store.fs.ls(table.store.path("slots", "hourly"))
    assert len(files) == 2 * len(table.slots("hourly"))
    assert tick(table, cluster, hour(11)) == ([], [])
