"""A student of every family: distilled for three steps, exported, loaded by plain diffusers, and
its pictures are those of the student in memory."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from dmd_core.condition import Condition
from dmd_core.export import LORA_FOLDER, check_exportable, export_student
from dmd_core.lora import LoraSettings
from dmd_core.networks import DmdNetworks, TrainerSettings
from dmd_core.parallel import Parallel, World, whole
from dmd_core.plain_call import (
    call_arguments,
    call_in_words,
    family_of_pipeline,
    samples_of,
    student_guidance,
    with_latents,
)
from dmd_core.schedule import Schedule
from dmd_core.step_types import (
    LossSettings,
    PairedPart,
    Pictures,
    StepData,
    StepNoise,
    Unpaired,
)
from dmd_core.student import Student
from dmd_core.student_schedulers import student_scheduler
from dmd_core.teacher import Teacher, load_teacher
from dmd_core.trainer import DmdTrainer, StageSettings
from tests.dmd_core.family_calls import (
    PIXELS,
    PROMPTS,
    SIDE,
    call_by_hand,
    noise,
    plain,
)

ONE, FOUR = None, (999, 749, 499, 249)
DMD, DMD2 = LossSettings(), LossSettings(reg=0.0, gan=5e-3)
# (family, student's times, losses)
OFTEN = [
    ("sd", ONE, DMD), ("sd", FOUR, DMD2), ("sdxl", FOUR, DMD2), ("sd3", ONE, DMD),
    ("sd3", FOUR, DMD2), ("flux", ONE, DMD2), ("pixart", ONE, DMD2), ("edm", ONE, DMD2),
    ("edm", FOUR, DMD2), ("pixart", (400,), DMD), ("ddpm", FOUR, DMD2),
    ("unconditional", FOUR, DMD),
]  # fmt: skip
REST = [
    ("sd v", ONE, DMD), ("sd v", FOUR, DMD2), ("sd", (399,), DMD2), ("sd", ONE, DMD2),
    ("sdxl", ONE, DMD), ("sdxl", ONE, DMD2), ("sdxl", FOUR, DMD), ("edm", ONE, DMD),
    ("edm", FOUR, DMD), ("sd3", ONE, DMD2), ("sd3", FOUR, DMD),
    ("sd3 dynamic", FOUR, DMD2), ("sd3 without t5", ONE, DMD2),
    ("flux", ONE, DMD), ("flux", FOUR, DMD2), ("flux schnell", ONE, DMD),
    ("flux schnell", FOUR, DMD2), ("pixart", ONE, DMD), ("pixart", FOUR, DMD2),
    ("ddpm", ONE, DMD), ("unconditional", ONE, DMD2),
]  # fmt: skip
ADAPTED_OFTEN = [("sd", ONE, DMD), ("sd3", ONE, DMD), ("flux", FOUR, DMD2), ("edm", FOUR, DMD2)]
ADAPTED_REST = [(name, ONE, DMD) for name in ("sd v", "sdxl", "flux", "pixart", "edm", "ddpm")]
Case = tuple[str, tuple[int, ...] | None, LossSettings]


def _cases(often: list[Case], rest: list[Case]) -> list:
    """Parameters with names; the rest is slow for its number."""
    slow = pytest.mark.slow
    return [
        *(pytest.param(*case, id=_id(*case)) for case in often),
        *(pytest.param(*case, id=_id(*case), marks=slow) for case in rest),
    ]


def _id(name: str, times: tuple[int, ...] | None, losses: LossSettings) -> str:
    steps = f"at {times[0]}" if times not in (ONE, FOUR) else len(times or (0,))
    return f"{name}-{steps}-{'dmd2' if losses.gan else 'dmd'}"


def _distil(
    teacher: Teacher, settings: TrainerSettings, losses: LossSettings, guidance: float = 1.0
) -> DmdNetworks:
    """Three steps on random numbers, each of another of the student's steps."""
    shape = teacher.latent_shape(*teacher.size)
    networks = DmdNetworks(teacher, settings, World(), shape)
    uncond = Condition() if guidance == 1.0 else teacher.encode_negatives([""])
    trainer = DmdTrainer(networks, uncond)
    trainer.enter_stage(
        StageSettings(
            losses, guidance_scale=guidance, learning_rate=1e-3, fake_learning_rate=1e-3,
            batch_size=2, regression_batch_size=2 if losses.reg else 0, gan_fake=1e-2, r1=0.1,
        )
    )  # fmt: skip
    torch.manual_seed(1)
    for step in range(3):
        data = _data(teacher, shape, step % len(networks.timesteps), losses)
        means = trainer.step(data).means()
        assert {f"loss_{name}" for name in ("dm", "reg", "gan") if getattr(losses, name)} <= set(
            means
        )
    assert trainer.nonfinite_updates == 0
    return networks


