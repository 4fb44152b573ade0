"""Station 9: seconds and joules per picture, as a user of the two pipelines would see them.

One picture at a time through the pipeline's own `__call__`: prompt encoding, network
evaluations and decoding. Teacher and student are run alike: in one memory layout, networks
and text encoders in the dtype that the teacher's pictures are made in. The one place in the library
that reads the wall clock, because here it is the instrument.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from dmd_core.noise import sample_noise
from dmd_core.ode import make_scheduler
from dmd_core.plain_call import (
    call_arguments,
    family_of_pipeline,
    student_guidance,
    with_latents,
)
from dmd_core.precision import hold
from dmd_core.teacher import Teacher, load_teacher
from pipelines.computing import prepare_computing
from pipelines.device_turns import DeviceTurns
from pipelines.systems import STUDENT, TEACHER, Networks, SamplingPlan, load_plainly

_WARM_UP = 2
# NVML updates its energy counter about every 100 ms, so one short picture cannot be measured.
_ENERGY_SECONDS = 2.0
NOT_MEASURED = "not measured"
Makers = dict[str, Callable[[str], Any]]  # system → a call that makes one picture of a prompt


@dataclass(frozen=True)
class Seconds:
    """Per picture, over `repeats` pictures."""

    median: float
    min: float
    max: float
    repeats: int


def measure_speed(
    plan: SamplingPlan, networks: Networks, prompts: tuple[str, ...], repeats: int
) -> dict[str, Any]:
    """Seconds per picture of each system, speed-up, and energy, as plain JSON values.

    Systems take turns, so that a machine that slows down slows all of them.
    """
    prepare_computing(networks.threads)
    networks = networks.local()
    makers, ready = _picture_makers(plan, networks)
    for system, make in makers.items():
        ready(system)
        for _ in range(_WARM_UP):
            make(prompts[0])
    taken: dict[str, list[float]] = {system: [] for system in makers}
    for repeat in range(repeats):
        for system, make in makers.items():
            if ready(system):
                make(prompts[0])  # finds its memory again
            started = time.perf_counter()
            make(prompts[repeat % len(prompts)])
            taken[system].append(time.perf_counter() - started)
    seconds = {
        system: Seconds(statistics.median(values), min(values), max(values), repeats)
        for system, values in taken.items()
    }
    return {
        "seconds_per_picture": {system: asdict(value) for system, value in seconds.items()},
        "speed_up": seconds[TEACHER].median / seconds[STUDENT].median,
        "batch_size": 1,
        "threads": torch.get_num_threads(),
        "device": _device_name(networks.device),
        "compute_dtype": plan.compute_dtype,
        "joules_per_picture": measure_energy(
            makers, prompts[0], nvml_counter(networks.device), ready
        ),
    }


def measure_energy(
    makers: Makers,
    prompt: str,
    counter: Callable[[], float] | str,
    ready: Callable[[str], object] = lambda system: None,
) -> dict[str, Any]:
    """System → joules per picture. `counter()` reads joules so far; a string says why there is
    none. `ready(system)` is called before a system is measured."""
    if isinstance(counter, str):
        return {"value": NOT_MEASURED, "reason": counter}
    joules = {}
    for system in (TEACHER, STUDENT):
        ready(system)
        pictures, started, before = 0, time.perf_counter(), counter()
        while pictures == 0 or time.perf_counter() - started < _ENERGY_SECONDS:
            makers[system](prompt)
            pictures += 1
        joules[system] = (counter() - before) / pictures
    return {"value": joules, "source": "NVML total energy of the whole GPU"}


def nvml_counter(device: str) -> Callable[[], float] | str:
    """Joules the GPU has used so far, or the reason why that cannot be read."""
    if torch.device(device).type != "cuda":
        return f"no energy counter is read on {torch.device(device).type}"
    try:
        import pynvml  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        return "nvidia-ml-py is not installed (pip install -e '.[eval]')"
    try:
        pynvml.nvmlInit()
        # By its id, not its number: CUDA_VISIBLE_DEVICES renumbers devices, NVML does not.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError as error:
        return f"NVML: {error}"
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000.0  # from millijoules


def _picture_makers(plan: SamplingPlan, local: Networks) -> tuple[Makers, Callable[[str], bool]]:
    """The makers, and what brings a system's networks to the device (True: they were not there)."""
    dtype = getattr(torch, plan.compute_dtype)
    teacher = load_teacher(
        local.teacher, device=local.device, size=(plan.height, plan.width), compute_dtype=dtype
    )
    turns = DeviceTurns(local.device, teacher.pipeline)
    shape = teacher.latent_shape(*teacher.size)
    latents = sample_noise([plan.seed], shape, torch.float16).float().to(local.device)
    student = with_latents(load_plainly(local.student, "cpu"))
    told = family_of_pipeline(student)
    lay_out_like(getattr(student, told.model), teacher.model)
    compute_in(student, dtype, local.device)
    steps = {TEACHER: plan.steps} | plan.few()
    if teacher.family.on_pixels:  # no pipeline of diffusers guides these, or takes our solver
        makers = {name: _solved(teacher, plan, latents, n) for name, n in steps.items()}
    else:
        whole = _sampling_pipeline(teacher, plan)
        compute_in(whole, dtype, local.device)
        guidance: dict[str, Any] = {"guidance_scale": plan.guidance_scale}
        if plan.guidance_scale > 1:
            guidance["negative_prompt"] = [plan.negative_prompt]  # as the prompts: a list
        makers = {name: _called(teacher, whole, latents, n, guidance) for name, n in steps.items()}
    guided = {"guidance_scale": student_guidance(told)} if told.takes("guidance_scale") else {}
    makers |= {STUDENT: _called(teacher, student, latents, plan.student_steps, guided)}
    return makers, lambda system: turns.bring(student if system == STUDENT else teacher.pipeline)


