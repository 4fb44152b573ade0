"""Every shipped training recipe through the command line, exported, and sampled with plain
diffusers: the same pictures as the student in memory. Minutes of work: run with -m slow."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fsspec.implementations.local import LocalFileSystem

from dmd_core.checkpoint import committed_steps, load_checkpoint
from dmd_core.networks import DmdNetworks
from dmd_core.noise import sample_noise
from dmd_core.parallel import World
from dmd_core.teacher import load_teacher
from jobs.cli import main
from jobs.config import load_recipe
from pipelines.train_settings import trainer_settings
from tests.pipelines.dmd_runs import PROMPTS, write_pictures

pytestmark = pytest.mark.slow
SMALL = {
    "train_batch_size": 4, "learning_rate": 1e-3, "lr_warmup_steps": 2, "threads_per_worker": 1,
    "checkpointing_steps": 2, "validation_steps": 4, "num_validation_images": 4,
    "logging_steps": 2, "mixed_precision": "no",
}  # fmt: skip
STAGES = "[{steps: 2, dm_weight: 0, lambda_reg: 1}, {samples: 8, t_max_fraction: 0.5}]"
RECIPES = {
    "demo": {"max_train_steps": 4, "regression_batch_size": 4},
    "dmd2": {"max_train_steps": 4},
    "dmd2-four-step": {"max_train_steps": 4, "ema_halflife_samples": 8},
    "lora": {"max_train_steps": 4, "regression_batch_size": 4, "lora_rank": 2},
    "stages": {"regression_batch_size": 4, "ema_halflife_samples": 8, "stages": STAGES},
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_the_recipe_trains_exports_and_samples(name, tiny_teacher_dir, tmp_path, ray_cluster):
    prompts, run = tmp_path / "prompts.txt", tmp_path / "run"
    prompts.write_text("\n".join(PROMPTS))
    settings = {
        "run.dir": run, "teacher.path": tiny_teacher_dir, "pairs.prompts": prompts,
        "pairs.batch_size": 4, "pairs.rows_per_block": 4, "pairs.steps": 4,
    }  # fmt: skip
    if name.startswith("dmd2"):
        settings["train.real_pictures"] = write_pictures(tmp_path / "real", PROMPTS)
    settings |= {f"train.{key}": value for key, value in (SMALL | RECIPES[name]).items()}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    options = ["--config", name, *(part for o in overrides for part in ("--set", o))]
    for verb in ("pairs", "train", "export") if _needs_pairs(name) else ("train", "export"):
        assert main([verb, *options]) == 0
    assert main(["train", *options]) == 0  # nothing to do

    fs, root = LocalFileSystem(), str(run / "checkpoints")
    found = load_checkpoint(fs, root)
    assert found is not None and committed_steps(fs, root)[-1] == 4
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [2, 4]
    section = load_recipe(name, overrides).train
    teacher = load_teacher(tiny_teacher_dir)
    networks = DmdNetworks(teacher, trainer_settings(section, 0), World())
    networks.load(found.parts)
    eps, steps = sample_noise([1, 2], teacher.latent_shape()), len(networks.timesteps)
    generator = torch.Generator().manual_seed(5)
    again = [torch.randn(eps.shape, generator=generator) for _ in range(steps - 1)]
    with networks.averaged() as student:
        expected = student.sample([eps, *again], teacher.encode_prompts(PROMPTS[:2]))
    latents = _sample_plainly(run / "student", eps, steps, tmp_path)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    if name == "lora":
        assert (run / "student" / "lora" / "pytorch_lora_weights.safetensors").is_file()


def _needs_pairs(name: str) -> bool:
    return load_recipe(name, []).train.needs_pairs


def _sample_plainly(student: Path, eps: torch.Tensor, steps: int, folder: Path) -> torch.Tensor:
    """Latents of the first two prompts, by a process that knows diffusers alone."""
    safetensors.torch.save_file({"eps": eps}, folder / "eps.safetensors")
    code = f"""
import sys, torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
pipe = DiffusionPipeline.from_pretrained({str(student)!r})
latents = pipe(
    {list(PROMPTS[:2])!r}, latents=load_file({str(folder / "eps.safetensors")!r})["eps"],
    num_inference_steps={steps}, guidance_scale=0,
    generator=torch.Generator().manual_seed(5), output_type="latent",
).images
save_file({{"x": latents.contiguous()}}, {str(folder / "x.safetensors")!r})
assert not {{"dmd_core", "pipelines", "jobs"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=folder, timeout=300)
    return safetensors.torch.load_file(folder / "x.safetensors")["x"]
