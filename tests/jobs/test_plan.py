"""A dry run says what work will take and cost, from which rate, and refuses a disk that is full."""

import json

import pytest
from diffusers import DDIMScheduler

from dmd_core.files import write_atomic
from dmd_core.ode import make_scheduler
from jobs import plans
from jobs.cli import main
from jobs.config import load_recipe
from jobs.errors import Exit, JobError
from pipelines.config import PairsSection
from pipelines.costs import (
    CostSection,
    MeasuredPairs,
    Rate,
    Work,
    estimate,
    evaluations_per_picture,
    free_bytes,
    measured_pairs,
    pair_rate,
    step_rate,
)
from pipelines.manifest_model import generation_folder
from pipelines.storage import open_store
from pipelines.train_config import TrainSection
from tests.pipelines.sealed_sets import SECTION, teacher_set

PRICES = CostSection(gpu_hour=2.0, cpu_hour=0.1, currency="EUR")


@pytest.fixture
def plan_of(tiny_teacher_dir, tmp_path, capsys):
    """(exit code, plan, stderr) of `dmd <verb> --dry-run` of the tiny recipe, 12 prompts."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(12)))

    def run(verb: str, **settings: object):
        base: dict[str, object] = {
            "run.dir": tmp_path / "run",
            "teacher.path": tiny_teacher_dir,
            "pairs.prompts": tmp_path / "prompts.txt",
            "evaluate.prompts": tmp_path / "prompts.txt",
        }
        merged = base | {key.replace("__", "."): value for key, value in settings.items()}
        chosen = [part for key, value in merged.items() for part in ("--set", f"{key}={value}")]
        code = main([verb, "--config", "tiny", "--dry-run", "--json", *chosen])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    run.folder = tmp_path
    return run


def record(root, manifest, **spent) -> None:
    """What the run that sealed `manifest` noted about itself."""
    path = root.path(
        generation_folder(manifest.fingerprint_digest), "runs", f"{manifest.fence:06d}.json"
    )
    write_atomic(root.fs, path, json.dumps(spent).encode())


# ------------------------------------------------------------------ arithmetic


def test_hours_and_prices_follow_from_the_rate():
    plan = estimate(Work(units=7200, workers=4, cpus=2, gpus=0.5), Rate(1.0, "said"), PRICES)
    assert plan["rate"] == "said"
    assert (plan["gpu_hours"], plan["cpu_hours"], plan["estimated_seconds"]) == (1.0, 4.0, 1800)
    assert (plan["cost"], plan["currency"]) == (2.4, "EUR")


def test_what_is_not_known_is_not_made_up():
    plan = estimate(Work(100, 1, 1, 0), Rate(None, "unknown: not measured"), PRICES)
    assert plan == {"rate": "unknown: not measured"}
    no_price = estimate(Work(3600, 1, 1, 0), Rate(1.0, "said"), CostSection())
    assert no_price["cpu_hours"] == 1.0 and no_price["cost"] == "unknown: cost.cpu_hour is not set"
    on_gpu = estimate(Work(3600, 1, 1, 1), Rate(1.0, "said"), CostSection(gpu_hour=3.0))
    assert on_gpu["cost"] == 3.0  # a node's price is its GPU's


def test_a_measured_rate_is_believed_before_a_stated_one_and_that_before_a_trial():
    section, here = PairsSection(), Rate(9.0, "measured here")
    measured = MeasuredPairs(version=3, rows=512, seconds=0.5, bytes=None)
    stated = CostSection(seconds_per_picture=2.0)
    rate = pair_rate(section, stated, measured, lambda: here)
    assert rate.seconds == 0.5 and "measured on version 3 (512 pairs)" in rate.source
    rate = pair_rate(section, stated, None, lambda: here)
    assert rate.seconds == 2.0 and "stated in the recipe" in rate.source
    assert pair_rate(section, CostSection(), None, lambda: here) == here


# ------------------------------------------------------------------ what was measured


def test_a_version_knows_what_it_took(tiny_teacher_dir, tmp_path):
    root = open_store(str(tmp_path / "set"))
    manifest = teacher_set(root, tiny_teacher_dir, 8)
    assert measured_pairs(root, SECTION, manifest.fingerprint) is None  # nothing was noted
    record(root, manifest, rows=8, busy_s=4.0, gpu_s=0.0)
    found = measured_pairs(root, SECTION, manifest.fingerprint)
    assert found is not None and (found.version, found.rows, found.seconds) == (1, 8, 0.5)
    assert found.bytes == sum(file.bytes for file in manifest.files) / 8
    # Twice the steps take twice as long; without guidance, half.
    doubled = SECTION.model_copy(update={"steps": 6})
    found = measured_pairs(root, doubled, manifest.fingerprint | {"steps": 6})
    assert found is not None and found.seconds == 1.0
    found = measured_pairs(
        root, doubled, manifest.fingerprint | {"guidance_scale": 1.0}, distilled=True
    )
    assert found is not None and found.seconds == 1.0  # guidance is no second pass
    plain = SECTION.model_copy(update={"guidance_scale": 1.0})
    found = measured_pairs(root, plain, manifest.fingerprint)
    assert found is not None and found.seconds == 0.25


def test_what_cannot_be_compared_is_not_believed(tiny_teacher_dir, tmp_path):
    root = open_store(str(tmp_path / "set"))
    manifest = teacher_set(root, tiny_teacher_dir, 8)
    record(root, manifest, rows=8, busy_s=4.0, gpu_s=0.0)
    larger = manifest.fingerprint | {"height": 64}
    assert measured_pairs(root, SECTION, larger) is None
    on_gpu = SECTION.model_copy(update={"gpus_per_actor": 1.0})
    assert measured_pairs(root, on_gpu, manifest.fingerprint) is None  # it ran on CPUs
    other = measured_pairs(root, SECTION, manifest.fingerprint | {"teacher_revision": "0" * 64})
    assert other is not None and other.bytes is None
    record(root, manifest, rows=0, busy_s=0.0, gpu_s=0.0)  # sealed what others had made
    assert measured_pairs(root, SECTION, manifest.fingerprint) is None


def test_a_run_knows_what_a_step_took(tmp_path):
    store, section = open_store(str(tmp_path)), TrainSection(train_batch_size=32)
    unknown = step_rate(store, section, CostSection())
    assert unknown.seconds is None and "not measured yet" in unknown.source
    stated = step_rate(store, section, CostSection(seconds_per_step=3.0))
    assert stated.seconds == 3.0
    lines = [{"step": step, "samples_per_second": 64.0} for step in range(10, 60, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measured = step_rate(store, section, CostSection(seconds_per_step=3.0))
    assert measured.seconds == 0.5 and "steps 10 to 50 of this run" in measured.source


# ------------------------------------------------------------------ the verbs


def test_pairs_are_planned_from_a_trial_then_from_the_version(plan_of, tiny_teacher_dir):
    code, plan, _ = plan_of("pairs", cost__cpu_hour=0.5)
    assert code == 0 and plan["rows"] == plan["rows_to_make"] == 12
    assert "measured here: one network evaluation" in plan["rate"]
    assert plan["bytes"] == 12 * 2 * 2 * 4 * 4 * 4  # ε and x₀, float16, 4×4×4
    assert plan["cpu_hours"] >= 0 and plan["cost"] >= 0 and plan["free_bytes"] > 0
    root = open_store(str(plan_of.folder / "run" / "pairs"))
    manifest = teacher_set(root, tiny_teacher_dir, 8)
    record(root, manifest, rows=8, busy_s=3600.0, gpu_s=0.0)
    code, plan, _ = plan_of("regenerate", cost__cpu_hour=0.5, pairs__steps=3, pairs__solver="ddim")
    assert code == 0 and "measured on version 1 (8 pairs)" in plan["rate"]
    assert plan["cpu_hours"] == pytest.approx(12 * 450 / 3600)
    assert plan["cost"] == pytest.approx(0.75) and plan["keeps_versions"] == 3


def test_rows_with_sizes_of_their_own_are_planned_at_their_size(plan_of):
    """The tiny teacher makes 16×16 pixels; two of these rows have four times the area."""
    rows = [*(f"prompt {i},," for i in range(10)), "wide,32,32", "wider,32,32"]
    (plan_of.folder / "sized.csv").write_text("\n".join(["prompt,height,width", *rows]))
    sized = {"pairs__prompts": plan_of.folder / "sized.csv"}
    code, plan, _ = plan_of("pairs", cost__seconds_per_picture=3600, **sized)
    assert code == 0 and plan["rows_to_make"] == 12
    assert plan["bytes"] == 2 * 2 * 4 * (10 * 4 * 4 + 2 * 8 * 8)
    assert plan["cpu_hours"] == pytest.approx(10 + 2 * 4) and "×1.5" in plan["rate"]
    assert plan["batches"] == 2 + 1  # rows of one size are made together, eight at a time


def test_a_gpu_that_is_not_here_is_not_measured(plan_of, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, plan, _ = plan_of("pairs", pairs__gpus_per_actor=0.5)
    assert code == 0 and "has none to measure on" in plan["rate"] and "cost" not in plan
    stated = {"cost__seconds_per_picture": 300, "cost__gpu_hour": 2}
    code, plan, _ = plan_of("pairs", pairs__gpus_per_actor=0.5, **stated)
    assert plan["gpu_hours"] == 0.5 and plan["cost"] == 1.0


def test_a_training_is_planned_in_steps_of_its_group(plan_of):
    code, plan, _ = plan_of(
        "train", cost__seconds_per_step=600, cost__gpu_hour=3, train__num_workers=2,
        train__use_gpu="true",
    )  # fmt: skip
    assert code == 0 and plan["steps_to_do"] == 6
    assert (plan["gpu_hours"], plan["cost"], plan["estimated_seconds"]) == (2.0, 6.0, 3600)
    assert plan["bytes"] > 0 and "stated in the recipe" in plan["rate"]
    _, plan, _ = plan_of("train")
    assert plan["rate"].startswith("unknown") and "cost" not in plan


def test_an_evaluation_counts_every_system(plan_of):
    code, plan, _ = plan_of("evaluate", cost__seconds_per_picture=8, cost__cpu_hour=1)
    # Teacher twice (4 steps), 1 and 2 steps, all guided; the student and its start once each.
    per_prompt = 2 * (4 + 4 + 1 + 2) + 2
    assert code == 0 and plan["network_evaluations"] == 12 * per_prompt
    assert plan["cpu_hours"] == pytest.approx(12 * per_prompt * 1.0 / 3600, abs=1e-4)
    systems = plan["systems"]
    held_out = plan_of.folder / "held_out.txt"
    held_out.write_text("\n".join([*(f"prompt {index}" for index in range(10)), "prompt 1"]))
    code, plan, _ = plan_of("evaluate", evaluate__prompts=held_out, evaluate__few_steps="[2,4]")
    assert plan["prompts"] == 10 and plan["systems"] == systems - 1  # the teacher makes 4 steps
    assert plan["network_evaluations"] == 10 * (2 * (4 + 4 + 2) + 2)


def test_a_teacher_of_ones_own_is_planned_too(plan_of):
    stated = {"cost__seconds_per_teacher_step": 450, "cost__cpu_hour": 2}
    code, plan, _ = plan_of("train-teacher", **stated)
    assert code == 0 and plan["cpu_hours"] == 1.0 and plan["cost"] == 2.0


@pytest.mark.parametrize("verb", ["pairs", "train"])
def test_a_disk_without_room_refuses_the_plan(plan_of, monkeypatch, verb):
    monkeypatch.setattr(plans, "free_bytes", lambda store: 1000)
    code, plan, err = plan_of(verb, cost__seconds_per_step=1)
    assert code == Exit.REFUSED and "are needed at" in err and "1000 B free" in err
    assert plan["free_bytes"] == 1000 and plan["bytes"] > 1000  # said nevertheless


def test_free_space_is_that_of_the_disk_below(tmp_path, s3_store):
    deep = open_store(str(tmp_path / "not" / "there" / "yet"))
    assert free_bytes(deep) == pytest.approx(free_bytes(open_store(str(tmp_path))), rel=0.01)
    assert not (tmp_path / "not").exists()
    assert free_bytes(s3_store) is None
    assert plans.with_space({"rows": 1}, 10**18, s3_store) == {"rows": 1}
    with pytest.raises(JobError):
        plans.with_space({"rows": 1}, 10**18, deep)


@pytest.mark.parametrize("solver", ["ddim", "pndm", "dpmsolver++", "heun", "euler", "edm_heun"])
def test_evaluations_are_those_that_the_solver_makes(solver):
    edm = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}
    config = edm if solver.startswith("edm") else dict(DDIMScheduler().config)
    scheduler = make_scheduler(solver, config)
    scheduler.set_timesteps(10)
    section = PairsSection(solver=solver, steps=10, guidance_scale=1.0)
    assert evaluations_per_picture(section) == len(scheduler.timesteps)
    guided = section.model_copy(update={"guidance_scale": 2.0})
    assert evaluations_per_picture(guided) == 2 * len(scheduler.timesteps)
    assert evaluations_per_picture(guided, distilled=True) == len(scheduler.timesteps)


def test_prices_are_no_part_of_a_run():
    recipe = load_recipe("demo", ["cost.gpu_hour=1.5", "pairs.placement.accelerator_type=A10G"])
    assert recipe.cost.gpu_hour == 1.5 and recipe.pairs.placement.accelerator_type == "A10G"
    with pytest.raises(JobError, match=r"did you mean cost\.gpu_hour"):
        load_recipe("demo", ["cost.gpu_hours=1"])
    assert evaluations_per_picture(recipe.pairs) == 40
