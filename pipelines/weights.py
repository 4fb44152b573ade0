"""How large the networks of a pipeline folder are, from the headers of their files alone."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

# What diffusers and transformers call the file of a network that is not cut.
_WHOLE = ("diffusion_pytorch_model", "model")
DENOISERS = ("unet", "transformer")


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

    def adapters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Parameters of low-rank adapters on the layers whose names end in one of `targets`."""
        ends = tuple(f".{target}.weight" for target in targets)
        layers = (shape for name, shape in self.shapes.items() if f".{name}".endswith(ends))
        return sum(rank * (shape[0] + prod(shape[1:])) for shape in layers)


def pipeline_weights(folder: str, variant: str | None = None) -> list[Weights]:
    """Every network of a pipeline folder that has weights; raises `WeightsError`."""
    try:
        index = json.loads((Path(folder) / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} has no readable model_index.json: {error}") from error
    parts = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]
    found = []
    for part in parts:
        files = _files(Path(folder) / part, variant)
        if files:
            found.append(Weights(part, _shapes(files)))
    return found


def denoiser_of(weights: list[Weights]) -> Weights:
    """The network that is distilled."""
    for part in weights:
        if part.part in DENOISERS:
            return part
    raise WeightsError(f"none of {', '.join(DENOISERS)} has weights in the teacher's folder")


def _files(folder: Path, variant: str | None) -> list[Path]:
    """Those that are loaded: of the variant, whole or cut."""
    middle = f".{variant}" if variant else ""
    for stem in _WHOLE:
        for index in (
            folder / f"{stem}.safetensors.index{middle}.json",
            folder / f"{stem}{middle}.safetensors.index.json",
        ):
            if index.is_file():
                names = set(json.loads(index.read_text())["weight_map"].values())
                return sorted(folder / name for name in names)
        whole = folder / f"{stem}{middle}.safetensors"
        if whole.is_file():
            return [whole]
    return sorted(folder.glob("*.safetensors"))


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
