"""Station 9 with a tiny random teacher, and a copy of it as the exported student."""

import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import DiffusionPipeline
from ray.data import DataContext

from dmd_core.export import student_scheduler
from dmd_core.features import latent_features
from dmd_core.gallery import Gallery, save_gallery
from dmd_core.metrics import Estimate
from dmd_core.miniature import build_scheduler
from dmd_core.noise import sample_noise
from dmd_core.ode import make_scheduler, solvers_for
from pipelines import images
from pipelines.config import EvaluateSection, PairsSection, StorageSection
from pipelines.evaluation import NOISE, NOISE_PROMPTS, evaluate
from pipelines.images import SamplerPool, image_folders, make_images
from pipelines.measures import verdict
from pipelines.plots import picture_grid
from pipelines.report import collect_inputs, render_report
from pipelines.storage import open_store
from pipelines.stored_images import array_of, open_images, stored_parts, stored_whole
from pipelines.systems import (
    Networks,
    SamplingPlan,
    SystemSampler,
    load_plainly,
    network_evaluations,
)
from pipelines.timing import measure_energy, nvml_counter
from tests.pipelines.timed_calls import rows_of, timed_calls

PROMPTS = tuple(
    f"a {colour} {thing}" for colour in ("red", "blue") for thing in "whale fox tree".split()
)
HELD_OUT = tuple(f"a {colour} {thing}" for colour in ("red", "green", "grey") for thing in "abcd")
MEAN_LATENT = np.full((4, 4, 4), 0.25, np.float32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Networks this small only lose time by threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def student_dir(tiny_teacher_dir, tmp_path_factory) -> str:
    """The untrained student: the teacher's networks under the exported student's scheduler."""
    folder = tmp_path_factory.mktemp("student") / "tiny"
    shutil.copytree(tiny_teacher_dir, folder)
    config = load_plainly(tiny_teacher_dir, "cpu").scheduler.config
    student_scheduler(config, (999,)).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture(scope="module")
def networks(tiny_teacher_dir, student_dir) -> Networks:
    return Networks(tiny_teacher_dir, student_dir, StorageSection(), mean=MEAN_LATENT, threads=1)


@pytest.fixture(scope="module")
def plan() -> SamplingPlan:
    section = EvaluateSection(teacher_steps=4, few_steps=(1, 2, 4), batch_size=4)
    return SamplingPlan.from_sections(section, PairsSection(guidance_scale=3.0))


@pytest.fixture(scope="module")
def sampler(plan, networks) -> SystemSampler:
    return SystemSampler(plan, networks)


def _sample(sampler: SystemSampler, system: str):
    return sampler(system, PROMPTS, sampler.plan.seeds(system, PROMPTS))


def test_untrained_student_through_plain_diffusers_is_the_start(sampler):
    start, student = _sample(sampler, "start"), _sample(sampler, "student")
    np.testing.assert_allclose(student.latents, start.latents, atol=1e-5)
    assert np.abs(student.pictures.astype(int) - start.pictures).max() <= 1


def test_few_step_teacher_is_the_diffusers_pipeline_on_the_same_noise(sampler, networks, plan):
    pipeline = load_plainly(networks.teacher, "cpu")
    pipeline.scheduler = make_scheduler("dpmsolver++", pipeline.scheduler.config)
    eps = sample_noise(plan.seeds("teacher", PROMPTS), (4, 4, 4), torch.float16).float()
    expected = pipeline(
        list(PROMPTS), latents=eps, num_inference_steps=2, guidance_scale=3.0, output_type="np"
    ).images
    found = _sample(sampler, "teacher_2").pictures
    assert np.abs(found - expected * 255).max() <= 1


def test_reference_draws_other_noise_and_nothing_else_does(plan):
    names = ["teacher", "student", "start", "teacher_1"]
    assert all(plan.seeds(name, PROMPTS) == plan.seeds("teacher", PROMPTS) for name in names)
    assert not set(plan.seeds("teacher_again", PROMPTS)) & set(plan.seeds("teacher", PROMPTS))


def test_mean_picture_is_one_decoded_latent(sampler):
    images = _sample(sampler, "mean")
    expected = sampler.teacher.decode(torch.from_numpy(MEAN_LATENT)[None])[0]
    assert all(np.array_equal(picture, expected) for picture in images.pictures)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\); expected \(4, 4, 4\)"):
        SystemSampler(sampler.plan, Networks(sampler._student_path, "", StorageSection(),
                      mean=np.zeros((4, 8, 8))))("mean", PROMPTS, [0] * 6)  # fmt: skip


