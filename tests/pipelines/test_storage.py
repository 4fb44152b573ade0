"""What the data set's shared state rests on, against a real S3 server and a network that fails."""

import io
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import aiohttp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dmd_core.files import store_errors
from pipelines.commits import (
    StoreError,
    check_create_only,
    create_once,
    list_files,
    new_commit_id,
    read_json,
)
from pipelines.config import StorageSection
from pipelines.lease import hold_lease
from pipelines.storage import Store, check_writable, open_store
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_servers import careless_server, new_bucket

WRITERS = 8
MEBI = 1 << 20
PART = 5 * MEBI  # the smallest that S3 allows


@pytest.fixture
def proxy(seaweed) -> Iterator[FaultProxy]:
    with FaultProxy(seaweed) as found:
        yield found


@pytest.fixture
def shaky(proxy, seaweed_store, monkeypatch) -> Store:
    """The folder of `seaweed_store`, reached through the proxy, by a client that gives up soon."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    store = proxy.before(seaweed_store)
    store.fs.retries = 2
    return store


def record(**content) -> dict:
    return {"commit_id": new_commit_id(), **content}


def some_bytes(count: int) -> bytes:
    return np.random.default_rng(0).bytes(count)


def test_the_server_checks_signatures_also_behind_the_proxy(shaky, seaweed_store, monkeypatch):
    shaky.fs.pipe_file(shaky.path("a b/ü+%"), b"1")
    assert shaky.fs.ls(shaky.path("a b")) == [seaweed_store.path("a b/ü+%")]
    assert seaweed_store.fs.cat_file(shaky.path("a b/ü+%")) == b"1"
    shaky.fs.rm_file(shaky.path("a b/ü+%"))
    assert not seaweed_store.fs.exists(shaky.path("a b/ü+%"))
    import s3fs

    stranger = s3fs.S3FileSystem(endpoint_url=shaky.fs.endpoint_url, key="test", secret="wrong")
    with pytest.raises(PermissionError, match="signature"):
        stranger.pipe_file(shaky.path("x"), b"1")


# ---------------------------------------------------------------- created once

_barrier = None


def _remember(barrier) -> None:
    global _barrier
    _barrier = barrier


def _race(url: str, endpoint: str | None, key: str) -> tuple[bool, str]:
    store = open_store(url, StorageSection(endpoint_url=endpoint))
    mine = record()
    store.fs.exists(store.path(key))  # connected
    assert _barrier is not None
    _barrier.wait(timeout=120)
    return create_once(store, store.path(key), mine), mine["commit_id"]


def test_of_eight_processes_exactly_one_creates(seaweed, seaweed_store, tmp_path):
    local = open_store(str(tmp_path / "set"))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(WRITERS)
    with ProcessPoolExecutor(WRITERS, context, _remember, (barrier,)) as pool:
        for store, endpoint, rounds in ((local, None, 5), (seaweed_store, seaweed, 2)):
            for number in range(rounds):
                key = f"log/{number}.json"
                calls = [pool.submit(_race, store.url, endpoint, key) for _ in range(WRITERS)]
                results = [call.result(timeout=300) for call in calls]
                assert sum(won for won, _ in results) == 1
                winner = next(commit_id for won, commit_id in results if won)
                found = read_json(store, store.path(key))
                assert found is not None and found["commit_id"] == winner


@pytest.mark.parametrize(
    ("fault", "times"),
    [
        (Fault.LOST_REPLY, 1),
        (Fault.LOST_REPLY, 3),
        (Fault.LOST_REQUEST, 3),
        (Fault.SLOW_DOWN, 3),
        (Fault.CONFLICT, 2),
        (Fault.STALE_REFUSAL, 2),
        (Fault.TORN_UPLOAD, 2),
    ],
)
@pytest.mark.parametrize("taken", [False, True], ids=["free", "taken"])
def test_a_writer_knows_whether_it_created(proxy, shaky, seaweed_store, fault, times, taken):
    path, mine, theirs = shaky.path("log/1.json"), record(who="mine"), record(who="theirs")
    if taken:
        assert create_once(seaweed_store, path, theirs)
    proxy.inject(fault, method="PUT", path="log/1.json", times=times)
    assert create_once(shaky, path, mine) is not taken
    assert len(proxy.hits) >= 1
    assert read_json(seaweed_store, path) == (theirs if taken else mine)
    assert seaweed_store.fs.ls(seaweed_store.path("log")) == [path]


def test_what_cannot_be_established_is_an_error(proxy, shaky, seaweed_store, monkeypatch):
    monkeypatch.setattr("pipelines.commits.time.sleep", lambda seconds: None)
    proxy.inject(Fault.STALE_REFUSAL, method="PUT", times=1000)
    with pytest.raises(StoreError, match=r"log/1\.json in 10 attempts"):
        create_once(shaky, shaky.path("log/1.json"), record())
    assert not seaweed_store.fs.exists(seaweed_store.root)


def test_a_store_that_ignores_conditions_is_refused(tmp_path, seaweed_store):
    check_create_only(seaweed_store)
    assert list_files(seaweed_store, seaweed_store.path("manifests")) == []
    with careless_server(tmp_path / "rclone") as url:
        careless = new_bucket(StorageSection(endpoint_url=url), "set")
        with pytest.raises(StoreError, match=r"If-None-Match is ignored.*conditional writes"):
            check_create_only(careless)
        with (
            pytest.raises(StoreError, match="If-None-Match is ignored"),
            hold_lease(careless, period_s=30, purpose="a test"),
        ):
            pytest.fail("the lease was given")
        assert careless.fs.find(careless.root) == []
        # A data set that was copied there brings its leases along.
        with hold_lease(seaweed_store, period_s=30, purpose="elsewhere"):
            pass
        for path in seaweed_store.fs.find(seaweed_store.root):
            copy = careless.path(path.removeprefix(seaweed_store.root).lstrip("/"))
            careless.fs.pipe_file(copy, seaweed_store.fs.cat_file(path))
        with (
            pytest.raises(StoreError, match="If-None-Match is ignored"),
            hold_lease(careless, period_s=30, purpose="a test"),
        ):
            pytest.fail("the lease was given")


# ---------------------------------------------------------------- at the door


def test_a_misspelt_bucket_is_refused_and_not_created(s3_store, s3_options):
    check_writable(s3_store)
    assert s3_store.fs.find(s3_store.root) == []
    typo = open_store("s3://tsets/run", s3_options)
    with pytest.raises(PermissionError, match=r"cannot write to s3://tsets/run: .*bucket"):
        check_writable(typo)
    typo.arrow.create_dir(typo.path("pairs"), recursive=True)  # Ray does so before it writes
    assert "tsets" not in s3_store.fs.ls("")


def test_rights_for_one_prefix_are_enough(proxy, shaky):
    """Nothing is asked about the bucket itself."""
    check_writable(shaky)
    arrow = pickle.loads(pickle.dumps(shaky.arrow))  # as it comes to a worker
    arrow.create_dir(shaky.path("data"), recursive=True)
    with arrow.open_output_stream(shaky.path("data", "a.parquet")) as stream:
        stream.write(b"1")
    assert proxy.log and all(shaky.root in exchange.path for exchange in proxy.log)


def test_a_local_folder_is_made(tmp_path):
    check_writable(open_store(str(tmp_path / "runs" / "mine")))
    assert list((tmp_path / "runs" / "mine").iterdir()) == []


# ---------------------------------------------------------------- whole or absent


@pytest.mark.parametrize("where", ["seaweed_store", "s3_store"])
def test_an_emptied_folder_lists_no_file(where, request):
    """SeaweedFS keeps the folder and lists it as an object of its own, as consoles of S3 do."""
    store = request.getfixturevalue(where)
    store.fs.pipe_file(store.path("pins/a.json"), b"{}")
    store.fs.rm_file(store.path("pins/a.json"))
    assert list_files(store, store.path("pins")) == []
    store.fs.pipe_file(store.path("pins/a.json"), b"{}")
    store.fs.pipe_file(store.path("pins/b/c.json"), b"{}")
    assert list_files(store, store.path("pins")) == ["a.json"]


def _put_in_parts(store: Store, path: str, data: bytes, folder) -> None:
    (folder / "file").write_bytes(data)
    store.fs.put_file(str(folder / "file"), path, chunksize=PART)


def _write_in_parts(store: Store, path: str, data: bytes, folder) -> None:
    with store.fs.open(path, "wb", block_size=PART) as file:
        for start in range(0, len(data), PART):
            file.write(data[start : start + PART])


def _write_parquet(store: Store, path: str, data: bytes, folder) -> None:
    """As Ray does: through pyarrow's view of the store."""
    with store.arrow.open_output_stream(path) as stream:
        stream.write(data)


