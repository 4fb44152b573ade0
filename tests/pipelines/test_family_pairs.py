"""Every family through the stations that make pairs and judge students: what is stored is what its
own diffusers pipeline gives, and an exported student is sampled as its user would."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.ddpm import pipeline_ddpm

from dmd_core.export import export_student
from dmd_core.families import guidance_distilled, part_config
from dmd_core.networks import DmdNetworks
from dmd_core.parallel import World
from dmd_core.teacher import teacher_revision
from dmd_core.trainer import DmdTrainer
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.pairs import decode_pairs, fingerprint_of
from pipelines.pins import Pins
from pipelines.run_inputs import RunInputs
from pipelines.step_data import Progress
from pipelines.storage import open_store
from pipelines.systems import Networks, SamplingPlan, SystemSampler, network_evaluations
from pipelines.teacher_actor import TeacherActor, TeacherTask
from pipelines.train_config import TrainSection
from pipelines.train_settings import stage_settings, trainer_settings
from pipelines.workers import Group
from tests.dmd_core.family_calls import (
    PIXELS,
    PROMPTS,
    call_by_hand,
    plain,
    unclipped_ddim,
)
from tests.pipelines.dmd_runs import write_pictures
from tests.pipelines.test_teacher_actor import rows
from tests.pipelines.timed_calls import rows_of, timed_calls

FLOW, VP = "flow_euler", "dpmsolver++"
SOLVERS = {
    "sd": VP, "sd v": VP, "sdxl": "euler", "sd3": FLOW, "sd3 without t5": FLOW, "flux": FLOW,
    "flux schnell": FLOW, "pixart": VP, "edm": "edm_euler", "ddpm": "ddim", "unconditional": "ddim",
}  # fmt: skip
TIMES = (999, 749, 499, 249)


pytestmark = pytest.mark.usefixtures("one_thread")


def _section(name: str, **changes: object) -> PairsSection:
    side = {} if name in PIXELS else {"height": 16, "width": 16}
    scale = 1.0 if name in PIXELS or name == "flux schnell" else 3.0
    return PairsSection.model_validate(
        {"solver": SOLVERS[name], "steps": 3, "guidance_scale": scale, "dtype": "float32",
         "threads_per_actor": 1, "batch_size": 2, "rows_per_block": 2} | side | changes
    )  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(("sd v", "sd3 w")) else ())
        for name in SOLVERS
    ],
)
def test_stored_pairs_equal_the_family_s_own_pipeline(
    families, tmp_path, name, record_property, monkeypatch
):
    folder, section = families.folder(name), _section(name)
    root = open_store(str(tmp_path / "set"))
    fingerprint = fingerprint_of(section, teacher_revision(folder))
    actor = TeacherActor(TeacherTask(section, folder, StorageSection(), root, fingerprint, {}))
    stored = decode_pairs(actor(rows(2, PROMPTS)))
    assert stored.pair_ids == (0, 1) and stored.latents.dtype == torch.float32
    guidance = {} if name in PIXELS else {"guidance_scale": section.guidance_scale}
    pipeline = plain(folder)
    if name in ("ddpm", "unconditional"):
        pipeline.scheduler = unclipped_ddim(pipeline)
    if name == "unconditional":  # it takes no latents
        monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: stored.noise)
    own = call_by_hand(name, pipeline, stored.noise, section.steps, **guidance)
    found = stored.latents.clamp(-1, 1) if name in PIXELS else stored.latents
    difference = float((found - own).abs().max())
    record_property("max_abs_difference", difference)
    print(f"{name}: {difference:.1e}")
    assert difference <= 1e-4


def test_a_prompt_that_is_no_class_goes_to_the_reject_lane(families, tmp_path):
    folder, section = families.folder("edm"), _section("edm")
    root = open_store(str(tmp_path / "set"))
    fingerprint = fingerprint_of(section, teacher_revision(folder))
    actor = TeacherActor(TeacherTask(section, folder, StorageSection(), root, fingerprint, {}))
    stored = decode_pairs(actor(rows(3, ["cat", "lion", "2"])))
    assert stored.prompts == ("cat", "2")


@pytest.fixture
def networks(families, tmp_path):
    """The untrained student of a family, exported, beside its teacher."""

    def make(name: str, times: tuple[int, ...]) -> Networks:
        teacher, target = families.teacher(name), str(tmp_path / "student")
        export_student(
            teacher, teacher.model.state_dict(), target,
            timesteps=times, card={}, dtype=torch.float32,
        )  # fmt: skip
        return Networks(families.folder(name), target, StorageSection(), threads=1)

    return make


def _plan(name: str, times: tuple[int, ...]) -> SamplingPlan:
    return SamplingPlan.from_sections(
        EvaluateSection(few_steps=(1,), batch_size=2), _section(name), times
    )


@pytest.mark.parametrize("name", ["sdxl", "sd3 without t5", "flux", "edm"])
def test_an_untrained_student_through_plain_diffusers_is_the_start(families, networks, name):
    plan = _plan(name, (999,))
    sampler = SystemSampler(plan, networks(name, (999,)))
    start, student = (
        sampler(system, tuple(PROMPTS), plan.seeds(system, tuple(PROMPTS)))
        for system in ("start", "student")
    )
    expected = start.latents.clip(-1, 1) if name in PIXELS else start.latents
    np.testing.assert_allclose(student.latents, expected, atol=1e-4)
    assert np.abs(student.pictures.astype(int) - start.pictures).max() <= 1
    assert student.features.shape == start.features.shape


def test_a_few_step_student_of_a_flow_teacher_is_the_same_each_time(families, networks):
    plan = _plan("sd3", TIMES)
    sampler, prompts = SystemSampler(plan, networks("sd3", TIMES)), tuple(PROMPTS)
    first, again = (sampler("student", prompts, [3, 4]).latents for _ in range(2))
    assert np.array_equal(first, again)
    assert not np.allclose(first, sampler("student", prompts, [3, 5]).latents, atol=1e-3)


@pytest.mark.parametrize(("name", "distilled", "count"), [("sd3", False, 6), ("flux", True, 3)])
def test_evaluations_are_those_that_happen(families, name, distilled, count):
    teacher, plan, calls = families.teacher(name), _plan(name, (999,)), []
    hook = teacher.model.register_forward_hook(lambda module, args, output: calls.append(output))
    section = _section(name)
    teacher.solve(
        torch.zeros(1, *teacher.latent_shape(16, 16)), ["cat"], solver=section.solver,
        steps=section.steps, guidance_scale=section.guidance_scale,
    )  # fmt: skip
    hook.remove()
    config = dict(teacher.pipeline.scheduler.config)
    found = network_evaluations(plan, config, "teacher", distilled=distilled)
    assert found == count == len(calls) * len(calls[0][0])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [pytest.param("sdxl", "bfloat16", marks=pytest.mark.slow), ("flux", "bfloat16"),
     ("edm", "bfloat16")],
)  # fmt: skip
def test_speed_is_that_of_both_networks(networks, name, dtype):
    used = networks(name, (999,))
    if not torch.cuda.is_available():
        used = replace(used, gpus=1)  # a GPU of the cluster may be a logical one
    plan = replace(_plan(name, (999,)), compute_dtype=dtype)
    timed = timed_calls(plan, used, ("cat",), repeats=1)
    config, distilled = part_config(used.teacher, "scheduler"), guidance_distilled(used.teacher)
    counts = {
        system: network_evaluations(plan, config, system, distilled=distilled)
        for system in ("teacher", "teacher_1", "student")
    }
    assert timed.rows == rows_of(counts, 1)
    assert timed.dtypes == {which: {getattr(torch, dtype)} for which in ("teacher", "student")}
    seconds = timed.measured["seconds_per_picture"]
    assert all(value["median"] > 0 for value in seconds.values())


@pytest.mark.parametrize(("name", "guidance"), [("sdxl", 3.0), ("sd3", 1.0), ("edm", 1.0)])
def test_a_training_run_reads_prompts_and_pictures_and_makes_a_step(
    families, tmp_path, name, guidance
):
    """DMD2 without pairs, as a worker does it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    section = TrainSection.model_validate(
        {"lambda_reg": 0, "regression_batch_size": 0, "train_batch_size": 2, "gan_weight": 5e-3,
         "gan_fake_weight": 1e-2, "guidance_scale": guidance, "learning_rate": 1e-3,
         "real_pictures": write_pictures(tmp_path / "pictures", PROMPTS)}
    )  # fmt: skip
    config = {
        "train": section.model_dump(), "pairs": _section(name).model_dump(), "seed": 3,
        "storage": StorageSection().model_dump(), "dir": str(tmp_path / "run"),
        "root": str(tmp_path / "set"), "teacher": families.folder(name),
        "pins": asdict(Pins(None, {}, (str(prompts),))),
    }  # fmt: skip
    inputs = RunInputs(config, Group(0, 1))
    networks = DmdNetworks(
        inputs.teacher, trainer_settings(section, inputs.seed), World(), inputs.shape
    )
    trainer = DmdTrainer(networks, inputs.unconditional())
    _, keys = section.plan()[0]
    trainer.enter_stage(stage_settings(section, keys, inputs.distance(keys)))
    data = inputs.source(timesteps=1).draw(Progress(), keys, None)
    assert data.unpaired[0].pictures.x.shape == (2, *inputs.shape)
    means = trainer.step(data).means()
    assert {"loss_dm", "loss_gan", "loss_discriminator", "loss_fake"} <= means.keys()
    assert trainer.nonfinite_updates == 0
    teacher, student = inputs.sample_pictures.rows(networks.student)
    assert teacher.shape == student.shape == (2, *inputs.teacher.size, 3)
