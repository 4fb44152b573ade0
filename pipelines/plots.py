"""Station 10: pictures of the run as PNG bytes — sample grids and loss curves."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

_GAP = 2  # pixels between pictures, before scaling
_BACKGROUND = (255, 255, 255)


def picture_grid(rows: Sequence[np.ndarray], *, scale: int = 3) -> bytes:
    """A PNG with one row of pictures per array (N,H,W,3) uint8, enlarged `scale` times.

    Enlarged by repeating pixels, so that what is seen is what the network made. Rows may differ in
    N; all pictures must have one size. Raises ValueError otherwise.
    """
    if not rows:
        raise ValueError("picture_grid got no rows; expected at least one (N,H,W,3) array")
    height, width = rows[0].shape[1:3]
    for index, row in enumerate(rows):
        if row.dtype != np.uint8 or row.ndim != 4 or row.shape[1:] != (height, width, 3):
            raise ValueError(
                f"row {index} is {row.dtype} {row.shape}; expected uint8 (N, {height}, {width}, 3)"
            )
    columns = max(len(row) for row in rows)
    canvas = np.empty(
        (len(rows) * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), dtype=np.uint8
    )
    canvas[:] = _BACKGROUND
    for line, row in enumerate(rows):
        for column, picture in enumerate(row):
            top, left = line * (height + _GAP), column * (width + _GAP)
            canvas[top : top + height, left : left + width] = picture
    return encode_png(canvas.repeat(scale, axis=0).repeat(scale, axis=1))


def encode_png(picture: np.ndarray) -> bytes:
    """(H,W,3) uint8 → PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
