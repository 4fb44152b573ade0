"""The whole journey from prompts to a sealed version, on a real Ray."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.data import DataContext

from dmd_core.noise import sample_noise
from dmd_core.teacher import TeacherError, teacher_revision
from pipelines.batches import PairReader
from pipelines.config import PairsSection, StorageSection
from pipelines.generate import forget_lost_files, generate_pairs
from pipelines.manifest import find_sealed, list_versions
from pipelines.pairs import fingerprint_of
from pipelines.progress import ProgressBoard
from pipelines.prompts import land_prompts
from pipelines.storage import open_store
from tests.conftest import CAPTIONS
from tests.pipelines.made_pairs import FINGERPRINT, land_ids, write_file

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
    """One data set and what it takes to generate it; counts the rows that teachers handle."""

    def __init__(self, root, teacher, tmp_path, storage=None):
        self.root, self.teacher, self.tmp_path = root, teacher, tmp_path
        self.storage = storage or StorageSection()

    def land(self, captions, section=SECTION):
        path = self.tmp_path / "prompts.txt"
        path.write_text("\n".join(captions))
        samples = section.samples_per_prompt
        return land_prompts(
            str(path), None, self.root, seed=section.seed, samples_per_prompt=samples
        )

    def run(self, captions, section=SECTION):
        """(manifest, landed prompts, rows that a teacher handled)."""
        board = ProgressBoard.remote()
        landed = self.land(captions, section)
        manifest = generate_pairs(
            section,
            teacher_url=self.teacher,
            storage=self.storage,
            root=self.root,
            prompts=landed,
            board=board,
        )
        done, _ = ray.get(board.read.remote())
        return manifest, landed, done

    def files(self, manifest):
        folder = f"generations/{manifest.fingerprint_digest[:16]}/data"
        return {path: self.root.fs.size(path) for path in self.root.fs.find(self.root.path(folder))}


def all_pairs(root, manifest):
    return PairReader(root, manifest, seed=0, verify=True).rows(np.arange(manifest.rows))


def assert_complete(root, manifest, landed):
    """Each asked row is there once, with the noise of its seed; returns the pairs."""
    asked = {
        row["pair_id"]: row for row in pq.read_table(landed.path, filesystem=root.arrow).to_pylist()
    }
    pairs = all_pairs(root, manifest)
    assert sorted(pairs.pair_ids) == sorted(asked) and manifest.rows == len(asked) == landed.rows
    assert list(pairs.prompts) == [asked[pair_id]["prompt"] for pair_id in pairs.pair_ids]
    seeds = [asked[pair_id]["seed"] for pair_id in pairs.pair_ids]
    assert torch.equal(pairs.noise, sample_noise(seeds, pairs.noise.shape[1:], pairs.noise.dtype))
    return pairs


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
    first, landed, done = job.run(CAPTIONS)
    assert (first.version, done, first.rejected) == (1, 15, 0)
    pairs = assert_complete(job.root, first, landed)
    assert all(max(file.row_groups) <= SECTION.row_group_rows for file in first.files)
    expected = integrate_with_diffusers(tiny_teacher_dir, pairs, SECTION)
    torch.testing.assert_close(pairs.latents.float(), expected, atol=2e-3, rtol=0)

    # Checkpointing left on would silently filter the rows of a later training job.
    assert DataContext.get_current().checkpoint_config is None

    # The same command again: nothing to do, and known in no time.
    before = job.files(first)
    started = time.perf_counter()
    fingerprint = fingerprint_of(SECTION, teacher_revision(tiny_teacher_dir))
    assert find_sealed(job.root, fingerprint.digest, landed.digest) == first
    assert time.perf_counter() - started < 1.0
    again, _, done = job.run(CAPTIONS)
    assert (again, done, job.files(first)) == (first, 0, before)

    # One more prompt: only its rows are made; a lost file: only its rows are made anew.
    lost = job.root.path(first.files[0].key)
    os.remove(lost)
    grown, landed, done = job.run([*CAPTIONS, "a purple apple"])
    assert (grown.version, done) == (2, 3 + first.files[0].rows)
    assert before.keys() - {lost} <= job.files(grown).keys()
    later = assert_complete(job.root, grown, landed)
    latents = dict(zip(later.pair_ids, later.latents, strict=True))
    for pair_id, latent in zip(pairs.pair_ids, pairs.latents, strict=True):
        torch.testing.assert_close(latents[pair_id], latent, atol=2e-3, rtol=0)


def test_the_same_on_s3_and_other_settings_are_another_generation(
    ray_cluster, tmp_path, tiny_teacher_dir, s3_store, s3_options
):
    s3_store.fs.put(tiny_teacher_dir, s3_store.path("teacher"), recursive=True)
    teacher = f"{s3_store.url}/teacher"
    job = Job(s3_store.at("pairs"), teacher, tmp_path, s3_options)
    first, landed, done = job.run(CAPTIONS[:3])
    assert (first.version, done) == (1, 9)
    before = job.files(first)
    pairs = assert_complete(job.root, first, landed)
    expected = integrate_with_diffusers(tiny_teacher_dir, pairs, SECTION)
    torch.testing.assert_close(pairs.latents.float(), expected, atol=2e-3, rtol=0)

    changed = SECTION.model_copy(update={"steps": 2})
    second, landed, done = job.run(CAPTIONS[:3], changed)
    assert (second.version, done) == (2, 9)
    assert not job.files(second).keys() & before.keys() and job.files(first) == before
    other = assert_complete(job.root, second, landed)
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
    landed = job.land(CAPTIONS, section)
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
    assert 0 < survived < landed.rows and list_versions(job.root) == []

    manifest, landed, done = job.run(CAPTIONS, section)
    assert done == landed.rows - survived
    assert_complete(job.root, manifest, landed)
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


def test_ledger_entries_without_their_data_are_forgotten(tmp_path):
    root = open_store(str(tmp_path / "set"))
    write_file(root, "set_write_000000-0.parquet", [1, 2])
    write_file(root, "set_write_000001-0.parquet", [3])
    write_file(root, "set_write_000001-1.parquet", [4])
    ledger = Path(root.path(FINGERPRINT.folder, "ledger"))
    ledger.mkdir()
    names = ["set_write_000000", "set_write_000001", "set_write_000002", "gone.pending"]
    for name in names:
        (ledger / f"{name}.parquet").touch()
    assert forget_lost_files(root, FINGERPRINT) == ["set_write_000002.parquet"]
    left = sorted(path.name for path in ledger.iterdir())
    assert left == sorted(f"{n}.parquet" for n in names if n != "set_write_000002")


def test_an_unusable_teacher_is_an_error_before_any_work(tmp_path):
    root = open_store(str(tmp_path / "set"))
    with pytest.raises(TeacherError, match="nowhere has no model_index"):
        generate_pairs(
            SECTION,
            teacher_url=str(tmp_path / "nowhere"),
            storage=StorageSection(),
            root=root,
            prompts=land_ids(root, [1]),
        )
    assert not (tmp_path / "set" / "generations").exists()
