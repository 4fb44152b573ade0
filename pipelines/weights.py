"""How large the networks of a pipeline folder are, from the headers of their files alone."""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dmd_core.families import family_of, present
from dmd_core.teacher_files import TeacherError, weight_files

DENOISERS = ("unet", "transformer")
# Tables that are looked up, by their names in diffusers' and transformers' models.
_TABLES = re.compile(
    r"(token_embedding|position_embedding|class_embedding|shared|embed_tokens|"
    r"relative_attention_bias)\.weight$"
)
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class WeightsError(ValueError):
    """A folder whose weights cannot be looked at."""


@dataclass(frozen=True)
class Weights:
    """One network: the shape of each of its tensors."""

    part: str
    shapes: dict[str, tuple[int, ...]]

    @property
    def parameters(self) -> int:
        return sum(map(prod, self.shapes.values()))

    @property
    def matrices(self) -> int:
        """Parameters of linear layers and convolutions, without their biases."""
        return sum(
            prod(shape)
            for name, shape in self.shapes.items()
            if len(shape) > 1 and name.endswith(".weight") and not _TABLES.search(name)
        )

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of low-rank adapters on the layers whose names end in one of `targets`."""
        ends = tuple(f".{target}.weight" for target in targets)
        named = ((_renamed(name), shape) for name, shape in self.shapes.items())
        layers = (shape for name, shape in named if f".{name}".endswith(ends))
        return sum(rank * (shape[0] + prod(shape[1:])) for shape in layers)


def _renamed(name: str) -> str:
    """As diffusers calls it once it is loaded: attention of old pixel models had other names."""
    block, _, layer = name.removesuffix(".weight").rpartition(".")
    return f"{block}.{_ATTENTION[layer]}.weight" if layer in _ATTENTION else name


def pipeline_weights(folder: str) -> list[Weights]:
    """Every network of a teacher's folder that is loaded: no safety checker. Raises
    `WeightsError`, and `TeacherError` for a folder that is no teacher's."""
    found = []
    for part in present(folder, family_of(folder)):
        files = _files(Path(folder) / part)
        if files:
            found.append(Weights(part, _shapes(files)))
    return found


def denoiser_of(weights: list[Weights]) -> Weights:
    """The network that is distilled."""
    for part in weights:
        if part.part in DENOISERS:
            return part
    raise WeightsError(f"none of {', '.join(DENOISERS)} has weights in the teacher's folder")


def _files(folder: Path) -> list[Path]:
    """Those that are loaded, whole or cut."""
    try:
        return weight_files(folder)
    except TeacherError as error:
        raise WeightsError(f"{folder}/{error}") from error


def _shapes(files: list[Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise WeightsError(f"{path} cannot be read: {error}") from error
    return shapes
