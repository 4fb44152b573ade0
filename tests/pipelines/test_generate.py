"""The whole journey from prompts to a sealed version, on a real Ray."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray.data import DataContext
from ray.data._internal.execution.no_progress_guard import NoProgressGuard

from dmd_core.noise import sample_noise
from dmd_core.teacher import teacher_revision
from pipelines import generate
from pipelines.batches import PairFileError, PairReader
from pipelines.config import ActorRange, PairsSection, StorageSection
from pipelines.factory import PairOrder, fill_order
from pipelines.lease import LeaseHeldError, newest_fence
from pipelines.ledger import forget_lost_files, settle_ledger
from pipelines.manifest import list_versions
from pipelines.pairs import fingerprint_of
from pipelines.progress import ProgressBoard
from pipelines.prompts import PromptSource
from pipelines.storage import open_store
from pipelines.teacher_actor import TeacherTask
from pipelines.teacher_source import local_teacher
from tests.conftest import CAPTIONS
from tests.pipelines.made_pairs import FINGERPRINT, write_file

SECTION = PairsSection(
    solver="dpmsolver++",
    steps=3,
    guidance_scale=4.0,
    negative_prompt="blurry",
    samples_per_prompt=3,
    batch_size=4,
    rows_per_block=8,
    row_group_rows=4,
    threads_per_actor=1,
)


class Job:
    """One data set and what it takes to fill it; counts the rows that teachers handle."""

    def __init__(self, root, teacher, tmp_path, storage=None):
        self.root, self.teacher, self.tmp_path = root, teacher, tmp_path
        self.storage = storage or StorageSection()

    def order(self, captions, section=SECTION):
        path = self.tmp_path / "prompts.txt"
        path.write_text("\n".join(captions))
        folder = local_teacher(self.teacher, self.storage)
        fingerprint = fingerprint_of(section, teacher_revision(folder))
        return PairOrder(
            section, PromptSource((str(path),)), self.teacher, fingerprint, self.storage, self.root
        )

    def run(self, captions, section=SECTION, **options):
        """(outcome, rows that a teacher handled in this run, what was said to have changed)."""
        boards, changes = [], []

        @contextmanager
        def watch(rows):
            boards.append(ProgressBoard.remote())
            yield boards[-1]

        outcome = fill_order(
            self.order(captions, section),
            watch,
            purpose="a test",
            on_changes=changes.append,
            **options,
        )
        assert len(boards) == bool(outcome.cost)  # Ray is used only if there is something to make
        return outcome, outcome.cost.get("rows", 0), changes

    def files(self, manifest):
        folder = f"generations/{manifest.fingerprint_digest[:16]}/data"
        return {path: self.root.fs.size(path) for path in self.root.fs.find(self.root.path(folder))}


def all_pairs(root, manifest):
    return PairReader(root, manifest, seed=0, verify=True).rows(np.arange(manifest.rows))


def assert_complete(root, manifest):
    """Each asked row is there once, with the noise of its seed; returns the pairs."""
    table = root.path("prompts", f"{manifest.prompts_digest}.parquet")
    asked = {row["pair_id"]: row for row in pq.read_table(table, filesystem=root.arrow).to_pylist()}
    pairs = all_pairs(root, manifest)
    assert sorted(pairs.pair_ids) == sorted(asked) and manifest.rows == len(asked)
    assert list(pairs.prompts) == [asked[pair_id]["prompt"] for pair_id in pairs.pair_ids]
    seeds = [asked[pair_id]["seed"] for pair_id in pairs.pair_ids]
    assert torch.equal(pairs.noise, sample_noise(seeds, pairs.noise.shape[1:], pairs.noise.dtype))
    return pairs


def flip_a_bit(path, column):
    """In the last page of the column's first chunk: its values may also stand in headers, which no
    page's checksum covers."""
    with pq.ParquetFile(path) as file:
        place = file.schema_arrow.get_field_index(column)
        chunk = file.metadata.row_group(0).column(place)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    raw = bytearray(Path(path).read_bytes())
    raw[start + chunk.total_compressed_size - 1] ^= 1
    Path(path).write_bytes(raw)


