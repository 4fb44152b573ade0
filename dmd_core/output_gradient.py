"""Losses differentiated at the student's output x, before G itself is differentiated.

So each loss's own graph (decoder, LPIPS, fake score) is freed before G's backward pass, every
gradient at x can be measured, and what is not finite is counted and left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Term:
    """A loss attached to G's graph, and its gradient at x as it was before `finite`."""

    loss: torch.Tensor
    gradient: torch.Tensor

    @property
    def norms(self) -> torch.Tensor:
        """‖∂loss/∂x‖ of each sample: (B,)."""
        return finite(self.gradient).flatten(1).norm(dim=1)

    @property
    def non_finite(self) -> torch.Tensor:
        return (~self.gradient.isfinite()).sum()


def differentiate(loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Term:
    """`loss` (B,) differentiated at x, which frees its graph before G's own backward pass; then
    attached to x: the same value, the same gradient."""
    leaf = x.detach().requires_grad_()
    value = loss(leaf)
    (g,) = torch.autograd.grad(value.sum(), leaf)
    attached = value.detach() + ((x - x.detach()) * finite(g)).flatten(1).sum(dim=1)
    return Term(attached, g)


def finite(g: torch.Tensor) -> torch.Tensor:
    return g.nan_to_num(0.0, 0.0, 0.0)
