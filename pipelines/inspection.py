"""What a pair data set holds: versions, generations, who writes, who reads, what is missing.

Only manifests, listings, footers and ids are read here, no pairs. What is damaged is reported with
its name beside what is not, and never ends the look.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bounded import map_bounded
from pipelines.commits import StoreError, read_json
from pipelines.dataset_pins import Pin, read_pins
from pipelines.inspection_facts import GenerationFacts, Overview, VersionFacts
from pipelines.landed import landed_tables
from pipelines.lease import lease_status
from pipelines.manifest import (
    ManifestError,
    NoSuchVersionError,
    list_versions,
    load_manifest,
    log_numbers,
    manifest_path,
)
from pipelines.manifest_model import Manifest, generation_folder
from pipelines.parquet_parts import open_parts
from pipelines.rejects import RejectFileError, read_rejects
from pipelines.run_record import Cost, is_run_record
from pipelines.storage import Store, no_answer
from pipelines.version_files import data_folder, file_faults, list_sizes

_GENERATION = re.compile(r"[0-9a-f]{16}")
_READERS = 16  # footers and small files: the store's response time counts
_NAMED_FILES = 10

Found = TypeVar("Found")


def inspect_dataset(root: Store, *, version: int | None = None) -> Overview:
    """The whole data set, or one `version` and its generation.

    Raises `ManifestError` for a `version` that cannot be read; without one, that is a problem among
    others.
    """
    problems: list[str] = []
    listings = _Listings(root)
    pins = _pins(root, problems)
    if version is None:
        numbers = list_versions(root)
        manifests = [m for number in numbers if (m := _load(root, number, problems))]
        void = _void(root, set(numbers))
        folders = listings.generations()
    else:
        manifests, void = [load_manifest(root, version)], {}
        folders = [generation_folder(manifests[0].fingerprint_digest)]
    rejects = {folder: _rejects(root, folder, problems) for folder in folders}
    for manifest in tuple(manifests):
        found = _file_problems(root, manifest, listings)
        if found and not _stands(root, manifest, asked=version is not None):
            manifests.remove(manifest)  # collected while this looked
        else:
            problems += found
    return Overview(
        url=root.url,
        versions=tuple(_version(root, m, pins, rejects, listings, problems) for m in manifests),
        void=void,
        generations=tuple(
            _generation(root, folder, rejects[folder], listings, problems) for folder in folders
        ),
        lease=_lease(root, problems),
        pins=tuple(pins),
        problems=tuple(problems),
    )


class _Listings:
    """Each folder of the data set is listed once."""

    def __init__(self, root: Store) -> None:
        self._root = root
        self._known: dict[str, dict[str, int]] = {}

    def sizes(self, folder: str) -> dict[str, int]:
        """See `list_sizes`."""
        if folder not in self._known:
            self._known[folder] = list_sizes(self._root, folder)
        return self._known[folder]

    def generations(self) -> list[str]:
        try:
            entries = self._root.fs.ls(self._root.path("generations"), detail=True)
        except FileNotFoundError:
            return []
        names = sorted(entry["name"].rstrip("/").rsplit("/", 1)[-1] for entry in entries)
        return [f"generations/{name}" for name in names if _GENERATION.fullmatch(name)]


# ---------------------------------------------------------------- versions


def _load(root: Store, number: int, problems: list[str]) -> Manifest | None:
    try:
        return load_manifest(root, number)
    except ManifestError as error:
        if root.fs.exists(manifest_path(root, number)):  # else: collected since it was listed
            problems.append(str(error))
        return None


def _stands(root: Store, manifest: Manifest, *, asked: bool) -> bool:
    """Whether a version is still one: collecting takes its manifest before its files.

    Raises `NoSuchVersionError` for one that was `asked` for.
    """
    try:
        load_manifest(root, manifest.version)
    except NoSuchVersionError:
        if asked:
            raise
        return False
    return True


def _file_problems(root: Store, manifest: Manifest, listings: _Listings) -> list[str]:
    """Files of the version that are missing or have another size, by listing alone."""
    faults, number = file_faults(manifest, listings.sizes(data_folder(manifest))), manifest.version
    found = [
        f"{root.path(file.key)}: missing, but version {number} names it" for file in faults.missing
    ]
    found += [
        f"{root.path(file.key)}: {size} bytes, but version {number} says {file.bytes}"
        for file, size in faults.resized
    ]
    if len(found) > _NAMED_FILES:
        more = len(found) - _NAMED_FILES
        found[_NAMED_FILES:] = [f"version {manifest.version}: {more} more files like these"]
    return found


def _version(
    root: Store,
    manifest: Manifest,
    pins: Iterable[Pin],
    rejects: dict[str, dict[int, str]],
    listings: _Listings,
    problems: list[str],
) -> VersionFacts:
    tables = landed_tables(manifest.prompts_digest, listings.sizes("prompts"))
    asked = _footer_rows(root, "prompts", tables, problems) if tables else None
    known = rejects.get(generation_folder(manifest.fingerprint_digest), {})
    reasons = Counter(known.get(i, "no reason is kept") for i in manifest.rejected_ids)
    return VersionFacts(
        version=manifest.version,
        rows=manifest.rows,
        rejected=manifest.rejected,
        excluded=len(manifest.excluded_ids),
        files=len(manifest.files),
        bytes=sum(file.bytes for file in manifest.files),
        asked=asked,
        missing=None if asked is None else asked - manifest.rows,
        fingerprint_digest=manifest.fingerprint_digest,
        fingerprint=manifest.fingerprint,
        prompts_digest=manifest.prompts_digest,
        created_by=manifest.created_by,
        statistics=manifest.statistics,
        pinned_by=tuple(pin.name for pin in pins if manifest.version in pin.versions),
        reasons=dict(reasons.most_common()),
    )


def _void(root: Store, versions: set[int]) -> dict[int, str]:
    found = {}
    for number in log_numbers(root):
        if number not in versions:
            content = read_json(root, manifest_path(root, number))
            if content is not None:  # else: collected since it was listed
                found[number] = str(content.get("reason", ""))
    return found


# ---------------------------------------------------------------- generations


def _generation(
    root: Store,
    folder: str,
    rejects: dict[int, str],
    listings: _Listings,
    problems: list[str],
) -> GenerationFacts:
    data = listings.sizes(f"{folder}/data")
    ledger = [name for name in listings.sizes(f"{folder}/ledger") if _is_entry(name)]
    if rejects:  # which of them were written since?
        ids = _look(root, f"{folder}/ledger", ledger, problems, _pair_ids)
        rows, rejected = sum(map(len, ids)), len(set(rejects).difference(*ids))
    else:
        rows, rejected = _footer_rows(root, f"{folder}/ledger", ledger, problems), 0
    return GenerationFacts(
        folder=folder,
        ledger_rows=rows,
        files=len(data),
        bytes=sum(data.values()),
        rejected=rejected,
        **asdict(Cost.of(_runs(root, folder, listings, problems))),
    )


def _is_entry(name: str) -> bool:
    return name.endswith(".parquet") and not name.endswith(".pending.parquet")


def _footer_rows(root: Store, folder: str, names: list[str], problems: list[str]) -> int:
    """Rows of the tables together, without those that cannot be read."""
    return sum(_look(root, folder, names, problems, lambda file: file.metadata.num_rows))


def _pair_ids(file: pq.ParquetFile) -> list[int]:
    return file.read(columns=["pair_id"])["pair_id"].to_pylist()


def _look(
    root: Store,
    folder: str,
    names: list[str],
    problems: list[str],
    look: Callable[[pq.ParquetFile], Found],
) -> list[Found]:
    """What `look` finds in each of the tables, without those that cannot be read."""

    def read(name: str) -> list[Found]:
        path = root.path(folder, name)
        try:
            with open_parts(root, path) as file:
                return [look(file)]
        except FileNotFoundError:
            return []  # collected since it was listed
        except (pa.ArrowException, KeyError, OSError) as error:
            if no_answer(error):
                raise  # not damage
            problems.append(f"{path}: cannot be read: {error}")
            return []

    return [found for part in map_bounded(read, names, _READERS) for found in part]


def _runs(
    root: Store, folder: str, listings: _Listings, problems: list[str]
) -> list[dict[str, Any]]:
    """What each run of the generation noted about itself."""
    found = []
    for name in sorted(filter(is_run_record, listings.sizes(f"{folder}/runs"))):
        try:
            content = read_json(root, root.path(folder, "runs", name))
        except StoreError as error:
            problems.append(str(error))
            continue
        if content is not None:
            found.append(content)
    return found


# ---------------------------------------------------------------- people


def _rejects(root: Store, folder: str, problems: list[str]) -> dict[int, str]:
    try:
        return read_rejects(root, folder)
    except RejectFileError as error:
        problems.append(str(error))
        return {}


def _pins(root: Store, problems: list[str]) -> list[Pin]:
    try:
        return list(read_pins(root).values())
    except StoreError as error:
        problems.append(str(error))
        return []


def _lease(root: Store, problems: list[str]) -> dict[str, Any] | None:
    try:
        return lease_status(root)
    except StoreError as error:
        problems.append(str(error))
        return None