def _data(teacher: Teacher, shape: tuple[int, ...], step: int, losses: LossSettings) -> StepData:
    cond = teacher.encode_prompts(PROMPTS)

    def eps() -> torch.Tensor:
        return torch.randn(2, *shape)

    drawn = StepNoise(
        z=tuple(eps() for _ in range(step + 1)), eps_dm=eps(), u_dm=torch.rand(2),
        eps_fake=eps(), u_fake=torch.rand(2), eps_gan=eps(), u_gan=torch.rand(2),
    )  # fmt: skip
    pictures = paired = None
    if losses.gan:
        pictures = Pictures(eps(), cond, eps(), torch.rand(2), eps(), torch.rand(2), eps())
    if losses.reg:
        paired = PairedPart(eps(), eps(), cond)
    return StepData((Unpaired(cond, drawn, pictures, step),) * 2, paired)


def _export(teacher: Teacher, networks: DmdNetworks, target: Path, lora=None) -> str:
    weights = {name: p.detach() for name, p in networks.weights.items()}  # as checkpoints have them
    export_student(
        teacher, weights, str(target), timesteps=networks.timesteps, card={"step": 3},
        dtype=torch.float32, lora=lora,
    )  # fmt: skip
    return str(target)


def _renoised(name: str, eps: torch.Tensor, steps: int) -> tuple[list[torch.Tensor], dict]:
    """ε of every step, and what makes the pipeline draw the same: schedulers of flow models use
    torch's own generator, the others the one they are given."""
    own = torch.Generator().manual_seed(0)
    torch.randn(eps.shape, generator=own)  # as DDPM's pipeline draws ε with it
    again = own if name == "unconditional" else torch.Generator().manual_seed(3)
    flow = name.startswith(("sd3", "flux"))
    packed = FluxPipeline._pack_latents(eps, *eps.shape).shape
    shape = packed if name.startswith("flux") else eps.shape
    drawn = [torch.randn(shape, generator=again) for _ in range(steps - 1)]
    if name.startswith("flux"):
        drawn = [FluxPipeline._unpack_latents(z, *eps.shape[2:], 1) for z in drawn]
    noises = [eps, *drawn]
    if flow:
        torch.manual_seed(3)
        return noises, {}
    return noises, {"generator": torch.Generator().manual_seed(3)}


@pytest.mark.parametrize(("name", "times", "losses"), _cases(OFTEN, REST))
def test_exported_student_equals_the_student_in_memory(families, tmp_path, name, times, losses):
    teacher = families.teacher(name)
    guidance = 3.0 if name in ("sdxl", "sd3", "flux", "edm") else 1.0
    settings = TrainerSettings(timesteps=times, discriminator=losses.gan > 0)
    networks = _distil(teacher, settings, losses, guidance)
    eps, cond = noise(teacher), teacher.encode_prompts(PROMPTS)
    steps = len(networks.timesteps)
    noises, generator = _renoised(name, eps, steps)
    expected = networks.student.sample(noises, cond)
    before = _sample_of_teacher(teacher, networks, noises, cond)
    assert (expected - before).abs().max() > 1e-2  # it learned something

    pipeline = plain(_export(teacher, networks, tmp_path / "student"))
    assert type(pipeline) is type(teacher.pipeline)
    arguments = {} if name in PIXELS or name == "flux" else {"guidance_scale": 0.0}
    if name != "unconditional":
        arguments |= generator
    found = call_by_hand(name, pipeline, eps, steps, **arguments)
    expected = expected.clamp(-1, 1) if name in PIXELS else expected
    difference = float((found - expected).abs().max())
    print(f"{name} {steps}: {difference:.1e}")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def _sample_of_teacher(teacher, networks, noises, cond) -> torch.Tensor:
    trained = {name: w.detach().clone() for name, w in networks.generator.state_dict().items()}
    networks.generator.load_state_dict(teacher.model.state_dict())
    try:
        return networks.student.sample(noises, cond)
    finally:
        networks.generator.load_state_dict(trained)


