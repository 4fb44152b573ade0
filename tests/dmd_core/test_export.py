"""Station 8: plain diffusers samples the exported folder and gives the in-memory student's x₀."""

import copy
import subprocess
import sys

import torch
from diffusers import DiffusionPipeline

from dmd_core.denoiser import DiffusersNetwork, NetworkDenoiser
from dmd_core.export import export_student
from dmd_core.noise import sample_noise
from dmd_core.student import Student
from dmd_core.teacher import load_teacher


def test_exported_student_equals_the_student_in_memory(tiny_teacher_dir, tmp_path):
    teacher = load_teacher(tiny_teacher_dir)
    torch.manual_seed(1)
    unet = copy.deepcopy(teacher.pipeline.unet)
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    prompts = ["red fox", "green apple"]
    eps = sample_noise([5, 6], teacher.latent_shape())
    student = Student.one_step(NetworkDenoiser(DiffusersNetwork(unet), teacher.schedule))
    with torch.no_grad():
        expected = student(eps, teacher.encode_prompts(prompts))

    target = str(tmp_path / "student")
    export_student(
        teacher, unet.state_dict(), target, timesteps=(999,), card={"step": 1}, dtype=torch.float32
    )
    pipeline = DiffusionPipeline.from_pretrained(target)
    latents = pipeline(
        prompts, latents=eps, num_inference_steps=1, guidance_scale=0, output_type="latent"
    ).images
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert pipeline.scheduler.timesteps.tolist() == [999]


def test_export_leaves_the_teacher_as_it_was_and_replaces_an_older_student(
    tiny_teacher_dir, tmp_path
):
    teacher = load_teacher(tiny_teacher_dir)
    before = {name: value.clone() for name, value in teacher.pipeline.unet.state_dict().items()}
    scheduler = type(teacher.pipeline.scheduler)
    zeros = {name: torch.zeros_like(value) for name, value in before.items()}
    for _ in range(2):
        export_student(
            teacher, zeros, str(tmp_path / "s"), timesteps=(999,), card={}, dtype=torch.float16
        )
    after = teacher.pipeline.unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(teacher.pipeline.scheduler) is scheduler
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_picture_needs_none_of_our_code(tiny_teacher_dir, tmp_path):
    teacher = load_teacher(tiny_teacher_dir)
    target = str(tmp_path / "student")
    export_student(
        teacher,
        teacher.pipeline.unet.state_dict(),
        target,
        timesteps=(999,),
        card={},
        dtype=torch.float32,
    )
    picture = tmp_path / "fox.png"
    code = (
        "import sys; from diffusers import DiffusionPipeline; "
        f"DiffusionPipeline.from_pretrained({target!r})('fox', num_inference_steps=1, "
        f"guidance_scale=0).images[0].save({str(picture)!r}); "
        "assert not {'dmd_core', 'pipelines', 'jobs'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=300)
    assert picture.stat().st_size > 0
