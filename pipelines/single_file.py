"""Single-file checkpoints (the format of most fine-tunes): converted once into a pipeline folder.

diffusers loads them: the weights from the file, everything else from a configuration folder.
"""

import hashlib
import json
from pathlib import Path

import diffusers
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError

from dmd_core.precision import stored_dtype
from dmd_core.teacher_files import INDEX, TEXTS, TeacherError
from pipelines.local_folders import made_once

# What diffusers raises for a checkpoint and a configuration that do not belong together.
_UNFIT = (
    SingleFileComponentError, SafetensorError, OSError, ValueError, KeyError, RuntimeError,
)  # fmt: skip


def converted(checkpoint: Path, config: Path) -> str:
    """This machine's pipeline folder of the weights in `checkpoint` and the networks, scheduler and
    tokenizers that the folder `config` describes. Raises `TeacherError` where they do not fit."""
    state = checkpoint.stat()
    inputs = [str(checkpoint.resolve()), state.st_size, state.st_mtime_ns, _texts(config)]
    return made_once("single-files", inputs, lambda target: _convert(checkpoint, config, target))


def _texts(config: Path) -> dict[str, str]:
    """Name → content of what a conversion reads of the configuration."""
    files = [file for text in TEXTS for file in config.rglob(text) if file.is_file()]
    digests = {}
    for file in files:
        with open(file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        digests[file.relative_to(config).as_posix()] = digest
    return digests


def _convert(checkpoint: Path, config: Path, target: Path) -> None:
    kind = str(json.loads((config / INDEX).read_text()).get("_class_name"))
    load = getattr(getattr(diffusers, kind, None), "from_single_file", None)
    if load is None:
        raise TeacherError(
            f"teacher.single_file_config {config} is of a {kind}, of which diffusers reads no "
            "single-file checkpoints; save the pipeline as a folder (save_pretrained) instead"
        )
    try:
        pipeline = load(
            str(checkpoint),
            config=str(config),
            local_files_only=True,
            torch_dtype=stored_dtype([checkpoint]),  # nothing is rounded, no disk is wasted
        )
    except _UNFIT as error:
        raise TeacherError(
            f"{checkpoint} cannot be loaded as a {kind} of the configuration {config}: "
            f"{' '.join(str(error).split())[:400]}. Is it a checkpoint of that very model, with "
            "its text encoders and VAE in it?"
        ) from error
    pipeline.save_pretrained(str(target), safe_serialization=True)
