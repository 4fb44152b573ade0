"""What transformers leaves unsaid about a pipeline folder's text encoders: are all of their weights
in it, and will another version find them?"""

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from dmd_core.teacher_files import TeacherError, weight_files

# Since 5.6 a CLIP text model has no wrapper of this name around it; files have it or not.
_WRAPPER = "text_model."


def save_pipeline(pipeline: Any, folder: str | Path, **options: Any) -> None:
    """As `pipeline.save_pretrained(folder, **options)`, with the names that published pipelines
    have. Without the wrapper's, versions before 5.6 take all weights of a CLIP text model for
    missing. Versions before 5 read a CLIP tokenizer from vocab.json and merges.txt alone."""
    pipeline.save_pretrained(folder, **options)
    for name, part in pipeline.components.items():
        target = Path(folder) / name
        if isinstance(part, CLIPTextModel):
            wrapped = {_WRAPPER + _bare(key): value for key, value in part.state_dict().items()}
            part.save_pretrained(target, state_dict=wrapped, **options)
        if isinstance(part, CLIPTokenizer):
            tokenizer: Any = part
            tokenizer.backend_tokenizer.model.save(str(target))


def check_complete(folder: Path, encoder: nn.Module) -> None:
    """Are all weights of a text encoder in the files it was loaded from? Those that are in none
    start at random, and only a log says so. Raises `TeacherError`."""
    stored = set()
    for path in weight_files(folder):
        with safe_open(path, framework="numpy") as file:
            stored |= set(map(_bare, file.keys()))
    tied: dict[int, list[str]] = {}  # weights that are one have several names; any may be stored
    for name, weight in encoder.named_parameters(remove_duplicate=False):
        tied.setdefault(id(weight), []).append(_bare(name))
    missing = [names[0] for names in tied.values() if stored.isdisjoint(names)]
    if missing:
        raise TeacherError(
            f"teacher's {folder} lacks {len(missing)} of the weights of a "
            f"{type(encoder).__name__}, such as {missing[0]}; expected all of them"
        )


def _bare(name: str) -> str:
    return name.removeprefix(_WRAPPER)
