import json
from dataclasses import replace

import numpy as np
import pytest

from dmd_core.files import write_atomic
from pipelines.lease import hold_lease
from pipelines.manifest import list_versions
from pipelines.manifest_model import ExcludedRows
from pipelines.rejects import RejectedRow, RejectFileError, write_rejects
from pipelines.seal import MissingRowsError, SealError, seal_generation
from pipelines.storage import open_store
from tests.pipelines.made_pairs import FINGERPRINT, land_ids, made_batch, write_file


@pytest.fixture
def root(tmp_path):
    return open_store(str(tmp_path / "set"))


def reject(root, *ids):
    lines = "".join(json.dumps({"pair_id": i, "prompt": "x", "reason": "y"}) + "\n" for i in ids)
    name = f"{min(ids)}.jsonl"
    write_atomic(root.fs, root.path(FINGERPRINT.folder, "rejects", name), lines.encode())


def test_a_whole_generation_becomes_a_version(root):
    import hashlib

    path = write_file(root, "b-0.parquet", range(10))
    write_file(root, "a-0.parquet", range(10, 13))
    manifest = seal_generation(root, FINGERPRINT, land_ids(root, range(13)))
    assert [file.key.rsplit("/", 1)[-1] for file in manifest.files] == [
        "a-0.parquet",
        "b-0.parquet",
    ]
    assert [file.row_groups for file in manifest.files] == [(3,), (4, 4, 2)]
    with open(path, "rb") as file:
        content = file.read()
    assert manifest.files[1].bytes == len(content)
    assert manifest.files[1].sha256 == hashlib.sha256(content).hexdigest()
    assert (manifest.version, manifest.rows, manifest.excluded_ids) == (1, 13, ())
    assert manifest.fingerprint == FINGERPRINT.as_dict()


def test_statistics_are_those_of_the_rows_of_the_version(root):
    write_file(root, "a-0.parquet", [*range(10), 77])
    write_file(root, "b-0.parquet", range(8, 15))
    manifest = seal_generation(root, FINGERPRINT, land_ids(root, range(15)))
    latents = made_batch(range(15)).latents.double().numpy()
    expected = [latents.mean(), latents.std(), latents.min(), latents.max()]
    names = ("latent_mean", "latent_std", "latent_min", "latent_max")
    np.testing.assert_allclose([manifest.statistics[n] for n in names], expected, rtol=1e-12)


def test_the_first_file_in_name_order_keeps_a_row_that_is_stored_twice(root):
    write_file(root, "b-0.parquet", [1, 2, 3, 4])
    write_file(root, "a-0.parquet", [3, 9, 4, 3])
    write_file(root, "c-0.parquet", [1, 2])
    manifest = seal_generation(root, FINGERPRINT, land_ids(root, [1, 2, 3, 4]))
    names = [file.key.rsplit("/", 1)[-1] for file in manifest.files]
    assert dict(zip(names, (file.excluded for file in manifest.files), strict=True)) == {
        "a-0.parquet": ExcludedRows(rows=(1, 3), pair_ids=(9, 3), duplicates=(3,)),
        "b-0.parquet": ExcludedRows(rows=(2, 3), pair_ids=(3, 4), duplicates=(2, 3)),
    }
    assert manifest.excluded_files == (f"{FINGERPRINT.folder}/data/c-0.parquet",)
    assert manifest.rows == 4


def test_missing_rows_are_an_error_unless_they_were_rejected(root):
    write_file(root, "a-0.parquet", range(5))
    with pytest.raises(SealError, match="2 of 7 rows are neither stored nor rejected"):
        seal_generation(root, FINGERPRINT, land_ids(root, range(7)))
    reject(root, 5)
    with pytest.raises(SealError, match="1 of 7 rows"):
        seal_generation(root, FINGERPRINT, land_ids(root, range(7)))
    reject(root, 6, 2, 99)  # 2 is stored all the same, 99 is not asked for
    manifest = seal_generation(root, FINGERPRINT, land_ids(root, range(7)))
    assert manifest.rejected_ids == (5, 6) and manifest.rejected == 2 and manifest.rows == 5


