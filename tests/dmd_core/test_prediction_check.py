"""A network's label is held against what it predicts."""

from types import SimpleNamespace

import pytest
import torch

from dmd_core.condition import Condition
from dmd_core.prediction_check import check_prediction
from dmd_core.schedule import Schedule
from dmd_core.teacher import load_teacher


@pytest.mark.parametrize("truth", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("label", ["epsilon", "v_prediction", "sample"])
def test_an_exact_network_of_every_kind_is_known_under_every_label(truth, label):
    """The optimal network of a few pictures: its answers are exact, its label may lie."""
    pictures = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alphas_cumprod = torch.linspace(0.9999, 0.005, 1000, dtype=torch.float64)
    kinds = {kind: Schedule.vp(alphas_cumprod, kind) for kind in (truth, label)}

    def network(x_t, t, cond):
        alpha_t, sigma_t = kinds[truth].coefficients(t, x_t)
        distances = (x_t[:, None] - alpha_t[:, None] * pictures).square().flatten(2).sum(2)
        weights = torch.softmax(-distances / (2 * sigma_t.flatten(1).square()), dim=1).float()
        x0 = torch.einsum("bk,kchw->bchw", weights, pictures)
        return kinds[truth].output_from_x0(x0, x_t, t)

    teacher = SimpleNamespace(
        schedule=kinds[label],
        device=torch.device("cpu"),
        latent_shape=lambda: (4, 8, 8),
        encode_prompts=lambda prompts: Condition(text=torch.zeros(len(prompts), 1, 1)),
        network=lambda: network,
    )
    verdict = check_prediction(teacher, ["a", "b"])  # type: ignore[arg-type]
    assert verdict.trained and verdict.best == truth
    assert verdict.mislabelled == (truth != label)


def test_random_weights_are_no_verdict(tiny_teacher_dir):
    verdict = check_prediction(load_teacher(tiny_teacher_dir), ["a red fox"], samples=2, steps=3)
    assert not verdict.trained and not verdict.mislabelled
