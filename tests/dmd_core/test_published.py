"""Stable Diffusion 1.5 and XL as large as they are, random weights, on a CPU: pairs and export.

No training step: student, fake score and teacher with Adam's state take 29 GB for SD 1.5 in
mixed precision; `benchmarks/architectures.py` does that, through the commands, on what has room.
"""

from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.published import ARCHITECTURES, write_published
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.diffusers_networks import DiffusersNetwork
from dmd_core.export import export_student
from dmd_core.noise import sample_noise
from dmd_core.student import Student
from dmd_core.teacher import load_teacher
from tests.dmd_core.family_calls import plain

pytestmark = pytest.mark.slow

# Pixels: their own 512 and 1024 take sixteen times as long.
SIDE = {"sd15": 128, "sdxl": 256}
SOLVER = {"sd15": "pndm", "sdxl": "euler"}
GIGABYTES = {"sd15": 6, "sdxl": 17}  # all networks in float32, and what passes hold


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_pairs_and_export(name, tmp_path):
    if psutil.virtual_memory().available < GIGABYTES[name] * 1e9:
        pytest.skip(f"needs {GIGABYTES[name]} GB of free memory")
    write_published(name, tmp_path / "teacher")
    side = SIDE[name]
    teacher = load_teacher(str(tmp_path / "teacher"), size=(side, side))
    assert teacher.latent_shape() == (4, *2 * (ARCHITECTURES[name].unet["sample_size"],))
    eps = sample_noise([1], teacher.latent_shape(side, side))
    pair = teacher.solve(eps, ["a red fox"], solver=SOLVER[name], steps=2, guidance_scale=7.5)
    own = teacher.pipeline(  # the same networks: two copies would take twice the memory
        "a red fox", latents=eps, height=side, width=side, num_inference_steps=2,
        guidance_scale=7.5, output_type="latent",
    ).images  # fmt: skip
    assert torch.isfinite(pair).all() and own.std() > 0.1
    difference = float((pair - own).abs().max())
    print(f"{name}, pairs: {difference:.1e} of {float(own.abs().max()):.1f}")
    assert difference <= 1e-4
    assert teacher.decode(pair).shape == (1, side, side, 3)

    student = Student.one_step(NetworkDenoiser(DiffusersNetwork(teacher.model), teacher.schedule))
    with torch.no_grad():
        expected = student(eps, teacher.encode_prompts(["a red fox"]))
    export_student(
        teacher, teacher.model.state_dict(), str(tmp_path / "student"),
        timesteps=(999,), card={}, dtype=torch.float16,  # loses nothing: the weights come from it
    )  # fmt: skip
    del teacher, student
    found = _drawn(tmp_path / "student", eps, side)
    relative = float((found - expected).abs().max() / expected.abs().max())
    print(f"{name}, export: {relative:.1e} of the largest")
    assert relative <= 1e-4


def _drawn(folder: Path, eps: torch.Tensor, side: int) -> torch.Tensor:
    return plain(str(folder))(
        "a red fox", latents=eps, height=side, width=side, num_inference_steps=1,
        guidance_scale=0.0, output_type="latent",
    ).images  # fmt: skip