@pytest.mark.parametrize(("name", "times", "losses"), _cases(ADAPTED_OFTEN, ADAPTED_REST))
def test_adapters_alone_and_fused(families, tmp_path, name, times, losses):
    lora = LoraSettings(rank=2, alpha=4)
    settings = TrainerSettings(timesteps=times, discriminator=losses.gan > 0, lora=lora)
    teacher = families.teacher(name)
    networks = _distil(teacher, settings, losses)
    eps, steps = noise(teacher), len(networks.timesteps)
    noises, _ = _renoised(name, eps, steps)
    expected = networks.student.sample(noises, teacher.encode_prompts(PROMPTS))
    expected = expected.clamp(-1, 1) if name in PIXELS else expected
    folder = _export(teacher, networks, tmp_path / "student", lora)

    def picture(pipeline) -> torch.Tensor:
        arguments = {} if name in PIXELS or name == "flux" else {"guidance_scale": 0.0}
        _, generator = _renoised(name, eps, steps)
        return call_by_hand(name, pipeline, eps, steps, **arguments, **generator)

    fused = plain(folder)
    torch.testing.assert_close(picture(fused), expected, rtol=1e-4, atol=1e-4)
    alone = plain(families.folder(name))
    alone.scheduler = fused.scheduler
    bare = picture(alone)
    _put_adapters(alone, f"{folder}/{LORA_FOLDER}")
    torch.testing.assert_close(picture(alone), expected, rtol=1e-4, atol=1e-4)
    assert (bare - expected).abs().max() > 1e-3


def _put_adapters(pipeline, folder: str) -> None:
    """By the student's card's own line."""
    card = (Path(folder).parent / "README.md").read_text()
    (line,) = re.findall(r"^(?:pipe\.|peft\.).*/lora\"\)$", card, re.MULTILINE)
    exec(line.replace("path/to/this/folder/lora", folder), {"pipe": pipeline, "peft": peft})


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, EulerDiscreteScheduler, UniPCMultistepScheduler]
)
@pytest.mark.parametrize("times", [(999,), FOUR])
def test_a_student_of_a_teacher_that_ends_in_pure_noise(families, tmp_path, scheduler, times):
    """v-prediction with zero terminal SNR, as fine-tunes of SD 2 and SDXL have it, under whichever
    class: some put 2^-24 in place of ᾱ_T = 0."""
    folder = shutil.copytree(families.folder("sd v"), tmp_path / "teacher")
    config = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    kept = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    scheduler(
        **kept,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ).save_pretrained(folder / "scheduler")
    teacher = load_teacher(str(folder), size=(SIDE, SIDE))
    assert teacher.schedule.alphas[-1] == 0
    config = dict(teacher.pipeline.scheduler.config)
    check_exportable(teacher.schedule, config, times, teacher.family, 16)
    eps = noise(teacher)
    noises, generator = _renoised("sd v", eps, len(times))
    expected = Student(teacher.denoiser(), times).sample(noises, teacher.encode_prompts(PROMPTS))
    target = str(tmp_path / "student")
    export_student(
        teacher, teacher.model.state_dict(), target, timesteps=times, card={}, dtype=torch.float32
    )
    found = call_by_hand("sd v", plain(target), eps, len(times), guidance_scale=0.0, **generator)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_class_that_does_not_rescale_is_not_taken_for_one_that_does(families):
    """It keeps the setting of the class before it."""
    rescaled = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    other = PNDMScheduler.from_config(rescaled.config)
    schedule = Schedule.from_scheduler(other)
    assert schedule.alphas[-1] > 0
    with pytest.raises(ValueError, match="does not carry the schedule"):
        check_exportable(schedule, dict(other.config), (999,), families.teacher("sd v").family, 16)


