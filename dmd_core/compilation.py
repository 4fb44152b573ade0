"""torch.compile for a network that is called again and again with one shape."""

import torch
from torch import nn

from dmd_core.families import TeacherError


def compile_network(network: nn.Module, device: torch.device) -> None:
    """Compile in place; weights and their names stay as they are.

    The first call with a shape takes a minute or more. Raises `TeacherError` where torch cannot
    compile for `device`.
    """
    try:
        torch.compile(torch.square, dynamic=False)(torch.ones(64, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise TeacherError(
            f"torch cannot compile for {device.type} on this machine: {type(error).__name__}: "
            f"{reason}. It needs a C++ compiler (g++, or the one that CXX names); without, "
            "set pairs.compile to false"
        ) from error
    network.compile(dynamic=False)
