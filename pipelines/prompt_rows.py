"""What one row of a prompt file may hold, and the form in which it is kept."""

import re
import unicodedata
from typing import Any, NamedTuple

MAX_PROMPT_CHARACTERS = 10_000
SIDE_STEP = 8  # pixels, at least; a teacher may need more
_MAX_SIDE = 65_536
# Unicode's Cc (control) and Cs (half of a surrogate pair, which UTF-8 cannot hold), less \t \r \n.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_DIGITS = re.compile(r"[0-9]{1,18}")


class BadCellError(ValueError):
    """What is wrong with one row; the place is added by who knows it."""


class PromptRow(NamedTuple):
    """A checked row. None: the recipe's negative prompt, the recipe's size."""

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None


def checked_row(
    prompt: Any, negative: Any, height: Any, width: Any, side_step: int = SIDE_STEP
) -> PromptRow:
    """The row as it is kept: texts in NFC without surrounding white space, class labels in decimal
    digits. `prompt` is a str or an int, the others are as found; height and width are multiples of
    `side_step`. Raises `BadCellError`."""
    if type(prompt) is int:
        if prompt < 0:
            raise BadCellError(f"class label {prompt}; expected 0 or more")
        prompt = str(prompt)
    text = _clean(prompt, "prompt")
    if not text:
        raise BadCellError("empty prompt")
    if negative is None and height is None and width is None:
        return PromptRow(text)
    if negative is not None:
        if not isinstance(negative, str):
            raise BadCellError(f"negative_prompt {negative!r}; expected text")
        negative = _clean(negative, "negative prompt")
    if (height is None) != (width is None):
        given, other = ("height", "width") if width is None else ("width", "height")
        raise BadCellError(f"{given} without {other}; expected both or neither")
    if height is not None:
        height, width = _side("height", height, side_step), _side("width", width, side_step)
    return PromptRow(text, negative, height, width)


def class_label(cell: str) -> int:
    """The label in a cell of text. Raises `BadCellError`."""
    if not _DIGITS.fullmatch(cell.strip()):
        raise BadCellError(f"class label {cell!r}; expected 0, 1, 2, … in decimal digits")
    return int(cell)


def _clean(text: str, what: str) -> str:
    text = (text if text.isascii() else unicodedata.normalize("NFC", text)).strip()
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise BadCellError(
            f"a {what} of {len(text):,} characters; expected at most {MAX_PROMPT_CHARACTERS:,}"
        )
    if not text.isprintable() and (found := _CONTROL.search(text)):
        raise BadCellError(f"control character U+{ord(found[0]):04X}; expected plain text")
    return text


def _side(name: str, cell: object, step: int) -> int:
    value = int(cell) if isinstance(cell, str) and _DIGITS.fullmatch(cell.strip()) else cell
    if type(value) is not int or not 0 < value <= _MAX_SIDE or value % step:
        raise BadCellError(
            f"{name} {cell!r}; expected a positive multiple of {step}, at most {_MAX_SIDE:,}"
        )
    return value
