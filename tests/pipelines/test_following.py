"""A run that follows a growing data set: where it looks, what it takes, what it reads then."""

import os
from dataclasses import dataclass, field, replace

import pytest
import torch

from dmd_core.noise import stable_seed
from dmd_core.teacher import load_teacher, teacher_revision
from pipelines.batches import PairReader
from pipelines.dataset_pins import pin_versions, read_pins
from pipelines.following import (
    FollowedPairs,
    FollowedPrompts,
    Follower,
    NewerVersions,
    PairVersions,
    PinHolder,
)
from pipelines.manifest import ManifestError, load_manifest, manifest_path
from pipelines.pair_fit import PairFit
from pipelines.pins import Pins
from pipelines.seal import seal_generation
from pipelines.step_data import Progress
from pipelines.storage import Store, open_store
from pipelines.train_config import TrainSection
from tests.pipelines.dmd_runs import SIZES, BareRun, seal_pairs
from tests.pipelines.made_pairs import FINGERPRINT, SHAPE, land_ids, write_file
from tests.pipelines.test_training import PAIRS

SEED = 7
FIT = PairFit(FINGERPRINT.teacher_revision, lambda height, width: SHAPE, None, None)
PIN = PinHolder("run", "a test", "now")


def grow(root: Store, stop: int, fingerprint=FINGERPRINT) -> None:
    """Seal a version of the pairs 0 … stop - 1; those that no earlier one has are in a new file."""
    files = root.fs.glob(root.path(fingerprint.folder, "data", "*"))
    known = sum(int(name.rsplit("-", 2)[1]) for name in files)
    name = f"{len(files)}-{stop - known}-0.parquet"
    write_file(root, name, range(known, stop), fingerprint=fingerprint)
    seal_generation(root, fingerprint, land_ids(root, range(stop)))


@pytest.fixture
def root(tmp_path) -> Store:
    """Version 1 holds 13 pairs."""
    root = open_store(str(tmp_path / "set"))
    grow(root, 13)
    return root


def pinned(root: Store, *versions: int) -> Pins:
    return Pins(1, {v: load_manifest(root, v).digest for v in (1, *versions)})


@dataclass
class Walk:
    """A run that reads and does not train."""

    root: Store
    section: TrainSection
    versions: PairVersions
    follower: Follower
    progress: Progress = field(default_factory=Progress)

    def go(self, steps: int) -> list[dict | None]:
        """What the log is told after each step."""
        told = []
        for _ in range(steps):
            before, (stage, keys) = self.progress, self.section.plan()[self.progress.stage]
            self.progress = before.after_step(keys)
            if self.progress.stage_is_over(stage, keys, None):
                self.progress = self.progress.next_stage()
            told.append(self.follower.follow(before, self.progress))
        return told

    def segments(self) -> list[tuple[int, int]]:
        return [(segment.version, segment.pairs) for segment in self.versions.segments]


def walk(root: Store, *, pins: Pins | None = None, pin=PIN, say=None, share=None, **changes):
    settings = {"follow_pairs": "epoch", "max_train_steps": 99, **SIZES} | changes
    section = TrainSection.model_validate(settings)
    versions = PairVersions(root, pins or pinned(root), SEED)
    newer = NewerVersions(root, FIT, pin, say or pytest.fail)
    follower = Follower(section, versions, newer, share or (lambda found: found))
    return Walk(root, section, versions, follower)


# ---------------------------------------------------------------- where it looks


def test_it_goes_over_with_the_first_batch_past_the_end_of_an_epoch(root):
    run = walk(root)
    grow(root, 20)
    # Batches of 3 from 13 rows: the fifth is across the end and is the old version's.
    assert run.go(4) == [None] * 4
    assert run.go(1) == [{"pairs_version": 2, "pairs_rows": 20}]
    assert run.segments() == [(1, 0), (2, 15)]
    grow(root, 30)
    assert run.go(6) == [None] * 6  # 18 of 20 rows
    assert run.go(1) == [{"pairs_version": 3, "pairs_rows": 30}]
    assert run.segments() == [(1, 0), (2, 15), (3, 36)]
    assert [segment.prompts for segment in run.versions.segments] == [0, 25, 60]


