import gc
import os
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from pipelines import pair_files, pair_order
from pipelines.batches import PairFileError, PairReader, part_of_batch
from pipelines.manifest import commit_manifest
from pipelines.manifest_model import SCHEMA_VERSION, ExcludedRows, ManifestBody
from pipelines.pair_files import PairFiles
from pipelines.seal import Inspector, seal_generation
from pipelines.storage import open_store
from tests.pipelines import made_pairs
from tests.pipelines.made_pairs import FINGERPRINT, land_ids, made_batch, write_file

ROWS = 50
BATCH = 8


@pytest.fixture
def root(tmp_path):
    return open_store(str(tmp_path / "set"))


@pytest.fixture
def sealed(root):
    """Rows 0…49, stored with duplicates and with rows (100…) that nobody asks for."""
    write_file(root, "a-0.parquet", range(17))
    write_file(root, "b-0.parquet", [100, 17, 101])
    write_file(root, "c-0.parquet", [3, *range(18, 40), 103, 104, 105, 106, 107])
    write_file(root, "d-0.parquet", [5, 6, 100])
    write_file(root, "e-0.parquet", range(38, 50))
    return seal_generation(root, FINGERPRINT, land_ids(root, range(ROWS)))


@pytest.fixture
def in_threads(monkeypatch):
    """Row groups are read as large ones are."""
    monkeypatch.setattr(pair_files, "_LARGE_ROW_GROUP", 0)


def all_ids(reader, batch_numbers, batch=BATCH, world=1):
    return [
        pair_id
        for k in batch_numbers
        for rank in range(world)
        for pair_id in reader.batch(k, batch, rank, world).pair_ids
    ]


