"""Station 8: plain diffusers samples the exported folder and gives the in-memory student's x₀."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file

from dmd_core.denoiser import NetworkDenoiser
from dmd_core.diffusers_networks import DiffusersNetwork
from dmd_core.export import _with_weights, export_student, student_scheduler
from dmd_core.lora import LoraSettings, add_lora
from dmd_core.noise import sample_noise
from dmd_core.student import Student
from dmd_core.teacher import load_teacher


def test_exported_student_equals_the_student_in_memory(tiny_teacher_dir, tmp_path):
    teacher = load_teacher(tiny_teacher_dir)
    unet = _perturbed(teacher)
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


def test_other_versions_of_transformers_find_the_text_encoder_s_weights(tiny_teacher_dir, tmp_path):
    """Before 5.6 they look for the wrapper's name, and before 5 for a tokenizer's two files."""
    teacher, target = load_teacher(tiny_teacher_dir), tmp_path / "student"
    export_student(
        teacher, teacher.model.state_dict(), str(target),
        timesteps=(999,), card={}, dtype=torch.float32,
    )  # fmt: skip
    stored = load_file(target / "text_encoder" / "model.safetensors")
    assert stored and all(name.startswith("text_model.") for name in stored)
    assert {"vocab.json", "merges.txt"} <= {file.name for file in (target / "tokenizer").iterdir()}
    found = load_teacher(str(target)).encode_prompts(["a red fox"]).text
    assert torch.equal(found, teacher.encode_prompts(["a red fox"]).text)


def test_a_student_is_written_from_the_weights_that_are_there(tiny_teacher_dir):
    """No second network beside the teacher's and the student's: of SDXL one has 10 GB."""
    model = load_teacher(tiny_teacher_dir).model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    written = _with_weights(model, weights).state_dict()
    assert written.keys() == weights.keys()
    assert all(written[name].data_ptr() == weights[name].data_ptr() for name in weights)
    name, _ = weights.popitem()
    with pytest.raises(ValueError, match=f"1 are missing or unknown, such as {name}"):
        _with_weights(model, weights)


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


@pytest.mark.parametrize("timesteps", [(399,), (999, 749, 499, 249), (999, 499)])
def test_a_student_s_own_timesteps_are_the_exported_defaults(tiny_teacher_dir, tmp_path, timesteps):
    teacher = load_teacher(tiny_teacher_dir)
    unet = _perturbed(teacher)
    prompts, seed, shape = ["red fox", "green apple"], 11, (2, *teacher.latent_shape())
    # The noise as diffusers draws it: the start is given, each re-noising comes from a generator.
    generator = torch.Generator().manual_seed(seed)
    eps = sample_noise([5, 6], teacher.latent_shape())
    again = [torch.randn(shape, generator=generator) for _ in timesteps[1:]]
    student = Student(NetworkDenoiser(DiffusersNetwork(unet), teacher.schedule), timesteps)
    expected = student.sample([eps, *again], teacher.encode_prompts(prompts))

    target = str(tmp_path / "student")
    export_student(
        teacher, unet.state_dict(), target, timesteps=timesteps, card={}, dtype=torch.float32
    )
    pipeline = DiffusionPipeline.from_pretrained(target)
    latents = pipeline(
        prompts, latents=eps, num_inference_steps=len(timesteps), guidance_scale=0,
        generator=torch.Generator().manual_seed(seed), output_type="latent",
    ).images  # fmt: skip
    assert pipeline.scheduler.timesteps.tolist() == list(timesteps)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


def test_timesteps_that_no_scheduler_has_are_refused_with_those_it_has():
    with pytest.raises(ValueError, match=r"expected evenly spaced times such as \[999, 666, 333\]"):
        student_scheduler(dict(DDIMScheduler().config), (999, 700, 100))


def test_an_adapter_is_exported_alone_and_fused(tiny_teacher_dir, tmp_path):
    teacher = load_teacher(tiny_teacher_dir)
    lora = LoraSettings(rank=3, alpha=6)
    unet = copy.deepcopy(teacher.pipeline.unet)
    add_lora(unet, lora, seed=1)
    adapters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    torch.manual_seed(2)
    for parameter in adapters.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    prompts, eps = ["red fox"], sample_noise([5], teacher.latent_shape())
    student = Student.one_step(NetworkDenoiser(DiffusersNetwork(unet), teacher.schedule))
    with torch.no_grad():
        expected = student(eps, teacher.encode_prompts(prompts))
        plain = Student.one_step(teacher.denoiser())(eps, teacher.encode_prompts(prompts))
    assert (expected - plain).abs().max() > 0.01  # the adapter does something

    target = str(tmp_path / "student")
    export_student(
        teacher, adapters, target, timesteps=(999,), card={}, dtype=torch.float32, lora=lora
    )
    fused = DiffusionPipeline.from_pretrained(target)
    assert not any("lora" in name for name, _ in fused.unet.named_parameters())
    loaded = DiffusionPipeline.from_pretrained(tiny_teacher_dir, scheduler=fused.scheduler)
    loaded.load_lora_weights(f"{target}/lora")
    for pipeline in (fused, loaded):
        latents = pipeline(
            prompts, latents=eps, num_inference_steps=1, guidance_scale=0, output_type="latent"
        ).images
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    other = LoraSettings(rank=3, alpha=6, targets=("to_q",))
    with pytest.raises(ValueError, match="lora_targets"):
        export_student(
            teacher, adapters, target, timesteps=(999,), card={}, dtype=torch.float32, lora=other
        )


def _perturbed(teacher):
    torch.manual_seed(1)
    unet = copy.deepcopy(teacher.pipeline.unet)
    for parameter in unet.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return unet
