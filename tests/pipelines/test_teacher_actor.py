"""The worker's part alone, without Ray."""

import json

import pyarrow as pa
import pytest
import torch

from dmd_core.noise import sample_noise
from dmd_core.teacher import Teacher, TeacherError, teacher_revision
from pipelines.config import PairsSection, StorageSection
from pipelines.pairs import decode_pairs, fingerprint_of
from pipelines.storage import open_store
from pipelines.teacher_actor import TeacherActor, TeacherTask

SECTION = PairsSection(
    solver="ddim", steps=2, batch_size=4, rows_per_block=4, threads_per_actor=1, dtype="float16"
)


@pytest.fixture
def make_actor(tiny_teacher_dir, tmp_path):
    def make(section=SECTION, revision=None, teacher_url=tiny_teacher_dir, storage=None):
        fingerprint = fingerprint_of(section, revision or teacher_revision(tiny_teacher_dir))
        root = open_store(str(tmp_path / "set"))
        storage = storage or StorageSection()
        return TeacherActor(TeacherTask(section, teacher_url, storage, root, fingerprint, {}))

    return make


def rows(count):
    return pa.table(
        {
            "pair_id": pa.array(range(count), pa.int64()),
            "prompt": [f"a red fox {i}" for i in range(count)],
            "seed": pa.array(range(100, 100 + count), pa.int64()),
        }
    )


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_stored_noise_is_the_noise_that_was_integrated(make_actor, monkeypatch, dtype):
    integrated = []
    solve = Teacher.solve

    def watched(self, eps, *args, **options):
        integrated.append(eps)
        return solve(self, eps, *args, **options)

    monkeypatch.setattr(Teacher, "solve", watched)
    table = make_actor(SECTION.model_copy(update={"dtype": dtype}))(rows(4))
    found = decode_pairs(table)
    expected = sample_noise(range(100, 104), (4, 4, 4), getattr(torch, dtype))
    assert torch.equal(found.noise, expected) and torch.equal(integrated[0], expected)
    assert table["seed"].to_pylist() == [100, 101, 102, 103]


def test_a_short_batch_is_filled_up_and_the_filling_leaves_no_trace(make_actor, monkeypatch):
    actor = make_actor()
    shapes = []
    solve = Teacher.solve

    def watched(self, eps, prompts, **options):
        shapes.append((len(eps), len(prompts)))
        return solve(self, eps, prompts, **options)

    monkeypatch.setattr(Teacher, "solve", watched)
    whole, short = decode_pairs(actor(rows(4))), decode_pairs(actor(rows(3)))
    assert shapes == [(4, 4), (4, 4)]
    assert short.pair_ids == (0, 1, 2)
    torch.testing.assert_close(short.latents, whole.latents[:3], atol=2e-3, rtol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e5])
def test_rows_without_a_usable_latent_leave_the_stream(make_actor, monkeypatch, tmp_path, bad):
    """1e5 is finite, but not as float16."""

    def solve(self, eps, prompts, **options):
        latents = eps.float().clone()
        latents[1, 0, 0, 0] = bad
        return latents

    monkeypatch.setattr(Teacher, "solve", solve)
    table = make_actor()(rows(4))
    found = decode_pairs(table)
    assert found.pair_ids == (0, 2, 3) and table["seed"].to_pylist() == [100, 102, 103]
    assert torch.equal(found.noise, sample_noise([100, 102, 103], (4, 4, 4), torch.float16))
    (path,) = (tmp_path / "set" / "generations").glob("*/rejects/*.jsonl")
    (line,) = path.read_text().splitlines()
    assert json.loads(line) == {
        "pair_id": 1,
        "prompt": "a red fox 1",
        "reason": "the latents are not finite in float16",
    }


def test_a_batch_of_rejects_is_an_empty_table_of_pairs(make_actor, monkeypatch):
    monkeypatch.setattr(Teacher, "solve", lambda self, eps, *_, **__: eps.float() * float("nan"))
    assert len(decode_pairs(make_actor()(rows(2)))) == 0


def test_another_size_gives_latents_of_that_size(make_actor):
    section = SECTION.model_copy(update={"height": 24, "width": 32})
    assert decode_pairs(make_actor(section)(rows(2))).latents.shape == (2, 4, 6, 8)


def test_a_teacher_that_changed_during_the_run_is_refused(make_actor):
    with pytest.raises(TeacherError, match=r"expected bbbbbbbbbbbbbbbb .it changed"):
        make_actor(revision="b" * 64)


def test_a_teacher_on_s3_is_the_same_teacher(make_actor, s3_store, s3_options, tiny_teacher_dir):
    s3_store.fs.put(tiny_teacher_dir, s3_store.path("teacher"), recursive=True)
    remote = make_actor(teacher_url=f"{s3_store.url}/teacher", storage=s3_options)
    assert remote(rows(4)).equals(make_actor()(rows(4)))