def test_each_epoch_visits_each_row_of_the_version_once(root, sealed):
    reader = PairReader(root, sealed, seed=1)
    assert len(reader) == sealed.rows == ROWS
    stream = all_ids(reader, range(4 * ROWS // BATCH))  # 25 batches: 4 epochs, batches straddle
    for epoch in range(4):
        assert sorted(stream[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))
    assert len({tuple(stream[e * ROWS : (e + 1) * ROWS]) for e in range(4)}) == 4


def test_a_batch_larger_than_the_data_set_goes_over_epochs(root, sealed):
    ids = PairReader(root, sealed, seed=1).batch(0, 3 * ROWS).pair_ids
    assert Counter(ids) == {i: 3 for i in range(ROWS)}


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_global_order_does_not_depend_on_the_number_of_workers(root, sealed, world):
    expected = all_ids(PairReader(root, sealed, seed=1), range(14))
    workers = [PairReader(root, sealed, seed=1) for _ in range(world)]
    found = []
    for k in range(14):
        parts = [worker.batch(k, BATCH, rank, world) for rank, worker in enumerate(workers)]
        sizes = [len(item) for item in parts]
        assert max(sizes) - min(sizes) <= 1
        found += [pair_id for item in parts for pair_id in item.pair_ids]
    assert found == expected


def test_resuming_at_k_gives_batch_k(root, sealed):
    reader = PairReader(root, sealed, seed=1)
    ahead = [reader.batch(k, BATCH) for k in range(20)]
    for k in (19, 7, 13):
        again = PairReader(root, sealed, seed=1).batch(k, BATCH)
        assert again.pair_ids == ahead[k].pair_ids and again.prompts == ahead[k].prompts
        assert torch.equal(again.noise, ahead[k].noise)
        assert torch.equal(again.latents, ahead[k].latents)


def test_batches_hold_the_stored_pairs(root, sealed):
    reader = PairReader(root, sealed, seed=1)
    for k in range(7):
        found = reader.batch(k, BATCH)
        expected = made_batch(found.pair_ids)
        assert found.prompts == expected.prompts
        assert torch.equal(found.noise, expected.noise)
        assert torch.equal(found.latents, expected.latents)
        rows = reader.global_rows(k, BATCH)
        assert reader.rows(rows).pair_ids == found.pair_ids
    assert sorted(reader.rows(np.arange(ROWS)).pair_ids) == list(range(ROWS))
    with pytest.raises(IndexError):
        reader.rows(np.array([ROWS]))


def test_the_prompts_alone_come_in_the_order_of_a_reader_with_their_seed(root, sealed):
    prompts = PairReader(root, sealed, seed=1).prompts(seed=2)
    reader = PairReader(root, sealed, seed=2)
    for k in range(14):
        for rank in range(2):
            expected = reader.batch(k, BATCH, rank, 2).prompts
            assert prompts.batch_from(k * BATCH, BATCH, rank, 2) == expected


def test_a_batch_may_be_changed_without_harm(root, sealed):
    reader = PairReader(root, sealed, seed=1)
    before = reader.batch(0, BATCH).noise.clone()
    reader.batch(0, BATCH).noise.zero_()
    assert torch.equal(reader.batch(0, BATCH).noise, before)


def test_no_more_files_stay_open_than_allowed_and_closed_ones_are_opened_again(
    root, sealed, monkeypatch
):
    monkeypatch.setattr(pair_files, "_OPEN_FILES", 2)
    reader = PairReader(root, sealed, seed=1, verify=True)
    ids = all_ids(reader, range(12))
    assert ids == all_ids(PairReader(root, sealed, seed=1), range(12))
    folder, here = root.path(FINGERPRINT.folder, "data"), "/proc/self/fd"
    if os.path.isdir(here):
        del reader
        gc.collect()
        opened = PairReader(root, sealed, seed=1)
        all_ids(opened, range(12))
        links = [os.path.join(here, name) for name in os.listdir(here)]
        targets = [os.readlink(link) for link in links if os.path.islink(link)]
        assert 1 <= len([target for target in targets if target.startswith(folder)]) <= 2


def test_batches_of_large_row_groups_are_those_of_small_ones(root, sealed, request):
    one = PairReader(root, sealed, seed=1, verify=True)
    expected = [one.batch(k, BATCH) for k in range(12)]
    request.getfixturevalue("in_threads")
    started = Counter()
    threads = PairReader(root, sealed, seed=1, verify=True)
    threads._files._tables = lambda *args: (
        started.update([threading.current_thread()]) or PairFiles._tables(threads._files, *args)
    )
    for k, batch in enumerate(expected):
        found = threads.batch(k, BATCH)
        assert (found.pair_ids, found.prompts) == (batch.pair_ids, batch.prompts)
        assert torch.equal(found.noise, batch.noise) and torch.equal(found.latents, batch.latents)
    assert started and threading.main_thread() not in started


def test_batches_from_an_object_store_are_those_from_a_disk(root, sealed, s3_store):
    s3_store.fs.put(root.root + "/", s3_store.root + "/", recursive=True)
    expected, found = (PairReader(at, sealed, seed=1, verify=True) for at in (root, s3_store))
    for k in range(7):
        assert found.batch(k, BATCH).prompts == expected.batch(k, BATCH).prompts
        assert torch.equal(found.batch(k, BATCH).noise, expected.batch(k, BATCH).noise)


def test_the_order_follows_from_seed_and_row_counts_alone(root, sealed):
    reader = PairReader(root, sealed, seed=1)
    other = PairReader(root, sealed, seed=2)
    assert not np.array_equal(reader.global_rows(0, ROWS), other.global_rows(0, ROWS))
    # Pinned: a run that resumes under another NumPy must see the same order.
    assert reader.global_rows(0, 10).tolist() == [18, 48, 49, 16, 35, 17, 41, 31, 40, 19]


def test_the_order_is_that_of_one_sort_by_window_and_word(monkeypatch):
    """Also where words are equal: then rows stay in the version's own order."""
    counts, words = [5, 0, 3, 7, 1, 4, 6, 2, 5, 3], np.arange(200) * 7919 % 11
    monkeypatch.setattr(pair_order, "uniform_words", lambda seed, count: words[:count])
    group = np.repeat(np.arange(10), counts)
    rank = np.empty(10, np.int64)
    rank[np.argsort(words[:10], kind="stable")] = np.arange(10)
    expected = np.lexsort((words[10 : 10 + 36], rank[group] // pair_order.WINDOW_ROW_GROUPS))
    order = pair_order.RowOrder(counts, seed=0)
    assert len(order) == 36 and order.rows_from(0, 36).tolist() == expected.tolist()
    assert order.rows_from(36, 36).tolist() == expected.tolist()
    assert order.rows_from(30, 10).tolist() == [*expected[30:], *expected[:4]]


def big_manifest(root, groups, rows_per_group):
    """A version of many row groups whose files need not exist."""
    key = f"{FINGERPRINT.folder}/data/a.parquet"
    entry = {
        "key": key,
        "bytes": 1,
        "sha256": "0" * 64,
        "rows": groups * rows_per_group,
        "row_groups": [rows_per_group] * groups,
    }
    body = ManifestBody(
        schema_version=SCHEMA_VERSION,
        created_by={},
        fingerprint=FINGERPRINT.as_dict(),
        fingerprint_digest=FINGERPRINT.digest,
        prompts_digest="p",
        files=[entry],
        excluded_files=(),
        rejected_ids=(),
        rows=entry["rows"],
        statistics={},
    )
    return commit_manifest(root, body)


def test_a_batch_reads_few_row_groups_and_rows_still_mix(root):
    reader = PairReader(root, big_manifest(root, groups=200, rows_per_group=16), seed=0)
    order = reader.global_rows(0, 3200)
    touched = [len(set(part // 16)) for part in np.split(order, 100)]
    assert max(touched) <= 2 * pair_order.WINDOW_ROW_GROUPS
    assert min(touched) >= pair_order.WINDOW_ROW_GROUPS // 2
    # A uniform shuffle leaves about one row beside its old neighbour; so should ours, almost.
    assert np.count_nonzero(np.diff(order) == 1) < 100
    assert abs(np.corrcoef(np.arange(3200), order)[0, 1]) < 0.3


def test_positions_are_uniform_over_epochs(root):
    """Each row should be as likely early as late in an epoch."""
    reader = PairReader(root, big_manifest(root, groups=20, rows_per_group=3), seed=0)
    place = np.array([np.argsort(reader.global_rows(epoch, 60)) for epoch in range(600)])
    # Mean of 600 draws from 0…59: 29.5 ± 0.71 (one standard error); 60 rows.
    assert np.abs(place.mean(axis=0) - 29.5).max() < 4 * 0.71


def test_row_groups_are_read_once_while_they_are_in_use(root, sealed, monkeypatch):
    reads = Counter()
    original = PairFiles.read

    def counting(self, places, columns):
        places = list(places)
        reads.update(places)
        return original(self, places, columns)

    monkeypatch.setattr(PairFiles, "read", counting)
    all_ids(PairReader(root, sealed, seed=1), range(ROWS // BATCH))
    assert len(reads) > 8
    assert set(reads.values()) == {1}


def test_parts_cover_the_batch_without_overlap():
    for batch, world in ((8, 3), (5, 5), (32, 7)):
        parts = [part_of_batch(batch, rank, world) for rank in range(world)]
        assert [place for part in parts for place in part] == list(range(batch))
    for rank, world in ((2, 2), (-1, 2), (0, 9)):
        with pytest.raises(ValueError, match=f"rank {rank} of {world} workers for 8 rows"):
            part_of_batch(8, rank, world)


def test_files_beside_the_manifest_are_not_read(root, sealed):
    before = all_ids(PairReader(root, sealed, seed=1), range(6))
    write_file(root, "0-0.parquet", [*range(50), 200])
    os.remove(root.path(FINGERPRINT.folder, "data/d-0.parquet"))  # all of its rows are excluded
    assert all_ids(PairReader(root, sealed, seed=1), range(6)) == before


# ---------------------------------------------------------------- damaged files


@pytest.fixture(params=[False, True], ids=["one thread", "threads"])
def read_all(request):
    if request.param:
        request.getfixturevalue("in_threads")

    def read(root, manifest, **options):
        PairReader(root, manifest, seed=1, **options).batch(0, ROWS)

    return read


def path_of(root, name):
    return root.path(FINGERPRINT.folder, "data", name)


def test_missing_truncated_and_foreign_files_are_named(root, sealed, read_all):
    path = path_of(root, "c-0.parquet")
    with open(path, "rb") as file:
        good = file.read()
    os.remove(path)
    with pytest.raises(PairFileError, match=r"c-0\.parquet"):
        read_all(root, sealed)
    for content, message in (
        (good[:-100], rf"{len(good) - 100} bytes, but the manifest says {len(good)}"),
        (good[:-100] + bytes(100), "cannot be read"),
        (bytes(len(good)), "cannot be read"),
    ):
        with open(path, "wb") as file:
            file.write(content)
        with pytest.raises(PairFileError, match=rf"c-0\.parquet: .*{message}"):
            read_all(root, sealed)


def test_a_changed_byte_is_found_when_asked_to_verify(root, sealed, read_all):
    path = path_of(root, "a-0.parquet")
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        where = content.find(made_batch([0]).noise.numpy().tobytes())
        content[where] ^= 1
        file.seek(0)
        file.write(content)
    with pytest.raises(PairFileError, match=r"a-0\.parquet: sha256"):
        read_all(root, sealed, verify=True)


def test_a_file_with_another_number_of_rows_than_listed_is_refused(root, sealed, read_all):
    (first, *others) = sealed.files
    wrong = first.model_copy(update={"row_groups": (8, 4, 4, 1)})
    manifest = sealed.model_copy(update={"files": (wrong, *others)})
    with pytest.raises(PairFileError, match=r"a-0\.parquet: row groups of \[4, 4, 4, 4, 1\] rows"):
        read_all(root, manifest)


def test_pairs_of_two_shapes_in_one_version_are_named(root, sealed, monkeypatch):
    monkeypatch.setattr(made_pairs, "SHAPE", (2, 6, 4))
    write_file(root, "z-0.parquet", range(50, 53))
    entry = Inspector(root, FINGERPRINT.digest)(f"{FINGERPRINT.folder}/data/z-0.parquet")
    file = sealed.files[0].model_copy(
        update={
            "key": entry.key, "bytes": entry.bytes, "sha256": entry.sha256, "rows": 3,
            "row_groups": entry.row_groups, "excluded": ExcludedRows(),
        }
    )  # fmt: skip
    manifest = sealed.model_copy(update={"files": (*sealed.files, file), "rows": ROWS + 3})
    reader = PairReader(root, manifest, seed=1)
    assert reader.shape == (2, 3, 4)
    with pytest.raises(PairFileError, match=r"z-0\.parquet: pairs of \(2, 6, 4\) .*\(2, 3, 4\)"):
        reader.batch(0, ROWS + 3)


def test_a_file_of_another_generation_is_refused(root, sealed, read_all):
    from dataclasses import replace

    other = replace(FINGERPRINT, steps=6)
    foreign = write_file(root, "a-0.parquet", range(17), fingerprint=other)
    os.replace(foreign, path_of(root, "a-0.parquet"))
    with pytest.raises(PairFileError, match=rf"a-0\.parquet: made by {other.digest[:16]}"):
        read_all(root, sealed)
