"""One resolver: a URL plus options → one filesystem object for every read and write.

The same object goes explicitly to Ray Data, Ray Train, checkpoints and reports. A bare `s3://`
string inside a Ray call would resolve the bucket's region against AWS and fail on any other store.
"""

import os
import sys
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

import pyarrow.fs
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from dmd_core.files import is_local, join, store_errors
from pipelines.config import NO_CREDENTIALS, StorageSection

# Replies that say "not now", whatever their HTTP status.
_NOT_NOW = (
    "RequestTimeout", "SlowDown", "Throttling", "OperationAborted", "InternalError",
    "ServiceUnavailable",
)  # fmt: skip


class StoreUrlError(ValueError):
    """A URL of a store that cannot be used as it is written."""


class _ObjectStoreHandler(pyarrow.fs.FSSpecHandler):
    """An object store has no folders to make: s3fs would ask for the bucket, which keys for one
    prefix may not, and create it where it thinks that there is none."""

    def create_dir(self, path: str, recursive: bool) -> None:
        pass


@dataclass(frozen=True)
class Store:
    """A folder: `fs` (fsspec) and `root`, the path inside it, without scheme."""

    fs: AbstractFileSystem
    root: str

    @property
    def arrow(self) -> pyarrow.fs.FileSystem:
        """The same filesystem for pyarrow and Ray."""
        if is_local(self.fs):
            return pyarrow.fs.LocalFileSystem()
        return pyarrow.fs.PyFileSystem(_ObjectStoreHandler(self.fs))

    @property
    def url(self) -> str:
        return self.root if is_local(self.fs) else f"s3://{self.root}"

    def path(self, *parts: str) -> str:
        return join(self.root, *parts)

    def at(self, *parts: str) -> "Store":
        return Store(self.fs, self.path(*parts))


def open_store(url: str, options: StorageSection | None = None) -> Store:
    """The store of a local path or `s3://bucket/prefix`. Nothing is contacted yet."""
    options = options or StorageSection()
    scheme = urlsplit(url).scheme
    if scheme == "" or len(scheme) == 1:  # one letter: a Windows drive
        return Store(LocalFileSystem(auto_mkdir=True), os.path.abspath(os.path.expanduser(url)))
    if scheme == "file":
        return Store(LocalFileSystem(auto_mkdir=True), os.path.abspath(urlsplit(url).path))
    if scheme != "s3":
        raise StoreUrlError(
            f"{url}: scheme {scheme!r} is not supported; expected a path or s3:// (for a teacher "
            "also a hub's model, as org/name with its revision)"
        )
    if "@" in urlsplit(url).netloc:
        raise StoreUrlError(NO_CREDENTIALS)
    return Store(_s3(options), url.removeprefix("s3://").rstrip("/"))


def _s3(options: StorageSection) -> AbstractFileSystem:
    import s3fs

    client = {} if options.region is None else {"region_name": options.region}
    return s3fs.S3FileSystem(
        endpoint_url=options.endpoint_url,
        profile=options.profile,
        client_kwargs=client,
        # A cached listing hides what another process wrote since (manifests, checkpoints).
        use_listings_cache=False,
    )


def no_answer(error: BaseException | None) -> bool:
    """True: `error`, or what it was raised from, is a remote store that could not be reached, broke
    off, or said "not now": the same may succeed later. False for a refusal, for settings that are
    missing (credentials, a profile), and for the local disk."""
    if error is None:
        return False
    return _is_transient(error) or no_answer(error.__cause__)


def is_not_now(code: str, status: int = 0) -> bool:
    """Does a reply with this error code (or its HTTP status in place of one) say "not now"?"""
    status = status or (int(code) if code.isdecimal() else 0)
    return code in _NOT_NOW or status in (408, 429) or (status >= 500 and status != 501)


def transient_errors() -> tuple[type[BaseException], ...]:
    """What the client of a remote store raises when it gets no (whole) reply."""
    from aiohttp import ClientError as HttpError
    from botocore import exceptions as boto
    from botocore.parsers import ResponseParserError
    from fsspec.exceptions import FSTimeoutError

    return (
        boto.ConnectionError,
        boto.HTTPClientError,
        boto.IncompleteReadError,
        boto.MetadataRetrievalError,
        ResponseParserError,  # half a reply, or a proxy's page in place of one
        HttpError,
        FSTimeoutError,
    )


def _is_transient(error: BaseException) -> bool:
    if "botocore" not in sys.modules:
        return False
    from botocore.exceptions import ClientError

    if isinstance(error, ClientError):  # a reply; s3fs raises an OSError from it
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return is_not_now(str(code), status)
    return isinstance(error, transient_errors())


def check_writable(store: Store) -> None:
    """Fail at the door: write and remove one small object.

    Raises `PermissionError` for a refusal; a store that does not answer raises what it raises.
    """
    probe = store.path(f".writable-{uuid.uuid4().hex}")
    try:
        if is_local(store.fs):  # elsewhere there are no folders (see `_ObjectStoreHandler`)
            store.fs.makedirs(store.root, exist_ok=True)
        store.fs.pipe_file(probe, b"ok")
        store.fs.rm_file(probe)
    except store_errors() as error:
        if no_answer(error):
            raise
        raise PermissionError(
            f"cannot write to {store.url}: {error}. Expected a writable folder or bucket prefix."
        ) from error
