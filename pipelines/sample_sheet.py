"""A sheet of pairs to look at: the teacher's pictures with their prompts under them, as a PNG."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dmd_core.teacher import Teacher
from pipelines.plots import encode_png
from pipelines.stored_rows import StoredRow

_BACKGROUND, _INK, _FAINT = (255, 255, 255), (32, 33, 36), (110, 114, 120)
_CELL = 160  # pixels; smaller pictures are enlarged to about this
_GAP, _MARGIN = 16, 24
_CAPTION_LINES = 2
_FONT, _LINE = 13, 17
_TITLE, _TITLE_LINE = 16, 22
_DECODED_AT_ONCE = 8


def decode_rows(teacher: Teacher, rows: Sequence[StoredRow]) -> list[np.ndarray]:
    """The picture (H,W,3) uint8 of each row. Rows may differ in size."""
    pictures: dict[int, np.ndarray] = {}
    shapes: dict[torch.Size, list[int]] = {}
    for index, row in enumerate(rows):
        shapes.setdefault(row.latent.shape, []).append(index)
    for places in shapes.values():
        for start in range(0, len(places), _DECODED_AT_ONCE):
            part = places[start : start + _DECODED_AT_ONCE]
            decoded = teacher.decode(torch.stack([rows[place].latent for place in part]))
            pictures |= dict(zip(part, decoded, strict=True))
    return [pictures[index] for index in range(len(rows))]


def sample_sheet(
    pictures: Sequence[np.ndarray], captions: Sequence[str], title: str, subtitle: str
) -> bytes:
    """A PNG of `pictures` (each (H,W,3) uint8), as near to a square as whole rows allow.

    Small pictures are enlarged by repeating pixels, so that what is seen is what is stored. Long
    captions are cut.
    """
    if not pictures:
        raise ValueError("sample_sheet got no pictures; expected at least one")
    shown = [_enlarged(picture) for picture in pictures]
    width = max(picture.shape[1] for picture in shown)
    height = max(picture.shape[0] for picture in shown)
    columns = math.ceil(math.sqrt(len(shown)))
    lines = math.ceil(len(shown) / columns)
    step_x, step_y = width + _GAP, height + 6 + _CAPTION_LINES * _LINE + _GAP
    head = 2 * _TITLE_LINE + _GAP
    font, bold = _font("DejaVuSans", _FONT), _font("DejaVuSans-Bold", _TITLE)
    needed = max(bold.getlength(title), font.getlength(subtitle))
    grid_width = columns * step_x - _GAP
    size = (
        2 * _MARGIN + math.ceil(max(grid_width, needed)),
        2 * _MARGIN + head + lines * step_y - _GAP,
    )
    canvas = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, _MARGIN), title, fill=_INK, font=bold)
    draw.text((_MARGIN, _MARGIN + _TITLE_LINE + 2), subtitle, fill=_FAINT, font=font)
    for index, (picture, caption) in enumerate(zip(shown, captions, strict=True)):
        line, column = divmod(index, columns)
        left = _MARGIN + column * step_x
        top = _MARGIN + head + line * step_y
        inset = ((width - picture.shape[1]) // 2, (height - picture.shape[0]) // 2)
        canvas.paste(Image.fromarray(picture), (left + inset[0], top + inset[1]))
        draw.rectangle((left - 1, top - 1, left + width, top + height), outline=(225, 227, 230))
        for number, text in enumerate(wrapped(caption, font, width)):
            draw.text((left, top + height + 6 + number * _LINE), text, fill=_INK, font=font)
    return encode_png(np.asarray(canvas))


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in at most two lines that fit into `width` pixels; "…" where it was cut."""
    words, lines = text.split(), []
    while words and len(lines) < _CAPTION_LINES:
        last = len(lines) == _CAPTION_LINES - 1
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        line, words = " ".join(words[:count]), words[count:]
        cut = bool(words and last) or font.getlength(line) > width
        while cut and len(line) > 1 and font.getlength(f"{line}…") > width:
            line = line[:-1].rstrip()
        lines.append(f"{line}…" if cut else line)
    return lines


def _enlarged(picture: np.ndarray) -> np.ndarray:
    scale = max(1, round(_CELL / max(picture.shape[:2])))
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font that comes with matplotlib: the same on every machine."""
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(str(path), size)
