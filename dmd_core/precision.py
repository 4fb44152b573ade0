"""Which arithmetic is done in which precision: a decision, stated once and printed at the start.

float16 is not offered: DMD2's authors and others saw it diverge, for the range of the normalised
gradient is wide.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

# What stays in higher precision whatever the networks compute in, and where.
ISLANDS = {
    "x₀ from the network's output, α, σ": "float64 (dmd_core/schedule.py)",
    "distribution-matching gradient, losses, logits": "float32 (dmd_core/losses.py)",
    "master weights, optimizers, moving average": "float32 (dmd_core/networks.py)",
    "random numbers": "float64, rounded once (dmd_core/noise.py)",
}


def exact_float32() -> None:
    """Make float32 mean float32 on a GPU, in this process: PyTorch's own choice for convolutions is
    TF32, which keeps 10 bits of the mantissa."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def autocast(device: torch.device, compute: torch.dtype) -> torch.autocast:
    """Matrix products and convolutions in `compute`: bfloat16, or float32 (as they are)."""
    mixed = compute == torch.bfloat16
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=mixed)


_STORED = {"F16": torch.float16, "BF16": torch.bfloat16}
# Layers whose weights autocast casts. Those of norms and tables of embeddings it leaves alone.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def hold(network: nn.Module, compute: torch.dtype) -> None:
    """Keep the weights of linear layers and convolutions that are not trained in `compute`, and all
    else in float32, for a network that runs under `autocast` to it alone. Autocast would cast those
    weights anew at every use: the numbers are the same to the last bit, in half the memory. Not the
    very first weight, whose dtype models of diffusers and transformers take for that of what they
    compute outside of layers. It converts a tensor at a time: the old network and the new one are
    never both whole in memory."""
    first = next(network.parameters(), None)
    cast = {
        weight
        for module in network.modules()
        if isinstance(module, _CAST)
        for weight in module.parameters(recurse=False)
        if weight is not first and not weight.requires_grad
    }
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(compute if tensor in cast else torch.float32)


def stored_dtype(files: Iterable[Path]) -> torch.dtype:
    """float16 or bfloat16 if every floating-point tensor in the safetensors files is in that; else
    float32. Raises `SafetensorError` that names the file that is none."""
    found = set()
    for path in files:
        try:
            with safe_open(path, framework="numpy") as file:
                found |= {file.get_slice(name).get_dtype() for name in file.keys()}
        except SafetensorError as error:
            raise SafetensorError(f"{path}: {error}") from error
    found = {name for name in found if name.startswith(("F", "BF"))}
    return _STORED.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


@dataclass(frozen=True)
class PrecisionPolicy:
    """`compute`: dtype of matrix products and convolutions inside the networks and text encoders
    (autocast), and of the weights that only these see and nothing trains."""

    compute: torch.dtype = torch.float32

    @staticmethod
    def named(mixed_precision: str) -> "PrecisionPolicy":
        """diffusers' names: "no" or "bf16"."""
        dtypes = {"no": torch.float32, "bf16": torch.bfloat16}
        if mixed_precision not in dtypes:
            raise ValueError(f"mixed_precision {mixed_precision!r}; expected {' or '.join(dtypes)}")
        return PrecisionPolicy(dtypes[mixed_precision])

    def describe(self) -> dict[str, str]:
        return {"networks": str(self.compute).removeprefix("torch.")} | ISLANDS
