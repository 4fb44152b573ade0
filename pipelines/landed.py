"""What is asked for: the ids in landed prompt tables."""

import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from pipelines.commits import StoreError, list_files
from pipelines.manifest_model import Manifest
from pipelines.parquet_parts import open_parts
from pipelines.prompts import LandedPrompts
from pipelines.storage import Store


def landed_ids(root: Store, prompts: LandedPrompts) -> np.ndarray:
    """The ids that are asked for, ascending, int64."""
    return np.sort(np.concatenate([table_ids(root, file.path) for file in prompts.files]))


def table_ids(root: Store, path: str) -> np.ndarray:
    """The ids of one landed table, int64; raises `StoreError` when it cannot be read."""
    try:
        with open_parts(root, path) as file:
            table = file.read(columns=["pair_id"])
    except (pa.ArrowException, OSError) as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    return table["pair_id"].to_numpy()


def landed_tables(digest: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that hold the landed prompts `digest`: one table for each picture size."""
    table = re.compile(rf"{re.escape(digest)}(-\d+x\d+)?\.parquet")
    return sorted(name for name in names if table.fullmatch(name))


def landed_ids_of(root: Store, manifest: Manifest) -> np.ndarray | None:
    """The ids that the version was asked to hold, int64; None: its landed table is gone.

    Raises `StoreError` for a table that cannot be read.
    """
    names = landed_tables(manifest.prompts_digest, list_files(root, root.path("prompts")))
    parts = [table_ids(root, root.path("prompts", name)) for name in names]
    return np.concatenate(parts) if parts else None
