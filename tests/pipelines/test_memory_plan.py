"""The memory plan: exact where it counts, near the truth where it estimates."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import save_file
from torch._subclasses import FakeTensorMode

from benchmarks.published import ARCHITECTURES
from dmd_core.decoder import decoded
from dmd_core.families import FAMILIES
from dmd_core.lora import DEFAULT_TARGETS, LoraSettings, add_lora
from dmd_core.miniature import MiniatureSize, build_unet
from dmd_core.networks import DmdNetworks
from dmd_core.parallel import World
from dmd_core.pass_memory import (
    _DRIVEN,
    PassMemory,
    UnknownNetworkError,
    _Live,
    condition_bytes,
    pass_memory,
)
from dmd_core.perceptual import Lpips
from dmd_core.teacher import load_teacher
from pipelines import memory_estimates
from pipelines.config import PairsSection
from pipelines.memory_estimates import regression_bytes
from pipelines.memory_plan import (
    GIB,
    Change,
    checkpoint_bytes,
    fitting_change,
    sampling_memory,
    training_memory,
)
from pipelines.network_sizes import NetworkSizes
from pipelines.stage_settings import StageKeys
from pipelines.train_config import TrainSection
from pipelines.train_settings import trainer_settings
from pipelines.weights import Weights, WeightsError, denoiser_of, pipeline_weights
from tests.dmd_core.tiny_families import BUILDERS

# Stable Diffusion 1.5 in round figures; a pass holds 1 GiB per sample beside 3 GiB of gradients.
VAE = ARCHITECTURES["sd15"].vae
SIZES = NetworkSizes(denoiser=860_000_000, others=206_000_000, adapters=12_000_000, block=10**8)
JUDGED = replace(SIZES, head=10**8)
PASS = PassMemory(held=(2 * GIB, 9 * GIB), peak=(4 * GIB, 10 * GIB), frozen=(GIB // 4, GIB))
CHECKPOINTED = PassMemory(held=(GIB, 2 * GIB), peak=(4 * GIB, 5 * GIB), frozen=(GIB // 4, GIB))


def passes(bf16: bool, checkpointing: bool) -> PassMemory:
    return CHECKPOINTED if checkpointing else PASS


def section(**settings) -> TrainSection:
    return TrainSection.model_validate({"mixed_precision": "bf16", "lambda_reg": 0} | settings)


def total(**settings) -> float:
    return training_memory(SIZES, section(**settings), passes).total / GIB


# ------------------------------------------------------------------ counting


def test_headers_tell_what_loading_would(tiny_teacher_dir):
    teacher = load_teacher(tiny_teacher_dir)
    weights = {part.part: part for part in pipeline_weights(tiny_teacher_dir)}
    for name in ("unet", "vae", "text_encoder"):
        loaded = getattr(teacher.pipeline, name)
        # Buffers that are saved (position ids) are tensors of the file, too.
        assert weights[name].parameters == sum(p.numel() for p in loaded.parameters())
    assert denoiser_of(list(weights.values())) is weights["unet"]


def test_a_safety_checker_is_not_loaded_and_not_counted(tiny_teacher_dir, tmp_path):
    folder = shutil.copytree(tiny_teacher_dir, tmp_path / "teacher")
    (folder / "safety_checker").mkdir()
    save_file({"a": torch.zeros(1000)}, folder / "safety_checker" / "model.safetensors")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (folder / "model_index.json").write_text(json.dumps(index))
    assert pipeline_weights(str(folder)) == pipeline_weights(tiny_teacher_dir)


def test_a_network_cut_into_files_is_one_network(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]})
    )
    for index, name in enumerate(("a.weight", "b.weight")):
        save_file(
            {name: torch.zeros(3, 4 + index)}, tmp_path / "unet" / f"part-{index}.safetensors"
        )
    stale = tmp_path / "unet" / "other.safetensors"
    save_file({"c": torch.zeros(1000)}, stale)
    weight_map = {"a.weight": "part-0.safetensors", "b.weight": "part-1.safetensors"}
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    (unet,) = pipeline_weights(str(tmp_path))
    assert unet.parameters == 12 + 15
    (tmp_path / "unet" / "part-1.safetensors").write_bytes(b"torn")
    with pytest.raises(WeightsError, match=r"part-1\.safetensors"):
        pipeline_weights(str(tmp_path))


def test_adapters_are_counted_as_peft_makes_them(tiny_teacher_dir):
    unet = load_teacher(tiny_teacher_dir).pipeline.unet
    settings = LoraSettings(rank=4, alpha=4)
    counted = denoiser_of(pipeline_weights(tiny_teacher_dir)).adapters(4, settings.targets)
    add_lora(unet, settings, 0)
    assert counted == sum(p.numel() for p in unet.parameters() if p.requires_grad) > 0


def test_adapters_on_attention_of_the_old_names_are_counted():
    """Pixel models saved before diffusers renamed it; loaded, they have today's names."""
    old = ("query", "key", "value", "proj_attn")
    block = "mid_block.attentions.0"
    shapes = {f"{block}.{name}.weight": (8, 8) for name in old}
    today = {f"{block}.{name}.weight": (8, 8) for name in DEFAULT_TARGETS}
    counted = [Weights("unet", s).adapters(2, DEFAULT_TARGETS) for s in (shapes, today)]
    assert counted == [4 * 2 * (8 + 8)] * 2


