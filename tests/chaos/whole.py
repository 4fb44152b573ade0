"""Is a data set whole? Looked at from outside, with nothing of the product but its file layout."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq


def sealed_manifests(root: Path) -> list[dict]:
    """All versions of the log, oldest first, without the void numbers."""
    found = [json.loads(path.read_text()) for path in sorted(root.glob("manifests/*.json"))]
    return [manifest for manifest in found if not manifest.get("void")]


def landed_table_ids(root: Path, digest: str) -> set[int]:
    tables = sorted(root.glob(f"prompts/{digest}*.parquet"))
    assert tables, f"no landed table of {digest}"
    ids = [pair_id for table in tables for pair_id in pq.read_table(table)["pair_id"].to_pylist()]
    assert len(set(ids)) == len(ids)
    return set(ids)


def assert_whole(root: Path, rows: int) -> dict:
    """Every version names existing, untouched, readable files that hold each asked row once. The
    newest version has `rows` rows; returns it.
    """
    manifests = sealed_manifests(root)
    assert manifests, "nothing is sealed"
    numbers = [manifest["version"] for manifest in manifests]
    assert numbers == sorted(set(numbers))
    for manifest in manifests:
        _assert_version(root, manifest)
    assert manifests[-1]["rows"] == rows
    for path in root.rglob("*.parquet"):
        pq.ParquetFile(path).close()  # reads the footer
    return manifests[-1]


def assert_settled(root: Path) -> None:
    """Nothing that a killed writer left in the middle of a write is there any more."""
    half = [path for path in root.rglob("*") if ".pending" in path.name]
    assert half == [], f"left over in the middle of a write: {half}"


def _assert_version(root: Path, manifest: dict) -> None:
    ids: list[int] = []
    for file in manifest["files"]:
        path = root / file["key"]
        assert path.exists(), f"version {manifest['version']} names the missing file {path}"
        content = path.read_bytes()
        assert len(content) == file["bytes"], path
        assert hashlib.sha256(content).hexdigest() == file["sha256"], path
        stored = pq.read_table(path, columns=["pair_id"])["pair_id"].to_pylist()
        out = set(file["excluded"].get("rows", ()))
        ids += [pair_id for row, pair_id in enumerate(stored) if row not in out]
    assert len(set(ids)) == len(ids) == manifest["rows"], "a pair is there twice"
    asked = landed_table_ids(root, manifest["prompts_digest"])
    assert set(ids) == asked - set(manifest["rejected_ids"]), "pairs are missing, or too many"


def stored_ids(root: Path, manifest: dict) -> set[int]:
    """Of the rows that belong to the version."""
    found = set()
    for file in manifest["files"]:
        out = set(file["excluded"].get("rows", ()))
        ids = pq.read_table(root / file["key"], columns=["pair_id"])["pair_id"].to_pylist()
        found |= {pair_id for row, pair_id in enumerate(ids) if row not in out}
    return found
