"""Are the files of a version there, and have they their size? One listing of their folder tells.

It reads no file, so it is quick for a million rows, and it does not see a flipped bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.manifest_model import Manifest, ManifestFile, generation_folder
from pipelines.storage import Store


@dataclass(frozen=True)
class FileFaults:
    """Files of a version that are not there any more, and those of another size with the bytes that
    each has now."""

    missing: tuple[ManifestFile, ...]
    resized: tuple[tuple[ManifestFile, int], ...]


def list_sizes(root: Store, folder: str) -> dict[str, int]:
    """name → bytes of the files right in `folder` (relative); none if it is not there."""
    try:
        entries = root.fs.ls(root.path(folder), detail=True)
    except FileNotFoundError:
        return {}
    files = (entry for entry in entries if entry["type"] == "file")
    return {entry["name"].rstrip("/").rsplit("/", 1)[-1]: entry["size"] for entry in files}


def data_folder(manifest: Manifest) -> str:
    """Where the version's files lie, relative to the data set's root."""
    return f"{generation_folder(manifest.fingerprint_digest)}/data"


def file_faults(manifest: Manifest, sizes: Mapping[str, int]) -> FileFaults:
    """Compare the version with `sizes`, the listing of its `data_folder`."""
    found = [(file, sizes.get(file_name(file))) for file in manifest.files]
    return FileFaults(
        missing=tuple(file for file, size in found if size is None),
        resized=tuple(
            (file, size) for file, size in found if size is not None and size != file.bytes
        ),
    )


def file_name(file: ManifestFile) -> str:
    """Its name in the `data_folder`."""
    return file.key.rsplit("/", 1)[-1]