@pytest.mark.parametrize("name", BUILDERS)
def test_what_is_held_in_bfloat16_is_counted_without_loading(families, name):
    """But for biases, and for the first weight of the denoiser, which stays as it is."""
    folder = families.folder(name)
    sizes = NetworkSizes.of(folder, pipeline_weights(folder), section(), PairsSection())
    pipeline = load_teacher(folder, compute_dtype=torch.bfloat16).pipeline

    def held(network) -> int:
        weights = (p for p in network.parameters() if p.dtype == torch.bfloat16)
        return sum(p.numel() for p in weights if p.ndim > 1)

    named = pipeline.components.items()
    networks = {name: part for name, part in named if isinstance(part, torch.nn.Module)}
    encoders = [part for name, part in networks.items() if name.startswith("text_encoder")]
    (denoiser,) = (networks[name] for name in ("unet", "transformer") if name in networks)
    layer, first = next(denoiser.named_parameters())
    kept = first.numel() if layer.endswith(".weight") else 0  # PixArt's is a table
    assert sizes.matrices == held(denoiser) + kept
    assert sizes.encoder_matrices == sum(map(held, encoders))
    assert bool(encoders) == (sizes.encoder_matrices > 0)


def test_what_nothing_trains_needs_half_in_bfloat16():
    sizes = replace(SIZES, matrices=800_000_000, encoder_matrices=90_000_000)
    teacher = {"no": 4 * 860e6, "bf16": 4 * 860e6 - 2 * 800e6}
    others = {"no": 4 * 206e6, "bf16": 4 * 206e6 - 2 * 90e6}
    for precision, dtype in (("no", "float32"), ("bf16", "bfloat16")):
        pairs = sampling_memory(sizes, PairsSection(compute_dtype=dtype), passes).parts
        train = training_memory(sizes, section(mixed_precision=precision), passes).parts
        for parts in (pairs, train):
            assert parts["teacher"] == teacher[precision]
            assert parts["text encoders, VAE"] == others[precision]
        lora = section(mixed_precision=precision, trainable="lora")
        student = training_memory(sizes, lora, passes).parts["student"]
        assert student == teacher[precision] + 4 * SIZES.adapters
    shared = section(parallel={"teacher": "sharded"}, num_workers=4)
    block = 2 * 2 * SIZES.block  # two at a time, whole
    parts = training_memory(sizes, shared, passes).parts
    assert parts["teacher"] == teacher["bf16"] / 4 + block


def test_a_network_under_adapters_is_not_cast_for_the_backward_pass():
    """Pairs, so that the student's pass is the largest."""
    many = {"train_batch_size": 16, "regression_batch_size": 16, "lambda_reg": 1.0}

    def most(matrices: int, **settings) -> float:
        asked = section(trainable="lora", regression_loss="l2", **many, **settings)
        sizes = replace(SIZES, matrices=matrices)
        return training_memory(sizes, asked, passes).parts["gradients and passes"]

    spared = most(0) - most(800_000_000)
    assert spared == pytest.approx(1.05 * 2 * 800_000_000, rel=1e-6)
    for settings in ({"mixed_precision": "no"}, {"parallel": {"gradient_checkpointing": True}}):
        assert most(0, **settings) == most(800_000_000, **settings)


