"""Running other people's files as they are: imports, recorded random numbers, recorded calls.

Nothing of a reference is copied. Its modules are imported from a clone; packages that they import
and we do not install are replaced by empty stand-ins, which is safe because the functions that are
run do not use them.
"""

import importlib
import importlib.machinery
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import nn

from dmd_core.denoiser import RawNetwork

Tensors = dict[str, torch.Tensor]
# What a reference computed is kept under this prefix; everything else in a case is an input.
THEIRS = "theirs."


@dataclass(frozen=True)
class Networks:
    """The raw networks of the real and of the fake score, as `dmd_core` takes them."""

    real: RawNetwork
    fake: RawNetwork


@dataclass(frozen=True)
class Case:
    """One run of a reference: `tensors` are its inputs and, under `THEIRS`, its results.

    `files`, relative to the clone, hold what was run. With `networks`, ours can be computed end to
    end; the golden data keep their outputs instead.
    """

    name: str
    files: tuple[str, ...]
    tensors: Tensors
    networks: Networks | None = None


def theirs_of(tensors: Tensors) -> Tensors:
    """What the reference computed, without the prefix."""
    return {
        name.removeprefix(THEIRS): value
        for name, value in tensors.items()
        if name.startswith(THEIRS)
    }


def add_clone(clone: Path, *, stand_ins: Sequence[str], bare: Sequence[str] = ()) -> None:
    """Make the modules of `clone` importable, after ours.

    `stand_ins` are modules to replace where they are not installed; `bare` are packages of the
    clone whose `__init__` is not run, because it imports every method and network there is.
    """
    sys.path.append(str(clone))
    for name in stand_ins:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            sys.modules[name] = _stand_in(name)
    for name in bare:
        package = types.ModuleType(name)
        package.__path__ = [str(clone / name.replace(".", "/"))]
        sys.modules[name] = package
        parent, _, child = name.rpartition(".")
        setattr(importlib.import_module(parent), child, package)


def _stand_in(name: str) -> types.ModuleType:
    module = mock.MagicMock(name=name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    return module


@contextmanager
def recorded_draws(*functions: str) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What `torch.<function>` returned, in order, while the body ran."""
    draws: dict[str, list[torch.Tensor]] = {name: [] for name in functions}

    def recording(name: str):
        real = getattr(torch, name)

        def draw(*args, **kwargs) -> torch.Tensor:
            value = real(*args, **kwargs)
            draws[name].append(value.detach().clone())
            return value

        return draw

    with ExitStack() as stack:
        for name in functions:
            stack.enter_context(mock.patch.object(torch, name, recording(name)))
        yield draws


class Call(NamedTuple):
    """One call of a module: its positional arguments and its output."""

    args: tuple
    output: torch.Tensor


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[list[Call]]:
    """The calls of `module`, in order, while the body ran."""
    calls: list[Call] = []

    def keep(_module: nn.Module, args: tuple, output) -> None:
        calls.append(Call(args, getattr(output, "sample", output).detach().clone()))

    handle = module.register_forward_hook(keep)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def shake(module: nn.Module, generator: torch.Generator, std: float) -> None:
    """Add noise to every parameter: two copies of one network then say different things, and a
    zero-initialised last layer says something."""
    for parameter in module.parameters():
        parameter.add_(std * torch.randn(parameter.shape, generator=generator))
