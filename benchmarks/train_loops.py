"""`dmd train` and a loop by hand over the same `DmdTrainer.step`, each in a fresh process."""

import json
import time
from collections.abc import Sequence
from typing import Any

import torch

import jobs.train
from dmd_core.networks import DmdNetworks, World
from dmd_core.noise import stable_seed
from dmd_core.teacher import load_teacher
from dmd_core.trainer import DmdTrainer
from jobs.config import load_recipe, resolve_shipped
from jobs.session import open_session
from pipelines.prompts import read_prompts
from pipelines.step_data import Progress, StepSource
from pipelines.streams import PromptStream
from pipelines.train_settings import lr_factor, stage_settings, trainer_settings
from pipelines.workers import set_threads


def run(config: str, overrides: list[str], warm_up: int) -> dict[str, Any]:
    """The whole command with an embedded Ray; its rate from step `warm_up` to the last."""
    with open_session(config, overrides, quiet=True) as session:
        jobs.train.run(session)
        text = session.store.fs.cat_file(session.store.path("metrics.jsonl"))
        batch = session.recipe.train.train_batch_size
    lines = [json.loads(line) for line in text.splitlines()]
    windows = [(line["step"], line["samples_per_second"]) for line in lines if "loss_fake" in line]
    return {"rate": rate_after(windows, warm_up, batch)}


def rate_after(windows: Sequence[tuple[int, float]], warm_up: int, batch: int) -> float:
    """Samples/s after step `warm_up`, from the (last step, samples/s) of each logged window."""
    samples, seconds, before = 0, 0.0, 0
    for step, rate in windows:
        if before >= warm_up:
            samples += (step - before) * batch
            seconds += (step - before) * batch / rate
        before = step
    if not samples:
        raise ValueError(f"no window after step {warm_up}; the last one ends at step {before}")
    return samples / seconds


def bare(config: str, overrides: list[str], warm_up: int) -> dict[str, Any]:
    """Draw and step, nothing else: no Ray, metrics, checkpoints or pictures."""
    recipe = load_recipe(config, overrides)
    section, seed = recipe.train, recipe.run.seed
    set_threads(section.threads_per_worker)
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