def test_the_sum_is_that_of_the_networks_of_a_run(tiny_teacher_dir):
    asked = section(gan_weight=1e-3, real_pictures="given", ema_halflife_samples=10)
    teacher = load_teacher(tiny_teacher_dir)
    networks = DmdNetworks(teacher, trainer_settings(asked, 0), World())
    weights = pipeline_weights(tiny_teacher_dir)
    sizes = NetworkSizes.of(tiny_teacher_dir, weights, asked, PairsSection())
    plan = training_memory(sizes, asked, lambda bf16, checkpointing: None)
    stored = {
        part: sum(tensor.nbytes for tensor in tensors.values() if tensor.ndim)  # without counts
        for part, tensors in networks.parts().items()
    }
    assert stored["head"] > 0
    expected = {
        "student": stored["generator"],
        "student's AdamW": stored["generator_optimizer"],
        "student's average": stored["ema"],
        "fake score": stored["fake"],
        "fake score's AdamW": stored["fake_optimizer"] + stored["head_optimizer"],
        "discriminator's head": stored["head"],
    }
    assert {name: plan.parts[name] for name in expected} == expected
    assert checkpoint_bytes(sizes, asked) == sum(stored.values())

    cond = teacher.encode_prompts(["a red fox"])
    assert cond.text is not None
    unet = teacher.pipeline.unet
    assert condition_bytes(unet, text_tokens=cond.text.shape[1]) == cond.text.nbytes


# ------------------------------------------------------------------ passes