@pytest.mark.parametrize(
    ("name", "times", "what"),
    [
        ("sd3", (999, 700, 100), "evenly spaced times such as"),
        ("flux", (399,), "evenly spaced times such as"),
        ("edm", (999, 749, 500, 250), r"\(nearest: \[999, 749, 499, 249\]\)"),
        ("edm", (999, 700, 100), r"\(nearest: \[999, 549, 99\]\); expected .* \[999, 666, 333\]"),
        ("edm", (749,), r"\(nearest: \[999\]\)"),
        ("sd3", (1000,), "the teacher's schedule has the times 0 to 999"),
    ],
)
def test_times_that_no_scheduler_has_are_refused(families, name, times, what):
    teacher = families.teacher(name)
    config = dict(teacher.pipeline.scheduler.config)
    with pytest.raises(ValueError, match=what):
        check_exportable(teacher.schedule, config, times, teacher.family, 16)


def test_ddim_s_pipeline_takes_one_step_only(families):
    from dmd_core.families import FAMILIES

    teacher = families.teacher("unconditional")
    config, family = dict(teacher.pipeline.scheduler.config), FAMILIES["DDIMPipeline"]
    check_exportable(teacher.schedule, config, (999,), family)
    with pytest.raises(ValueError, match="runs DDIM whatever its folder says"):
        check_exportable(teacher.schedule, config, FOUR, family)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("times", [(999,), (999, 499), (999, 666, 332), FOUR])
def test_flow_schedulers_have_the_student_s_times_as_their_default(shift, times):
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = dict(FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=0.1).config)
    scheduler = student_scheduler(config, times)
    scheduler.set_timesteps(len(times))
    sigma = torch.tensor([1 - k / len(times) for k in range(len(times))])
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    torch.testing.assert_close(scheduler.sigmas[:-1], sigma, rtol=0, atol=1e-5)
    torch.testing.assert_close(scheduler.timesteps, 1000 * sigma, rtol=0, atol=1e-2)


EDM_TEACHERS = {
    "euler": EDMEulerScheduler(),
    "exponential": EDMEulerScheduler(sigma_schedule="exponential", sigma_data=0.7),
    "clipping": EDMDPMSolverMultistepScheduler(thresholding=True, sample_max_value=0.5),
    "v": EDMDPMSolverMultistepScheduler(
        prediction_type="v_prediction", final_sigmas_type="sigma_min", solver_type="heun",
        euler_at_final=True, sigma_min=0.02, sigma_max=50.0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(EDM_TEACHERS))
@pytest.mark.parametrize("times", [(999, 499), (999, 666, 333), FOUR, (999, 980)])
def test_an_edm_student_s_scheduler_renoises_as_its_training_does(name, times):
    teacher = EDM_TEACHERS[name]
    schedule = Schedule.from_scheduler(teacher)
    scheduler = student_scheduler(dict(teacher.config), times)
    scheduler.set_timesteps(len(times))
    torch.manual_seed(0)
    x_t = torch.randn(2, 3, 4, 4) * scheduler.init_noise_sigma
    for k, told in enumerate(scheduler.timesteps):
        t, output = torch.full((2,), times[k]), torch.randn_like(x_t)
        torch.testing.assert_close(told, schedule.network_time(t)[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            scheduler.scale_model_input(x_t, told), schedule.network_input(x_t, t)
        )
        x0 = expected = schedule.x0_from_output(output, x_t, t)
        if k + 1 < len(times):
            eps = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(k))
            expected = schedule.renoise(x0, x_t, eps, t, torch.full((2,), times[k + 1]))
        drawn = torch.Generator().manual_seed(k)
        x_t = scheduler.step(output, told, x_t, generator=drawn).prev_sample
        torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", range(1, 17))
def test_the_times_that_a_refusal_suggests_are_taken(steps):
    config = dict(EDMEulerScheduler().config)
    with pytest.raises(ValueError, match="expected evenly spaced") as refused:
        student_scheduler(config, tuple(range(990, 990 - steps, -1)))
    suggested = tuple(json.loads(str(refused.value).partition("times such as ")[2]))
    assert len(suggested) == steps
    student_scheduler(config, suggested)


@pytest.mark.parametrize("name", ["sd3", "edm"])
def test_a_sharded_run_starts_as_an_unsharded_one(families, name):
    teacher = families.teacher(name)
    shape = teacher.latent_shape(*teacher.size)
    unsharded = DmdNetworks(teacher, TrainerSettings(discriminator=True), World(), shape)
    parallel = Parallel(generator="fsdp", fake="fsdp")
    settings = TrainerSettings(discriminator=True, parallel=parallel)
    sharded = DmdNetworks(teacher, settings, World(), shape)
    for part in ("generator", "fake", "head"):
        expected, found = unsharded.parts()[part], sharded.parts()[part]
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(whole(found[key]), value), key


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "pixart", "edm"])
def test_score_and_logits_of_one_pass_are_those_of_two(families, name):
    """Where only a part of the rows runs to the end, that changes nothing."""
    teacher, x = families.teacher(name), noise(families.teacher(name))
    shape = tuple(x.shape[1:])
    networks = DmdNetworks(teacher, TrainerSettings(discriminator=True), World(), shape)
    cond, t, ran = teacher.encode_prompts(PROMPTS), torch.tensor([100, 700]), []
    first, second = (x, t, cond), (x.flip(0), t, cond.rows(slice(None)))
    fake = networks.fake_frozen
    last = getattr(networks.fake, "conv_out", getattr(networks.fake, "proj_out", None))
    hook = last.register_forward_hook(lambda module, args, output: ran.append(len(output)))
    with torch.no_grad():
        score, logits = fake.score_and_judge(first, second)
        torch.testing.assert_close(score, fake(*first), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, fake.judge(*second), rtol=1e-4, atol=1e-4)
    hook.remove()
    assert logits.shape == (2,) and logits.std() > 0
    assert ran[0] == (4 if name in ("flux", "pixart") else 2)