def integrate_with_diffusers(folder, pairs, section):
    """The same pairs by diffusers' own pipeline call."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=list(pairs.prompts),
        negative_prompt=[section.negative_prompt] * len(pairs),
        latents=pairs.noise.float(),
        num_inference_steps=section.steps,
        guidance_scale=section.guidance_scale,
        output_type="latent",
    ).images


def test_prompts_become_a_sealed_version_that_only_ever_grows(
    ray_cluster, tmp_path, tiny_teacher_dir
):
    job = Job(open_store(str(tmp_path / "set")), tiny_teacher_dir, tmp_path)
    outcome, done, changes = job.run(CAPTIONS)
    first = outcome.manifest
    assert (first.version, done, first.rejected) == (1, 15, 0)
    assert (changes[0].settings, changes[0].rows, changes[0].to_make) == (None, 15, 15)
    assert outcome.cost["busy_s"] > 0 and outcome.cost["gpu_s"] == 0
    pairs = assert_complete(job.root, first)
    assert all(max(file.row_groups) <= SECTION.row_group_rows for file in first.files)
    assert all(file.key.rsplit("/", 1)[-1].startswith("000001_") for file in first.files)
    expected = integrate_with_diffusers(tiny_teacher_dir, pairs, SECTION)
    torch.testing.assert_close(pairs.latents.float(), expected, atol=2e-3, rtol=0)

    # A flipped bit is an error of whoever reads the page, without the file's checksum.
    damaged = open_store(str(tmp_path / "damaged"))
    job.root.fs.cp(job.root.root, damaged.root, recursive=True)
    flip_a_bit(damaged.path(first.files[0].key), "latent")
    with pytest.raises(PairFileError, match="checksum"):
        PairReader(damaged, first, seed=0).rows(np.arange(first.rows))

    # Checkpointing left on would silently filter the rows of a later training job.
    assert DataContext.get_current().checkpoint_config is None

    # The same again: nothing to do, nothing written, no lease taken, and Ray not asked.
    before = job.files(first)
    again, done, changes = job.run(CAPTIONS)
    assert (again.manifest, again.made, done, changes) == (first, False, 0, [])
    assert job.files(first) == before and newest_fence(job.root) == 1

    # One more prompt: only its rows are made; a lost file: only its rows are made anew.
    lost = job.root.path(first.files[0].key)
    os.remove(lost)
    outcome, done, changes = job.run([*CAPTIONS, "a purple apple"])
    grown = outcome.manifest
    assert (grown.version, done) == (2, 3 + first.files[0].rows)
    assert (changes[0].added, changes[0].removed, changes[0].settings) == (3, 0, {})
    assert before.keys() - {lost} <= job.files(grown).keys()
    later = assert_complete(job.root, grown)
    latents = dict(zip(later.pair_ids, later.latents, strict=True))
    for pair_id, latent in zip(pairs.pair_ids, pairs.latents, strict=True):
        torch.testing.assert_close(latents[pair_id], latent, atol=2e-3, rtol=0)

    # A prompt that goes away retires its rows; one that comes back is rows again, made by nobody.
    outcome, done, changes = job.run(CAPTIONS[:2], keep=1)
    assert (outcome.manifest.version, outcome.manifest.rows, done) == (3, 6, 0)
    assert (changes[0].added, changes[0].removed) == (0, 12)
    assert outcome.collected.versions == (1, 2) and list_versions(job.root) == [3]
    assert_complete(job.root, outcome.manifest)
    outcome, done, changes = job.run([*CAPTIONS, "a purple apple"], keep=1)
    assert (outcome.manifest.version, outcome.manifest.rows, done) == (4, 18, 0)
    returned = assert_complete(job.root, outcome.manifest)
    assert torch.equal(returned.latents[:1], later.latents[:1])


@pytest.mark.slow  # on S3 `tests/jobs/test_reject_lane.py` makes pairs in the default suite
def test_the_same_on_s3_and_other_settings_are_another_generation(
    ray_cluster, tmp_path, tiny_teacher_dir, s3_store, s3_options
):
    s3_store.fs.put(tiny_teacher_dir, s3_store.path("teacher"), recursive=True)
    teacher = f"{s3_store.url}/teacher"
    job = Job(s3_store.at("pairs"), teacher, tmp_path, s3_options)
    outcome, done, _ = job.run(CAPTIONS[:3])
    first = outcome.manifest
    assert (first.version, done) == (1, 9)
    before = job.files(first)
    pairs = assert_complete(job.root, first)
    expected = integrate_with_diffusers(tiny_teacher_dir, pairs, SECTION)
    torch.testing.assert_close(pairs.latents.float(), expected, atol=2e-3, rtol=0)

    changed = SECTION.model_copy(update={"steps": 2, "actors": ActorRange(min=1, max=2)})
    outcome, done, changes = job.run(CAPTIONS[:3], changed, keep=2)
    second = outcome.manifest
    assert (second.version, done) == (2, 9)
    assert changes[0].settings == {"steps": (3, 2)} and changes[0].to_make == 9
    assert not job.files(second).keys() & before.keys() and job.files(first) == before
    other = assert_complete(job.root, second)
    assert not torch.equal(other.latents, pairs.latents)
    assert list_versions(job.root) == [1, 2]


def committed_rows(root):
    """Rows that the ledgers on disk say are written."""
    entries = Path(root.root).glob("generations/*/ledger/*.parquet")
    return sum(
        pq.read_metadata(entry).num_rows
        for entry in entries
        if not entry.name.endswith(".pending.parquet")
    )


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_where_it_ended(ray_cluster, tmp_path, tiny_teacher_dir):
    # Slow enough to be caught in the middle: many blocks of many steps.
    slow = {"rows_per_block": 4, "steps": 60, "samples_per_prompt": 6}
    section = SECTION.model_copy(update=slow)
    job = Job(open_store(str(tmp_path / "set")), tiny_teacher_dir, tmp_path)
    job.order(CAPTIONS, section)  # writes the prompt file
    rows = 6 * len(CAPTIONS)
    script = [sys.executable, "-m", "tests.pipelines.generate_driver"]
    arguments = [job.root.root, tiny_teacher_dir, str(tmp_path / "prompts.txt")]
    with open(tmp_path / "driver.log", "w") as log:
        driver = subprocess.Popen(
            [*script, *arguments, section.model_dump_json()],
            cwd=Path(__file__).parents[2],
            stdout=log,
            stderr=log,
        )
        try:
            deadline = time.monotonic() + 480
            while not committed_rows(job.root) and time.monotonic() < deadline:
                assert driver.poll() is None, (tmp_path / "driver.log").read_text()[-2000:]
                time.sleep(0.05)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    survived = wait_until_quiet(job.root)
    assert 0 < survived < rows and list_versions(job.root) == []

    outcome, done, _ = job.run(CAPTIONS, section)
    manifest = outcome.manifest
    assert done == rows - survived
    # The dead driver's lease was taken over: its number in the log is void.
    assert manifest.version == 2 and list_versions(job.root) == [2]
    assert_complete(job.root, manifest)
    assert manifest.excluded_ids == () and manifest.excluded_files == ()
    assert not list(Path(job.root.root).glob("generations/*/ledger/*.pending.parquet"))


def wait_until_quiet(root):
    """The dead driver's workers end a moment after it; returns the rows they have committed."""
    rows, quiet = committed_rows(root), 0
    while quiet < 8:
        time.sleep(0.5)
        now = committed_rows(root)
        rows, quiet = now, quiet + 1 if now == rows else 0
    return rows


