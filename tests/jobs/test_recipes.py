"""The recipes for the published models, with tiny components of the same families in them."""

import json
import re
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline

import jobs
from jobs.cli import main
from jobs.config import load_recipe, shipped_recipes
from jobs.placement import (
    DATA_CPUS,
    evaluate_demand,
    pairs_demand,
    teacher_training_demand,
    too_full,
    train_demand,
)
from pipelines.placement import NodeFacts, room_for
from pipelines.stage_settings import stage_steps
from pipelines.teacher_source import TeacherSource, teacher_source
from pipelines.train_config import TrainSection
from tests.dmd_core.tiny_families import save_family
from tests.pipelines.dmd_runs import PROMPTS, write_pictures

# recipe → its family among the tiny ones
FAMILIES = {"sd15": "sd", "sdxl": "sdxl", "sd3": "sd3", "flux": "flux", "pixart": "pixart"}
# What this machine and the tiny components need; what makes the method stays the recipe's own.
TINY = {
    "teacher.revision": "", "pairs.height": 16, "pairs.width": 16, "pairs.steps": 4,
    "pairs.batch_size": 4, "pairs.rows_per_block": 4, "pairs.actors": 1, "pairs.gpus_per_actor": 0,
    "pairs.threads_per_actor": 1, "train.use_gpu": "false", "train.num_workers": 1,
    "train.cpus_per_worker": 1, "train.threads_per_worker": 1, "train.max_train_steps": 2,
    "train.train_batch_size": 2, "train.lr_warmup_steps": 1, "train.checkpointing_steps": 2,
    "train.validation_steps": 2, "train.num_validation_images": 2, "train.logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Recipe → its tiny teacher."""
    root = tmp_path_factory.mktemp("families")
    return {name: save_family(family, root / name) for name, family in FAMILIES.items()}


@pytest.fixture
def options(folders, tmp_path):
    """Recipe → the arguments that put tiny components in its place."""

    def build(name: str) -> list[str]:
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        section = load_recipe(name, []).train
        keys = TINY | {
            "run.dir": tmp_path / "run", "teacher.path": folders[name],
            "pairs.prompts": tmp_path / "prompts.txt",
        }  # fmt: skip
        if section.uses_gan:
            keys["train.real_pictures"] = write_pictures(tmp_path / "real", PROMPTS)
        if section.needs_pairs:
            keys |= {"train.regression_loss": "l2", "train.regression_batch_size": 2}
        if section.trainable == "lora":
            keys["train.lora_rank"] = 2
        return ["--config", name, *(f"--set={key}={value}" for key, value in keys.items())]

    return build


@pytest.mark.parametrize("name", list(FAMILIES))
def test_its_teacher_is_pinned_or_a_folder(name):
    assert name in shipped_recipes()
    source = TeacherSource.from_url(teacher_source(load_recipe(name, []).teacher).url)
    assert re.fullmatch("[0-9a-f]{40}", source.revision) or source.path.startswith("/models/")


@pytest.mark.parametrize("name", shipped_recipes())
def test_its_work_has_room_in_the_ray_that_it_starts(name):
    """On a machine with eight GPUs."""
    recipe = load_recipe(name, [])
    grown = recipe.pairs.model_copy(update={"actors": recipe.pairs.most_actors})
    node = NodeFacts({"CPU": recipe.ray.num_cpus, "GPU": 8}, {})
    fed = [pairs_demand(recipe.model_copy(update={"pairs": grown})), evaluate_demand(recipe)]
    for demand in (*fed, train_demand(recipe), teacher_training_demand(recipe)):
        assert room_for(demand, [node]) >= demand.count, demand
    assert [too_full(demand, [node], DATA_CPUS) for demand in fed] == ["", ""]


@pytest.mark.parametrize(
    ("name", "iterations"),
    [("sdxl", 20_000), ("sd3", 20_000), ("flux", 5_000), ("cifar10-dmd2", 200_000)],
)
def test_its_steps_are_the_published_updates_of_the_student(name, iterations):
    """DMD2 and FastGen count the updates of the fake score, too; a step is one of the student."""
    train = load_recipe(name, []).train
    assert train.total_steps * train.fake_updates == iterations
    assert train.lr_warmup_steps * train.fake_updates == 500


def test_dmd2_s_settings_for_stable_diffusion_are_a_recipe():
    """Those in the last comment of `sd15`, with the paper's steps."""
    text = (Path(jobs.__file__).parent / "recipes" / "sd15.yaml").read_text()
    (block,) = re.findall(r"#   (train: \{.*?\n(?:#  .*\n)*)", text)
    given = yaml.safe_load(block.replace("\n#", "\n"))["train"]
    train = TrainSection.model_validate(given)
    assert [10 * stage_steps(stage, keys) for stage, keys in train.plan()] == [40_000, 5_000]
    assert train.fake_updates == 10 and train.lr_warmup_steps * 10 == 500


@pytest.mark.parametrize("name", list(FAMILIES))
def test_its_plan_is_told_without_work(name, options, tmp_path, capsys):
    arguments = options(name)
    assert main(["pairs", *arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == len(PROMPTS)
    assert main(["train", *arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps_to_do"] == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_it_runs_from_pairs_to_a_student(name, options, folders, tmp_path, ray_cluster):
    arguments = options(name)
    for verb in ("pairs", "train", "export"):
        assert main([verb, *arguments]) == 0
    log = [
        json.loads(line)
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")
        if line
    ]
    assert [line["step"] for line in log] == [1, 2]
    index = json.loads((tmp_path / "run" / "student" / "model_index.json").read_text())
    teacher = DiffusionPipeline.load_config(folders[name])
    assert index["_class_name"] == teacher["_class_name"]
