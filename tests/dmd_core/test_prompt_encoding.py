"""Text encoders compute in the precision of the network that their conditions are for."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from dmd_core.teacher import Teacher, load_teacher
from tests.dmd_core.family_calls import PROMPTS, noise
from tests.dmd_core.tiny_families import SIDE

SOLVERS = {"sd": "ddim", "sdxl": "euler", "sd3": "flow_euler", "flux": "flow_euler",
           "pixart": "ddim"}  # fmt: skip


@contextmanager
def products(teacher: Teacher) -> Iterator[set[torch.dtype]]:
    """What dtypes the linear layers of the text encoders give meanwhile."""
    found: set[torch.dtype] = set()
    encoders = [
        part for name, part in teacher.pipeline.components.items()
        if name.startswith("text_encoder") and part is not None
    ]  # fmt: skip
    hooks = [
        layer.register_forward_hook(lambda module, given, output: found.add(output.dtype))
        for encoder in encoders
        for layer in encoder.modules()
        if isinstance(layer, nn.Linear)
    ]
    yield found
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", list(SOLVERS))
def test_text_encoders_compute_as_the_network_does(families, name):
    mixed = load_teacher(families.folder(name), size=(SIDE, SIDE), compute_dtype=torch.bfloat16)
    teacher = families.teacher(name)
    with products(teacher) as exact_products, products(mixed) as mixed_products:
        exact, rounded = (each.encode_prompts(PROMPTS) for each in (teacher, mixed))
    assert exact_products == {torch.float32} and mixed_products == {torch.bfloat16}
    for field in ("text", "pooled", "time_ids"):
        expected, found = getattr(exact, field), getattr(rounded, field)
        assert (expected is None) == (found is None)
        if expected is None or field == "time_ids":
            assert expected is found is None or torch.equal(expected, found)
            continue
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_a_solve_says_what_its_prompts_are_encoded_in(families, name):
    teacher = families.teacher(name)

    def solve(dtype: torch.dtype) -> set[torch.dtype]:
        with products(teacher) as found:
            teacher.solve(
                noise(teacher), PROMPTS, solver=SOLVERS[name], steps=1, guidance_scale=2.0,
                compute_dtype=dtype,
            )  # fmt: skip
        return found

    assert solve(torch.bfloat16) == {torch.bfloat16}
    assert solve(torch.float32) == {torch.float32}
