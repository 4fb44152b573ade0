"""Model folders from a Hugging Face hub: an id pinned to a commit → a local folder.

huggingface_hub downloads, each file once per machine, and its environment variables hold: HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN. Only data is asked for (JSON, text, tokenizer models,
safetensors): no pickle and no code ever reaches the disk.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# Its HTTP client's errors, and its own: a file that is nowhere to be had is an OSError.
_FAILURES = (HTTPError, OSError)


class HubError(ValueError):
    """A model that a hub does not give: not there, not allowed, or out of reach."""


def is_hub_id(name: str) -> bool:
    """Could `name` be `org/name`, and is it no path of this machine?"""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def how_to_pin(hub_id: str) -> str:
    """Where a person finds the commit."""
    return (
        "a branch may move while a run goes on, so a model of a hub needs the 40 hexadecimal "
        "digits of a commit: they stand on the model's page under Files and versions → History, or "
        f"are printed by `git ls-remote {constants.ENDPOINT}/{hub_id} HEAD`"
    )


def hub_file(hub_id: str, revision: str, name: str) -> Path:
    """One file of a model at a commit. Raises `HubError`."""
    try:
        return Path(hf_hub_download(hub_id, name, revision=revision))
    except _FAILURES as error:
        raise _in_words(error, hub_id, revision) from error


def hub_folder(hub_id: str, revision: str, wanted: Sequence[str]) -> Path:
    """The folder of a model at a commit, with the files that match `wanted`. Raises `HubError`."""
    try:
        folder = snapshot_download(hub_id, revision=revision, allow_patterns=[*wanted])
    except _FAILURES as error:
        raise _in_words(error, hub_id, revision) from error
    return Path(folder)


def pinned(name: str) -> tuple[str, str]:
    """`org/name@<commit>` → (id, commit). Raises `HubError` for a name without its commit."""
    hub_id, _, revision = name.partition("@")
    if not COMMIT.fullmatch(revision):
        raise HubError(f"{name}: expected {hub_id}@<commit>; {how_to_pin(hub_id)}")
    return hub_id, revision


def _in_words(error: Exception, hub_id: str, revision: str) -> HubError:
    """One paragraph. The order is that of the classes: gated is also "not found"."""
    model = f"{hub_id} at commit {revision[:12]}…"
    if isinstance(error, GatedRepoError):
        return HubError(
            f"{model}: {constants.ENDPOINT} gives this model only to those who accepted its "
            "licence. Accept it on the model's page and set HF_TOKEN on every machine of the run, "
            "or use a local copy."
        )
    if isinstance(error, RevisionNotFoundError):
        return HubError(f"{model}: {constants.ENDPOINT} has the model, but not this commit")
    if isinstance(error, RepositoryNotFoundError):
        return HubError(
            f"{model}: {constants.ENDPOINT} has no such model (a private one needs HF_TOKEN)"
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 404:
        return HubError(f"{model} lacks a file: {_one_line(error)}")
    reach = (
        "HF_HUB_OFFLINE is set"
        if is_offline_mode()
        else f"{constants.ENDPOINT} could not be reached ({_one_line(error.__cause__ or error)})"
    )
    return HubError(
        f"{model} is not, or not wholly, in this machine's cache ({constants.HF_HUB_CACHE}), and "
        f"{reach}. Give the path or s3:// URL of a local copy instead, fill the cache where there "
        f"is a network (`hf download {hub_id} --revision {revision}`), or set HF_ENDPOINT to a "
        "mirror that this machine reaches."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
