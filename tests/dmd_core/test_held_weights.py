"""A teacher that computes in bfloat16 alone keeps its matrices in it: the same pictures to the last
bit, in less memory."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dmd_core.lora import LoraSettings
from dmd_core.networks import DmdNetworks, TrainerSettings
from dmd_core.parallel import Parallel, World, whole
from dmd_core.precision import PrecisionPolicy
from dmd_core.teacher import Teacher, load_teacher
from tests.dmd_core.family_calls import PIXELS, PROMPTS, Families, noise
from tests.dmd_core.tiny_families import SIDE

SOLVERS = {
    "sd": "dpmsolver++", "sdxl": "euler", "sd3": "flow_euler", "flux": "flow_euler",
    "pixart": "dpmsolver++", "edm": "edm_heun", "ddpm": "ddim",
}  # fmt: skip


def _loaded(families: Families, name: str, compute: torch.dtype, **options) -> Teacher:
    size = (None, None) if name in PIXELS else (SIDE, SIDE)
    return load_teacher(families.folder(name), size=size, compute_dtype=compute, **options)


def _bytes(network: nn.Module) -> int:
    return sum(weight.nbytes for weight in network.parameters())


def _matrices(network: nn.Module) -> set[torch.dtype]:
    """Of all but the first weight."""
    layers = (module for module in network.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    weights = (weight for layer in layers for weight in layer.parameters(recurse=False))
    first = next(network.parameters())
    return {weight.dtype for weight in weights if weight is not first}


def _encoders(teacher: Teacher) -> list[nn.Module]:
    parts = teacher.pipeline.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and part is not None]


@pytest.mark.parametrize("name", list(SOLVERS))
def test_its_samples_are_those_of_a_teacher_that_casts_at_every_use(families, name):
    held, cast = (_loaded(families, name, dtype) for dtype in (torch.bfloat16, torch.float32))
    random = torch.Generator().manual_seed(0)
    for one, other in zip(held.model.parameters(), cast.model.parameters(), strict=True):
        if one.dtype == torch.float32:  # norms that nothing has trained are exact in bfloat16
            one += 0.1 * torch.randn(one.shape, generator=random)
            other.copy_(one)
    found, expected, exact = (
        teacher.solve(
            noise(teacher), PROMPTS, solver=SOLVERS[name], steps=3,
            guidance_scale=1.0 if name in PIXELS else 3.0, compute_dtype=dtype,
        )
        for teacher, dtype in (
            (held, None), (cast, torch.bfloat16), (cast, None)
        )
    )  # fmt: skip
    assert torch.equal(found, expected)
    assert not torch.equal(expected, exact)
    for one, other in zip(
        [held.model, *_encoders(held)], [cast.model, *_encoders(cast)], strict=True
    ):
        assert _matrices(one) == {torch.bfloat16} and _matrices(other) == {torch.float32}
        assert _bytes(one) < 0.8 * _bytes(other)


def test_a_network_that_is_copied_to_be_trained_is_held_when_its_copies_are_made(families):
    teacher = _loaded(families, "sd", torch.bfloat16, to_train=True)
    exact = _loaded(families, "sd", torch.float32)
    assert _matrices(teacher.model) == {torch.float32}
    assert all(_matrices(encoder) == {torch.bfloat16} for encoder in _encoders(teacher))

    settings = TrainerSettings(precision=PrecisionPolicy(torch.bfloat16))
    networks = DmdNetworks(teacher, settings, World(), teacher.latent_shape(*teacher.size))
    assert _matrices(teacher.model) == {torch.bfloat16}
    weights = exact.model.state_dict()
    for copy in (networks.generator, networks.fake):
        assert all(torch.equal(weight, weights[name]) for name, weight in copy.state_dict().items())


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["sd", "flux"])
def test_adapters_learn_the_same_on_a_network_that_is_held(families, monkeypatch, name, strategy):
    """Output and gradients, to the last bit; the adapters themselves stay in float32."""

    def trained(held: bool) -> tuple[DmdNetworks, torch.Tensor]:
        if not held:
            monkeypatch.setattr("dmd_core.networks.hold", lambda network, compute: None)
        teacher = _loaded(families, name, torch.float32)
        settings = TrainerSettings(
            parallel=Parallel(generator=strategy),
            precision=PrecisionPolicy(torch.bfloat16),
            lora=LoraSettings(rank=4, alpha=4),
        )
        networks = DmdNetworks(teacher, settings, World(), teacher.latent_shape(*teacher.size))
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in networks.weights.values():  # B starts at 0: no gradient reaches A
                local = weight.to_local() if isinstance(weight, DTensor) else weight
                local += 0.1 * torch.randn(weight.shape, generator=random)
        x = networks.student_trained(noise(teacher), teacher.encode_prompts(PROMPTS))
        x.square().sum().backward()
        return networks, x.detach()

    (held, x), (cast, expected) = trained(True), trained(False)
    assert torch.equal(x, expected)
    assert {weight.dtype for weight in held.weights.values()} == {torch.float32}
    for key, weight in held.weights.items():
        other = cast.weights[key]
        assert weight.grad is not None and other.grad is not None
        assert torch.equal(whole(weight.grad), whole(other.grad)), key
        assert bool(whole(weight.grad).any()), key
    base = [weight for weight in held.generator.parameters() if not weight.requires_grad]
    bits = sum(w.numel() for w in base if w.dtype == torch.bfloat16)
    assert bits > 0.9 * sum(w.numel() for w in base)
    assert {w.dtype for w in cast.generator.parameters()} == {torch.float32}
