"""Station 8: the trained student as a plain diffusers pipeline that samples in its few steps.

The pipeline is of the teacher's own class, with the student's network and a scheduler whose
default times are the student's.
"""

import copy
import json
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from dmd_core.checkpoint import Tensors
from dmd_core.diffusers_schedules import family as schedule_family
from dmd_core.families import CLASSES, Family
from dmd_core.lora import LoraSettings, add_lora, fuse_lora, save_for_diffusers, save_for_peft
from dmd_core.model_card import UNKNOWN, Origin, model_card
from dmd_core.parallel import on_meta
from dmd_core.pipeline_files import save_pipeline
from dmd_core.schedule import Schedule
from dmd_core.student_schedulers import student_scheduler
from dmd_core.teacher import Teacher

LORA_FOLDER = "lora"
# Of a pipeline beside its parts: what its class takes and keeps in model_index.json.
_SETTINGS = ("requires_safety_checker", "force_zeros_for_empty_prompt")


def export_student(
    teacher: Teacher,
    generator: Tensors,
    target: str,
    *,
    timesteps: tuple[int, ...],
    card: dict,
    dtype: torch.dtype,
    lora: LoraSettings | None = None,
    origin: Origin = UNKNOWN,
) -> None:
    """Write `target`/ as a pipeline folder: the teacher's parts, the student's network, its steps.

    `generator` holds the trained weights; buffers (positions) are the teacher's, for nothing trains
    them. With `lora` it holds adapters: the network is exported with them fused, and the
    adapters alone go to `target`/lora/. `card` and `origin`, what is known of the teacher, go into
    the model card. A folder is complete or absent: it is written beside and moved into place. The
    teacher is left as it was.
    """
    family, scheduler = teacher.family, teacher_student_scheduler(teacher, timesteps)
    temporary = Path(f"{target}.{uuid.uuid4().hex}.tmp")
    try:
        if lora is None:
            network = _with_weights(teacher.model, generator)
        else:
            network = _with_adapters(teacher.model, generator, lora)
            _save_adapters(family, network, temporary / LORA_FOLDER)
            fuse_lora(network)
        pipeline = _pipeline_of(teacher, network, scheduler)
        _with_dtype(pipeline, dtype, lambda: save_pipeline(pipeline, temporary))
        if teacher.encoder.class_names:
            (temporary / CLASSES).write_text(json.dumps(teacher.encoder.class_names))
        absent = [name for name in family.optional if getattr(pipeline, name, card) is None]
        text = model_card(
            family, card, teacher.size, len(timesteps), lora is not None, absent,
            dtype=dtype, origin=origin,
        )  # fmt: skip
        (temporary / "README.md").write_text(text, encoding="utf-8")
        if Path(target).exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def teacher_student_scheduler(teacher: Teacher, timesteps: tuple[int, ...]) -> Any:
    """`student_scheduler` for this teacher, at the size of picture it was loaded for."""
    return student_scheduler(
        dict(teacher.pipeline.scheduler.config),
        timesteps,
        image_tokens=teacher.geometry.image_tokens(teacher.latent_shape(*teacher.size)),
        by_sigmas=teacher.family.by_sigmas,
    )


def _pipeline_of(teacher: Teacher, network: nn.Module, scheduler: Any) -> DiffusionPipeline:
    pipeline = teacher.pipeline
    settings = {name: pipeline.config[name] for name in _SETTINGS if name in pipeline.config}
    parts = pipeline.components | {teacher.family.model: network, "scheduler": scheduler}
    return type(pipeline)(**parts, **settings)


def _with_weights(model: nn.Module, weights: Tensors) -> nn.Module:
    """A network to be saved, like `model`: of `weights` themselves, no copy, and of its buffers."""
    network, stored = on_meta(model), model.state_dict()
    found = {name: stored[name] for name, _ in model.named_buffers() if name in stored}
    # Detached: what is assigned would be the caller's own parameters.
    found |= {name: value.detach() for name, value in weights.items()}
    missing, unexpected = network.load_state_dict(found, strict=False, assign=True)
    wrong = sorted((*missing, *unexpected))
    if wrong:
        raise ValueError(
            f"the checkpoint's weights are not those of a {type(network).__name__} like the "
            f"teacher's: {len(wrong)} are missing or unknown, such as {wrong[0]}"
        )
    return network


def _with_adapters(model: nn.Module, adapters: Tensors, lora: LoraSettings) -> nn.Module:
    network = copy.deepcopy(model)
    add_lora(network, lora, seed=0)
    expected = {name for name, p in network.named_parameters() if p.requires_grad}
    if adapters.keys() != expected:
        raise ValueError(
            f"the checkpoint holds {len(adapters)} adapter weights, these settings need "
            f"{len(expected)}; was it trained with other lora_rank or lora_targets?"
        )
    network.load_state_dict(adapters, strict=False)
    return network


def _save_adapters(family: Family, network: nn.Module, folder: Path) -> None:
    if family.loads_adapters:
        save_for_diffusers(network, family.pipeline_class, family.model, folder)
    else:
        save_for_peft(network, folder)


def _with_dtype(pipeline: Any, dtype: torch.dtype, save: Callable[[], None]) -> None:
    """Save in `dtype` and leave the teacher's own parts in float32."""
    if dtype == torch.float32:
        return save()
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    try:
        for part in parts:
            part.to(dtype)
        save()
    finally:
        for part in parts:
            part.float()


def check_exportable(
    schedule: Schedule,
    config: dict,
    timesteps: tuple[int, ...] | None,
    family: Family,
    image_tokens: int | None = None,
) -> None:
    """Fail at the door: are these times of the teacher's schedule, and a scheduler's default?

    `config`: of the teacher's scheduler. Raises ValueError.
    """
    times = timesteps or (schedule.num_timesteps - 1,)
    wrong = [t for t in times if not 0 <= t < schedule.num_timesteps]
    if wrong:
        raise ValueError(
            f"student_timesteps has {wrong[0]}; the teacher's schedule has the times 0 to "
            f"{schedule.num_timesteps - 1}"
        )
    if schedule.prediction_type == "epsilon" and float(schedule.alphas[max(times)]) < 1e-3:
        raise ValueError(f"at time {max(times)} α is 0, where ε says nothing about x₀")
    if len(times) > 1 and family.pipeline == "DDIMPipeline":
        raise ValueError(
            f"{len(times)} student_timesteps, but a DDIMPipeline runs DDIM whatever its folder "
            "says; expected one, or a teacher saved as a DDPMPipeline"
        )
    kind = schedule_family(config.get("_class_name", ""), config)
    if kind not in family.schedules:
        raise ValueError(
            f"a {schedule.prediction_type} student of this noise schedule cannot be exported: a "
            f"{family.pipeline} does not run schedulers of its kind ({kind}); expected "
            f"{' or '.join(family.schedules)}"
        )
    scheduler = student_scheduler(
        config, times, image_tokens=image_tokens, by_sigmas=family.by_sigmas
    )
    if hasattr(scheduler, "alphas_cumprod"):  # the others were compared by their σ
        _compare_noise(Schedule.from_scheduler(scheduler), schedule, times, scheduler)


def _compare_noise(
    exported: Schedule, schedule: Schedule, times: tuple[int, ...], scheduler: Any
) -> None:
    index = torch.tensor(times)
    if exported.prediction_type != schedule.prediction_type or not torch.allclose(
        exported.alphas[index], schedule.alphas[index], rtol=1e-4
    ):
        raise ValueError(
            f"a {schedule.prediction_type} student of this noise schedule cannot be exported: "
            f"{type(scheduler).__name__} does not carry the schedule"
        )
