"""Recipes that a teacher's family cannot follow are refused before work starts."""

import json
import shutil

import pytest

from jobs.errors import Exit
from tests.dmd_core.family_calls import PIXELS
from tests.jobs.tiny_cli import run_tiny

NO_PAIRS = {"train__lambda_reg": 0, "train__regression_batch_size": 0}
FOUR = "[999, 749, 499, 249]"
SOLVERS = {"sd3": "flow_euler", "flux": "flow_euler", "edm": "edm_heun"}  # of others: dpmsolver++


class _ThroughTheDoor(Exception):
    """All checks were passed: what follows would start Ray."""


@pytest.fixture
def train(families, tmp_path, capsys, monkeypatch):
    """`dmd train` of the tiny recipe without pairs, up to where Ray would start."""
    import jobs.session

    def no_ray(self):
        raise _ThroughTheDoor

    monkeypatch.setattr(jobs.session.Session, "start_ray", no_ray)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog")

    def run(name: str, **settings: object) -> tuple[int, str]:
        base = {
            "run.dir": tmp_path / "run", "teacher.path": families.folder(name),
            "pairs.prompts": prompts, "pairs.root": tmp_path / "pairs",
            "pairs.solver": SOLVERS.get(name.split()[0], "dpmsolver++"),
        }  # fmt: skip
        if name not in PIXELS:
            base |= {"pairs.height": 16, "pairs.width": 16}
        return run_tiny("train", base, NO_PAIRS | settings, capsys)

    return run


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("edm", {"train__student_timesteps": "[999, 700, 100]"}, "evenly spaced"),
        ("sd3", {"train__student_timesteps": "[999, 700, 100]"}, "evenly spaced"),
        ("sd3", {"pairs__height": 18}, "height is 18; expected a multiple of 4"),
        (
            "ddpm",
            {"train__guidance_scale": 3.0, "pairs__guidance_scale": 1.0},
            "train.guidance_scale is 3, but the teacher's network has",
        ),
        ("ddpm", {"train__guidance_scale": 1.0}, "pairs.guidance_scale is 2, but the teacher's"),
    ],
)
def test_what_a_family_cannot_do(train, name, settings, expected):
    code, message = train(name, **settings)
    assert code == Exit.USAGE and expected in message, message


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sdxl", {"train__student_timesteps": FOUR, "train__trainable": "lora"}),
        ("sd3 dynamic", {"train__student_timesteps": FOUR, "train__trainable": "lora"}),
        ("flux", {"train__student_timesteps": FOUR, "train__trainable": "lora"}),
        ("pixart", {"train__student_timesteps": FOUR, "train__trainable": "lora"}),
        ("edm", {"train__guidance_scale": 3.0}),
        ("edm", {"train__student_timesteps": FOUR, "train__trainable": "lora"}),
        ("flux schnell", {"train__guidance_scale": 1.0, "pairs__guidance_scale": 1.0}),
        (
            "ddpm",
            {
                "train__student_timesteps": FOUR,
                "train__guidance_scale": 1.0,
                "pairs__guidance_scale": 1.0,
            },
        ),
    ],
)
def test_what_a_family_can_do(train, name, settings):
    with pytest.raises(_ThroughTheDoor):
        train(name, **settings)


@pytest.mark.parametrize(
    ("pairs", "train_", "expected"),
    [
        (2.0, 1.0, "pairs.guidance_scale is 2; expected 1:"),
        (1.0, 3.5, "train.guidance_scale is 3.5; expected 1:"),
    ],
)
def test_a_network_that_is_told_no_guidance_is_not_guided(train, pairs, train_, expected):
    settings = {"pairs__guidance_scale": pairs, "train__guidance_scale": train_}
    code, message = train("flux schnell", **settings)
    assert code == Exit.REFUSED and expected in message, message


@pytest.mark.parametrize(("guidance", "expected"), [(3.5, Exit.REFUSED), (1.0, Exit.OK)])
def test_neither_are_its_pairs(families, tmp_path, capsys, guidance, expected):
    (tmp_path / "prompts.txt").write_text("cat\ndog")
    base = {
        "run.dir": tmp_path / "run", "teacher.path": families.folder("flux schnell"),
        "pairs.prompts": tmp_path / "prompts.txt", "pairs.solver": "flow_euler",
        "pairs.height": 16, "pairs.width": 16,
    }  # fmt: skip
    code, message = run_tiny(
        "pairs", base, {"pairs__guidance_scale": guidance}, capsys, words=["--dry-run"]
    )
    assert code == expected, message
    assert expected == Exit.OK or "pairs.guidance_scale is 3.5; expected 1:" in message


