"""What is said about a data set, against data sets whose every row is known."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from s3fs.core import S3File

from dmd_core.teacher import Teacher, TeacherError, load_teacher
from pipelines.batches import PairFileError
from pipelines.dataset_pins import pin_versions
from pipelines.inspection import inspect_dataset
from pipelines.lease import hold_lease
from pipelines.manifest import load_manifest, manifest_path, void_next_number
from pipelines.manifest_model import ExcludedRows
from pipelines.pairs import decode_pairs
from pipelines.reintegration import verify_rows
from pipelines.rejects import RejectedRow, write_rejects
from pipelines.sample_sheet import _font, decode_rows, sample_sheet, wrapped
from pipelines.storage import open_store
from pipelines.stored_rows import check_files, random_rows, read_rows, version_ids
from pipelines.version_diff import diff_versions
from tests.pipelines.made_pairs import (
    FINGERPRINT,
    made_batch,
    made_table,
    negative_prompt,
    write_file,
)
from tests.pipelines.sealed_sets import commit_files, land, tamper, teacher_set, write_table


@pytest.fixture
def root(tmp_path):
    return open_store(str(tmp_path / "set"))


@pytest.fixture
def sealed(root):
    """Rows 0…19 in two files, with two rows that are left out."""
    write_file(root, "a-0.parquet", range(11))
    write_file(root, "b-0.parquet", [3, *range(11, 20), 50])
    return commit_files(root, ["a-0.parquet", "b-0.parquet"], excluded={"b-0.parquet": [3, 50]})


# ---------------------------------------------------------------- overview


def fill(root):
    """Version 1 of 8 rows, version 2 void, version 3 of 10 rows with 3 rejected."""
    write_file(root, "a-0.parquet", range(8))
    write_file(root, "b-0.parquet", [0, 8, 9])
    land(root, range(8), "1" * 64)
    land(root, range(6), "3" * 64)
    land(root, range(6, 13), "3" * 64, "-64x32")
    commit_files(root, ["a-0.parquet"], prompts_digest="1" * 64)
    void_next_number(root, 7, "lease 6 was taken over")
    reasons = {10: "not finite", 11: "CUDA", 12: "not finite", 99: "of another run"}
    folder = FINGERPRINT.folder
    write_rejects(root, folder, [RejectedRow(i, "p", why, 1) for i, why in reasons.items()])
    names = ["a-0.parquet", "b-0.parquet"]
    left_out = {"b-0.parquet": [0]}
    commit_files(root, names, excluded=left_out, rejected=[10, 11, 12], prompts_digest="3" * 64)
    ledger = root.at(folder, "ledger")
    write_table(ledger, "c.pending.parquet", pa.table({"pair_id": [1]}))
    for fence, gpu_s in ((6, 1.5), (8, 2.0)):
        record = {"fence": fence, "rows": 5, "busy_s": 2 * gpu_s, "gpu_s": gpu_s, "seconds": 9}
        root.fs.pipe_file(
            root.path(folder, "runs", f"{fence:06d}.json"), json.dumps(record).encode()
        )


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_the_overview_says_what_is_there(request, kind):
    root = request.getfixturevalue("root" if kind == "local" else "s3_store")
    fill(root)
    pin_versions(root, "run-a", [1], holder="a run", created="today")
    facts = inspect_dataset(root)
    assert [v.version for v in facts.versions] == [1, 3] and not facts.problems
    assert facts.void == {2: "lease 6 was taken over"}
    first, last = facts.versions
    assert (first.rows, first.asked, first.missing, first.excluded) == (8, 8, 0, 0)
    assert (last.rows, last.asked, last.missing, last.excluded) == (10, 13, 3, 1)
    assert (last.files, last.rejected) == (2, 3)
    assert last.bytes == sum(file.bytes for file in load_manifest(root, 3).files)
    assert last.reasons == {"not finite": 2, "CUDA": 1}
    assert first.pinned_by == ("run-a",) and last.pinned_by == ()
    (generation,) = facts.generations
    assert (generation.ledger_rows, generation.files, generation.rejected) == (11, 2, 4)
    assert (generation.gpu_s, generation.busy_s, generation.seconds) == (3.5, 7.0, 18.0)
    assert generation.bytes == last.bytes
    json.dumps(facts.as_dict())
    write_file(root, "c-0.parquet", [10, 99])  # two of the rejected rows, in a later run
    (generation,) = inspect_dataset(root).generations
    assert (generation.ledger_rows, generation.rejected) == (13, 2)


def test_one_version_is_shown_alone(root):
    fill(root)
    facts = inspect_dataset(root, version=1)
    assert [v.version for v in facts.versions] == [1] and facts.void == {}


def test_who_writes_is_shown_while_they_do(root):
    with hold_lease(root, period_s=5, purpose="pairs", progress=lambda: {"rows": "3 of 9"}):
        lease = inspect_dataset(root).lease
        assert lease is not None
        assert lease["purpose"] == "pairs" and lease["progress"]["rows"] == "3 of 9"
    assert inspect_dataset(root).lease is None


def test_damage_is_named_and_hides_nothing_else(root):
    fill(root)
    Path(manifest_path(root, 1)).write_text('{"version": 1}' + " " * 3000)
    data = Path(root.path(FINGERPRINT.folder, "data"))
    (data / "a-0.parquet").unlink()
    (data / "b-0.parquet").write_bytes(b"short")
    Path(root.path("prompts", "3" * 64 + ".parquet")).write_bytes(b"PAR1")
    Path(root.path("pins")).mkdir()
    Path(root.path("pins", "x.json")).write_text("{}")
    facts = inspect_dataset(root)
    assert [v.version for v in facts.versions] == [3] and facts.generations[0].files == 1
    for name in (
        "000001.json",
        "a-0.parquet: missing",
        "b-0.parquet: 5 bytes",
        "x.json",
        "333.parquet",
    ):
        assert sum(name in problem for problem in facts.problems) == 1, name
    assert len(facts.problems) == 5


# ---------------------------------------------------------------- rows and files


def test_rows_are_found_wherever_they_lie(root, sealed):
    assert version_ids(root, sealed).tolist() == list(range(20))
    for wanted in ([0, 4, 10, 11, 19], [12], range(20)):
        found = read_rows(root, sealed, np.array(wanted), verify=True)
        expected = made_batch(list(wanted))
        assert tuple(row.pair_id for row in found) == expected.pair_ids
        assert tuple(row.prompt for row in found) == expected.prompts
        assert [row.seed for row in found] == list(wanted)
        assert [row.negative_prompt for row in found] == [negative_prompt(i) for i in wanted]
        assert torch.equal(torch.stack([row.noise for row in found]), expected.noise)
        assert torch.equal(torch.stack([row.latent for row in found]), expected.latents)


def test_random_rows_are_distinct_seeded_and_anywhere(sealed):
    drawn = [random_rows(sealed, 5, seed).tolist() for seed in range(40)]
    assert drawn == [random_rows(sealed, 5, seed).tolist() for seed in range(40)]
    assert all(len(set(rows)) == 5 and rows == sorted(rows) for rows in drawn)
    assert set().union(*drawn) == set(range(20))
    assert random_rows(sealed, 100, 0).tolist() == list(range(20))


def other_latents(path):
    """Whole, with the same size, rows and ids: only the checksum tells."""
    raw = path.read_bytes()
    values = made_batch([5]).latents.numpy().tobytes()
    assert values in raw
    path.write_bytes(raw.replace(values, values[::-1]))


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "damage",
    [
        other_latents,
        flip_a_bit,
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: write_table(open_store(str(path.parent)), path.name, made_table(range(8))),
    ],
    ids=["other latents", "a flipped bit", "missing", "truncated", "another table"],
)
def test_a_damaged_file_is_named(root, sealed, damage):
    assert check_files(root, sealed).problems == ()
    path = Path(root.path(FINGERPRINT.folder, "data", "a-0.parquet"))
    damage(path)
    problems = check_files(root, sealed).problems
    assert problems and all(str(path) in problem for problem in problems)
    with pytest.raises(PairFileError, match=r"a-0\.parquet"):
        read_rows(root, sealed, np.array([0, 15]), verify=True)
    read_rows(root, sealed, np.array([11, 15]), verify=True)  # the other file is whole


def test_ids_that_do_not_make_the_version_are_named(root):
    write_file(root, "a-0.parquet", [0, 1, 2])
    write_file(root, "b-0.parquet", [2, 3, 7])
    land(root, [0, 1, 2, 3, 4, 5], "1" * 64)
    names = ["a-0.parquet", "b-0.parquet"]
    whole = commit_files(root, names, rejected=[3, 5], prompts_digest="1" * 64)
    found = "\n".join(check_files(root, whole).problems)
    for expected in (
        "1 ids belong to the version more than once: 2",
        "1 ids are stored and listed as rejected: 3",
        "1 ids are stored and were not asked for: 7",
        "1 ids were asked for, and are neither stored nor rejected: 4",
    ):
        assert expected in found
    item = whole.files[0].model_copy(
        update={"excluded": ExcludedRows(rows=(0,), pair_ids=(1,), duplicates=(0,))}
    )
    wrong = whole.model_copy(update={"files": (item, whole.files[1]), "rows": 5})
    assert "row 0 is 0, but the manifest excludes 1" in check_files(root, wrong).problems[0]


# ---------------------------------------------------------------- two versions


def brute_force(root, manifest):
    """id → (file, place, the row without its id)."""
    rows = {}
    for file in manifest.files:
        ids = set(file.excluded.rows)
        with root.fs.open(root.path(file.key), "rb") as stream:
            table = pa.parquet.read_table(io.BytesIO(stream.read()))
        batch, columns = decode_pairs(table), table.drop_columns(["pair_id"]).to_pylist()
        for place, row in enumerate(columns):
            if place not in ids:
                rows[batch.pair_ids[place]] = ((file.key, place), row)
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_the_difference_is_that_of_the_sets(root, seed):
    rng = np.random.default_rng(seed)
    ids = rng.permutation(60)
    write_file(root, "a-0.parquet", ids[:20].tolist())
    write_file(root, "b-0.parquet", ids[20:35].tolist())
    # In another order and with new rows; one row of file "a" changed on the way.
    moved = rng.permutation(np.concatenate([ids[:12], ids[35:50]]))
    write_file(root, "c-0.parquet", moved.tolist())
    changed = int(ids[5])
    old = commit_files(
        root, ["a-0.parquet", "b-0.parquet"], excluded={"a-0.parquet": ids[:3].tolist()}
    )
    left_out = {"b-0.parquet": ids[30:33].tolist(), "c-0.parquet": ids[48:50].tolist()}
    new = commit_files(root, ["b-0.parquet", "c-0.parquet"], excluded=left_out)
    other = tamper(root, new, "latent", changed, 0.5)
    before, after = brute_force(root, old), brute_force(root, other)
    assert changed in before and changed in after

    found = diff_versions(root, old, other)
    kept = before.keys() & after.keys()
    same = {i for i in kept if before[i][0] == after[i][0]}
    equal = {i for i in kept - same if before[i][1] == after[i][1]}
    assert found.added == len(after.keys() - before.keys())
    assert found.removed == len(before.keys() - after.keys())
    assert (found.kept, found.same_file) == (len(kept), len(same))
    assert (found.compared, found.equal) == (len(kept - same), len(equal))
    assert 0 < found.equal == found.compared - 1 and found.differing == {"latent": 1}
    prompts = [{row["prompt"] for _, row in rows.values()} for rows in (before, after)]
    assert found.prompts_added == len(prompts[1] - prompts[0])
    assert found.prompts_removed == len(prompts[0] - prompts[1])
    assert len(found.added_examples) == 5 and set(found.added_examples) <= prompts[1] - prompts[0]
    removed = prompts[0] - prompts[1]
    assert set(found.removed_examples) <= removed
    assert len(found.removed_examples) == min(5, len(removed))
    assert found.fingerprint == {}


def test_another_sampler_is_said_field_by_field(root):
    from dataclasses import replace

    more = replace(FINGERPRINT, steps=9, negative_prompt="ugly")
    write_file(root, "a-0.parquet", range(6))
    write_file(root, "a-0.parquet", range(6), fingerprint=more)
    old = commit_files(root, ["a-0.parquet"])
    new = commit_files(root, ["a-0.parquet"], fingerprint=more)
    found = diff_versions(root, old, new)
    assert found.fingerprint == {"steps": (5, 9), "negative_prompt": ("", "ugly")}
    assert (found.kept, found.same_file, found.compared, found.equal) == (6, 0, 6, 6)
    assert (found.added, found.removed, found.prompts_added) == (0, 0, 0)


# ---------------------------------------------------------------- against the teacher


@pytest.fixture
def teacher(tiny_teacher_dir):
    torch.set_num_threads(1)
    return load_teacher(tiny_teacher_dir)


def test_what_the_teacher_made_is_verified_whatever_the_batch(root, tiny_teacher_dir, teacher):
    manifest = teacher_set(root, tiny_teacher_dir, 10)
    for batch_size in (4, 7):
        report = verify_rows(root, manifest, teacher, count=10, seed=0, batch_size=batch_size)
        assert report.ok and report.rows == 10
        assert 0 < report.mean_difference < report.max_difference < 0.002  # float16's rounding


def test_the_row_that_was_changed_is_named(root, tiny_teacher_dir, teacher):
    manifest = teacher_set(root, tiny_teacher_dir, 10)
    for column, pair_id in (("latent", 7), ("noise", 2)):
        manifest = tamper(root, manifest, column, pair_id, 0.0625)
    report = verify_rows(root, manifest, teacher, count=10, seed=0, batch_size=4)
    assert not report.ok
    assert report.latents_differ == (7,) and report.noise_differs == (2,)
    assert report.max_difference == pytest.approx(0.0625, abs=0.003)
    some = verify_rows(root, manifest, teacher, count=3, seed=0, batch_size=4)
    drawn = set(random_rows(manifest, 3, 0).tolist())
    assert set(some.latents_differ) == drawn & {7} and set(some.noise_differs) == drawn & {2}


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 4), ("guidance_scale", 2.2), ("negative_prompt", "apple")]
)
def test_another_sampler_shows_in_every_row_it_touches(
    root, tiny_teacher_dir, teacher, field, value
):
    """Rows 0, 3, 6, 9 have a negative prompt of their own."""
    manifest = teacher_set(root, tiny_teacher_dir, 10)
    fingerprint = manifest.fingerprint | {field: value}
    other = manifest.model_copy(update={"fingerprint": fingerprint})
    report = verify_rows(root, other, teacher, count=10, seed=0, batch_size=4, tolerance=1e-5)
    untouched = {0, 3, 6, 9} if field == "negative_prompt" else set()
    assert set(report.latents_differ) == set(range(10)) - untouched


def test_every_batch_has_the_shape_that_was_asked_for(root, tiny_teacher_dir, teacher, monkeypatch):
    manifest = teacher_set(root, tiny_teacher_dir, 6)
    shapes, solve = [], Teacher.solve

    def watched(self, eps, prompts, *, negative_prompt, **settings):
        shapes.append((len(eps), len(prompts), len(negative_prompt)))
        return solve(self, eps, prompts, negative_prompt=negative_prompt, **settings)

    monkeypatch.setattr(Teacher, "solve", watched)
    verify_rows(root, manifest, teacher, count=6, seed=0, batch_size=4)
    assert shapes == [(4, 4, 4), (4, 4, 4)]


def test_another_teacher_is_refused_by_name(root, tiny_teacher_dir, teacher):
    manifest = teacher_set(root, tiny_teacher_dir, 2)
    from dataclasses import replace

    other = replace(teacher, revision="b" * 64)
    with pytest.raises(TeacherError, match=f"{teacher.revision}, but the configured one is bbb"):
        verify_rows(root, manifest, other, count=2, seed=0, batch_size=2)
    fingerprint = manifest.fingerprint | {"numerics_version": 99}
    with pytest.raises(TeacherError, match="numerics_version 99"):
        verify_rows(
            root,
            manifest.model_copy(update={"fingerprint": fingerprint}),
            teacher,
            count=2,
            seed=0,
            batch_size=2,
        )


# ---------------------------------------------------------------- pictures


def test_pictures_of_rows_are_the_decoded_latents(root, tiny_teacher_dir, teacher):
    manifest = teacher_set(root, tiny_teacher_dir, 10)
    rows = read_rows(root, manifest, np.arange(10))
    pictures = decode_rows(teacher, rows)
    expected = teacher.decode(torch.stack([row.latent for row in rows]))
    assert [p.shape for p in pictures] == [(16, 16, 3)] * 10
    # Another batch size: another rounding here and there.
    assert np.abs(np.stack(pictures).astype(int) - expected.astype(int)).max() <= 1


def test_a_sheet_holds_each_picture_once_enlarged():
    colours = [(250, 10, 10), (10, 250, 10), (10, 10, 250), (250, 250, 10), (10, 250, 250)]
    pictures = [np.full((16, 16, 3), colour, np.uint8) for colour in colours]
    png = sample_sheet(pictures, ["a prompt"] * 5, "title", "subtitle")
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    for index, colour in enumerate(colours):
        lines, columns = np.nonzero((sheet == colour).all(axis=2))
        assert len(lines) == 160 * 160  # 16 pixels, 10 times enlarged
        assert np.ptp(lines) == np.ptp(columns) == 159
        assert (lines.min() > sheet.shape[0] // 2) == (index >= 3)  # three columns


def test_captions_keep_to_their_width():
    font = _font("DejaVuSans", 13)
    for text in ("fox", "a red fox " * 20, "x" * 300, "a " + "y" * 300, "fox\nin two lines"):
        lines = wrapped(text, font, 160)
        assert 1 <= len(lines) <= 2 and all(font.getlength(line) <= 160 for line in lines)
        whole = " ".join(lines) == " ".join(text.split())
        assert whole != (lines[-1].endswith("…") or lines[0].endswith("…"))


def test_one_column_of_a_version_on_s3_is_read_without_the_others(s3_store, monkeypatch):
    """s3fs would read 50 MiB ahead: every file whole, noise and latents too."""
    write_file(s3_store, "a-0.parquet", range(2000), row_group_rows=1000)
    manifest = commit_files(s3_store, ["a-0.parquet"])
    fetched, fetch = [], S3File._fetch_range

    def counted(self, start, end):
        fetched.append(end - start)
        return fetch(self, start, end)

    monkeypatch.setattr(S3File, "_fetch_range", counted)
    assert version_ids(s3_store, manifest).tolist() == list(range(2000))
    assert 0 < sum(fetched) < manifest.files[0].bytes / 2
