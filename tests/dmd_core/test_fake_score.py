"""Station 6, the fake score and its discriminator. Oracle: the same in separate forward passes."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.nn.functional import binary_cross_entropy_with_logits

from dmd_core.condition import Condition
from dmd_core.denoiser import NetworkDenoiser
from dmd_core.fake_score import DiscriminatorHead, FakeScore, FakeScoreNetwork
from dmd_core.schedule import Schedule
from dmd_core.student import Student
from dmd_core.train_step import (
    R1_SIGMA,
    LossSettings,
    PairedPart,
    draw_times,
    fake_score_step,
    generator_step,
)
from tests.dmd_core.small_networks import (
    SmallNetwork,
    judging_network,
    labels,
    normal,
    pictures,
    step_noise,
    uniform,
)

SCHEDULES = {
    "epsilon": Schedule.from_scheduler(DDIMScheduler()),
    "v_prediction": Schedule.from_scheduler(DDIMScheduler(prediction_type="v_prediction")),
    "flow": Schedule.flow(shift=3.0),
    "edm": Schedule.edm(sigma_max=5.0),
}
VP = SCHEDULES["v_prediction"]
B, P = 3, 2


@pytest.mark.parametrize("family", list(SCHEDULES))
def test_score_and_logits_of_one_pass_equal_those_of_two(family):
    network = judging_network(0)
    fake = FakeScore(network, SCHEDULES[family])
    score = (normal(B, 1), torch.tensor([20, 500, 900]), labels(B, 2))
    judge = (normal(5, 3), torch.tensor([1, 100, 300, 700, 998]), labels(5, 4))
    network.network.calls.clear()
    x0, logits = fake.score_and_judge(score, judge)
    assert len(network.network.calls) == 1
    torch.testing.assert_close(x0, fake(*score), rtol=1e-5, atol=1e-5)
    plain = NetworkDenoiser(network.network, SCHEDULES[family])
    torch.testing.assert_close(x0, plain(*score), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, fake.judge(*judge), rtol=1e-5, atol=1e-5)
    for row in range(5):
        one = slice(row, row + 1)
        alone = fake.judge(judge[0][one], judge[1][one], judge[2].rows(one))
        torch.testing.assert_close(logits[one], alone, rtol=1e-5, atol=1e-5)


def test_logits_are_the_head_on_the_middle_of_the_network_s_input():
    network, schedule = judging_network(0), SCHEDULES["edm"]
    x_t, t, cond = normal(B, 1), torch.tensor([20, 500, 900]), labels(B, 2)
    kept: list[torch.Tensor] = []
    network.network.middle.register_forward_hook(lambda module, inputs, out: kept.append(out))
    network.network(schedule.network_input(x_t, t), schedule.network_time(t), cond)
    expected = network.head(kept[0])
    torch.testing.assert_close(FakeScore(network, schedule).judge(x_t, t, cond), expected)


@pytest.mark.parametrize("size", [1, 4, 5, 7, 8, 32])
@pytest.mark.parametrize("channels", [6, 16, 32, 64])
def test_head_gives_one_logit_that_depends_on_features_of_any_size(channels, size):
    torch.manual_seed(0)
    features = torch.randn(2, channels, size, size, requires_grad=True)
    logits = DiscriminatorHead(channels, size)(features)
    assert logits.shape == (2,)
    (slope,) = torch.autograd.grad(logits[0], features)
    assert bool((slope[0].flatten(1).norm(dim=1) > 1e-4).all())  # by every channel
    assert slope[1].abs().max() == 0  # and by its own sample alone


def test_head_for_wide_features_has_the_groups_of_dmd2():
    assert {
        m.num_groups for m in DiscriminatorHead(1280, 8).modules() if hasattr(m, "num_groups")
    } == {32}


def test_what_has_no_head_does_not_judge():
    bare = FakeScore(FakeScoreNetwork(SmallNetwork(0)), VP)
    x_t, t, cond = normal(B, 1), torch.tensor([20, 500, 900]), labels(B, 2)
    torch.testing.assert_close(
        bare(x_t, t, cond), NetworkDenoiser(SmallNetwork(0), VP)(x_t, t, cond)
    )
    with pytest.raises(ValueError, match="no discriminator head"):
        bare.judge(x_t, t, cond)
    with pytest.raises(ValueError, match="needs the block"):
        FakeScoreNetwork(SmallNetwork(0), head=DiscriminatorHead(4, 4))
    with pytest.raises(TypeError, match="NetworkDenoiser has no discriminator"):
        fake_score_step(
            NetworkDenoiser(SmallNetwork(0), VP), x_t, step_noise(B), cond, LossSettings(),
            pictures=pictures(B),
        )  # fmt: skip


@pytest.mark.parametrize("family", list(SCHEDULES))
@pytest.mark.parametrize("kind", ["teacher", "epsilon", "x0"])
def test_score_loss_is_the_weighted_error_at_every_time(family, kind):
    schedule = SCHEDULES[family]
    fake, noise, x, cond = (
        FakeScore(judging_network(0), schedule),
        step_noise(B),
        normal(B, 1),
        labels(B, 2),
    )
    result = fake_score_step(fake, x, noise, cond, LossSettings(score_weight=kind))
    t = (noise.u_fake * 1000).long()
    alpha, sigma = schedule.coefficients(t, x)
    x0 = fake((alpha * x + sigma * noise.eps_fake).float(), t, cond)
    snr = (alpha / sigma).square().flatten()
    weight = {
        "x0": torch.ones(B),
        "epsilon": snr,
        "teacher": {
            "epsilon": snr,
            "v_prediction": 1 / sigma.square().flatten(),
            "flow": 1 / sigma.square().flatten(),
            "edm": snr + 4.0,
        }[family],
    }[kind]
    expected = weight * (x0 - x).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(result.loss_score, expected.float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(result.t, t)
    assert result.loss_gan.shape == result.loss_r1.shape == (0,)


@pytest.mark.parametrize("paired", [0, P])
@pytest.mark.parametrize("r1", [False, True])
def test_discriminator_losses_equal_those_of_separate_passes(paired, r1):
    """With samples of stored pairs behind the B fresh ones: scored, not judged."""
    network = judging_network(0)
    fake, noise = FakeScore(network, VP), step_noise(B, paired=paired)
    x, cond, real = normal(B + paired, 1), labels(B + paired, 2), pictures(B, r1=r1)
    network.network.calls.clear()
    result = fake_score_step(fake, x, noise, cond, LossSettings(), pictures=real)
    assert len(network.network.calls) == 1

    without = fake_score_step(fake, x, noise, cond, LossSettings())
    torch.testing.assert_close(result.loss_score, without.loss_score, rtol=1e-4, atol=1e-6)
    t_x, t_real = (real.u_x * 1000).long(), (real.u * 1000).long()
    of_x = fake.judge(VP.diffuse(x[:B], real.eps_x, t_x), t_x, cond.rows(slice(B)))
    real_t = VP.diffuse(real.x, real.eps, t_real)
    of_real = fake.judge(real_t, t_real, real.cond)
    expected = [
        binary_cross_entropy_with_logits(logits, torch.full((B,), label), reduction="none")
        for logits, label in ((of_x, 0.0), (of_real, 1.0))
    ]
    torch.testing.assert_close(result.loss_gan, sum(expected), rtol=1e-4, atol=1e-6)
    if not r1:
        assert result.loss_r1.shape == (0,)
        return
    near = fake.judge(real_t + R1_SIGMA * real.eps_r1, t_real, real.cond)
    penalty = ((near - of_real) / R1_SIGMA).square()
    torch.testing.assert_close(result.loss_r1, penalty, rtol=1e-2, atol=1e-6)


def test_fake_step_trains_the_fake_score_and_its_head_alone():
    g, teacher, network = SmallNetwork(0), SmallNetwork(1), judging_network(2)
    student, fake = Student.one_step(NetworkDenoiser(g, VP)), FakeScore(network, VP)
    noise, paired = step_noise(B, paired=P), PairedPart(normal(P, 5), normal(P, 6), labels(P, 7))
    made = generator_step(
        student, NetworkDenoiser(teacher, VP), fake, noise, labels(B, 8), paired,
        LossSettings(pairs_in_dm=True),
    )  # fmt: skip
    result = fake_score_step(fake, made.x, noise, made.cond, LossSettings(), pictures=pictures(B))
    assert result.loss_score.shape == (B + P,)
    result.loss_score.sum().backward(retain_graph=True)
    assert all(w.grad is None or not w.grad.any() for w in network.head.parameters())
    (result.loss_gan + result.loss_r1).sum().backward()
    assert all(bool(w.grad.any()) for w in network.parameters())
    assert all(w.grad is None for other in (g, teacher) for w in other.parameters())


# ---------------------------------------------------------------------- times


def test_times_cover_their_range_and_no_more():
    last = torch.nextafter(torch.tensor(1.0).double(), torch.tensor(0.0).double())
    ends = torch.stack([torch.zeros_like(last), last])
    assert draw_times(ends, VP).tolist() == [0, 999]
    assert draw_times(ends, VP, 0.02, 0.98).tolist() == [20, 979]
    assert draw_times(ends, VP, 0.0, 0.5).tolist() == [0, 499]
    many = draw_times(uniform(200_000, 0), VP, 0.02, 0.98)
    counts = torch.bincount(many, minlength=1000)
    assert counts[:20].sum() == 0 and counts[980:].sum() == 0
    assert 120 < counts[20:980].min() and counts[20:980].max() < 300  # 208 each, on average


def test_discriminator_is_asked_at_every_time_and_the_teacher_in_its_range():
    count = 3000
    g, teacher, network = SmallNetwork(0), SmallNetwork(1), judging_network(2)
    noise, cond = step_noise(count), Condition(labels=torch.zeros(count, dtype=torch.int64))
    fake = FakeScore(network, VP)
    generator_step(
        Student.one_step(NetworkDenoiser(g, VP)), NetworkDenoiser(teacher, VP), fake, noise, cond,
        None, LossSettings(gan=1.0), discriminator=fake.judge,
    )  # fmt: skip
    (of_teacher,) = (time for _, time, _ in teacher.calls)
    of_score, of_judge = (time for _, time, _ in network.network.calls)
    assert torch.equal(of_teacher, of_score)
    assert of_score.min() >= 20 and of_score.max() < 980
    assert of_judge.min() < 5 and of_judge.max() > 994
