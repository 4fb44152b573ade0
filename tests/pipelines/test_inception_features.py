"""Inception features of stored pictures, and real pictures as the reference of both systems."""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dmd_core import inception
from dmd_core.inception import DIMENSION
from dmd_core.metrics import frechet_distance, kid, regression_distance
from pipelines import feature_parts
from pipelines.cifar10 import CLASSES, Cifar10Error, load_split
from pipelines.config import EvaluateSection, StorageSection
from pipelines.evaluation import measure_system, reference_of
from pipelines.feature_parts import inception_features
from pipelines.images import SamplerPool
from pipelines.inception_features import REAL, Judge, real_images
from pipelines.storage import open_store
from pipelines.stored_images import open_images, write_part
from pipelines.systems import STUDENT, TEACHER, TEACHER_AGAIN, Images, SamplingPlan
from pipelines.unit import PICTURES, Unit
from tests.pipelines import small_cifar10 as small

HERE = SamplerPool(actors=0)


class _Pool(torch.nn.Module):
    """2048 features: the colours of a 26 × 26 grid of the picture, and twenty zeros."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = torch.nn.functional.adaptive_avg_pool2d(x, (26, 26)).flatten(1)
        return torch.nn.functional.pad(grid, (0, 20))


@pytest.fixture
def weights(tmp_path, monkeypatch) -> str:
    """A TorchScript file that passes for the known one."""
    path = tmp_path / "weights.pt"
    torch.jit.save(torch.jit.script(_Pool()), str(path))
    monkeypatch.setattr(inception, "_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10")
    store = open_store(str(folder / "data"))
    small.write_small(store, folder)
    return store


def _images(prompts, seed: int, count: int | None = None) -> Images:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (len(prompts), 32, 32, 3), dtype=np.uint8)
    nothing = np.zeros((len(prompts), 1), np.float32)
    return Images(tuple(prompts), tuple(range(len(prompts))), nothing, pictures, nothing)


def test_row_i_of_the_real_pictures_has_the_class_of_prompt_i_and_none_is_taken_twice(data):
    prompts = ("cat", "3", "truck", "Cat ", "cat", "0")
    found = real_images(data, prompts)
    train = load_split(data, "train")
    assert [int(train.labels[row]) for row in found.seeds] == [3, 3, 9, 3, 3, 0]
    assert len(set(found.seeds)) == 6
    assert np.array_equal(found.pictures, train.pictures[list(found.seeds)])


def test_more_real_pictures_of_a_class_than_there_are_and_unknown_classes_are_refused(data):
    with pytest.raises(Cifar10Error, match="more real pictures of 'cat' than the 20 of"):
        real_images(data, ("cat",) * 21)
    with pytest.raises(Cifar10Error, match="'fox' is no class of the real pictures"):
        real_images(data, ("cat", "fox"))


def test_features_are_kept_beside_the_pictures_and_the_data_set(
    tmp_path, data, weights, monkeypatch
):
    section = EvaluateSection(features="inception", inception=weights, real=data.url)
    judge = Judge.of(section, StorageSection())
    assert judge is not None
    prompts, store = CLASSES * 2, open_store(str(tmp_path / "run"))
    given = {TEACHER: _images(prompts, 1), STUDENT: _images(prompts, 2)}
    folders = {TEACHER: "abc/teacher"}  # the student's pictures are not kept
    found = judge.features(store, folders, given, HERE)
    assert list(found) == [TEACHER, STUDENT, REAL] and reference_of(found) == REAL
    network = inception.Inception(_Pool())
    pictures = given | {REAL: real_images(data, prompts)}
    for system, features in found.items():
        assert np.allclose(features, network(pictures[system].pictures), atol=1e-5)
    kept = [str(p.relative_to(tmp_path)) for p in (tmp_path / "run").rglob("*.safetensors")]
    assert kept == ["run/abc/teacher.inception/00000000.safetensors"]

    computed = []
    whole = feature_parts._compute
    monkeypatch.setattr(
        feature_parts,
        "_compute",
        lambda *arguments: computed.append(len(arguments[1].prompts)) or whole(*arguments),
    )
    again = judge.features(store, folders, given, HERE)
    assert computed == [20]  # the student alone
    assert np.array_equal(again[REAL], found[REAL])
    other = {TEACHER: _images(CLASSES, 1)}
    judge.features(store, {TEACHER: "def/teacher"}, other, HERE)
    assert computed == [20, 10, 10]  # other rows of the real pictures, other features


def _kept_features(weights: str, images, pool: SamplerPool, folder: Path, **how) -> np.ndarray:
    store = open_store(str(folder))
    return inception_features(weights, images, pool, store=store, folder="teacher.inception", **how)


def test_a_killed_computation_loses_the_part_it_was_at(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(feature_parts, "PART_ROWS", 8)
    images, whole, asked = _images(CLASSES * 3, 5), feature_parts._compute, []

    def compute(weights: str, images: Images, gpus: float) -> np.ndarray:
        asked.append(len(images.prompts))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return whole(weights, images, gpus)

    monkeypatch.setattr(feature_parts, "_compute", compute)
    with pytest.raises(KeyboardInterrupt):
        _kept_features(weights, images, HERE, tmp_path)
    told = []
    found = _kept_features(weights, images, HERE, tmp_path, on_rows=told.append)
    assert asked == [8, 8, 8, 8, 6] and told == [16, 8, 6]
    network = inception.Inception(_Pool())
    assert np.allclose(found, network(images.pictures), atol=1e-5)

    # A torn part and one of other rows are computed again, and they alone.
    first, second, *_ = sorted(tmp_path.rglob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:1000])
    shutil.copy(tmp_path / "teacher.inception" / "00000024.safetensors", second)
    told.clear()
    assert np.array_equal(
        _kept_features(weights, images, HERE, tmp_path, on_rows=told.append), found
    )
    assert told == [14, 8, 8]


def test_parts_of_stored_pictures_are_whole_files(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(feature_parts, "PART_ROWS", 8)
    store, images = open_store(str(tmp_path)), _images(CLASSES * 2, 3)
    for start in range(0, 20, 3):
        write_part(store, "teacher", start, 20, images.rows(slice(start, start + 3)))
    stored = open_images(store, "teacher")
    found = _kept_features(weights, stored, HERE, tmp_path)
    assert [int(p.stem) for p in sorted(tmp_path.rglob("*.safetensors"))] == [0, 9, 18]
    assert np.array_equal(found, _kept_features(weights, stored, HERE, tmp_path))
    assert np.allclose(found, inception.Inception(_Pool())(images.pictures), atol=1e-5)


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_give_what_this_process_gives(weights, monkeypatch):
    images = _images(CLASSES * 3, 5)
    images.pictures[10:17] = images.pictures[:7]  # equal ones are seen once
    expected = _features_of(weights, images, HERE)
    assert expected.shape == (30, DIMENSION)
    assert np.array_equal(expected[:7], expected[10:17])
    network = inception.Inception(_Pool())
    assert np.allclose(expected, network(images.pictures), atol=1e-5)
    monkeypatch.setattr(feature_parts, "PART_ROWS", 8)
    # The workers know the true weights only: they must refuse these.
    from ray.exceptions import RayTaskError

    with pytest.raises(RayTaskError, match="another network"):
        _features_of(weights, images, SamplerPool(actors=1))


def _features_of(weights: str, images: Images, pool: SamplerPool) -> np.ndarray:
    return inception_features(weights, images, pool, store=open_store("/nowhere"), folder=None)


def test_teacher_and_student_are_measured_against_the_real_pictures():
    rng = np.random.default_rng(0)
    count, prompts = 200, CLASSES * 20
    features = {
        TEACHER: rng.normal(0.1, 1, (count, 40)),
        STUDENT: rng.normal(0.4, 1, (count, 40)),
        REAL: rng.normal(0, 1, (count, 40)),
    }
    images = {system: _images(prompts, 1) for system in (TEACHER, STUDENT)}

    def measured(system: str, features: dict[str, np.ndarray], images=images) -> dict:
        return measure_system(system, images, features, None, Unit(0.95, PICTURES))

    teacher, student = (measured(system, features) for system in (TEACHER, STUDENT))
    assert teacher["kid"] == asdict(kid(features[TEACHER], features[REAL]))
    assert teacher["kid"]["value"] < student["kid"]["value"]
    assert teacher["rmse"] is None and student["rmse"]["value"] == 0.0
    fid = frechet_distance(features[STUDENT], features[REAL])
    assert student["fid"] == {"value": fid, "samples": count}
    few = {system: values[:150] for system, values in features.items()}
    assert measured(STUDENT, few)["fid"] is None  # fewer than 4 a feature
    drawn = {STUDENT: features[STUDENT], TEACHER_AGAIN: features[REAL]}
    assert measured(STUDENT, drawn)["fid"] is None  # not to real pictures


def test_pictures_in_files_of_other_sizes_are_compared_row_by_row(tmp_path):
    store, teacher, student = open_store(str(tmp_path)), _images(CLASSES, 1), _images(CLASSES, 2)
    for start in (0, 4, 8):
        write_part(store, "teacher", start, 10, teacher.rows(slice(start, start + 4)))
    images = {TEACHER: open_images(store, "teacher"), STUDENT: student}
    features = {STUDENT: np.zeros((10, 2)), TEACHER_AGAIN: np.ones((10, 2))}
    found = measure_system(STUDENT, images, features, None, Unit(0.95, PICTURES))["rmse"]
    scaled = [entry.pictures.astype(np.float32) / 255 for entry in (student, teacher)]
    assert found == pytest.approx(asdict(regression_distance(*scaled)))


def test_the_nth_picture_of_a_prompt_has_a_noise_of_its_own_and_the_first_keeps_its_own():
    plan = SamplingPlan(7, "edm_heun", 2, 1.0, "", None, None, (), "float32", 4)
    once, twice = plan.seeds(TEACHER, ("cat", "dog")), plan.seeds(TEACHER, ("cat", "dog") * 2)
    assert twice[:2] == once and len(set(twice)) == 4
    assert plan.seeds(STUDENT, ("cat", "dog") * 2) == twice
    assert not set(plan.seeds(TEACHER_AGAIN, ("cat", "dog") * 2)) & set(twice)


def test_what_cannot_be_measured_is_refused_before_anything_is_sampled(tmp_path, weights):
    assert Judge.of(EvaluateSection(), StorageSection()) is None
    with pytest.raises(ValueError, match="real needs features: inception"):
        EvaluateSection(real="data/cifar10")
    bad = EvaluateSection(features="inception", inception=str(tmp_path / "none.pt"))
    with pytest.raises(inception.InceptionError, match="is not a file"):
        Judge.of(bad, StorageSection())
    empty = EvaluateSection(features="inception", inception=weights, real=str(tmp_path))
    with pytest.raises(Cifar10Error, match="holds no complete CIFAR-10"):
        Judge.of(empty, StorageSection())