def lay_out_like(network: nn.Module, other: nn.Module) -> None:
    """Give `network` the memory layout of `other`, the same network with other weights: on a GPU
    `load_teacher` chooses channels_last, in which convolutions are faster."""
    if any(weight.ndim == 4 and not weight.is_contiguous() for weight in other.parameters()):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compute_in(pipeline: Any, dtype: torch.dtype, device: str) -> None:
    """Let the pipeline's network and text encoders compute as the teacher's do where its pictures
    are made: under autocast to `dtype`, from float32 to float32."""
    if dtype == torch.float32:
        return
    family = family_of_pipeline(pipeline)
    for name in family.parts:
        part = getattr(pipeline, name, None)
        if part is not None and (name == family.model or name.startswith("text_encoder")):
            hold(part.requires_grad_(False), dtype)  # what may be trained is left as it is
            autocast = torch.autocast(torch.device(device).type, dtype)
            part.forward = convert_outputs_to_fp32(autocast(part.forward))


def _sampling_pipeline(teacher: Teacher, plan: SamplingPlan) -> Any:
    pipeline = teacher.pipeline
    tokens = teacher.geometry.image_tokens(teacher.latent_shape(*teacher.size))
    pipeline.scheduler = make_scheduler(plan.solver, pipeline.scheduler.config, tokens)
    return pipeline


def _solved(
    teacher: Teacher, plan: SamplingPlan, latents: torch.Tensor, steps: int
) -> Callable[[str], Any]:
    """One picture by our own integration."""

    def call(prompt: str) -> Any:
        samples = teacher.solve(
            latents, [prompt],
            solver=plan.solver, steps=steps,
            guidance_scale=plan.guidance_scale, negative_prompt=plan.negative_prompt,
        )  # fmt: skip
        return teacher.decode(samples)

    return call


def _called(
    teacher: Teacher, pipeline: Any, latents: torch.Tensor, steps: int, guidance: dict[str, Any]
) -> Callable[[str], Any]:
    """One picture by the pipeline as its user calls it."""
    family = family_of_pipeline(pipeline)

    def call(prompt: str) -> Any:
        labels = teacher.encode_prompts([prompt]).labels if family.on_pixels else None
        arguments = call_arguments(family, [prompt], labels, latents, teacher.size)
        # On the CPU, so a GPU has finished when the call returns.
        arguments |= {"num_inference_steps": steps, "output_type": "np"}
        return pipeline(**arguments, **guidance).images

    return call


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return device
