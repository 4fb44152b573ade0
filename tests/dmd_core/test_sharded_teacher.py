"""A frozen teacher in shards that computes in bfloat16 is gathered in bfloat16, and stays what it
is."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from dmd_core.networks import DmdNetworks, TrainerSettings
from dmd_core.parallel import Parallel, World, whole
from dmd_core.precision import PrecisionPolicy
from dmd_core.teacher import Teacher, load_teacher
from tests.dmd_core.family_calls import PIXELS, PROMPTS, Families, noise
from tests.dmd_core.tiny_families import SIDE

T = torch.tensor([999, 431])


def _loaded(families: Families, name: str) -> Teacher:
    size = (None, None) if name in PIXELS else (SIDE, SIDE)
    teacher = load_teacher(families.folder(name), size=size)
    random = torch.Generator().manual_seed(0)
    for weight in teacher.model.parameters():
        if weight.ndim == 1:  # of norms, too: those that nothing has trained are exact in bfloat16
            weight += 0.1 * torch.randn(weight.shape, generator=random)
    return teacher


def _sharded(families: Families, name: str, placement: str, compute: torch.dtype) -> Teacher:
    teacher = _loaded(families, name)
    settings = TrainerSettings(
        parallel=Parallel(teacher=placement), precision=PrecisionPolicy(compute)
    )
    DmdNetworks(teacher, settings, World(), teacher.latent_shape(*teacher.size))
    return teacher


def _x0(teacher: Teacher, compute: torch.dtype) -> torch.Tensor:
    eps, cond = noise(teacher), teacher.encode_prompts(PROMPTS)
    with torch.no_grad():
        return teacher.denoiser(compute)(eps * teacher.schedule.init_noise_sigma, T, cond)


@pytest.mark.parametrize(
    ("name", "placement"),
    [("sd", "sharded"), ("sdxl", "offload"), ("sd3", "sharded"), ("flux", "offload"),
     ("pixart", "sharded"), ("edm", "sharded")],
)  # fmt: skip
def test_a_bfloat16_teacher_in_shards_is_the_whole_one_to_its_rounding(families, name, placement):
    plain, teacher = _loaded(families, name), _sharded(families, name, placement, torch.bfloat16)
    exact, expected = _x0(plain, torch.float32), _x0(plain, torch.bfloat16)
    gathered, times = set(), []

    def look(module, arguments, options):
        gathered.update(weight.dtype for weight in module.parameters(recurse=False))

    def look_at_time(module, arguments, options):
        times.append(options["timestep"] if "timestep" in options else arguments[1])

    for block in teacher.model.modules():
        block.register_forward_pre_hook(look, with_kwargs=True)
    teacher.model.register_forward_pre_hook(look_at_time, with_kwargs=True)
    found = _x0(teacher, torch.bfloat16)
    assert gathered == {torch.bfloat16}
    wanted = teacher.schedule.network_time(T) / (1000 if name == "flux" else 1)
    assert torch.equal(times[0], wanted)  # not rounded: 999 would be 1000
    # Weights of norms are rounded, too: as far from the exact result as the whole one is.
    rounding = (expected - exact).abs().max()
    assert 0 < (found - exact).abs().max() < 3 * rounding
    for name, weight in teacher.model.named_parameters():
        assert isinstance(weight, DTensor)
        assert torch.equal(whole(weight), plain.model.get_parameter(name).to(weight.dtype)), name
    _, *layers = (m for m in teacher.model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    assert {layer.weight.dtype for layer in layers} == {torch.bfloat16}


def test_a_float32_teacher_in_shards_is_gathered_as_it_is(families):
    teacher = _sharded(families, "sd3", "sharded", torch.float32)
    expected = _x0(_loaded(families, "sd3"), torch.float32)
    torch.testing.assert_close(_x0(teacher, torch.float32), expected, rtol=0, atol=0)
