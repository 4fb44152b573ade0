"""What is computed of each picture is kept part by part; workers make their network once."""

import os
import shutil
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from pipelines import feature_parts
from pipelines.feature_parts import in_parts
from pipelines.images import SamplerPool
from pipelines.storage import Store, open_store
from pipelines.stored_images import Pictures, open_images, write_part
from pipelines.systems import Images

HERE = SamplerPool(actors=0)


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(feature_parts, "PART_ROWS", 8)


def _images(count: int) -> Images:
    """Picture i is of the brightness i."""
    pictures = np.repeat(np.arange(count, dtype=np.uint8), 12).reshape(count, 2, 2, 3)
    nothing = np.zeros((count, 1), np.float32)
    return Images(("fox",) * count, tuple(range(count)), nothing, pictures, nothing)


class _Network:
    """The brightness of each picture; `seen`: pictures of each call. `dies_at`: this call never
    ends."""

    def __init__(self, dies_at: int = 0) -> None:
        self.seen: list[int] = []
        self._dies_at = dies_at

    def __call__(self, images: Pictures) -> np.ndarray:
        self.seen.append(len(images.prompts))
        if len(self.seen) == self._dies_at:
            raise KeyboardInterrupt
        return np.concatenate([part.pictures[:, 0, 0, :1] for part in images.parts()]) * 1.0


def _compute(network: _Network, images: Pictures, store: Store, **how) -> np.ndarray:
    return in_parts(lambda: network, images, HERE, row=(1,), store=store, folder="x", **how)


def test_a_killed_computation_loses_the_part_it_was_at(tmp_path):
    images, store, killed = _images(30), open_store(str(tmp_path)), _Network(dies_at=3)
    with pytest.raises(KeyboardInterrupt):
        _compute(killed, images, store)
    network, told = _Network(), []
    found = _compute(network, images, store, on_rows=told.append)
    assert killed.seen == [8, 8, 8] and network.seen == [8, 6] and told == [16, 8, 6]
    np.testing.assert_array_equal(found[:, 0], np.arange(30))

    # A torn part and one of other rows are computed again, and they alone.
    first, second, *_ = sorted(tmp_path.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:20])
    shutil.copy(tmp_path / "x" / "00000024.safetensors", second)
    network = _Network()
    assert np.array_equal(_compute(network, images, store), found) and network.seen == [8, 8]


def test_parts_of_stored_pictures_are_whole_files(tmp_path):
    store, images = open_store(str(tmp_path)), _images(20)
    for start in range(0, 20, 3):
        write_part(store, "teacher", start, 20, images.rows(slice(start, start + 3)))
    found = _compute(_Network(), open_images(store, "teacher"), store)
    np.testing.assert_array_equal(found[:, 0], np.arange(20))
    assert [int(p.stem) for p in sorted(tmp_path.rglob("*.safetensors"))] == [0, 9, 18]


def test_where_a_folder_takes_no_files_the_other_one_is_used(tmp_path, monkeypatch):
    images, (store, instead) = _images(20), (open_store(str(tmp_path / n)) for n in ("a", "b"))
    _compute(_Network(), images, store, instead=instead)
    assert len(list((tmp_path / "a").rglob("*.safetensors"))) == 3 and not (tmp_path / "b").exists()

    monkeypatch.setattr(feature_parts, "check_writable", _refuse)
    network = _Network()
    _compute(network, images, store, instead=instead)  # all is there
    assert network.seen == []
    (tmp_path / "a" / "x" / "00000008.safetensors").unlink()
    for expected in ([8], []):
        network = _Network()
        found = _compute(network, images, store, instead=instead)
        np.testing.assert_array_equal(found[:, 0], np.arange(20))
        assert network.seen == expected
    assert [p.name for p in (tmp_path / "b").rglob("*.safetensors")] == ["00000008.safetensors"]


def _refuse(store: Store) -> None:
    raise PermissionError(f"cannot write to {store.url}")


# ---------------------------------------------------------------------- on actors


def _who(mark: str):
    """Makes a network that says which process it is in, and which one it is. The first process to
    be asked leaves `mark` and is lost."""

    def make():
        one = uuid.uuid4().int % 2**40

        def network(images):
            with suppress(FileExistsError):
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                os._exit(1)
            rows = [part.pictures[:, 0, 0, :1] for part in images.parts()]
            found = np.concatenate(rows).astype(np.int64)
            return np.concatenate([found, found * 0 + os.getpid(), found * 0 + one], axis=1)

        return network

    return make


def _of_actors(mark: Path, pool: SamplerPool) -> set[tuple[int, int]]:
    """(process, network) of those that were at work; their processes have ended: the device is
    free again."""
    found = in_parts(
        _who(str(mark)), _images(60), pool, row=(3,), store=open_store("/no"), folder=None
    )
    np.testing.assert_array_equal(found[:, 0], np.arange(60))
    networks = {tuple(row) for row in found[:, 1:].tolist()}
    for process, _ in networks:
        _wait_for_end(process)
    return networks


@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_makes_its_network_once_and_is_gone_when_all_is_there(tmp_path):
    (tmp_path / "mark").touch()
    assert len(_of_actors(tmp_path / "mark", SamplerPool(actors=1))) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_an_actor_that_is_lost_is_replaced_where_others_have_its_place(tmp_path):
    """Of two that have room for one, the first is lost while it works, and the other one takes its
    place; what the first was at is done when it gets a place again."""
    networks = _of_actors(tmp_path / "mark", SamplerPool(actors=2, cpus=5))  # of 8
    assert (tmp_path / "mark").exists()
    assert len(networks) == len({process for process, _ in networks}) <= 2


def _wait_for_end(process: int) -> None:
    for _ in range(200):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {process} is still there")