def test_a_slow_run_is_not_given_up(tmp_path):
    """By default Ray Data ends an execution in which no block moves for half an hour."""
    root = open_store(str(tmp_path / "set"))
    task = TeacherTask(SECTION, "nowhere", StorageSection(), root, FINGERPRINT, {})
    assert DataContext.get_current().execution_no_progress_timeout_s > 0
    timeout = generate._context(task).execution_no_progress_timeout_s
    assert not NoProgressGuard({}, timeout).enabled


def test_ledger_entries_without_their_data_are_forgotten(tmp_path):
    root = open_store(str(tmp_path / "set"))
    write_file(root, "set_write_000000-0.parquet", [1, 2], finished=False)
    write_file(root, "set_write_000001-0.parquet", [3], finished=False)
    write_file(root, "set_write_000001-1.parquet", [4], finished=False)
    ledger = Path(root.path(FINGERPRINT.folder, "ledger"))
    ledger.mkdir()
    names = ["set_write_000000", "set_write_000001", "set_write_000002", "gone.pending"]
    for name in names:
        (ledger / f"{name}.parquet").touch()
    assert forget_lost_files(root, FINGERPRINT.folder) == ["set_write_000002.parquet"]
    left = sorted(path.name for path in ledger.iterdir())
    assert left == sorted(f"{n}.parquet" for n in names if n != "set_write_000002")
    # One of a write's two files is known to be gone.
    lost = ["set_write_000001-1.parquet"]
    assert forget_lost_files(root, FINGERPRINT.folder, lost) == ["set_write_000001.parquet"]