def test_only_rejects_of_the_run_itself_excuse_a_missing_row(root):
    write_file(root, "a-0.parquet", range(5))
    write_rejects(root, FINGERPRINT.folder, [RejectedRow(5, "x", "y", 1)], fence=1)
    with hold_lease(root, period_s=30, purpose="first") as first:
        assert seal_generation(root, FINGERPRINT, land_ids(root, range(6)), lease=first).rows == 5
    with hold_lease(root, period_s=30, purpose="second") as second:
        with pytest.raises(MissingRowsError, match="1 of 6 rows"):
            seal_generation(root, FINGERPRINT, land_ids(root, range(6)), lease=second)


def test_a_file_whose_writing_was_not_finished_does_not_count(root):
    """Ray deletes the data of a pending ledger entry when it starts again: a version that named
    it would name a missing file."""
    write_file(root, "a-0.parquet", range(5))
    write_file(root, "b-0.parquet", range(5, 8), finished=False)
    with pytest.raises(MissingRowsError, match="3 of 8 rows"):
        seal_generation(root, FINGERPRINT, land_ids(root, range(8)))


def test_rows_of_an_earlier_version_stay_where_they_are(root):
    """What a writer that was thought dead adds later, with an older fence, changes no version."""
    write_file(root, "000002_w_0-0.parquet", range(4))
    first = seal_generation(root, FINGERPRINT, land_ids(root, range(4)))
    write_file(root, "000001_w_0-0.parquet", [2, 3, 9])
    assert seal_generation(root, FINGERPRINT, land_ids(root, range(4))).files == first.files
    grown = seal_generation(root, FINGERPRINT, land_ids(root, [*range(4), 9]))
    assert grown.files[0] == first.files[0]
    assert grown.files[1].excluded.pair_ids == (2, 3)


def test_a_generation_without_a_usable_pair_is_not_sealed(root):
    reject(root, 0, 1)
    with pytest.raises(SealError, match="no usable pair"):
        seal_generation(root, FINGERPRINT, land_ids(root, range(2)))
    with pytest.raises(SealError, match="2 of 2 rows"):
        seal_generation(root, replace(FINGERPRINT, steps=9), land_ids(root, range(2)))
    assert list_versions(root) == []


def test_sealing_the_same_pairs_again_writes_nothing(root):
    write_file(root, "a-0.parquet", range(5))
    first = seal_generation(root, FINGERPRINT, land_ids(root, range(5)))
    assert seal_generation(root, FINGERPRINT, land_ids(root, range(5))) == first
    assert list_versions(root) == [1]
    assert seal_generation(root, FINGERPRINT, land_ids(root, range(4))).version == 2


def test_a_sealed_file_that_was_written_again_is_refused(root):
    write_file(root, "a-0.parquet", range(5))
    seal_generation(root, FINGERPRINT, land_ids(root, range(5)))
    write_file(root, "a-0.parquet", range(5), row_group_rows=2)
    with pytest.raises(SealError, match=r"a-0\.parquet is not what version 1 was sealed with"):
        seal_generation(root, FINGERPRINT, land_ids(root, range(4)))


def test_damaged_and_foreign_files_are_named(root):
    landed = land_ids(root, range(5))
    path = write_file(root, "a-0.parquet", range(5))
    with open(path, "rb") as file:
        good = file.read()
    for damaged in (good[:-20], b"", good[:200] + bytes(100) + good[300:]):
        with open(path, "wb") as file:
            file.write(damaged)
        with pytest.raises(SealError, match=r"a-0\.parquet cannot be read; move it away"):
            seal_generation(root, FINGERPRINT, landed)
    other = replace(FINGERPRINT, steps=6)
    foreign = write_file(root, "a-0.parquet", range(5), fingerprint=other)
    root.fs.mv(foreign, path)
    with pytest.raises(SealError, match=rf"a-0\.parquet was made by {other.digest[:16]}"):
        seal_generation(root, FINGERPRINT, landed)
    assert list_versions(root) == []


def test_a_damaged_reject_list_is_named(root):
    write_file(root, "a-0.parquet", range(5))
    write_atomic(root.fs, root.path(FINGERPRINT.folder, "rejects/x.jsonl"), b"{")
    with pytest.raises(RejectFileError, match=r"x\.jsonl, line 1: not a rejected row"):
        seal_generation(root, FINGERPRINT, land_ids(root, range(5)))