@pytest.mark.parametrize("write", [_put_in_parts, _write_in_parts, _write_parquet])
def test_an_upload_that_breaks_is_repeated_or_leaves_what_was_there(
    proxy, shaky, seaweed_store, tmp_path, write
):
    path, data = shaky.path("big"), some_bytes(2 * PART + 2 * MEBI)
    for fault in (Fault.TORN_UPLOAD, Fault.LOST_REPLY, Fault.SLOW_DOWN):
        proxy.clear()
        proxy.inject(fault, method="PUT", path="/big", at=0 if write is _write_parquet else 1)
        write(shaky, path, data, tmp_path)
        assert len(proxy.hits) == 1, proxy.log
        assert seaweed_store.fs.cat_file(path) == data
        seaweed_store.fs.rm_file(path)

    seaweed_store.fs.pipe_file(path, b"old")
    proxy.clear()
    proxy.inject(Fault.TORN_UPLOAD, method="PUT", path="/big", at=1, times=1000)
    if write is _write_parquet:
        proxy.inject(Fault.TORN_UPLOAD, method="PUT", path="/big")
    with pytest.raises(store_errors()):
        write(shaky, path, data, tmp_path)
    assert len(proxy.hits) > 1
    assert seaweed_store.fs.cat_file(path) == b"old"


