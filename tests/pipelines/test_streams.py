"""Prompts and real pictures in an order that is a function of seed and position alone."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipelines import picture_tables
from pipelines.config import StorageSection
from pipelines.storage import open_store
from pipelines.streams import (
    PictureError,
    PictureStream,
    PromptStream,
    list_pictures,
    open_pictures,
    pictures_at_once,
    pictures_digest,
)
from tests.pipelines.dmd_runs import write_pictures

CAPTIONS = ("fox", "whale", "apple", "")


def test_every_epoch_holds_every_prompt_once_in_another_order():
    stream = PromptStream([str(i) for i in range(20)], seed=1)
    first, second = stream.batch_from(0, 20), stream.batch_from(20, 20)
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(20))
    assert first != second
    assert stream.batch_from(15, 10) == first[15:] + second[:5]
    assert PromptStream([str(i) for i in range(20)], seed=2).batch_from(0, 20) != first


@pytest.mark.parametrize("world", [2, 3, 4])
def test_workers_parts_make_the_whole_batch(world):
    stream = PromptStream([str(i) for i in range(20)], seed=1)
    parts = [stream.batch_from(7, 10, rank, world) for rank in range(world)]
    assert sum(parts, ()) == stream.batch_from(7, 10)


def _encode(pictures: np.ndarray) -> torch.Tensor:
    """One number per picture, so that a mix-up shows."""
    return torch.from_numpy(pictures.astype(np.float32)).mean(dim=(1, 2, 3)).view(-1, 1, 1, 1)


def _stream(store, size=(16, 16)) -> PictureStream:
    return PictureStream(store, list_pictures(store), _encode, size, seed=4)


def test_a_folder_of_pictures_with_captions(tmp_path):
    store = open_store(write_pictures(tmp_path / "real", CAPTIONS))
    refs = list_pictures(store)
    assert {ref.key: ref.prompt for ref in refs} == {
        f"{i}.png": text for i, text in enumerate(CAPTIONS)
    }
    latents, prompts = _stream(store).batch_from(0, 4)
    for value, prompt in zip(latents.flatten().tolist(), prompts, strict=True):
        with Image.open(tmp_path / "real" / f"{CAPTIONS.index(prompt)}.png") as picture:
            middle = np.asarray(picture)[:, 2:18].astype(np.float32)  # 20×16 → its middle 16×16
        assert value == pytest.approx(middle.mean(), abs=0.6)


def test_pictures_are_encoded_once_and_parquet_gives_the_same(tmp_path):
    folder = tmp_path / "real"
    store = open_store(write_pictures(folder, CAPTIONS))
    encoded: list[int] = []

    def counting(pictures):
        encoded.append(len(pictures))
        return _encode(pictures)

    stream = PictureStream(store, list_pictures(store), counting, (16, 16), seed=4)
    first = stream.batch_from(0, 4)
    assert torch.equal(stream.batch_from(0, 4)[0], first[0]) and encoded == [1, 1, 1, 1]

    cells = [(folder / f"{i}.png").read_bytes() for i in range(len(CAPTIONS))]
    table = pa.table({"image": [{"bytes": cell} for cell in cells], "prompt": list(CAPTIONS)})
    (tmp_path / "table").mkdir()
    pq.write_table(table, tmp_path / "table" / "a.parquet", row_group_size=3)
    latents, prompts = _stream(open_store(str(tmp_path / "table"))).batch_from(0, 4)
    assert dict(zip(prompts, latents, strict=True)) == dict(zip(first[1], first[0], strict=True))


def test_a_folder_s_order_is_that_of_a_list(tmp_path):
    """Runs that were started before pictures in tables had another one go on as they were."""
    store = open_store(write_pictures(tmp_path / "real", CAPTIONS))
    prompts = [ref.prompt for ref in list_pictures(store)]
    assert _stream(store).batch_from(2, 7)[1] == PromptStream(prompts, seed=4).batch_from(2, 7)
    assert "".join(PromptStream("abcdef", seed=4).batch_from(3, 9)) == "dbeceafbd"


ROWS, GROUP = 450, 50


@pytest.fixture
def tables(tmp_path) -> Path:
    """Two files with a row group for every 50 of 450 pictures, whose captions are their numbers."""
    folder = tmp_path / "tables"
    folder.mkdir()
    for name, first, last in (("a", 0, 300), ("b", 300, ROWS)):
        cells = [_png(row) for row in range(first, last)]
        table = pa.table({"image": cells, "prompt": [str(row) for row in range(first, last)]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=GROUP)
    return folder


def _png(row: int) -> bytes:
    """Its number in base 256."""
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), (row // 256, row % 256, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _number(pictures: np.ndarray) -> torch.Tensor:
    first = torch.from_numpy(pictures[:, 0, 0].astype(np.float32))
    return (first[:, 0] * 256 + first[:, 1]).view(-1, 1, 1, 1)


def _numbers(folder: Path, seed: int = 4, at_once: int = 1) -> PictureStream:
    store = open_store(str(folder))
    return PictureStream(store, list_pictures(store), _number, (2, 2), seed, at_once=at_once)


@pytest.fixture
def read(monkeypatch) -> Counter:
    """How often each row group was read."""
    counted, real = Counter(), picture_tables._read_group

    def counting(store, key, group):
        counted[key, group] += 1
        return real(store, key, group)

    monkeypatch.setattr(picture_tables, "_read_group", counting)
    return counted


def test_an_epoch_of_a_table_reads_every_row_group_once(tables, read):
    stream = _numbers(tables)
    stream.batch_from(0, 20)
    assert len(read) <= 8  # a window
    seen = [p for at in range(0, ROWS, 15) for p in stream.batch_from(at, 15)[1]]
    assert sorted(map(int, seen)) == list(range(ROWS))
    assert read == Counter(
        [("a.parquet", g) for g in range(6)] + [("b.parquet", g) for g in range(3)]
    )


def test_a_table_s_order_is_a_function_of_seed_and_position(tables):
    latents, prompts = _numbers(tables).batch_from(440, 30)  # into the second epoch
    assert latents.flatten().tolist() == [float(prompt) for prompt in prompts]
    assert _numbers(tables, seed=5).batch_from(440, 30)[1] != prompts
    assert _numbers(tables).batch_from(450, 20)[1] == prompts[10:]
    parts = [_numbers(tables).batch_from(440, 30, rank, 4)[1] for rank in range(4)]
    assert sum(parts, ()) == prompts


def test_row_groups_too_large_to_read_for_a_few_pictures_are_refused(tables, monkeypatch):
    monkeypatch.setattr(picture_tables, "_LARGEST_ROW_GROUP", 1000)
    with pytest.raises(PictureError, match=r"a\.parquet has a row group with") as caught:
        list_pictures(open_store(str(tables)))
    line = str(caught.value).partition("as pq: ")[2].partition("; then move")[0]
    monkeypatch.chdir(tables)
    monkeypatch.setattr(picture_tables, "_LARGEST_ROW_GROUP", 256 << 20)
    before = list_pictures(open_store(str(tables)))
    exec(line.replace("(100)", "(30)"), {"pq": pq})
    Path("a.parquet.new").replace("a.parquet")
    after = list_pictures(open_store(str(tables)))
    assert [(ref.key, ref.row, ref.prompt) for ref in after] == [
        (ref.key, ref.row, ref.prompt) for ref in before
    ]
    assert [ref.group for ref in after[:300]] == [row // 30 for row in range(300)]


@pytest.mark.parametrize("kind", ["files", "tables"])
def test_batches_to_encode_have_one_size(tables, tmp_path, kind):
    """So that what else is missing does not change the last bits of a picture's latents."""
    if kind == "files":
        write_pictures(tmp_path / "tables", [str(row) for row in range(20)])
        for table in tables.glob("*.parquet"):
            table.unlink()
    sizes: list[int] = []
    store = open_store(str(tables))

    def watched(pictures):
        sizes.append(len(pictures))
        return _number(pictures)

    stream = PictureStream(store, list_pictures(store), watched, (2, 2), 4, at_once=8)
    plain = PictureStream(store, list_pictures(store), _number, (2, 2), 4)
    assert torch.equal(stream.batch_from(0, 10)[0], plain.batch_from(0, 10)[0])
    assert sizes == [8, 8]
    assert torch.equal(stream.batch_from(5, 6)[0], plain.batch_from(5, 6)[0])
    assert sizes == [8, 8, 8]


