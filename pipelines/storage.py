"""One resolver: a URL plus options → one filesystem object for every read and write.

The same object goes explicitly to Ray Data, Ray Train, checkpoints and reports. A bare `s3://`
string inside a Ray call would resolve the bucket's region against AWS and fail on any other store.
"""

import os
import tempfile
from dataclasses import dataclass
from urllib.parse import urlsplit

import pyarrow.fs
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from dmd_core.files import is_local, join
from pipelines.config import StorageSection


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
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(self.fs))

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
        raise ValueError(f"{url}: scheme {scheme!r} is not supported; expected a path or s3://")
    if "@" in urlsplit(url).netloc:
        raise ValueError(
            "a store URL must not hold credentials; put them into the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE or a role)"
        )
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


def check_writable(store: Store) -> None:
    """Fail at the door: write and remove one small object."""
    probe = store.path(f".writable-{os.getpid()}")
    try:
        store.fs.makedirs(store.root, exist_ok=True)
        store.fs.pipe_file(probe, b"ok")
        store.fs.rm_file(probe)
    except OSError as error:
        raise PermissionError(
            f"cannot write to {store.url}: {error}. Expected a writable folder or bucket prefix."
        ) from error


def local_copy(store: Store) -> str:
    """A local path with the folder's content: the folder itself, or a copy of the remote one."""
    if is_local(store.fs):
        return store.root
    if not store.fs.exists(store.root):
        raise FileNotFoundError(f"{store.url} does not exist")
    target = tempfile.mkdtemp(prefix="dmd-copy-")
    store.fs.get(store.root + "/", target, recursive=True)
    return target