def test_a_renaming_that_was_cut_in_half_is_finished(tmp_path):
    """Left alone, Ray would delete the data of the entry that is pending and committed at once."""
    root = open_store(str(tmp_path / "set"))
    ledger = Path(root.path(FINGERPRINT.folder, "ledger"))
    ledger.mkdir(parents=True)
    for name in ("a.parquet", "a.pending.parquet", "b.pending.parquet"):
        (ledger / name).touch()
    settle_ledger(root, FINGERPRINT.folder)
    assert sorted(path.name for path in ledger.iterdir()) == ["a.parquet", "b.pending.parquet"]


@pytest.mark.slow
def test_rows_whose_data_vanish_while_a_run_starts_are_made_in_the_same_run(
    ray_cluster, tmp_path, tiny_teacher_dir, monkeypatch
):
    job = Job(open_store(str(tmp_path / "set")), tiny_teacher_dir, tmp_path)
    outcome, _, _ = job.run(CAPTIONS[:2])
    lost = job.root.path(outcome.manifest.files[0].key)
    write, passes = generate._write_missing_rows, []

    def lose_then_write(*arguments):
        if not passes:
            os.remove(lost)
        passes.append(1)
        write(*arguments)

    monkeypatch.setattr(generate, "_write_missing_rows", lose_then_write)
    outcome, done, _ = job.run(CAPTIONS[:3])
    assert len(passes) == 2 and outcome.manifest.rows == 9
    assert done == 3  # by how many there are more; the six that were made again are none of them
    assert_complete(job.root, outcome.manifest)


@pytest.mark.slow  # the chaos suite has it with two drivers
def test_two_runs_at_the_same_moment_do_the_work_once(ray_cluster, tmp_path, tiny_teacher_dir):
    job = Job(open_store(str(tmp_path / "set")), tiny_teacher_dir, tmp_path)
    order, second = job.order(CAPTIONS[:2]), []

    def start_again(changes):
        try:
            job.run(CAPTIONS[:2])
        except LeaseHeldError as error:
            second.append(str(error))

    @contextmanager
    def watch(rows):
        yield ProgressBoard.remote()

    outcome = fill_order(order, watch, purpose="the first", on_changes=start_again)
    assert len(second) == 1 and "the first" in second[0]
    assert outcome.manifest.rows == 6 and list_versions(job.root) == [1]
    assert_complete(job.root, outcome.manifest)