def test_how_many_pictures_are_encoded_together():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pictures_at_once((512, 512), cpu) == 1
    assert [pictures_at_once((side, side), gpu) for side in (32, 512, 1024, 2048)] == [8, 4, 1, 1]


def test_transparent_pictures_come_on_white(tmp_path):
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    latents, prompts = _stream(open_store(str(tmp_path))).batch_from(0, 1)
    assert float(latents) == 255.0 and prompts == ("",)


def test_the_digest_names_the_list(tmp_path):
    store = open_store(write_pictures(tmp_path, CAPTIONS))
    before = pictures_digest(list_pictures(store))
    assert before == pictures_digest(list_pictures(store))
    write_pictures(tmp_path, (*CAPTIONS[:3], "pear"))
    assert pictures_digest(list_pictures(store)) != before


def test_the_shipped_teacher_s_pictures_are_its_training_set():
    store, refs = open_pictures("emoji", StorageSection())
    captions = {ref.prompt for ref in refs}
    assert len(refs) > 3500 and "fox" in captions
    assert "rice ball" not in captions  # held out of the teacher's training
    latents, _ = PictureStream(store, refs, _encode, (32, 32), seed=0).batch_from(0, 2)
    assert latents.shape == (2, 1, 1, 1)


def test_pictures_that_cannot_be_used_are_named(tmp_path, s3_store):
    with pytest.raises(PictureError, match="does not exist"):
        list_pictures(open_store(str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PictureError, match="holds no pictures"):
        list_pictures(open_store(str(tmp_path / "empty")))
    folder = tmp_path / "bad"
    write_pictures(folder, CAPTIONS)
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(PictureError, match=r"1\.png"):
        _stream(open_store(str(folder))).batch_from(0, 4)
    (folder / "metadata.jsonl").write_text('{"file_name": "9.png", "text": "x"}')
    with pytest.raises(PictureError, match=r"9\.png"):
        list_pictures(open_store(str(folder)))
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "x"}\nnonsense')
    with pytest.raises(PictureError, match="line 2"):
        list_pictures(open_store(str(folder)))
    pq.write_table(pa.table({"image": [b""], "words": [""]}), tmp_path / "bad" / "t.parquet")
    with pytest.raises(PictureError, match="columns"):
        list_pictures(open_store(str(folder)))
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(buffer, "PNG")
    s3_store.fs.pipe_file(s3_store.path("a.png"), buffer.getvalue())
    assert float(_stream(s3_store).batch_from(0, 1)[0]) == 9.0