def test_features_are_the_scaled_posterior_mean_in_any_batch(sampler):
    images, vae = _sample(sampler, "teacher_1"), sampler.teacher.pipeline.vae
    one = torch.from_numpy(images.pictures[3:4]).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(one).latent_dist.mode() * vae.config.scaling_factor
    np.testing.assert_allclose(images.features[3], expected.flatten(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        latent_features(vae, images.pictures, batch_size=2), images.features, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("solver", solvers_for(build_scheduler().config))
def test_network_evaluations_are_those_that_happen(sampler, networks, plan, solver):
    plan = replace(plan, solver=solver)
    counted = SystemSampler(plan, networks)
    counts = []
    counted.teacher.pipeline.unet.register_forward_hook(
        lambda module, inputs, output: counts.append(len(output[0]))
    )
    config = dict(counted.teacher.pipeline.scheduler.config)
    for system in ("teacher", "teacher_1", "teacher_2", "start"):
        counts.clear()
        counted(system, PROMPTS[:1], [1])
        assert network_evaluations(plan, config, system) == sum(counts), system
    assert network_evaluations(plan, config, "student") == 1
    assert network_evaluations(plan, config, "mean") == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speed_is_that_of_what_each_system_does(plan, networks, dtype):
    """Of the right network, all of its evaluations and no others, both in the pictures' dtype."""
    plan = replace(plan, compute_dtype=dtype)
    timed = timed_calls(plan, networks, PROMPTS, 2)
    config = load_plainly(networks.teacher, "cpu").scheduler.config
    systems = ("teacher", "teacher_1", "teacher_2", "student")
    counts = {system: network_evaluations(plan, config, system) for system in systems}
    assert counts["teacher"] == 8 and counts["student"] == 1
    assert timed.rows == rows_of(counts, 2)
    assert timed.dtypes == {name: {getattr(torch, dtype)} for name in ("teacher", "student")}
    assert timed.measured["compute_dtype"] == dtype
    seconds = timed.measured["seconds_per_picture"]
    for entry in seconds.values():
        assert 0 < entry["min"] <= entry["median"] <= entry["max"] and entry["repeats"] == 2
    ratio = seconds["teacher"]["median"] / seconds["student"]["median"]
    assert timed.measured["speed_up"] == ratio
    assert timed.measured["joules_per_picture"] == {
        "value": "not measured",
        "reason": "no energy counter is read on cpu",
    }


def test_the_timed_student_lies_in_memory_as_the_timed_teacher_does(plan, networks):
    def on_a_gpu(network):
        network.to(memory_format=torch.channels_last)

    plan = replace(plan, steps=1, few_steps=())
    plain, laid_out = (
        timed_calls(plan, networks, PROMPTS, 1, *layout).strides for layout in ((), (on_a_gpu,))
    )
    assert plain["student"] == plain["teacher"] != laid_out["teacher"] == laid_out["student"]


def test_energy_is_joules_over_pictures(monkeypatch):
    monkeypatch.setattr("pipelines.timing._ENERGY_SECONDS", 0.02)
    joules = [0.0]

    def spend(amount):
        def make(prompt):
            joules[0] += amount

        return make

    makers = {"teacher": spend(40.0), "teacher_1": spend(7.0), "student": spend(0.5)}
    found = measure_energy(makers, "fox", lambda: joules[0])
    assert found["value"] == pytest.approx({"teacher": 40.0, "student": 0.5})
    assert nvml_counter("cpu") == "no energy counter is read on cpu"


def test_files_change_with_what_decides_their_content_and_only_then(plan):
    systems = ["teacher", "teacher_1", "student", "mean"]
    inputs = {"teacher_revision": "t", "student_revision": "s", "mean": MEAN_LATENT}
    files = image_folders(plan, PROMPTS, systems, **inputs)
    retrained = image_folders(plan, PROMPTS, systems, **(inputs | {"student_revision": "s2"}))
    assert {name for name in systems if files[name] != retrained[name]} == {"student"}
    other_mean = image_folders(plan, PROMPTS, systems, **(inputs | {"mean": MEAN_LATENT + 1}))
    assert {name for name in systems if files[name] != other_mean[name]} == {"mean"}
    for changed in ({"steps": 5}, {"seed": 1}, {"guidance_scale": 2.0}, {"solver": "ddim"}):
        other = image_folders(replace(plan, **changed), PROMPTS, systems, **inputs)
        assert not set(other.values()) & set(files.values()), changed
    more = image_folders(replace(plan, few_steps=(1, 2, 8)), PROMPTS, systems, **inputs)
    assert more == files


def test_foreign_file_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    store, folder = open_store(str(tmp_path)), tmp_path / "x"
    with pytest.raises(ValueError, match="x holds no evaluation pictures"):
        open_images(store, "x")
    folder.mkdir()
    pq.write_table(pa.table({"prompt": ["fox"]}), folder / "00000000.parquet")
    with pytest.raises(ValueError, match="x does not hold evaluation pictures"):
        open_images(store, "x")


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(-2, -1, True), (1, 2, False), (-1, 1, "undecided")]
)
def test_better_only_beyond_the_interval(low, high, expected):
    assert verdict(Estimate((low + high) / 2, low, high)) == expected


