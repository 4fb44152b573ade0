"""The real pictures' features, kept beside the teacher: what retrieval compares with.

Two files in the teacher's folder: `gallery.safetensors` (features, float16) and `gallery.json`
(the name of each picture, and whether it was held out of training). Data only, no pictures.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

_FEATURES, _NAMES = GALLERY_FILES = "gallery.safetensors", "gallery.json"


@dataclass(frozen=True)
class Gallery:
    """N real pictures: captions, held-out flags (N,) bool, features (N,d) float16."""

    captions: tuple[str, ...]
    held_out: np.ndarray
    features: np.ndarray

    def __post_init__(self) -> None:
        sizes = len(self.captions), len(self.held_out), len(self.features)
        if len(set(sizes)) != 1:
            raise ValueError(
                f"gallery has {sizes[0]} captions, {sizes[1]} held-out flags, {sizes[2]} features; "
                "expected one of each per picture"
            )


def save_gallery(directory: str, gallery: Gallery) -> None:
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    features = np.ascontiguousarray(gallery.features, dtype=np.float16)
    save_file({"features": features}, folder / _FEATURES)
    names = {
        "captions": list(gallery.captions),
        "held_out": [bool(flag) for flag in gallery.held_out],
    }
    (folder / _NAMES).write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")


def load_gallery(directory: str) -> Gallery | None:
    """The gallery of a teacher's folder. None: this teacher has none, retrieval is not measured."""
    folder = Path(directory)
    present = [name for name in (_FEATURES, _NAMES) if (folder / name).is_file()]
    if not present:
        return None
    if len(present) == 1:
        raise ValueError(f"{folder} has {present[0]} alone; expected both {_FEATURES} and {_NAMES}")
    try:
        names = json.loads((folder / _NAMES).read_text(encoding="utf-8"))
        captions, held_out = tuple(names["captions"]), np.array(names["held_out"], dtype=bool)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / _NAMES} is not a gallery: expected the lists captions and held_out"
        ) from error
    return Gallery(captions, held_out, load_file(folder / _FEATURES)["features"])