@pytest.mark.parametrize("name", ["flux", "pixart", "edm", "unconditional"])
def test_our_plain_call_is_the_one_by_hand(families, name):
    pipeline = plain(families.folder(name))
    teacher, eps = families.teacher(name), noise(families.teacher(name))
    if name == "unconditional":
        from diffusers import DDIMScheduler

        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    own, family = with_latents(pipeline), family_of_pipeline(with_latents(pipeline))
    labels = teacher.encode_prompts(PROMPTS).labels
    arguments = call_arguments(family, PROMPTS, labels, eps, teacher.size)
    if family.takes("guidance_scale"):
        arguments["guidance_scale"] = student_guidance(family)
    found = samples_of(family, own, eps.shape, num_inference_steps=2, **arguments)
    given = {"guidance_scale": 0.0} if name == "pixart" else {}
    expected = call_by_hand(name, pipeline, eps, 2, **given)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "edm", "unconditional"])
def test_the_call_in_words_makes_the_picture_of_the_call(families, name):
    pipeline = plain(families.folder(name))
    teacher, eps = families.teacher(name), noise(families.teacher(name))[:1]
    own, family = with_latents(pipeline), family_of_pipeline(pipeline)
    labels = teacher.encode_prompts(PROMPTS[:1]).labels if family.on_pixels else None
    arguments = call_arguments(
        family_of_pipeline(own), PROMPTS[:1], labels, eps.clone(), teacher.size
    )
    if family.takes("guidance_scale"):
        arguments["guidance_scale"] = student_guidance(family)
    torch.manual_seed(0)
    (expected,) = own(num_inference_steps=1, **arguments).images
    label = None if labels is None else int(labels[0])
    *before, last = call_in_words(family, PROMPTS[0], label, teacher.size, 1).splitlines()
    names = {"pipe": pipeline, "latents": eps}
    torch.manual_seed(0)
    exec("\n".join(before), names)
    assert np.array_equal(np.asarray(eval(last, names)), np.asarray(expected))


def test_the_call_in_words_draws_the_new_noise_of_a_student_of_several_steps(families):
    pipeline, teacher = plain(families.folder("sd")), families.teacher("sd")
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    family, eps = family_of_pipeline(pipeline), noise(teacher)[:1]
    arguments = call_arguments(family, PROMPTS[:1], None, eps.clone(), teacher.size)

    def own(seed: int) -> np.ndarray:
        drawn = [torch.Generator().manual_seed(seed)]
        arguments["guidance_scale"] = student_guidance(family)
        return np.asarray(pipeline(num_inference_steps=2, generator=drawn, **arguments).images[0])

    words = call_in_words(family, PROMPTS[0], None, teacher.size, 2, seed=7)
    *before, last = words.splitlines()
    names: dict[str, object] = {"pipe": pipeline, "latents": eps}
    exec("\n".join(before), names)
    assert np.array_equal(np.asarray(eval(last, names)), own(7))
    assert not np.array_equal(own(7), own(8))
