import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines import commits
from pipelines import manifest as module
from pipelines.commits import StoreError
from pipelines.manifest import (
    ManifestError,
    commit_manifest,
    find_sealed,
    latest_manifest,
    list_versions,
    load_manifest,
    log_numbers,
    void_next_number,
)
from pipelines.manifest_model import SCHEMA_VERSION, ExcludedRows, ManifestBody
from pipelines.storage import Store, open_store
from tests.pipelines.made_pairs import FINGERPRINT


def file_entry(name="a.parquet", **changes):
    entry = {
        "key": f"{FINGERPRINT.folder}/data/{name}",
        "bytes": 10,
        "sha256": "0" * 64,
        "rows": 4,
        "row_groups": [3, 1],
        "excluded": {"rows": [2], "pair_ids": [9], "duplicates": [2]},
    }
    return {**entry, **changes}


def content(**changes):
    made = {
        "schema_version": SCHEMA_VERSION,
        "created_by": {"python": "3"},
        "fingerprint": FINGERPRINT.as_dict(),
        "fingerprint_digest": FINGERPRINT.digest,
        "prompts_digest": "p",
        "files": [file_entry()],
        "excluded_files": [],
        "rejected_ids": [],
        "rows": 3,
        "statistics": {"latent_mean": 0.0},
    }
    return {**made, **changes}


def body(**changes):
    return ManifestBody.model_validate(content(**changes))


@pytest.fixture
def root(tmp_path):
    return open_store(str(tmp_path / "set"))


def test_versions_count_up_and_read_back_equal(root):
    assert list_versions(root) == [] and latest_manifest(root) is None
    first = commit_manifest(root, body())
    second = commit_manifest(root, body(prompts_digest="q"))
    assert (first.version, second.version) == (1, 2)
    assert list_versions(root) == [1, 2]
    assert load_manifest(root, 1) == first and load_manifest(root, 1).digest == first.digest
    assert latest_manifest(root) == second and first.digest != second.digest
    assert first.excluded_ids == (9,) and first.rejected == 0


def test_the_same_on_s3(s3_store):
    first, second = (commit_manifest(s3_store, body()) for _ in range(2))
    assert list_versions(s3_store) == [1, 2]
    assert load_manifest(s3_store, 1) == first and load_manifest(s3_store, 2) == second


