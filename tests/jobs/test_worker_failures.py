"""What comes back from a worker is told in one line with the right exit code, on a real Ray."""

import pytest
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    RayTaskError,
    UserCodeException,
    WorkerCrashedError,
)
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

import jobs.pairs
from dmd_core.teacher import TeacherError
from jobs.cli import main
from jobs.errors import Exit
from jobs.worker_failures import ray_errors, worker_failure
from tests.jobs.worker_errors import ERRORS, FailsInMaking, end_process, raise_in_map, raise_in_task

NO_SERVER = 'Could not connect to the endpoint URL: "http://127.0.0.1:1"'
EXPECTED = {
    "ours": (Exit.REFUSED, "the teacher is now another one: why?"),
    "ours, of a refusal": (Exit.REFUSED, "cannot create"),
    "ours, of a busy store": (Exit.TRANSIENT, "cannot be read"),
    "no server": (Exit.TRANSIENT, f"botocore.exceptions.EndpointConnectionError: {NO_SERVER};"),
    "no credentials": (Exit.REFUSED, "Unable to locate credentials"),
    "timeout": (Exit.TRANSIENT, "did not answer: fsspec.exceptions.FSTimeoutError; try again"),
    "slow down": (Exit.TRANSIENT, "did not answer: OSError: [Errno 16] so it says; try again"),
    "bad gateway": (Exit.TRANSIENT, "An error occurred (502)"),
    "not found": (Exit.REFUSED, "so it says"),
    "bug": (Exit.BUG, "a worker failed: ZeroDivisionError: division by zero"),
}


def raised_by(act) -> BaseException:
    with pytest.raises(ray_errors()) as caught:
        act()
    return caught.value


def materialize(**how: object) -> None:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        ray.data.range(1).map_batches(**how).materialize()


def assert_told(error: BaseException, name: str) -> None:
    code, expected = EXPECTED[name]
    message, found = worker_failure(error)
    assert found == code and expected in message, message
    assert "retry" not in message and "\n" not in message


@pytest.mark.parametrize("name", ["ours", "no server", "timeout"])
def test_an_error_in_a_map_of_ray_data(ray_cluster, name):
    error = raised_by(lambda: materialize(fn=raise_in_map, fn_kwargs={"name": name}))
    assert "To change retry attempts" in str(error).splitlines()[-1]
    assert_told(error, name)


def test_an_error_in_the_making_of_an_actor_of_ray_data(ray_cluster):
    pool = ray.data.ActorPoolStrategy(size=1)
    making = {"fn": FailsInMaking, "fn_constructor_args": ("ours",), "compute": pool}
    error = raised_by(lambda: materialize(**making))
    assert isinstance(error, ActorDiedError)
    assert_told(error, "ours")


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_in_a_task(ray_cluster, name):
    task = ray.remote(num_cpus=0)(raise_in_task)
    assert_told(raised_by(lambda: ray.get(task.remote(name))), name)


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_that_ray_data_wrapped(name):
    """As `test_an_error_in_a_map_of_ray_data`, without one."""
    wrapper = UserCodeException(
        "UDF failed to process a data block.\n"
        "Failed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\n"
        "To change retry attempts, backoff, or which errors are retried, configure …"
    )
    assert_told(RayTaskError("map", _traceback(wrapper, ERRORS[name]()), wrapper), name)


@pytest.mark.parametrize("name", ["no server", "timeout", "slow down"])
def test_an_error_that_ray_data_appended_its_advice_to(name):
    """As in a write task: the cause is dropped, and the error's own message is changed."""
    from ray._common.retry import call_with_retry
    from ray.data._internal.util import iterate_with_retry

    def write():
        yield call_with_retry(lambda: raise_in_task(name), "write", match=[])

    try:
        list(iterate_with_retry(write, "write", match=[], unwrap_cause=True))
    except Exception as error:  # noqa: BLE001
        told = RayTaskError("write", _traceback(error), error).as_instanceof_cause()
    assert isinstance(told, RayTaskError)
    assert_told(told, name)


def _traceback(error: BaseException, cause: BaseException | None = None) -> str:
    import traceback

    try:
        if cause is None:
            raise error
        try:
            raise cause
        except BaseException as caught:
            raise error from caught
    except BaseException as raised:  # noqa: BLE001
        return "".join(traceback.format_exception(raised))


# ---------------------------------------------------------------- workers that are lost


def test_a_worker_that_ends_is_no_bug(ray_cluster):
    task = ray.remote(num_cpus=0, max_retries=0)(end_process)
    error = raised_by(lambda: ray.get(task.remote()))
    assert isinstance(error, WorkerCrashedError)
    message, code = worker_failure(error)
    assert code == Exit.TRANSIENT and "worker process or its node was lost" in message


@pytest.mark.parametrize("error", [ActorDiedError(), NodeDiedError("the node is gone\nlong ago")])
def test_what_is_lost_is_tried_again(error):
    for found in (
        error,
        ControllerError(error),
        WorkerGroupError("text", {0: RuntimeError("Connection closed by peer"), 1: error}),
        WorkerGroupError("text", {0: WorkerHealthCheckFailedError("ill", failure=error)}),
    ):
        message, code = worker_failure(found, "the log")
        assert code == Exit.TRANSIENT and "\n" not in message, message
        assert "run the same command again" in message and "the log" not in message


def test_of_several_workers_the_one_whose_error_asks_for_something_is_told():
    failures = {0: ActorDiedError(), 1: TeacherError("not this one"), 2: RuntimeError("gloo")}
    assert worker_failure(WorkerGroupError("text", failures)) == ("not this one", Exit.REFUSED)


def test_a_run_in_which_nothing_moves_is_no_traceback(monkeypatch, capfd):
    def run(session):
        raise ExecutionTimeoutError("Dataset execution made no progress for 9 s.\nOperators: …")

    monkeypatch.setattr(jobs.pairs, "run", run)
    assert main(["pairs", "--config", "tiny", "--json"]) == Exit.TRANSIENT
    said = capfd.readouterr().err.splitlines()[-1]
    assert said.startswith("error: Dataset execution made no progress for 9 s. Run the same")


@pytest.mark.parametrize(
    ("last", "code"),
    [
        ("botocore.exceptions.EndpointConnectionError: Could not connect", Exit.TRANSIENT),
        ("OSError: [Errno 121] We encountered an internal error", Exit.TRANSIENT),
        ("pipelines.batches.PairFileError: a.parquet: missing", Exit.REFUSED),
        ("pipelines.lease.LeaseLostError: another took over", Exit.TRANSIENT),
        ("ZeroDivisionError: division by zero", Exit.BUG),
    ],
)
def test_an_error_of_a_worker_is_told_by_its_last_line(last, code):
    message, found = worker_failure(RuntimeError(f"Traceback\n  File\n{last}\n"))
    assert found == code and last.split(": ", 1)[1] in message


def test_a_bug_says_where_the_whole_story_is():
    message, code = worker_failure(RuntimeError("what now\nand more"), "ray.log")
    assert code == Exit.BUG
    assert message == "a worker failed: RuntimeError: what now (the whole story is in ray.log)"
