"""Distances to the teacher's pictures: each file is read once, and of it the pictures alone."""

from dataclasses import asdict

import numpy as np
import pytest

from dmd_core.metrics import mean_estimate, regression_distance
from pipelines import measures
from pipelines.distances import distances_to_teacher
from pipelines.measures import own_features
from pipelines.storage import open_store
from pipelines.stored_images import StoredImages, array_of, open_images, write_part
from pipelines.systems import START, STUDENT, TEACHER, Images


def _images(seed: int, count: int = 10) -> Images:
    rng = np.random.default_rng(seed)
    return Images(
        tuple(f"prompt {row}" for row in range(count)), tuple(range(count)),
        rng.normal(size=(count, 1)).astype(np.float32),
        rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
        rng.normal(size=(count, 5)).astype(np.float32),
    )  # fmt: skip


@pytest.fixture
def stored(tmp_path):
    """Pictures → the same in files of so many rows."""

    def store(images: Images, name: str, rows: int) -> StoredImages:
        folder, count = open_store(str(tmp_path)), len(images.prompts)
        for start in range(0, count, rows):
            write_part(folder, name, start, count, images.rows(slice(start, start + rows)))
        return open_images(folder, name)

    return store


@pytest.fixture
def reads(monkeypatch) -> list[tuple[str, int, tuple[str, ...]]]:
    """(folder, first row of the file, columns) of what is read."""
    found, whole = [], StoredImages._read

    def read(self: StoredImages, start: int, names):
        found.append((self.folder, start, tuple(names)))
        return whole(self, start, names)

    monkeypatch.setattr(StoredImages, "_read", read)
    return found


def test_every_file_is_read_once_and_of_it_the_pictures_alone(stored, reads):
    given = {TEACHER: _images(1), STUDENT: _images(2), START: _images(3)}
    files = {system: stored(entry, system, 4) for system, entry in given.items()}
    told = []
    found = distances_to_teacher(files, told.append)
    expected = [(system, start, ("pictures",)) for system in given for start in (0, 4, 8)]
    assert sorted(reads) == sorted(expected) and told == [12, 12, 6]
    for system in (STUDENT, START):
        scaled = [given[one].pictures.astype(np.float32) / 255 for one in (system, TEACHER)]
        expected = asdict(regression_distance(*scaled))
        assert asdict(mean_estimate(found[system])) == pytest.approx(expected)
    assert TEACHER not in found


def test_pictures_in_files_of_other_sizes_are_compared_row_by_row(stored):
    teacher, student, start = _images(1), _images(2), _images(3)
    files = {TEACHER: stored(teacher, "t", 4), START: stored(start, "s", 3), STUDENT: student}
    found = distances_to_teacher(files)
    alone = distances_to_teacher({TEACHER: teacher, START: start, STUDENT: student})
    assert found.keys() == alone.keys() == {START, STUDENT}
    for system, distances in found.items():
        np.testing.assert_array_equal(distances, alone[system])


def test_rows_of_an_array_are_read_from_the_files_that_hold_them(stored, reads):
    images = _images(1)
    files = stored(images, "t", 4)
    for name in ("latents", "pictures", "features"):
        for rows in ((0, None), (0, 4), (3, 9), (5, 7), (8, 99)):
            expected = getattr(images, name)[slice(*rows)]
            np.testing.assert_array_equal(array_of(files, name, *rows), expected)
            np.testing.assert_array_equal(array_of(images, name, *rows), expected)
    reads.clear()
    array_of(files, "features", 5, 7)
    assert reads == [("t", 4, ("features",))]


def test_of_features_only_the_rows_that_kid_takes_are_read(stored, reads, monkeypatch):
    monkeypatch.setattr(measures, "KID_ROWS", 5)
    images = _images(1)
    found = own_features({STUDENT: stored(images, "s", 4), TEACHER: images})
    assert sorted(reads) == [("s", start, ("features",)) for start in (0, 4)]
    for features in found.values():
        np.testing.assert_array_equal(features, images.features[:5])