def test_the_digest_is_that_of_the_file(root):
    import hashlib

    committed = commit_manifest(root, body())
    with open(module.manifest_path(root, 1), "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == committed.digest


def test_the_newest_version_alone_can_be_what_is_asked_for(root):
    assert find_sealed(root, FINGERPRINT.digest, "p") is None
    commit_manifest(root, body())
    assert find_sealed(root, FINGERPRINT.digest, "p").version == 1
    assert find_sealed(root, "0" * 64, "p") is None
    commit_manifest(root, body(prompts_digest="q"))
    assert find_sealed(root, FINGERPRINT.digest, "p") is None  # readers take version 2
    assert find_sealed(root, FINGERPRINT.digest, "q").version == 2
    commit_manifest(root, body(prompts_digest="q", rejected_ids=[1]))
    assert find_sealed(root, FINGERPRINT.digest, "q") is None  # the rejected row is tried again


def test_a_void_number_is_no_version(root):
    void_next_number(root, 7, "taken over")
    first = commit_manifest(root, body())
    void_next_number(root, 8, "taken over")
    assert log_numbers(root) == [1, 2, 3] and list_versions(root) == [2]
    assert latest_manifest(root) == first and commit_manifest(root, body()).version == 4
    with pytest.raises(
        ManifestError, match=r"000001\.json: no such version; sealed versions: 2, 4"
    ):
        load_manifest(root, 1)


def test_nothing_to_do_is_known_without_ray_or_torch():
    code = "import sys, pipelines.manifest; print({'ray', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---------------------------------------------------------------- commits that go wrong


class LossyFileSystem(MemoryFileSystem):
    """An object store whose replies get lost. `faults`: what happens to the next manifest puts.

    "lost reply": stored, but an error comes back. "lost request": not stored. "exists": stored,
    and the client's own retry meets it. An int: another writer takes the number first.
    """

    cachable = False
    store: dict = {}  # noqa: RUF012
    pseudo_dirs: list = [""]  # noqa: RUF012

    def __init__(self, *faults):
        super().__init__()
        self.store, self.pseudo_dirs, self.faults = {}, [""], list(faults)
        self.honours_conditions = True

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        fault = self.faults.pop(0) if self.faults and ".probe" not in path else None
        if fault == "lost request":
            raise TimeoutError("no reply")
        if isinstance(fault, bytes):
            super().pipe_file(path, fault)
        if mode == "create" and self.honours_conditions and self.exists(path):
            raise FileExistsError("pre-condition failed")
        super().pipe_file(path, value)
        if fault == "lost reply":
            raise OSError("connection reset")
        if fault == "exists":
            raise FileExistsError("pre-condition failed")


def lossy(*faults):
    return Store(LossyFileSystem(*faults), "/set")


@pytest.mark.parametrize("fault", ["lost reply", "exists", "lost request"])
def test_a_lost_reply_neither_doubles_nor_loses_a_version(fault):
    root = lossy(fault)
    committed = commit_manifest(root, body())
    assert committed.version == 1 and list_versions(root) == [1]
    assert load_manifest(root, 1) == committed


def test_a_lost_race_takes_the_next_number_and_leaves_the_winner():
    winner = lossy()
    theirs = commit_manifest(winner, body(prompts_digest="theirs"))
    for taken in (theirs.to_bytes(), b"not JSON", b"[]"):
        root = lossy(taken)
        committed = commit_manifest(root, body())
        assert committed.version == 2 and list_versions(root) == [1, 2]
        assert root.fs.cat_file(module.manifest_path(root, 1)) == taken
        assert load_manifest(root, 2) == committed


def test_a_store_that_never_answers_is_an_error(monkeypatch):
    monkeypatch.setattr(commits.time, "sleep", lambda seconds: None)
    root = lossy(*["lost request"] * 50)
    with pytest.raises(StoreError, match="no reply"):
        commit_manifest(root, body())
    assert list_versions(root) == []


def test_a_store_that_ignores_conditions_is_refused():
    root = lossy()
    root.fs.honours_conditions = False
    with pytest.raises(StoreError, match="If-None-Match is ignored"):
        commit_manifest(root, body())
    assert root.fs.find("/set") == []


def test_a_folder_that_cannot_be_written_is_an_error(root, monkeypatch):
    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(commits.os, "link", refuse)
    with pytest.raises(StoreError, match="read-only"):
        commit_manifest(root, body())


@pytest.mark.parametrize("where", ["local", "s3"])
def test_concurrent_writers_each_get_their_own_number(where, root, request):
    store = root if where == "local" else request.getfixturevalue("s3_store")
    commit_manifest(store, body())
    with ThreadPoolExecutor(6) as pool:
        bodies = [body(prompts_digest=str(number)) for number in range(6)]
        made = list(pool.map(lambda item: commit_manifest(store, item), bodies))
    assert sorted(item.version for item in made) == [2, 3, 4, 5, 6, 7]
    for item in made:
        assert load_manifest(store, item.version) == item
    left = [entry for entry in store.fs.find(store.root) if not entry.endswith(".json")]
    assert left == []


# ---------------------------------------------------------------- manifests that cannot be trusted


@pytest.mark.parametrize(
    "key",
    [
        "../secret.parquet",
        "/etc/passwd",
        "generations/../../secret",
        "generations//a",
        "prompts/a.parquet",
        "generations/a b.parquet",
        "s3://bucket/generations/a",
        f"generations/{'0' * 16}/data/a.parquet",
        "generations/a\n",
    ],
)
def test_keys_outside_the_generation_are_refused(key):
    with pytest.raises(ValueError, match=r"plain path|lies outside"):
        body(files=[file_entry(key=key)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 4}, "rows is 4, but the files hold 3"),
        ({"files": [file_entry(row_groups=[3, 2])]}, "do not add up to 4"),
        ({"files": [file_entry(), file_entry()], "rows": 6}, "listed twice"),
        ({"files": [file_entry(bytes=1 << 60)]}, "less than"),
        ({"fingerprint_digest": "0" * 64}, "not the digest of fingerprint"),
        ({"schema_version": 1}, "this program reads 2 and 3"),
        *(
            ({"files": [file_entry(excluded=excluded)]}, message)
            for excluded, message in (
                ({"rows": [4], "pair_ids": [1]}, "ascending within 4 rows"),
                ({"rows": [-1], "pair_ids": [1]}, "ascending within 4 rows"),
                ({"rows": [2, 1], "pair_ids": [1, 2]}, "ascending within 4 rows"),
                ({"rows": [1, 1], "pair_ids": [1, 2]}, "ascending within 4 rows"),
                ({"rows": [1, 2], "pair_ids": [1]}, "2 excluded rows have 1 ids"),
                ({"rows": [1], "pair_ids": [1], "duplicates": [2]}, "some of the excluded rows"),
            )
        ),
        ({"surprise": 1}, "Extra inputs"),
    ],
)
def test_inconsistent_manifests_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        body(**changes)


def test_a_manifest_of_the_schema_before_keeps_its_digest_and_its_rows(root):
    """It lists the rows that are left out one by one, with a reason each."""
    listed = [
        {"row": 1, "pair_id": 7, "reason": "not asked for"},
        {"row": 3, "pair_id": 9, "reason": "duplicate"},
    ]
    old = content(schema_version=2, files=[file_entry(excluded=listed)], rows=2)
    raw = json.dumps(old | {"version": 1, "commit_id": "0" * 32}, indent=1).encode()
    path = module.manifest_path(root, 1)
    root.fs.makedirs(root.path("manifests"))
    root.fs.pipe_file(path, raw)
    manifest = load_manifest(root, 1)
    assert manifest.files[0].excluded == ExcludedRows(rows=(1, 3), pair_ids=(7, 9), duplicates=(3,))
    assert manifest.digest == hashlib.sha256(raw).hexdigest()
    listed[0]["reason"] = "mood"
    root.fs.pipe_file(path, json.dumps(old | {"version": 1, "commit_id": "0" * 32}).encode())
    with pytest.raises(ManifestError, match=r"000001\.json is not a valid manifest: files\.0"):
        load_manifest(root, 1)


def test_damaged_and_missing_manifests_are_named(root):
    commit_manifest(root, body())
    path = module.manifest_path(root, 1)
    with open(path) as file:
        good = json.load(file)
    for damaged in ("{", "", "[]", json.dumps({**good, "rows": "many"}), json.dumps({"a": 1})):
        with open(path, "w") as file:
            file.write(damaged)
        with pytest.raises(ManifestError, match=r"000001\.json is not a valid manifest"):
            load_manifest(root, 1)
    with open(path, "w") as file:
        json.dump({**good, "version": 7}, file)
    with pytest.raises(ManifestError, match="says it is version 7"):
        load_manifest(root, 1)
    with pytest.raises(ManifestError, match=r"000005\.json: no such version; sealed versions: 1"):
        load_manifest(root, 5)