@pytest.fixture(scope="module")
def evaluated(ray_cluster, networks, tmp_path_factory):
    """One whole evaluation: (its run, its metrics, what was reported as progress)."""
    folder = tmp_path_factory.mktemp("evaluated")
    teacher = folder / "teacher"
    shutil.copytree(networks.teacher, teacher)
    features = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float16)
    save_gallery(str(teacher), Gallery(HELD_OUT * 2, np.zeros(24, bool), features))
    run, progress = open_store(str(folder / "run")), []
    section = EvaluateSection(
        teacher_steps=4, few_steps=(1,), batch_size=8, timing_repeats=2, report_images=3
    )
    metrics = evaluate(
        section,
        PairsSection(guidance_scale=3.0),
        run=run,
        networks=replace(networks, teacher=str(teacher)),
        prompts=[*HELD_OUT, HELD_OUT[0]],
        provenance={"manifest": "abc"},
        on_progress=lambda *count: progress.append(count),
    )
    return run, metrics, progress


def test_evaluation_measures_every_system(evaluated):
    run, metrics, progress = evaluated
    assert metrics == json.loads(Path(run.path("metrics.json")).read_text())
    assert metrics["prompts"] == metrics["samples"] == 12
    assert metrics["interval_over"] == "prompts" and metrics["provenance"]["manifest"] == "abc"
    assert progress[-1] == (72, 72)
    systems = metrics["systems"]
    assert set(systems) == {"teacher", "student", "teacher_again", "start", "mean", "teacher_1"}
    # The student is the untrained start, up to rounding: same distance, same pictures.
    for measure in ("kid", "rmse"):
        start, student = systems["start"][measure], systems["student"][measure]
        assert student["value"] == pytest.approx(start["value"], abs=1e-3)
    assert set(metrics["comparisons"]) == {"start", "mean", "teacher_1"}
    assert systems["teacher"]["network_evaluations"] == 8
    assert [entry["k"] for entry in systems["student"]["retrieval"]] == [1, 5]


def test_plain_diffusers_makes_the_stored_picture_from_the_noise_file(evaluated, networks):
    run, metrics, _ = evaluated
    eps = safetensors.numpy.load_file(run.path(NOISE))["latents"]
    listing = json.loads(Path(run.path(NOISE_PROMPTS)).read_text())
    assert [entry["prompt"] for entry in listing] == list(HELD_OUT[:3])
    picture = DiffusionPipeline.from_pretrained(networks.student)(
        HELD_OUT[2],
        latents=torch.from_numpy(eps[2:3]),
        num_inference_steps=1,
        guidance_scale=0,
        output_type="np",
    ).images[0]
    stored = open_images(run, metrics["pictures"]["student"]).first(3).pictures[2]
    assert np.abs(picture * 255 - stored).max() <= 1


def test_report_of_the_evaluated_run_shows_what_was_sampled(evaluated):
    run, metrics, _ = evaluated
    Path(run.path("metrics.jsonl")).write_text('{"step": 200, "loss_dm": 2.0}\n')
    Path(run.path("versions.json")).write_text('{"torch": "2"}')
    samples = Path(run.path("samples"))
    samples.mkdir()
    for step in (30, 4, 200, 210):  # the last one is of lost work: the log ends before it
        png = picture_grid([np.full((1, 2, 2, 3), step, np.uint8)])
        (samples / f"step_{step:08d}.png").write_bytes(png)
    inputs = collect_inputs(run, title="t", images=3)
    assert tuple(inputs.prompts) == HELD_OUT[:3]
    for system in ("teacher", "student", "start", "teacher_1"):
        stored = open_images(run, metrics["pictures"][system]).first(3).pictures
        assert np.array_equal(inputs.pictures[system], stored)
    assert [step for step, _ in inputs.samples] == [4, 30, 200]
    files = {source.name: source.file for source in inputs.sources}
    assert files["torch"] == "versions.json" and files["manifest"] == "metrics.json"
    template = resources.files("jobs").joinpath("templates/report.html.j2").read_text("utf-8")
    html = render_report(inputs, template)
    assert all(prompt in html for prompt in HELD_OUT[:3]) and HELD_OUT[3] not in html


