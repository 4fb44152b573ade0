"""`dmd train` and a loop by hand over the same `DmdTrainer.step`, each in a fresh process."""

import json
import time
from typing import Any

import numpy as np
import torch

import jobs.train
from benchmarks.train_windows import rate_after
from dmd_core.networks import DmdNetworks, World
from dmd_core.noise import stable_seed
from dmd_core.teacher import load_teacher
from dmd_core.trainer import DmdTrainer
from jobs.config import load_recipe, resolve_shipped
from jobs.session import open_session
from pipelines.computing import prepare_computing
from pipelines.prompts import read_prompts
from pipelines.step_data import Progress, StepSource
from pipelines.streams import PromptStream
from pipelines.train_settings import lr_factor, stage_settings, trainer_settings


def run(config: str, overrides: list[str], warm_up: int) -> dict[str, Any]:
    """The whole command with an embedded Ray: its rate from step `warm_up` to the last, and its
    `windows`, the seconds between two lines of its log."""
    with open_session(config, overrides, quiet=True) as session:
        jobs.train.run(session)
        text = session.store.fs.cat_file(session.store.path("metrics.jsonl"))
        batch = session.recipe.train.train_batch_size
    lines = [json.loads(line) for line in text.splitlines()]
    windows = [(line["step"], line["samples_per_second"]) for line in lines if "loss_fake" in line]
    steps = np.diff([0, *(step for step, _ in windows)])
    seconds = steps * batch / np.array([rate for _, rate in windows])
    return {
        "rate": rate_after(windows, warm_up, batch),
        "windows": seconds.tolist(),
        "batch": batch,
    }


def bare(config: str, overrides: list[str], warm_up: int) -> dict[str, Any]:
    """Draw and step, nothing else: no Ray, metrics, checkpoints or pictures."""
    recipe = load_recipe(config, overrides)
    section, seed = recipe.train, recipe.run.seed
    prepare_computing(section.threads_per_worker)
    device = torch.device("cuda" if section.use_gpu else "cpu")
    teacher = load_teacher(resolve_shipped(recipe.teacher.path), device=device)
    shape = teacher.latent_shape(recipe.pairs.height, recipe.pairs.width)
    networks = DmdNetworks(teacher, trainer_settings(section, seed), World(device=device), shape)
    trainer = DmdTrainer(networks, teacher.encode_prompts([recipe.pairs.negative_prompt]))
    ((_, keys),) = section.plan()
    trainer.enter_stage(stage_settings(section, keys, None))
    prompts = read_prompts(section.unpaired_prompts, recipe.storage).prompts
    source = StepSource(
        teacher,
        seed=seed,
        rank=0,
        world=1,
        shape=shape,
        timesteps=len(networks.timesteps),
        prompts=PromptStream(prompts, stable_seed(seed, "prompts")),
        pictures=None,
    )
    factor, progress, started = lr_factor(section), Progress(), 0.0
    for number in range(section.total_steps):
        if number == warm_up:
            started = time.perf_counter()
        trainer.step(source.draw(progress, keys, None), factor(progress.step))
        progress = progress.after_step(keys)
    if section.use_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {"rate": (section.total_steps - warm_up) * section.train_batch_size / seconds}
