"""The adapters around a network. Oracles: the network called by hand, and closed forms that know
only what the network is told."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, UNet2DConditionModel, UNet2DModel
from torch import nn

from dmd_core.condition import Condition
from dmd_core.denoiser import GuidedDenoiser, NetworkDenoiser
from dmd_core.diffusers_networks import DiffusersNetwork
from dmd_core.schedule import Schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    **{
        kind: Schedule.from_scheduler(DDIMScheduler(**SD, prediction_type=kind))
        for kind in ("epsilon", "v_prediction", "sample")
    },
    "flow_prediction": Schedule.flow(shift=3.0),
    "edm": Schedule.edm(),
    "edm_v": Schedule.from_scheduler(EDMEulerScheduler(prediction_type="v_prediction")),
}
SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1,
         "norm_num_groups": 4, "attention_head_dim": 4}  # fmt: skip
TEXT = {
    **SMALL,
    "cross_attention_dim": 12,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
PLAIN = {
    **SMALL,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
NETWORKS = {
    "text": lambda: UNet2DConditionModel(**TEXT),
    "text and class": lambda: UNet2DConditionModel(**TEXT, num_class_embeds=11),
    "text and class as a time": lambda: UNet2DConditionModel(**TEXT, class_embed_type="timestep"),
    "sdxl": lambda: UNet2DConditionModel(
        **TEXT,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 10,  # six sizes, each 8 wide, and `pooled`
    ),
    "class": lambda: UNet2DModel(**PLAIN, num_class_embeds=11),
    "nothing": lambda: UNet2DModel(**PLAIN),
}
FIELDS = {
    "text": {"text"},
    "text and class": {"text", "labels"},
    "text and class as a time": {"text", "labels"},
    "sdxl": {"text", "pooled", "time_ids"},
    "class": {"labels"},
    "nothing": set(),
}
T = torch.tensor([20, 500, 979])


def _condition(name: str, rows: int, seed: int) -> Condition:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "text": torch.randn(rows, 5, 12, generator=generator),
        "pooled": torch.randn(rows, 10, generator=generator),
        "time_ids": torch.rand(rows, 6, generator=generator) * 64,
        "labels": torch.randint(11, (rows,), generator=generator),
    }
    return Condition(**{field: values[field] for field in FIELDS[name]})


def _network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().eval()


def _by_hand(unet: nn.Module, x: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
    arguments = {} if isinstance(unet, UNet2DModel) else {"encoder_hidden_states": cond.text}
    if cond.labels is not None:
        arguments["class_labels"] = cond.labels
    if cond.pooled is not None:
        arguments["added_cond_kwargs"] = {"text_embeds": cond.pooled, "time_ids": cond.time_ids}
    return unet(x, time, **arguments).sample


@pytest.mark.parametrize("name", list(NETWORKS))
@torch.no_grad()
def test_a_network_is_told_every_field_of_its_condition(name):
    unet, x_t = _network(name), torch.randn(3, 4, 8, 8)
    cond, other = _condition(name, 3, seed=1), _condition(name, 3, seed=2)
    denoiser = NetworkDenoiser(DiffusersNetwork(unet), SCHEDULES["sample"])
    found = denoiser(x_t, T, cond)  # of an x₀-predicting network: its output
    torch.testing.assert_close(found, _by_hand(unet, x_t, T, cond))
    for field in FIELDS[name]:
        parts = {key: getattr(other if key == field else cond, key) for key in FIELDS[name]}
        assert not torch.allclose(denoiser(x_t, T, Condition(**parts)), found, atol=1e-6), field


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("scale", [0.0, 4.0])
@torch.no_grad()
def test_guidance_in_one_forward_equals_two_separate_ones(name, scale):
    unet, x_t = _network(name), torch.randn(3, 4, 8, 8)
    cond, uncond = _condition(name, 3, seed=1), _condition(name, 1, seed=2)
    schedule = SCHEDULES["v_prediction"]
    calls: list[int] = []
    unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    guided = GuidedDenoiser(NetworkDenoiser(DiffusersNetwork(unet), schedule), scale, uncond)
    found = guided(x_t, T, cond)
    assert calls == [6] and guided.schedule is schedule
    negative = schedule.x0_from_output(
        torch.cat([_by_hand(unet, x_t[i : i + 1], T[i : i + 1], uncond) for i in range(3)]), x_t, T
    )
    positive = schedule.x0_from_output(_by_hand(unet, x_t, T, cond), x_t, T)
    expected = negative + scale * (positive - negative)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    calls.clear()
    unguided = GuidedDenoiser(NetworkDenoiser(DiffusersNetwork(unet), schedule), 1.0, uncond)
    torch.testing.assert_close(unguided(x_t, T, cond), positive)
    assert calls == [3]


@pytest.mark.parametrize("kind", list(SCHEDULES))
@pytest.mark.parametrize("scale", [0.5, 7.5])
def test_guiding_x0_equals_guiding_the_raw_output(kind, scale):
    schedule = SCHEDULES[kind]

    def network(x, time, cond):
        return 0.5 * x + cond.text.mean(dim=(1, 2)).view(-1, 1, 1, 1)

    x_t = schedule.diffuse(torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), T)
    cond, uncond = _condition("text", 3, seed=1), _condition("text", 1, seed=2)
    x_in, time = schedule.network_input(x_t, T), schedule.network_time(T)
    negative, positive = network(x_in, time, uncond.expand(3)), network(x_in, time, cond)
    expected = schedule.x0_from_output(negative + scale * (positive - negative), x_t, T)
    found = GuidedDenoiser(NetworkDenoiser(network, schedule), scale, uncond)(x_t, T, cond)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_the_exact_network_gives_the_closed_form_denoiser(kind):
    """Of N(m, s²). The network knows only the input and the time that it is given; α and σ come
    from those, by each family's own definition."""
    m, s, schedule = 0.3, 0.6, SCHEDULES[kind]
    sigma_data = 0.5
    cumulative = DDIMScheduler(**SD).alphas_cumprod.double()

    def exact(x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        k = alpha * s**2 / (alpha**2 * s**2 + sigma**2)
        return m + k * (x - alpha * m)

    def network(x_in: torch.Tensor, time: torch.Tensor, cond: Condition) -> torch.Tensor:
        x, time = x_in.double(), time.double().view(-1, 1, 1, 1)
        if kind.startswith("edm"):
            sigma = (4 * time).exp()
            x = x * (sigma**2 + sigma_data**2).sqrt()
            x0 = exact(x, torch.ones_like(sigma), sigma)
            skip = sigma_data**2 / (sigma**2 + sigma_data**2)
            out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
            return (x0 - skip * x) / (out if kind == "edm" else -out)
        if kind == "flow_prediction":
            sigma = time / 1000
            return (x - exact(x, 1 - sigma, sigma)) / sigma
        alpha_2 = cumulative[time.long()]
        alpha, sigma = alpha_2.sqrt(), (1 - alpha_2).sqrt()
        x0 = exact(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]

    x_t = schedule.diffuse(torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), T)
    alpha, sigma = schedule.coefficients(T, x_t)
    found = NetworkDenoiser(network, schedule)(x_t, T, Condition())
    torch.testing.assert_close(
        found, exact(x_t, alpha, sigma), check_dtype=False, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", list(SCHEDULES))
@torch.no_grad()
def test_bfloat16_is_for_the_network_alone(kind):
    schedule, unet = SCHEDULES[kind], _network("text")
    cond = _condition("text", 3, seed=1)
    x_t = schedule.diffuse(torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = unet(schedule.network_input(x_t, T), schedule.network_time(T), cond.text).sample
    assert output.dtype == torch.bfloat16
    network = DiffusersNetwork(unet)
    found = NetworkDenoiser(network, schedule, torch.bfloat16)(x_t, T, cond)
    expected = schedule.x0_from_output(output.double(), x_t.double(), T)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
    full = NetworkDenoiser(network, schedule)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # float32 means float32, also in there
        assert full.raw(x_t, T, cond).dtype == torch.float32


def test_a_network_of_another_class_is_refused():
    denoiser = NetworkDenoiser(DiffusersNetwork(nn.Conv2d(4, 4, 1)), SCHEDULES["epsilon"])
    with pytest.raises(TypeError, match="Conv2d is not a network this version drives"):
        denoiser(torch.randn(3, 4, 8, 8), T, Condition())


# ---------------------------------------------------------------------- Condition


@pytest.mark.parametrize("name", list(FIELDS))
def test_conditions_are_joined_cut_and_repeated_row_by_row(name):
    one, two, row = (_condition(name, n, seed=n) for n in (3, 2, 1))
    joined, repeated = Condition.cat(one, two), row.expand(4)
    chosen = joined.rows(torch.tensor([4, 0]))
    for field in ("text", "pooled", "time_ids", "labels"):
        value = getattr(one, field)
        assert (value is not None) == (field in FIELDS[name])
        if value is None:
            assert getattr(joined, field) is None and getattr(repeated, field) is None
            continue
        assert torch.equal(getattr(joined.rows(slice(3)), field), value)
        assert torch.equal(getattr(joined.rows(slice(3, 5)), field), getattr(two, field))
        assert torch.equal(getattr(chosen, field)[0], getattr(two, field)[1])
        assert torch.equal(getattr(chosen, field)[1], value[0])
        assert len(getattr(repeated, field)) == 4
        assert all(torch.equal(entry, getattr(row, field)[0]) for entry in getattr(repeated, field))
        assert getattr(joined.to("cpu"), field).device.type == "cpu"


def test_conditions_with_different_fields_are_not_joined():
    with pytest.raises(ValueError, match="labels is given in some and not in all"):
        Condition.cat(_condition("text", 2, 0), _condition("text and class", 2, 0))
    with pytest.raises(ValueError, match="text is given in some and not in all"):
        Condition.cat(Condition(), _condition("text", 2, 0))