def test_run_is_read_the_same_from_an_object_store(evaluated, s3_store):
    run, _, _ = evaluated
    for path in (path for path in Path(run.root).rglob("*") if path.is_file()):
        s3_store.fs.put_file(str(path), s3_store.path(path.relative_to(run.root).as_posix()))
    here, there = (collect_inputs(store, title="t", images=3) for store in (run, s3_store))
    assert there.metrics == here.metrics and there.samples == here.samples
    for system, pictures in here.pictures.items():
        assert np.array_equal(there.pictures[system], pictures)


def test_interrupted_sampling_goes_on_with_what_is_missing(evaluated, networks):
    """Of two batches of a system that is half done, the one that is there is left alone."""
    run, metrics, _ = evaluated
    folders = {name: metrics["pictures"][name] for name in ("teacher_1", "student")}
    files = [path for folder in folders.values() for path in Path(run.path(folder)).iterdir()]
    assert sorted({path.name for path in files}) == ["00000000.parquet", "00000008.parquet"]
    assert len(files) == 4
    written = {path: path.stat().st_mtime_ns for path in files}
    lost = Path(run.path(folders["student"])) / "00000008.parquet"
    before = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match="holds 8 of 12 evaluation pictures"):
        open_images(run, folders["student"])
    assert stored_whole(run, folders["teacher_1"]) and not stored_whole(run, folders["student"])
    section = EvaluateSection(teacher_steps=4, few_steps=(1,), batch_size=8)
    plan = SamplingPlan.from_sections(section, PairsSection(guidance_scale=3.0))
    told = []
    make_images(
        run, folders, HELD_OUT, plan, networks,
        pool=SamplerPool(actors=0), on_progress=lambda *count: told.append(count),
    )  # fmt: skip
    assert told == [(20, 24), (24, 24)]  # four pictures were missing
    assert lost.read_bytes() == before
    assert {path for path in files if path.stat().st_mtime_ns != written[path]} == {lost}
    images = open_images(run, folders["student"])
    assert images.prompts == HELD_OUT
    assert list(images.seeds) == plan.seeds("student", HELD_OUT)
    assert not list(Path(run.root).rglob("*.tmp"))


def test_stored_pictures_are_read_in_parts_in_groups_and_from_the_top(evaluated):
    run, metrics, _ = evaluated
    images = open_images(run, metrics["pictures"]["student"])
    parts = list(images.parts())
    assert [len(part.prompts) for part in parts] == [8, 4]
    np.testing.assert_array_equal(
        array_of(images, "features"), np.concatenate([part.features for part in parts])
    )
    groups = images.groups(8)
    assert {row: group.prompts for row, group in groups.items()} == {
        0: HELD_OUT[:8],
        8: HELD_OUT[8:],
    }
    assert [group.prompts for group in images.groups(100).values()] == [HELD_OUT]
    top = images.first(10)
    assert top.prompts == HELD_OUT[:10] and len(top.pictures) == 10
    np.testing.assert_array_equal(top.pictures[8:], parts[1].pictures[:2])
    assert stored_parts(run, "nowhere") == []


def test_too_few_prompts_are_refused(networks, tmp_path):
    with pytest.raises(ValueError, match="gives 2 distinct prompts; expected at least 10"):
        evaluate(
            EvaluateSection(),
            PairsSection(),
            run=open_store(str(tmp_path)),
            networks=networks,
            prompts=["fox", "cat", "fox"],
            provenance={},
        )
    assert not list(Path(tmp_path).iterdir())


def test_a_slow_evaluation_is_not_given_up(ray_cluster, plan, networks, tmp_path):
    """By default Ray Data ends an execution in which no batch is finished for half an hour."""
    root, folders = open_store(str(tmp_path)), {"teacher": "x/teacher"}
    batches = list(images._missing_batches(root, folders, PROMPTS, plan))
    where = images._Target(root, folders, len(PROMPTS))
    found = images._on_ray(batches, plan, networks, where, SamplerPool())
    assert found.context.execution_no_progress_timeout_s == -1
    assert DataContext.get_current().execution_no_progress_timeout_s > 0
