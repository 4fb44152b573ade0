"""Sealed versions made by hand, file by file: for tests of what looks into them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dmd_core.files import write_atomic
from dmd_core.teacher import teacher_revision
from pipelines.config import PairsSection, StorageSection
from pipelines.manifest import commit_manifest, manifest_path
from pipelines.manifest_model import (
    SCHEMA_VERSION,
    ExcludedRows,
    Manifest,
    ManifestBody,
    ManifestFile,
)
from pipelines.pairs import Fingerprint, fingerprint_of, library_versions
from pipelines.seal import Inspector
from pipelines.storage import Store
from pipelines.teacher_actor import TeacherActor, TeacherTask
from tests.pipelines.made_pairs import FINGERPRINT

SECTION = PairsSection(
    solver="ddim", steps=3, guidance_scale=2.0, batch_size=4, rows_per_block=4, threads_per_actor=1
)


def commit_files(
    root: Store,
    names: Sequence[str],
    *,
    fingerprint: Fingerprint = FINGERPRINT,
    excluded: Mapping[str, Sequence[int]] | None = None,
    rejected: Sequence[int] = (),
    prompts_digest: str = "f" * 64,
) -> Manifest:
    """A version of data files that are there. `excluded`: file name → ids left out of it."""
    files = []
    for name in names:
        facts = Inspector(root, fingerprint.digest)(f"{fingerprint.folder}/data/{name}")
        left_out = (excluded or {}).get(name, ())
        rows = np.flatnonzero(np.isin(facts.pair_ids, left_out)).tolist()
        files.append(
            ManifestFile(
                key=facts.key,
                bytes=facts.bytes,
                sha256=facts.sha256,
                rows=len(facts.pair_ids),
                row_groups=facts.row_groups,
                excluded=ExcludedRows(
                    rows=rows, pair_ids=facts.pair_ids[rows].tolist(), duplicates=rows
                ),
            )
        )
    body = ManifestBody(
        schema_version=SCHEMA_VERSION,
        created_by=library_versions(),
        fingerprint=fingerprint.as_dict(),
        fingerprint_digest=fingerprint.digest,
        prompts_digest=prompts_digest,
        files=tuple(files),
        excluded_files=(),
        rejected_ids=tuple(rejected),
        rows=sum(file.rows - len(file.excluded) for file in files),
        statistics={"latent_mean": 0.0, "latent_std": 1.0},
    )
    return commit_manifest(root, body)


def land(root: Store, ids: Sequence[int], digest: str, size: str = "") -> None:
    """A landed table of prompts that asks for `ids`."""
    write_table(root.at("prompts"), f"{digest}{size}.parquet", pa.table({"pair_id": list(ids)}))


def write_table(folder: Store, name: str, table: pa.Table, row_group_rows: int = 4) -> str:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=row_group_rows, write_page_checksum=True)
    path = folder.path(name)
    write_atomic(folder.fs, path, buffer.getvalue())
    return path


def teacher_set(root: Store, teacher_dir: str, count: int, **settings: object) -> Manifest:
    """A version of `count` rows (ids 0, 1, …) that the teacher made; every third row has a
    negative prompt of its own. Files a-0.parquet and b-0.parquet."""
    section = SECTION.model_copy(update=settings)
    fingerprint = fingerprint_of(section, teacher_revision(teacher_dir))
    task = TeacherTask(section, teacher_dir, StorageSection(), root, fingerprint, {})
    actor, folder = TeacherActor(task), root.at(fingerprint.folder, "data")
    names = ["a-0.parquet", "b-0.parquet"]
    for name, ids in zip(names, np.array_split(np.arange(count), 2), strict=True):
        rows = pa.table(
            {
                "pair_id": pa.array(ids, pa.int64()),
                "prompt": [f"a red fox and {i} green apples" for i in ids],
                "seed": pa.array(ids + 100, pa.int64()),
                "negative_prompt": [None if i % 3 else "blue whale" for i in ids],
            }
        )
        write_table(folder, name, actor(rows))
    return commit_files(root, names, fingerprint=fingerprint)


def tamper(root: Store, manifest: Manifest, column: str, pair_id: int, change: float) -> Manifest:
    """Add `change` to the first value of one row's noise or latent, and make the manifest agree."""
    files = list(manifest.files)
    for number, file in enumerate(files):
        path = Path(root.path(file.key))
        table = pq.read_table(path)
        ids = table["pair_id"].to_pylist()
        if pair_id not in ids:
            continue
        values = table[column].to_pylist()
        array = np.frombuffer(values[ids.index(pair_id)], np.float16).copy()
        array[0] += change
        values[ids.index(pair_id)] = array.tobytes()
        place, about = table.column_names.index(column), table.schema.field(column)
        changed = table.set_column(place, about, pa.array(values, about.type))
        write_table(root, file.key, changed)
        facts = Inspector(root, manifest.fingerprint_digest)(file.key)
        files[number] = file.model_copy(update={"bytes": facts.bytes, "sha256": facts.sha256})
    again = manifest.model_copy(update={"files": tuple(files)})
    Path(manifest_path(root, manifest.version)).write_bytes(again.to_bytes())
    return again
