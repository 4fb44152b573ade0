"""Stable Diffusion 1.5 and XL as large as they are, random weights, on a CPU: pairs and export.

No training step: student, fake score and teacher with Adam's state take 29 GB for SD 1.5 in
mixed precision; `benchmarks/architectures.py` does that, through the commands, on what has room.
"""

import ctypes
import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest
import torch
from diffusers import DiffusionPipeline

from benchmarks.published import ARCHITECTURES
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.diffusers_networks import DiffusersNetwork
from dmd_core.export import export_student
from dmd_core.noise import sample_noise
from dmd_core.student import Student
from dmd_core.teacher import Teacher, load_teacher

pytestmark = pytest.mark.slow

# Pixels: their own 512 and 1024 take sixteen times as long.
SIDE = {"sd15": 128, "sdxl": 256}
SOLVER = {"sd15": "pndm", "sdxl": "euler"}
GIGABYTES = {"sd15": 5, "sdxl": 15}  # of all networks in float32


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def published(request) -> Iterator[tuple[str, str]]:
    """(name, folder). Written by another process, whose memory goes with it; pytest's own folders
    would keep the gigabytes of three runs."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.published", request.param, f"{folder}/teacher"]
        subprocess.run(command, check=True)
        yield request.param, f"{folder}/teacher"


def loaded(name: str, folder: str) -> Teacher:
    gc.collect()  # the networks of the test before this one, which the allocator would keep
    ctypes.CDLL(None).malloc_trim(0)
    if psutil.virtual_memory().available < GIGABYTES[name] * 1e9:
        pytest.skip(f"{name} needs {GIGABYTES[name]} GB of free memory")
    return load_teacher(folder, size=(SIDE[name], SIDE[name]))


def test_pairs(published):
    name, folder = published
    teacher, side = loaded(name, folder), SIDE[name]
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


def test_export(published):
    name, folder = published
    teacher, side = loaded(name, folder), SIDE[name]
    eps = sample_noise([1], teacher.latent_shape(side, side))
    student = Student.one_step(NetworkDenoiser(DiffusersNetwork(teacher.model), teacher.schedule))
    with torch.no_grad():
        expected = student(eps, teacher.encode_prompts(["a red fox"]))
    target = str(Path(folder).parent / "student")
    export_student(
        teacher, teacher.model.state_dict(), target,
        timesteps=(999,), card={}, dtype=torch.float32,
    )  # fmt: skip
    del teacher, student
    found = DiffusionPipeline.from_pretrained(target)(
        "a red fox", latents=eps, height=side, width=side, num_inference_steps=1,
        guidance_scale=0.0, output_type="latent",
    ).images  # fmt: skip
    relative = float((found - expected).abs().max() / expected.abs().max())
    print(f"{name}, export: {relative:.1e} of the largest")
    assert relative <= 1e-4
