"""`dmd pipeline` refuses at once what a later step would refuse after hours."""

import pytest

from jobs.errors import Exit
from jobs.pipeline_steps import NAMES
from pipelines import trackers

GAN = {"train__gan_weight": 1, "train__real_pictures": "/nowhere"}


def _misspelt(pipeline) -> str:
    pipeline.base["evaluate.prompts"] = pipeline.held_out.with_name("held_uot.txt")
    return "held_uot.txt: no such file"


def _too_few(pipeline) -> str:
    pipeline.held_out.write_text("one\ntwo")
    return "evaluate.prompts gives 2 distinct prompts; expected at least 10"


def _no_inception(pipeline) -> str:
    pipeline.base |= {"evaluate.features": "inception", "evaluate.inception": "/nowhere.pth"}
    return "/nowhere.pth"


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--from", "train")])
@pytest.mark.parametrize("spoil", [_misspelt, _too_few, _no_inception])
def test_an_evaluation_that_cannot_be_measured(pipeline, spoil, options):
    expected = spoil(pipeline)
    code, said, ran = pipeline(*options)
    assert code == Exit.REFUSED and expected in said and ran == [], said
    assert not list(pipeline.run.glob("*"))


@pytest.mark.parametrize("spoil", [_misspelt, _too_few])
def test_also_where_the_pairs_are_there_already(pipeline, spoil):
    expected = spoil(pipeline)
    code, said, ran = pipeline("--only", "regenerate")  # nobody asks for an evaluation
    assert code == Exit.OK and ran == ["regenerate"], said
    code, said, ran = pipeline()
    assert code == Exit.REFUSED and expected in said and ran == [], said


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        ({"train__regression_loss": "lpips"}, Exit.REFUSED, "torchvision's VGG-16"),
        ({"train__report_to": "wandb"}, Exit.REFUSED, "[wandb]"),
        ({"train__student_timesteps": "[1200]"}, Exit.USAGE, "times 0 to 999"),
        ({"pairs__solver": "flow_euler"}, Exit.USAGE, "pairs.solver"),
        ({"train__unpaired_prompts": "/nowhere.txt"}, Exit.REFUSED, "/nowhere.txt"),
        ({"train__evaluation": "{steps: 2, metric: retrieval}"}, Exit.USAGE, "no gallery"),
        (GAN, Exit.REFUSED, "/nowhere"),
    ],
)
def test_a_training_that_could_not_start(pipeline, monkeypatch, settings, code, expected, options):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    found, said, ran = pipeline(*options, **settings)
    assert found == code and expected in said and ran == [], said


def test_what_is_finished_is_asked_nothing(pipeline, monkeypatch):
    assert pipeline()[2] == list(NAMES)
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    later = {"train__report_to": "wandb"}
    assert pipeline(**later)[::2] == (Exit.OK, [])
    assert pipeline("--from", "export", **later)[2] == ["export", "evaluate", "report"]
    begun = pipeline.trainings()
    code, said, ran = pipeline("--from", "train", **later)
    assert code == Exit.REFUSED and "[wandb]" in said and ran == []
    assert pipeline.trainings() == begun  # nor is a folder left behind