def test_it_stays_where_nothing_is_newer_and_looks_again_an_epoch_later(root):
    run = walk(root)
    assert run.go(5) == [None] * 5
    grow(root, 20)
    assert run.go(3) == [None] * 3  # batches at 15, 18 and 21; the next starts at 24
    assert run.go(1)[0] == {"pairs_version": 2, "pairs_rows": 20}
    assert run.segments() == [(1, 0), (2, 27)]


def test_each_batch_is_of_one_version_and_a_segment_reads_its_own_from_the_beginning(root):
    run = walk(root)
    grow(root, 20)
    run.go(7)
    seed = stable_seed(SEED, "pairs")
    old, new = (PairReader(root, load_manifest(root, v), seed) for v in (1, 2))
    pairs, prompts = FollowedPairs(run.versions), FollowedPrompts(run.versions)
    for k in range(5):
        assert pairs.batch_from(3 * k, 3).pair_ids == old.batch(k, 3).pair_ids
        found = pairs.batch_from(15 + 3 * k, 3, 1, 2)
        assert found.pair_ids == new.batch(k, 3, 1, 2).pair_ids
        assert torch.equal(found.noise, new.batch(k, 3, 1, 2).noise)
    epoch = [prompt for k in range(4) for prompt in prompts.batch_from(25 + 5 * k, 5)]
    assert sorted(epoch) == sorted(f"prompt {i}" for i in range(20))
    before = [prompt for k in range(2) for prompt in prompts.batch_from(5 * k, 5)]
    assert len(set(before)) == 10 and set(before) <= {f"prompt {i}" for i in range(13)}


def test_at_the_start_of_each_stage_unless_it_names_its_version(root):
    grow(root, 20)
    stages = [
        {"steps": 2},
        {"steps": 2, "pairs_version": 2},
        {"steps": 2, "lambda_reg": 0},
        {"steps": 9},
    ]
    run = walk(
        root, pins=pinned(root, 2), follow_pairs="stage", max_train_steps=None, stages=stages
    )
    grow(root, 30)
    assert run.go(5) == [None] * 5
    assert run.go(1) == [{"pairs_version": 3, "pairs_rows": 30}]
    assert run.segments() == [(1, 0), (3, 12)]
    grow(root, 31)
    assert run.go(8) == [None] * 8
    named = run.versions.stream(run.section.plan()[1][1])
    assert named is not None
    reader = PairReader(root, load_manifest(root, 2), stable_seed(SEED, "pairs"))
    assert named.batch_from(6, 3).pair_ids == reader.batch(2, 3).pair_ids


def test_a_stage_with_a_version_of_its_own_passes_ends_of_epochs_by(root):
    stages = [{"steps": 9, "pairs_version": 1}, {"steps": 9}]
    run = walk(root, max_train_steps=None, stages=stages)
    grow(root, 20)
    assert run.go(12) == [None] * 12  # 36 rows: two epochs, both ends in the first stage
    assert run.go(1) == [{"pairs_version": 2, "pairs_rows": 20}]


def test_one_worker_looks_and_the_others_take_what_it_found(root):
    handed = []
    first = walk(root, share=lambda found: handed.append(found) or found)
    grow(root, 20)
    first.go(5)
    grow(root, 30)  # sealed between the look of the first and the step of the second
    second = walk(root)
    second.follower = Follower(second.section, second.versions, None, lambda found: handed.pop(0))
    second.go(5)
    assert second.versions.segments == first.versions.segments
    assert second.versions.segments[-1].version == 2


def test_no_is_the_default_and_looks_nowhere(root):
    run = walk(root, follow_pairs=False)  # as YAML reads a bare `no`
    assert run.section.follow_pairs == TrainSection().follow_pairs == "no"
    grow(root, 20)
    assert run.go(12) == [None] * 12


# ---------------------------------------------------------------- what it takes


def test_versions_of_another_teacher_or_shape_are_passed_over_and_said_once(root):
    said = []
    run = walk(root, say=said.append)
    grow(root, 20)
    grow(root, 9, replace(FINGERPRINT, teacher_revision="b" * 64))
    (land,) = root.fs.glob(root.path("prompts", load_manifest(root, 2).prompts_digest + "*"))
    grow(root, 21)
    sized = load_manifest(root, 4).prompts_digest
    root.fs.copy(land, root.path("prompts", f"{sized}-64x64.parquet"))
    run.follower._newer._fit = replace(  # type: ignore[union-attr]
        FIT, latent_shape=lambda height, width: SHAPE if height is None else (2, 8, 8)
    )
    assert run.go(5)[-1] == {"pairs_version": 2, "pairs_rows": 20}
    assert run.go(14) == [None] * 14
    assert len(said) == 2
    assert "version 4 holds latents of several shapes: (2, 3, 4), (2, 8, 8)" in said[0]
    assert "version 3 was made by teacher bbbb" in said[1]
    assert all("staying with version 1" in line for line in said)