@pytest.mark.parametrize(
    ("name", "solver", "expected"),
    [
        ("sd3", "dpmsolver++", "does not fit the teacher's noise schedule"),
        ("flux", "ddim", "expected one of flow_euler"),
        ("edm", "dpmsolver++", "expected one of edm_heun"),
    ],
)
@pytest.mark.parametrize("verb", ["pairs", "train"])
def test_a_solver_of_another_family_makes_no_pairs(
    families, train, tmp_path, capsys, verb, name, solver, expected
):
    if verb == "train":  # its sample pictures and its evaluation are the solver's
        code, message = train(name, pairs__solver=solver)
    else:
        code, message = _planned_pairs(families.folder(name), tmp_path, capsys, solver=solver)
    assert code == Exit.USAGE and message.startswith("error: pairs.solver: solver"), message
    assert expected in message


def test_a_size_that_the_teacher_cannot_make_is_no_pairs_either(families, tmp_path, capsys):
    arguments = {"solver": "flow_euler", "height": 18}
    code, message = _planned_pairs(families.folder("sd3"), tmp_path, capsys, **arguments)
    assert code == Exit.USAGE and "pairs.height, pairs.width: height is 18" in message


def test_pairs_are_not_guided_away_from_a_class_that_is_not_there(families, tmp_path, capsys):
    code, message = _planned_pairs(families.folder("ddpm"), tmp_path, capsys, solver="ddim")
    assert code == Exit.USAGE and "Set pairs.guidance_scale: 1.0" in message


def test_a_discriminator_needs_a_network_with_a_middle(families, tmp_path, capsys):
    folder = shutil.copytree(families.folder("sd"), tmp_path / "teacher")
    config = folder / "unet" / "config.json"
    unet = json.loads(config.read_text())
    config.write_text(json.dumps(unet | {"mid_block_type": None}))
    settings = {
        "run.dir": tmp_path / "run", "teacher.path": folder, "pairs.height": 16, "pairs.width": 16,
        "train.gan_weight": 1e-3, "train.real_pictures": tmp_path,
    }  # fmt: skip
    code, message = run_tiny("train", settings, NO_PAIRS, capsys, words=["--dry-run"])
    assert code == Exit.USAGE, message
    assert "train.gan_weight, teacher.path: this UNet has no middle block" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"train__gan_weight": 1e-3, "train__real_pictures": "nowhere"}, "nowhere does not exist"),
        ({"train__unpaired_prompts": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"pairs__prompts": "nowhere.txt"}, "nowhere.txt: no such file"),
        ({"train__student_timesteps": "[1000]"}, "student_timesteps has 1000"),
    ],
)
def test_what_a_training_would_refuse_its_plan_refuses(
    families, tmp_path, capsys, settings, expected
):
    base = {
        "run.dir": tmp_path / "run", "teacher.path": families.folder("sd"),
        "pairs.height": 16, "pairs.width": 16,
    }  # fmt: skip
    code, message = run_tiny("train", base, NO_PAIRS | settings, capsys, words=["--dry-run"])
    assert code in (Exit.USAGE, Exit.REFUSED) and expected in message, message


def test_a_row_s_own_size_that_the_teacher_cannot_make_is_named_by_line(
    families, tmp_path, capsys, monkeypatch
):
    """As of SD 3: a VAE of factor 8, and tokens of 2×2. Before any other row is made."""
    folder = shutil.copytree(families.folder("sd3"), tmp_path / "teacher")
    config = folder / "vae" / "config.json"
    vae = json.loads(config.read_text())
    config.write_text(json.dumps(vae | {"block_out_channels": [8, 8, 8, 8]}))
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt,height,width\ncat,,\ndog,32,48\nfox,32,40\n")
    monkeypatch.setattr("jobs.session.Session.start_ray", lambda self: pytest.fail("too late"))
    settings = {
        "run.dir": tmp_path / "run", "teacher.path": folder, "pairs.prompts": prompts,
        "pairs.solver": "flow_euler", "pairs.height": 16, "pairs.width": 16,
    }  # fmt: skip
    code, message = run_tiny("pairs", settings, {}, capsys)
    assert code == Exit.REFUSED
    assert "prompts.csv, line 4: width '40'; expected a positive multiple of 16" in message


def _planned_pairs(teacher: str, folder, capsys, **pairs: object) -> tuple[int, str]:
    """`dmd pairs --dry-run`."""
    (folder / "prompts.txt").write_text("cat\ndog")
    base = {
        "run.dir": folder / "run", "teacher.path": teacher,
        "pairs.prompts": folder / "prompts.txt", "cost.seconds_per_picture": 1,
    }  # fmt: skip
    changes = {f"pairs__{key}": value for key, value in pairs.items()}
    return run_tiny("pairs", base, changes, capsys, words=["--dry-run"])
