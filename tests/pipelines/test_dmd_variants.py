"""Every variant of the method in a bare loop: it goes on bit for bit from a saved state, sends each
loss where it belongs, and shows its health."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dmd_core.checkpoint import CheckpointError
from dmd_core.health import DivergedError
from dmd_core.teacher import Teacher, load_teacher
from pipelines.batches import PairReader
from pipelines.run_checkpoints import RunCheckpoints
from pipelines.storage import open_store
from pipelines.train_config import TrainSection
from pipelines.workers import Group
from tests.pipelines.dmd_runs import PROMPTS, SIZES, BareRun, write_pictures
from tests.pipelines.test_training import pairs  # noqa: F401  (a fixture)

NO_PAIRS = {"lambda_reg": 0, "regression_batch_size": 0}
GAN = {"gan_weight": 5e-3, "real_pictures": "given"}
VARIANTS = {
    "dmd": {},
    "dmd with pairs in both terms": {"pairs_in_dm": True, "fake_updates": 2},
    "dmd2": NO_PAIRS | GAN | {"fake_updates": 3, "r1_weight": 0.1},
    "dmd2 four steps": NO_PAIRS | {"student_timesteps": (999, 749, 499, 249), "fake_updates": 2},
    "conditioned at 399": {"student_timesteps": (399,)},
    "lora": {"trainable": "lora", "lora_rank": 2, "lora_alpha": 2},
    "moving average": {"ema_halflife_samples": 20.0},
    "stages": {
        "ema_halflife_samples": 20.0,
        "real_pictures": "given",
        "stages": [
            {"steps": 1, "dm_weight": 0.0, "lambda_reg": 1.0},
            {"samples": 4, "train_batch_size": 4, "learning_rate": 1e-4},
            {"steps": 3, "lambda_reg": 0.0, "gan_weight": 5e-3, "fake_updates": 2},
        ],
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tiny_teacher_dir) -> Teacher:
    return load_teacher(tiny_teacher_dir)


@pytest.fixture
def make(teacher, pairs, tmp_path: Path):  # noqa: F811
    root, manifest = pairs
    pictures = write_pictures(tmp_path / "pictures", [*PROMPTS, ""])

    def run(changes: dict, **place) -> BareRun:
        section = TrainSection.model_validate({"learning_rate": 1e-3, **SIZES, **changes})
        reader = PairReader(root, manifest, seed=5)
        return BareRun(teacher, section, reader, pictures, **place)

    return run


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(make, name):
    straight = make(VARIANTS[name])
    straight.train(5)
    first = make(VARIANTS[name])
    first.train(3)
    saved = first.state()
    second = make(VARIANTS[name])
    second.load(saved)
    second.train(2)
    expected, progress = straight.state()
    found, resumed = second.state()
    assert progress == resumed and expected.keys() == found.keys()
    for part, tensors in expected.items():
        for key, value in tensors.items():
            assert torch.equal(value, found[part][key]), f"{part}.{key}"


def test_stages_change_what_is_trained_and_draw_each_sample_once(make):
    run = make(VARIANTS["stages"])
    seen = [set(tally.means()) for tally in run.train(5)]
    assert "loss_dm" not in seen[0] and "loss_reg" in seen[0]
    assert {"loss_dm", "loss_reg"} <= seen[1] and "loss_gan" not in seen[1]
    assert {"loss_dm", "loss_gan", "loss_discriminator"} <= seen[2] and "loss_reg" not in seen[2]
    # 5 samples, then 4 (one step), then 3 steps of two fake updates of 5.
    at = run.progress
    assert (at.step, at.stage, at.step_in_stage) == (5, 2, 3)
    assert (at.prompts, at.pairs, at.pictures) == (5 + 4 + 3 * 2 * 5, 3 + 3, 3 * 2 * 5)


def test_only_the_networks_of_a_loss_move(make, teacher):
    run = make(NO_PAIRS | GAN | {"trainable": "lora", "lora_rank": 2, "dm_weight": 0.0})
    before = {name: p.clone() for name, p in teacher.pipeline.unet.named_parameters()}
    generator = {name: p.clone() for name, p in run.networks.generator.named_parameters()}
    run.train(3)  # the first steps of LoRA move B alone, for A's gradient is through B = 0
    moved = {
        name
        for name, p in run.networks.generator.named_parameters()
        if not torch.equal(p, generator[name])
    }
    assert moved and all("lora_" in name for name in moved)
    assert all(torch.equal(p, before[n]) for n, p in teacher.pipeline.unet.named_parameters())


def test_the_moving_average_follows_its_half_life(make):
    run = make(VARIANTS["moving average"])
    start = {name: value.clone() for name, value in run.networks.ema.average.items()}
    run.train(1)
    decay = 0.5 ** (5 / 20.0)  # five samples, half-life of twenty
    for name, weight in run.networks.weights.items():
        expected = decay * start[name] + (1 - decay) * weight.detach()
        torch.testing.assert_close(run.networks.ema.average[name], expected)


def test_workers_share_samples_and_their_noise(make):
    alone = make({}).source.draw(make({}).progress, *_keys(make))
    parts = [
        make({}, rank=rank, world=3).source.draw(make({}).progress, *_keys(make))
        for rank in range(3)
    ]
    for name in ("eps_dm", "u_dm", "eps_fake", "u_fake"):
        joined = torch.cat([getattr(part.unpaired[0].noise, name) for part in parts])
        assert torch.equal(joined, getattr(alone.unpaired[0].noise, name))
    assert torch.equal(torch.cat([part.paired.y for part in parts]), alone.paired.y)
    texts = torch.cat([part.unpaired[0].cond.text for part in parts])
    torch.testing.assert_close(texts, alone.unpaired[0].cond.text)


def _keys(make):
    run = make({})
    return run.section.plan()[0][1], run.pairs


def test_no_two_purposes_share_their_noise(make):
    data = make(VARIANTS["dmd2"]).source.draw(make({}).progress, *_gan_keys(make))
    tensors = []
    for part in data.unpaired:
        tensors += [*part.noise.z, part.noise.eps_fake, part.pictures.eps, part.pictures.eps_x]
        tensors += [part.pictures.eps_r1]
    tensors += [data.unpaired[0].noise.eps_dm, data.unpaired[0].noise.eps_gan]
    rows = torch.cat([t.flatten(1) for t in tensors])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def _gan_keys(make):
    run = make(VARIANTS["dmd2"])
    return run.section.plan()[0][1], None


def test_non_finite_gradients_are_left_out_and_fail_past_the_limit(make):
    run = make({"max_nonfinite_updates": 1})
    run.train(1)
    before = {name: p.clone() for name, p in run.networks.weights.items()}
    with torch.no_grad():
        run.networks.fake.conv_in.weight.fill_(float("nan"))
    # The matching gradient is NaN everywhere: it counts as zero, and the fake score's update is
    # left out; so is the next one, which is one too many.
    tally = run.train(1)[0]
    assert tally.means()["nonfinite_entries"] == 4 * 4 * 4
    assert run.trainer.nonfinite_updates == 1
    assert all(p.isfinite().all() for p in run.networks.weights.values())
    assert any(not torch.equal(p, before[n]) for n, p in run.networks.weights.items())
    with pytest.raises(DivergedError, match="max_nonfinite_updates"):
        run.train(1)


def test_non_finite_gradients_now_and_then_end_nothing(make):
    run = make({"max_nonfinite_updates": 1})
    weight = run.networks.fake.conv_in.weight
    for count in (1, 2, 3):
        good = weight.detach().clone()
        with torch.no_grad():
            weight.fill_(float("nan"))
        run.train(1)
        assert run.trainer.nonfinite_updates == count
        with torch.no_grad():
            weight.copy_(good)
        run.train(1)
    assert run.trainer.nonfinite_updates == 3


def test_health_signals_are_what_they_say(make):
    run = make({})
    tally = run.train(1)[0]
    means = tally.means()
    quarters = [tally.sums[f"loss_fake_t{i}"] for i in range(4)]
    assert sum(count for _, count in quarters) == 5
    assert sum(total for total, _ in quarters) / 5 == pytest.approx(means["loss_fake"], rel=1e-5)
    assert means["grad_ratio_reg_dm"] == pytest.approx(
        means["grad_at_x_reg"] / means["grad_at_x_dm"]
    )
    assert means["nonfinite_entries"] == 0 and np.isfinite(list(means.values())).all()


@pytest.mark.parametrize("name", ["dmd2", "lora", "moving average"])
def test_a_checkpoint_is_read_into_the_live_state_bit_for_bit(make, name, tmp_path):
    """A second copy of the optimizers' moments may not fit beside them."""
    run = make(VARIANTS[name])
    run.train(2)
    store, size = open_store(str(tmp_path / "run")), len(run.networks.optimizers)
    checkpoints = RunCheckpoints(store, run.networks, Group(0, 1), keep=1, also=lambda _: ())
    checkpoints.save(2, {}, surely=True)
    expected, _ = run.state()
    run.train(2)

    live = run.networks.parts()
    targets = run.networks.targets(_sizes(run))
    assert sum(part.endswith("_optimizer") for part in targets) == size
    for part, tensors in live.items():
        for key, tensor in tensors.items():
            assert targets[part][key].data_ptr() == tensor.data_ptr(), f"{part}/{key}"
    assert checkpoints.restore(2) == {"step": 2}
    for part, tensors in run.networks.parts().items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, expected[part][key]), f"{part}/{key}"


def test_state_of_other_settings_is_refused(make):
    plain, gan = make({}), make(GAN)
    plain.train(1)
    gan.train(1)
    with pytest.raises(CheckpointError, match="head"):
        plain.networks.targets(_sizes(gan))
    sizes = _sizes(plain)
    del sizes["generator_optimizer"]  # never a silent start without the optimizer's memory
    with pytest.raises(CheckpointError, match="generator_optimizer"):
        make({}).networks.targets(sizes)
    with pytest.raises(CheckpointError, match="other weights"):
        make(VARIANTS["lora"]).networks.targets(_sizes(plain))
    for change in (
        {"further.exp_avg": torch.Size([1])},
        {"conv_in.weight.exp_avg": torch.Size([1])},
    ):
        odd = _sizes(plain)
        odd["fake_optimizer"] |= change
        with pytest.raises(CheckpointError, match="fake_optimizer has other weights"):
            make({}).networks.targets(odd)
    assert _sizes(plain) == _sizes(make({})), "before the first step there is as much to store"


def _sizes(run: BareRun) -> dict[str, dict[str, torch.Size]]:
    parts = run.networks.parts()
    return {part: {name: t.shape for name, t in tensors.items()} for part, tensors in parts.items()}