def test_a_broken_read_is_repeated_or_an_error_but_never_short(proxy, shaky, seaweed_store):
    table = pa.table({"x": np.arange(MEBI // 8)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", use_dictionary=False)
    data, path = buffer.getvalue(), shaky.path("a.parquet")
    seaweed_store.fs.pipe_file(path, data)

    def read_stream() -> bytes:
        with shaky.arrow.open_input_file(path) as file:
            return file.read()

    def read_table() -> bytes:
        return pq.read_table(path, filesystem=shaky.arrow)["x"].to_numpy().tobytes()

    reads = {
        lambda: shaky.fs.cat_file(path): data,
        read_stream: data,
        read_table: table["x"].to_numpy().tobytes(),
    }
    for read, expected in reads.items():
        for times in (1, 1000):
            proxy.clear()
            proxy.inject(Fault.SHORT_BODY, method="GET", path="a.parquet", times=times)
            try:
                found = read()
            except (*store_errors(), aiohttp.ClientError, pa.ArrowException):
                found = None
            assert proxy.hits
            assert found is None or (found == expected and times == 1)


def test_each_error_of_a_broken_read_is_known_as_the_transports(proxy, shaky, seaweed_store):
    seaweed_store.fs.pipe_file(shaky.path("log/1.json"), b'{"commit_id": "1"}' + b" " * MEBI)
    for fault in (Fault.SHORT_BODY, Fault.LOST_REPLY, Fault.SLOW_DOWN):
        proxy.clear()
        proxy.inject(fault, method="GET", times=1000)
        with pytest.raises(store_errors()):
            read_json(shaky, shaky.path("log/1.json"))
        assert proxy.hits


def test_slow_replies_only_take_longer(proxy, shaky):
    proxy.inject(Fault.DELAY, times=1000, seconds=0.3)
    mine = record()
    assert create_once(shaky, shaky.path("log/1.json"), mine)
    assert read_json(shaky, shaky.path("log/1.json")) == mine
    assert {exchange.status for exchange in proxy.hits} == {200}


def test_two_processes_of_one_number_may_look_at_once_whether_a_folder_is_writable(tmp_path):
    """As two containers have that share a volume; threads share their process's."""
    store = open_store(str(tmp_path))
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: check_writable(store), range(400)))
    assert list(tmp_path.iterdir()) == []
