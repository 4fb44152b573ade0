"""Station 10: the report and its pictures."""

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.plots import picture_grid


def _pictures(count: int, size: int = 4, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def test_grid_shows_every_picture_pixel_for_pixel():
    teacher, student = _pictures(3, seed=1), _pictures(2, seed=2)
    grid = np.asarray(Image.open(io.BytesIO(picture_grid([teacher, student], scale=3))))
    assert grid.shape == (3 * (4 + 2 + 4), 3 * (3 * 4 + 2 * 2), 3)
    for line, row in enumerate([teacher, student]):
        for column, picture in enumerate(row):
            top, left = 3 * 6 * line, 3 * 6 * column
            assert np.array_equal(grid[top : top + 12 : 3, left : left + 12 : 3], picture)


def test_grid_refuses_pictures_of_different_sizes():
    with pytest.raises(ValueError, match=r"row 1 is uint8 \(2, 5, 5, 3\); expected uint8 \(N, 4"):
        picture_grid([_pictures(2), _pictures(2, size=5)])
