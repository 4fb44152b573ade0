"""Inception features of stored pictures, and real pictures as the reference of both systems."""

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from dmd_core import inception
from dmd_core.inception import DIMENSION, INCEPTION_SPACE
from dmd_core.metrics import frechet_distance, kid
from pipelines import feature_parts, inception_features
from pipelines.cifar10 import CLASSES, Cifar10Error, load_split
from pipelines.config import EvaluateSection, StorageSection
from pipelines.distances import distances_to_teacher
from pipelines.evaluation import check_evaluation
from pipelines.feature_parts import inception_features as features_of
from pipelines.images import SamplerPool
from pipelines.inception_features import REAL, Judge, check_real, real_images
from pipelines.measures import measure, measure_system, reference_of
from pipelines.storage import open_store
from pipelines.stored_images import StoredImages, open_images, write_part
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

    computed = _counted(monkeypatch)
    again = judge.features(store, folders, given, HERE)
    assert computed == [20]  # the student alone
    assert np.array_equal(again[REAL], found[REAL])
    other = {TEACHER: _images(CLASSES, 1)}
    judge.features(store, {TEACHER: "def/teacher"}, other, HERE)
    assert computed == [20, 10, 10]  # other rows of the real pictures, other features


@pytest.mark.usefixtures("ray_cluster")
def test_actors_give_what_this_process_gives(weights, monkeypatch):
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
    return features_of(weights, images, pool, store=open_store("/nowhere"), folder=None)


def test_teacher_and_student_are_measured_against_the_real_pictures():
    rng = np.random.default_rng(0)
    count, prompts = 200, CLASSES * 20
    features = {
        TEACHER: rng.normal(0.1, 1, (count, 40)),
        STUDENT: rng.normal(0.4, 1, (count, 40)),
        REAL: rng.normal(0, 1, (count, 40)),
    }
    images = {system: _images(prompts, 1) for system in (TEACHER, STUDENT)}
    distances = distances_to_teacher(images)

    def measured(system: str, features: dict[str, np.ndarray], images=images) -> dict:
        return measure_system(system, images, features, distances, None, Unit(0.95, PICTURES))

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


def _counted(monkeypatch) -> list[int]:
    """Pictures of each part that is computed from now on."""
    computed, whole = [], feature_parts._inception

    def make(weights: str, gpus: float):
        network = whole(weights, gpus)
        return lambda images: computed.append(len(images.prompts)) or network(images)

    monkeypatch.setattr(feature_parts, "_inception", make)
    return computed


def test_real_features_are_kept_in_the_run_where_the_data_set_takes_no_files(
    tmp_path, data, weights, monkeypatch
):
    section = EvaluateSection(features="inception", inception=weights, real=data.url)
    judge = Judge.of(section, StorageSection())
    assert judge is not None
    run, given = open_store(str(tmp_path / "run")), {TEACHER: _images(CLASSES * 3, 1)}

    def refuse(store):
        raise PermissionError(f"cannot write to {store.url}")

    monkeypatch.setattr(feature_parts, "check_writable", refuse)
    found = judge.features(run, {TEACHER: "abc/teacher"}, given, HERE)
    kept = [path.relative_to(tmp_path) for path in (tmp_path / "run" / "inception").rglob("*.*")]
    assert len([path for path in kept if path.suffix == ".safetensors"]) == 1
    computed = _counted(monkeypatch)
    again = judge.features(run, {TEACHER: "abc/teacher"}, given, HERE)
    assert computed == [] and np.array_equal(again[REAL], found[REAL])


def test_where_inception_judges_no_other_features_are_read(tmp_path, weights, monkeypatch):
    store, images = open_store(str(tmp_path)), _images(CLASSES, 1)
    write_part(store, "teacher", 0, 10, images)
    columns, whole = [], StoredImages._read

    def read(self, start, names):
        columns.extend(names)
        return whole(self, start, names)

    monkeypatch.setattr(StoredImages, "_read", read)
    judge = Judge(weights, "", StorageSection())
    stored = {TEACHER: open_images(store, "teacher")}
    found = judge.features(store, {TEACHER: "teacher"}, stored, HERE)
    assert columns == ["pictures"] and len(found[TEACHER]) == 10


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (("cat", "3") * 11, "ask for 22 real pictures of 'cat', and .* has 20"),
        (("truck",) * 21, "ask for 21 real pictures of 'truck', and .* has 20"),
        (("cat", "fox"), "'fox' is no class of the real pictures"),
    ],
)
def test_real_pictures_that_are_not_there_are_told_before_sampling(
    data, weights, tiny_teacher_dir, monkeypatch, prompts, expected
):
    """From the counts alone: no picture is read."""
    monkeypatch.setattr(
        inception_features.cifar10, "load_split", lambda *given: pytest.fail("read")
    )
    with pytest.raises(Cifar10Error, match=expected):
        check_real(data, prompts)
    check_real(data, ("cat", "3") * 10)

    section = EvaluateSection(
        features="inception", inception=weights, real=data.url, samples_per_prompt=21
    )
    with pytest.raises(Cifar10Error, match="ask for 21 real pictures of 'airplane'"):
        check_evaluation(section, CLASSES, tiny_teacher_dir, StorageSection())
    enough = section.model_copy(update={"samples_per_prompt": 20})
    check_evaluation(enough, CLASSES, tiny_teacher_dir, StorageSection())


def test_why_there_is_no_fid_is_said_where_it_was_asked_for():
    def measured(space: str, real: bool, count: int) -> dict:
        prompts, rng = CLASSES * (count // 10), np.random.default_rng(0)
        systems = (TEACHER, STUDENT, TEACHER_AGAIN)
        features = {s: rng.normal(size=(count, 40)) for s in (*systems, *([REAL] if real else []))}
        images = {system: _images(prompts, 1) for system in systems}
        unit, distances = Unit(0.95, PICTURES), {STUDENT: np.zeros(count)}
        found = measure(images, features, distances, None, unit, space)["systems"]
        return json.loads(json.dumps(found))

    few = measured(INCEPTION_SPACE, True, 150)[STUDENT]
    assert few["fid"] is None and few["fid_reason"].startswith("150 samples; expected at least 160")
    for entry in measured(INCEPTION_SPACE, False, 160).values():
        assert entry["fid"] is None and "evaluate.real names none" in entry["fid_reason"]
    for entry in measured(INCEPTION_SPACE, True, 160).values():
        assert entry["fid"]["samples"] == 160 and "fid_reason" not in entry
    assert "fid_reason" not in measured("VAE latent mean", False, 160)[STUDENT]