def _saved_bytes(unet, samples: int) -> int:
    """What a true forward pass keeps for its backward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        x, t = torch.randn(samples, 4, 8, 8), torch.zeros(samples, dtype=torch.long)
        unet(x, t, encoder_hidden_states=torch.randn(samples, 24, 192)).sample.sum()
    return sum(storage.nbytes() for storage in kept.values())


def test_what_a_pass_holds_is_what_a_true_one_holds():
    torch.manual_seed(0)
    unet = build_unet(MiniatureSize()).eval()
    plan = pass_memory("UNet2DConditionModel", unet.config, (4, 8, 8), text_tokens=24)
    for samples in (1, 8):
        assert plan.held_by(samples) == pytest.approx(_saved_bytes(unet, samples), rel=0.1)
    assert plan.peak_of(1) >= 4 * sum(p.numel() for p in unet.parameters())


@pytest.mark.slow
def test_bfloat16_checkpointing_and_no_gradient_each_need_less():
    config = build_unet(MiniatureSize()).config
    shape = (4, 8, 8)
    plain = pass_memory("UNet2DConditionModel", config, shape)
    mixed = pass_memory("UNet2DConditionModel", config, shape, bf16=True)
    checkpointed = pass_memory("UNet2DConditionModel", config, shape, checkpointing=True)
    per_sample = [(p.held[1] - p.held[0]) / 7 for p in (plain, mixed, checkpointed)]
    assert per_sample[1] < 0.8 * per_sample[0] and per_sample[2] < 0.4 * per_sample[0]
    assert plain.frozen[1] < 0.5 * plain.peak[1]


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", "pixart", "edm"])
def test_every_family_s_network_is_played_through(name):
    pipeline = BUILDERS[name]()
    family = FAMILIES[type(pipeline).__name__]
    model = getattr(pipeline, family.model)
    shape = (3, 8, 8) if family.on_pixels else (4, 8, 8)
    plan = pass_memory(type(model).__name__, model.config, shape)
    assert 0 < plan.frozen[0] < plan.frozen[1]
    assert 0 < plan.held[0] < plan.held[1] < plan.peak[1]
    gradients = 4 * sum(p.numel() for p in model.parameters())
    assert gradients <= plan.peak[0] <= plan.peak[1]


def test_the_networks_of_all_families_are_driven():
    assert {name for family in FAMILIES.values() for name in family.networks} == set(_DRIVEN)


def test_a_network_that_needs_values_says_so(monkeypatch):
    """As one of another diffusers might."""
    model = BUILDERS["unconditional"]().unet

    def of_values(self, sample, timestep, return_dict):
        return (sample * float(sample.mean()),)

    def of_others(self, sample, timestep, return_dict, resolution):
        return (sample,)

    for forward, why in ((of_values, "DataDependent"), (of_others, "resolution")):
        monkeypatch.setattr(type(model), "forward", forward)
        with pytest.raises(UnknownNetworkError, match=f"UNet2DModel does not run .*{why}"):
            pass_memory("UNet2DModel", model.config, (3, 8, 8))


def test_a_network_that_is_not_driven_says_so():
    for name in ("AutoencoderKL", "os", "NoSuchModel"):
        with pytest.raises(UnknownNetworkError, match=name):
            pass_memory(name, {}, (3, 8, 8))


# ------------------------------------------------------------------ adding up


def test_every_float32_weight_and_moment_is_in_the_sum():
    plan = training_memory(SIZES, section(train_batch_size=1), passes)
    parts = plan.parts
    assert parts["teacher"] == parts["student"] == parts["fake score"] == 4 * SIZES.denoiser
    assert parts["student's AdamW"] == parts["fake score's AdamW"] == 8 * SIZES.denoiser
    assert parts["text encoders, VAE"] == 4 * SIZES.others
    assert parts["gradients and passes"] == pytest.approx(1.05 * 4 * GIB)
    assert plan.total == sum(parts.values()) and plan.complete


def test_each_setting_that_saves_memory_saves_it():
    base = total(train_batch_size=32)
    assert total(train_batch_size=32, micro_batch_size=4) < base - 15
    assert total(train_batch_size=32, parallel={"gradient_checkpointing": True}) < base - 15
    assert total(train_batch_size=32, parallel={"teacher": "offload"}) < base - 2
    assert total(train_batch_size=32, trainable="lora") < base - 5
    assert total(train_batch_size=32, ema_halflife_samples=1000) == pytest.approx(base + 3.2, 0.01)
    assert total(train_batch_size=32, num_workers=4) < base  # fewer samples each
    four = {"train_batch_size": 4, "num_workers": 4}
    sharded = total(**four, parallel={"generator": "fsdp", "fake": "fsdp", "teacher": "sharded"})
    assert sharded < total(**four) - 15


def test_an_elastic_group_is_planned_at_its_smallest():
    elastic = total(train_batch_size=32, num_workers={"min": 2, "max": 8})
    assert elastic == total(train_batch_size=32, num_workers=2)


def test_a_gan_and_pairs_need_more():
    base = total(train_batch_size=8)
    assert total(train_batch_size=8, gan_weight=1e-3, real_pictures="emoji") > base + 5
    assert total(train_batch_size=8, lambda_reg=1.0, regression_batch_size=8) > base + 5


def test_a_head_is_whole_on_every_worker_while_it_works():
    """Sharded with the fake score, in the group that is gathered for the whole of a pass."""
    asked = section(
        gan_weight=1e-3, real_pictures="given", num_workers=4,
        parallel={"generator": "fsdp", "fake": "fsdp"},
    )  # fmt: skip
    without, whole = (training_memory(s, asked, passes).total for s in (SIZES, JUDGED))
    shards, gathered, gradients = (4 + 8) / 4, 4, 4 * 1.05
    assert whole - without == pytest.approx((shards + gathered + gradients) * JUDGED.head, rel=1e-3)


def test_data_is_drawn_and_encoded_beside_the_passes():
    sizes = replace(SIZES, sample=10**5, condition=10**6, picture=(512, 512))
    gan = {"gan_weight": 1e-3, "real_pictures": "given", "fake_updates": 5}
    plain = training_memory(sizes, section(train_batch_size=8), passes).parts
    assert plain["data of two steps"] == 2 * 8 * (10 * 10**5 + 10**6)
    assert plain["encoders at work"] == 25 * 8 * 10**6
    judged = training_memory(sizes, section(train_batch_size=8, **gan), passes).parts
    assert judged["data of two steps"] == 2 * 5 * 8 * (10 * 10**5 + 2 * 10**6)
    assert judged["encoders at work"] == 3 * GIB // 4  # one picture, a quarter of a megapixel
    on_gpu = training_memory(sizes, section(train_batch_size=8, use_gpu=True, **gan), passes).parts
    assert on_gpu["encoders at work"] == 3 * GIB
    pixels = replace(sizes, decoded=False)
    assert (
        training_memory(pixels, section(**gan), passes).parts["encoders at work"] == 25 * 32 * 10**6
    )


def test_a_perceptual_loss_needs_more_the_larger_its_pictures_are():
    pixels = replace(SIZES, picture=(32, 32), decoded=False)
    latents, keys = replace(SIZES, picture=(512, 256)), StageKeys(regression_loss="lpips")
    tiny = keys.model_copy(update={"regression_decoder": "/models/taesd"})
    assert regression_bytes(pixels, keys, 224, 8) == 8 * 224**2 * 3_000
    assert regression_bytes(pixels, keys, 0, 8) == 8 * 32**2 * 3_000
    assert regression_bytes(latents, tiny, 224, 8) == 8 * 512 * 256 * (3_000 + 2_700)
    assert regression_bytes(latents, keys, 224, 8) > 4 * regression_bytes(latents, tiny, 224, 8)
    assert regression_bytes(pixels, StageKeys(regression_loss="l2"), 224, 8) == 0

    def held(**settings) -> int:
        asked = {"lambda_reg": 1.0, "dm_weight": 0, "regression_batch_size": 32} | settings
        plan = training_memory(pixels, section(train_batch_size=32, **asked), passes)
        return plan.parts["gradients and passes"]

    lpips = held(regression_loss="lpips")
    assert lpips > held(regression_loss="l2")
    assert lpips > held(regression_loss="lpips", micro_batch_size=8)


@pytest.mark.parametrize(
    ("figure", "pooling", "decoder"),
    [
        (memory_estimates._PERCEPTUAL["lpips"], "max", None),
        (memory_estimates._PERCEPTUAL["st-lpips"], "blur", None),
        (memory_estimates._DECODER_TINY, None, AutoencoderTiny),
        (
            memory_estimates._DECODER_VAE,
            None,
            lambda: AutoencoderKL.from_config(ARCHITECTURES["sd15"].vae),
        ),
    ],
)
def test_the_coarse_figures_are_those_of_the_true_classes(figure, pooling, decoder):
    with FakeTensorMode():
        parts = torch.nn.ModuleList()
        distance, decode, shape = torch.nn.MSELoss(), torch.nn.Identity(), (2, 3, 64, 64)
        if pooling:
            distance = Lpips(pooling=pooling, resize=None)
            parts.append(distance)
        if decoder:
            vae, shape = decoder().requires_grad_(False), (2, 4, 8, 8)
            parts.append(vae)
            decode = lambda latents: vae.decode(latents, return_dict=False)[0]  # noqa: E731
        x, y = torch.empty(shape, requires_grad=True), torch.empty(shape)
        live = _Live(parts)
        with live:
            decoded(distance, decode)(x, y).sum().backward()
    assert live.peak / (2 * 64**2) == pytest.approx(figure, rel=0.1)


def test_guidance_is_a_second_pass_only_where_it_is_one():
    """More samples than eight, so that the scores are the most that is held."""
    guided = total(train_batch_size=32)
    once = total(train_batch_size=32, guidance_scale=1)
    assert once < guided - 1
    told = training_memory(SIZES, section(train_batch_size=32), passes, distilled=True)
    assert told.total / GIB == once
    unscored = {"dm_weight": 0, "lambda_reg": 1, "regression_batch_size": 1}
    assert total(train_batch_size=31, **unscored) < once - 1


def test_what_is_not_known_is_said():
    plan = training_memory(SIZES, section(), lambda bf16, checkpointing: None)
    assert not plan.complete and "gradients and passes" not in plan.parts


def test_the_change_that_makes_it_fit_is_small_and_true():
    asked = section(train_batch_size=32)

    def plan_of(changed):
        return training_memory(SIZES, changed, passes)

    assert not plan_of(asked).fits(39)
    change = fitting_change(asked, 39, plan_of)
    assert change is not None and len(change.settings) == 1
    assert plan_of(change.apply(asked)).fits(39)
    assert change.in_words() == "train.micro_batch_size: 4"
    harder = fitting_change(asked, 22, plan_of)
    assert harder is not None and plan_of(harder.apply(asked)).fits(22)
    assert fitting_change(asked, 5, plan_of) is None
    words = Change({"micro_batch_size": 1, "parallel.gradient_checkpointing": True}).in_words()
    assert words == "train.micro_batch_size: 1, train.parallel.gradient_checkpointing: true"
    both = Change({"parallel.teacher": "offload", "micro_batch_size": 2}).apply(asked)
    assert both.parallel.teacher == "offload" and both.micro_batch_size == 2


def test_teachers_and_checkpoints():
    for scale, distilled, rows in ((7.5, False, 8), (1.0, False, 4), (7.5, True, 4)):
        pairs = PairsSection(guidance_scale=scale, batch_size=4, rows_per_block=8)
        plan = sampling_memory(SIZES, pairs, passes, distilled=distilled)
        assert plan.parts["passes"] == pytest.approx(1.05 * PASS.frozen_of(rows), rel=1e-6)
    assert checkpoint_bytes(SIZES, section()) == 24 * SIZES.denoiser
    lora = section(trainable="lora", ema_halflife_samples=10)
    assert checkpoint_bytes(SIZES, lora) == 12 * SIZES.denoiser + 16 * SIZES.adapters
