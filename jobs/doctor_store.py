"""`dmd doctor` on the stores: credentials, reading and writing, conditional writes, the clock."""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from dmd_core.files import is_local, store_errors
from jobs.doctor_checks import Check, one_line
from pipelines.commits import StoreError, check_create_only, list_files
from pipelines.config import StorageSection
from pipelines.storage import Store

_CONTENT = os.urandom(4096)
_CONNECT_SECONDS = 5
# A signature is refused after 15 minutes; leases and schedules compare stamps of machines.
_SKEW_WARN_S, _SKEW_FAIL_S = 5.0, 300.0


def credentials(options: StorageSection) -> Check:
    """Where they come from; never what they are."""
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    advice = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, storage.profile, or a role"
    try:
        found = Session(profile=options.profile).get_credentials()
    except BotoCoreError as error:
        return Check("credentials", "fail", one_line(error), advice)
    if found is None:
        return Check("credentials", "fail", "none found", advice)
    where = {"env": "the environment", "shared-credentials-file": "the shared credentials file"}
    profile = f", profile {options.profile}" if options.profile else ""
    return Check("credentials", "ok", f"from {where.get(found.method, found.method)}{profile}")


def endpoint(options: StorageSection) -> Check | None:
    """Does anything listen there? Asked first, for a client tries a dead address many times."""
    if options.endpoint_url is None:
        return None
    parts = urlsplit(options.endpoint_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), _CONNECT_SECONDS).close()
    except OSError as error:
        return Check(
            "endpoint", "fail", f"{options.endpoint_url} does not answer: {one_line(error)}",
            "correct storage.endpoint_url, or start that server; inside a container localhost is "
            "the container",
        )  # fmt: skip
    return Check("endpoint", "ok", f"{options.endpoint_url} accepts connections")


def check_store(key: str, store: Store) -> list[Check]:
    """Write, read, list, delete, create once; and the store's clock against this machine's."""
    with _probe_folder(store) as probe:
        checks = [_reads_and_writes(key, store.url, probe)]
        if checks[0].status == "fail":
            return checks
        checks.append(_creates_once(key, probe))
        if not is_local(store.fs):
            checks.append(_clock(key, probe))
    return checks


@contextmanager
def _probe_folder(store: Store) -> Iterator[Store]:
    """A folder of our own in the store; nothing of it is left, nor of folders made for it."""
    probe = store.at(f".doctor-{uuid.uuid4().hex[:12]}")
    made = _missing_folders(probe) if is_local(store.fs) else []
    try:
        yield probe
    finally:
        with contextlib.suppress(*store_errors()):  # it has been said already
            if store.fs.exists(probe.root):
                store.fs.rm(probe.root, recursive=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _missing_folders(store: Store) -> list[Path]:
    """The deepest first."""
    path = Path(store.root)
    return [folder for folder in (path, *path.parents) if not folder.exists()]


def _reads_and_writes(key: str, url: str, probe: Store) -> Check:
    name, path, started = f"store: {key}", probe.path("probe"), time.perf_counter()
    try:
        probe.fs.pipe_file(path, _CONTENT)
        read = probe.fs.cat_file(path)
        listed = list_files(probe, probe.root)
        probe.fs.rm_file(path)
        gone = not probe.fs.exists(path)
    except store_errors() as error:
        return Check(name, "fail", f"{url}: {one_line(error)}", _advice(error))
    wrong = [
        what
        for what, bad in (
            ("what was written reads back otherwise", read != _CONTENT),
            ("a new object is not listed", "probe" not in listed),
            ("a deleted object is still there", not gone),
        )
        if bad
    ]
    if wrong:
        advice = "a store with stale reads cannot hold a run; use another"
        return Check(name, "fail", f"{url}: {'; '.join(wrong)}", advice)
    taken = (time.perf_counter() - started) * 1000
    return Check(name, "ok", f"write, read, list, delete in {taken:.0f} ms at {url}")


def _creates_once(key: str, probe: Store) -> Check:
    name = f"conditional put: {key}"
    try:
        check_create_only(probe)
    except StoreError as error:
        advice = "versions, leases and schedules need If-None-Match (a local disk: hard links)"
        return Check(name, "fail", one_line(error), advice)
    except store_errors() as error:
        return Check(name, "fail", one_line(error), _advice(error))
    return Check(name, "ok", "a second writer is refused")


def _clock(key: str, probe: Store) -> Check:
    """By the stamp that the store gives a new object; stamps are whole seconds."""
    name, path = f"clock: {key}", probe.path("clock")
    try:
        before = datetime.now(UTC)
        probe.fs.pipe_file(path, b"")
        after = datetime.now(UTC)
        stamp = probe.fs.info(path).get("LastModified")
    except store_errors() as error:
        return Check(name, "fail", one_line(error), _advice(error))
    if not isinstance(stamp, datetime):
        return Check(name, "skip", "the store stamps no objects")
    return _skew(name, stamp, before, after)


def _skew(name: str, stamp: datetime, before: datetime, after: datetime) -> Check:
    """How far `stamp`, cut to its second, lies outside of the time in which it was made."""
    early = (before - stamp).total_seconds() - 1
    late = (stamp - after).total_seconds()
    skew = max(early, late, 0.0)
    ahead = "ahead of" if early > late else "behind"
    if skew < _SKEW_WARN_S:
        return Check(name, "ok", f"within {max(1, round(skew))} s of the store's")
    found = f"this machine's clock is {skew:.0f} s {ahead} the store's"
    status = "fail" if skew >= _SKEW_FAIL_S else "warn"
    return Check(name, status, found, "set the clock (chrony, ntpd, or the host's time service)")


def _advice(error: BaseException) -> str:
    """What to do about a store's error; the clock, where its reply shows that."""
    skew = _skew_of_reply(error)
    if skew is not None and abs(skew) > _SKEW_FAIL_S:
        return f"this machine's clock differs by {abs(skew):.0f} s from the store's: set the clock"
    if isinstance(error, PermissionError):
        return "give this account the rights to read, write, list and delete there"
    if isinstance(error, FileNotFoundError):
        return "make the bucket first, or correct its name"
    return "see storage.endpoint_url, storage.region and the credentials"


def _skew_of_reply(error: BaseException | None) -> float | None:
    """Seconds between this clock and the Date of the reply that an error was made from."""
    while error is not None:
        reply = getattr(error, "response", None)
        if isinstance(reply, dict):
            stamp = reply.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
            if stamp:
                return (datetime.now(UTC) - parsedate_to_datetime(stamp)).total_seconds()
        error = error.__cause__
    return None
