"""Pools of teachers on a real Ray: who gets blocks, what is reserved, what is encoded how often."""

from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest

from dmd_core.teacher import teacher_revision
from pipelines import generate
from pipelines.config import ActorRange, PairsSection, StorageSection
from pipelines.factory import PairOrder, fill_order
from pipelines.pairs import fingerprint_of
from pipelines.progress import ProgressBoard
from pipelines.prompts import PromptSource
from pipelines.storage import open_store
from pipelines.teacher_actor import TeacherActor, TeacherTask
from tests.pipelines.pool_teachers import Note, NotingTeacher, read_notes

BLOCK = 2


@contextmanager
def _watch(rows: int):
    yield ProgressBoard.remote()


def fill(folder: Path, **settings: object) -> list[Note]:
    """Make a small set from one small file of prompts; what its teachers noted."""
    prompts, notes = folder / "prompts.txt", folder / "notes"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(BLOCK * NotingTeacher.BLOCKS)))
    notes.mkdir()
    blocks = {"batch_size": BLOCK, "rows_per_block": BLOCK}
    section = PairsSection.model_validate(blocks | settings)
    root, source = open_store(str(folder / "set")), PromptSource((str(prompts),))
    fingerprint = fingerprint_of(section, "a" * 64)
    order = PairOrder(section, source, str(notes), fingerprint, StorageSection(), root)
    made = fill_order(order, _watch, purpose="a test").manifest
    assert made.rows == BLOCK * NotingTeacher.BLOCKS
    return read_notes(notes)


@pytest.mark.slow
def test_a_pool_grows_while_blocks_wait_and_shrinks_when_none_is_left(
    ray_cluster, tmp_path, monkeypatch
):
    """One small file is one block, if nothing cuts it, and one block goes to one teacher. Here a
    second one works before the first is through its first block, and one of them is given up while
    the other still works on the last. With `cpus_per_actor` 0 Ray reserves no CPU for them; the
    teachers see to that."""
    monkeypatch.setattr(generate, "TeacherActor", NotingTeacher)
    notes = fill(tmp_path, actors=ActorRange(min=1, max=2), cpus_per_actor=0)
    assert len({note.pid for note in notes}) == 2
    assert [note.alone for note in notes].count(True) == 1


def test_a_number_of_teachers_is_that_number():
    pool = generate._pool(3)
    assert (pool.min_size, pool.max_size) == (3, 3)


def test_prompts_are_encoded_once_for_a_batch_and_not_for_each_step(tiny_teacher_dir, tmp_path):
    section = PairsSection(solver="ddim", steps=3, batch_size=4, rows_per_block=8)
    fingerprint = fingerprint_of(section, teacher_revision(tiny_teacher_dir))
    root = open_store(str(tmp_path / "set"))
    task = TeacherTask(section, tiny_teacher_dir, StorageSection(), root, fingerprint, {})
    actor, encoded = TeacherActor(task), []
    encoder = actor._teacher.pipeline.text_encoder
    encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    columns = {"pair_id": [1, 2, 3, 4], "seed": [1, 2, 3, 4], "prompt": ["a", "b", "c", "a"]}
    for _ in range(2):
        actor(pa.table(columns))
    assert encoded == [3, 1, 3, 1]  # distinct prompts, and the negative prompt of all