def test_pairs_of_another_shape_than_the_teacher_s_do_not_fit(root):
    other = replace(FIT, latent_shape=lambda height, width: (2, 8, 8))
    misfit = other.misfit(root, load_manifest(root, 1))
    assert "holds latents of shape (2, 3, 4)" in misfit and "has (2, 8, 8)" in misfit
    assert FIT.misfit(root, load_manifest(root, 1)) == ""


def test_a_switch_pins_old_and_new_versions_first(root):
    run = walk(root, pins=pinned(root))
    pin_versions(root, "run", [1], holder="a test", created="now")
    grow(root, 20)
    run.go(5)
    grow(root, 30)
    run.go(7)
    assert read_pins(root)["run"].versions == (1, 2, 3)


@dataclass(frozen=True)
class Collector(PinHolder):
    """Deletes the `losses` newest versions, one before each pin."""

    losses: tuple[int, ...] = ()

    def pin(self, root, versions):
        newest = max(versions)
        if newest in self.losses:
            os.remove(manifest_path(root, newest))
        super().pin(root, versions)


def test_a_version_collected_before_it_was_pinned_is_looked_for_again_once(root):
    for stop in (20, 21, 22):
        grow(root, stop)
    run = walk(root, pin=Collector("run", "a test", "now", losses=(4,)))
    assert run.go(5)[-1] == {"pairs_version": 3, "pairs_rows": 21}
    assert read_pins(root)["run"].versions == (1, 3)
    run = walk(root, pin=Collector("run", "a test", "now", losses=(3, 2)))
    with pytest.raises(ManifestError, match="no such version"):
        run.go(5)


# ---------------------------------------------------------------- training


@pytest.fixture
def make(tiny_teacher_dir, tmp_path):
    """A run of the tiny teacher on a data set of 12 pairs, and how to grow it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    teacher, revision = load_teacher(tiny_teacher_dir), teacher_revision(tiny_teacher_dir)
    root = open_store(str(tmp_path / "growing"))

    def seal(start: int, stop: int) -> None:
        shape, ids = teacher.latent_shape(), range(start, stop)
        seal_pairs(root, PAIRS, revision, shape, ids, base=f"from{start}")

    def run() -> BareRun:
        settings = {"learning_rate": 1e-3, "follow_pairs": "epoch", **SIZES}
        section = TrainSection.model_validate(settings)
        versions = PairVersions(root, pinned(root), SEED)
        newer = NewerVersions(
            root, PairFit(revision, teacher.latent_shape, None, None), PIN, pytest.fail
        )
        follower = Follower(section, versions, newer, lambda found: found)
        return BareRun(
            teacher, section, None, prompts=FollowedPrompts(versions), versions=versions,
            follower=follower,
        )  # fmt: skip

    seal(1, 13)
    run.seal = seal
    yield run
    torch.set_num_threads(before)


@pytest.mark.parametrize("killed_at", [3, 4, 6])
def test_a_run_killed_around_a_switch_equals_an_undisturbed_one_bit_for_bit(make, killed_at):
    straight, first = make(), make()
    straight.train(3)
    make.seal(13, 21)
    straight.train(4)  # goes over after the fourth step: an epoch of 12 rows
    expected, where = straight.state()

    first.train(killed_at)
    saved = first.state()
    second = make()
    second.load(saved)
    second.train(7 - killed_at)
    found, resumed = second.state()
    assert resumed == where and '"version": 2' in where
    for part, tensors in expected.items():
        for key, value in tensors.items():
            assert torch.equal(value, found[part][key]), f"{part}.{key}"


def test_a_resumed_run_does_not_look_before_the_next_end_of_an_epoch(make):
    first = make()
    make.seal(13, 21)
    first.train(4)
    saved = first.state()
    make.seal(21, 23)
    second = make()
    second.load(saved)
    second.train(2)
    assert [segment.version for segment in second.versions.segments] == [1, 2]
