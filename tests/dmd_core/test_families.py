"""Every teacher family gives what its own diffusers pipeline gives, from the same latents, prompts,
guidance and scheduler; what is not one of them is refused by name."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file

from dmd_core.denoiser import GuidedDenoiser
from dmd_core.edm_heun import EDMHeunScheduler
from dmd_core.families import FAMILIES, folder_geometry
from dmd_core.features import latent_features
from dmd_core.teacher import (
    TeacherError,
    check_teacher,
    folder_scheduler,
    load_teacher,
    teacher_revision,
)
from tests.dmd_core.family_calls import (
    PIXELS,
    PROMPTS,
    Families,
    call_by_hand,
    noise,
    plain,
    unclipped_ddim,
)
from tests.dmd_core.tiny_families import BUILDERS, CLASSES

# family → (our name of the scheduler its pipeline has, guidance, what the pipeline calls it)
OWN = {
    "sd": ("dpmsolver++", 4.0, {"guidance_scale": 4.0}),
    "sd v": ("dpmsolver++", 4.0, {"guidance_scale": 4.0}),
    "sdxl": ("euler", 4.0, {"guidance_scale": 4.0}),
    "sd3": ("flow_euler", 4.0, {"guidance_scale": 4.0}),
    "sd3 without t5": ("flow_euler", 4.0, {"guidance_scale": 4.0}),
    "sd3 dynamic": ("flow_euler", 4.0, {"guidance_scale": 4.0}),
    "flux": ("flow_euler", 2.0, {"guidance_scale": 2.0}),
    "flux schnell": ("flow_euler", 1.0, {}),
    "pixart": ("dpmsolver++", 4.0, {"guidance_scale": 4.0}),
    "edm": ("edm_euler", 1.0, {}),
    "ddpm": ("ddim", 1.0, {}),
    "unconditional": ("ddim", 1.0, {}),
}


def _own_pipeline(families: Families, name: str):
    pipeline = plain(families.folder(name))
    if name in ("ddpm", "unconditional"):
        pipeline.scheduler = unclipped_ddim(pipeline)
    return pipeline


@pytest.mark.parametrize("name", list(OWN))
def test_pairs_equal_the_family_s_own_pipeline(families, name, record_property):
    solver, scale, arguments = OWN[name]
    teacher = families.teacher(name)
    eps = noise(teacher)
    own = call_by_hand(name, _own_pipeline(families, name), eps, 3, **arguments)
    found = teacher.solve(eps, PROMPTS, solver=solver, steps=3, guidance_scale=scale)
    assert found.dtype == torch.float32 and found.shape == eps.shape
    found = found.clamp(-1, 1) if name in PIXELS else found
    difference = float((found - own).abs().max())
    record_property("max_abs_difference", difference)
    print(f"{name}: {difference:.1e}")
    assert difference <= 1e-4
    assert own.std() > 0.05 and not torch.allclose(own[0], own[1], atol=1e-2)


@pytest.mark.parametrize("name", [name for name, (_, scale, _) in OWN.items() if scale > 1])
def test_prompt_negative_prompt_and_guidance_reach_the_network(families, name):
    solver, scale, _ = OWN[name]
    teacher = families.teacher(name)
    eps = noise(teacher)[:1]

    def solve(prompt: str, negative: str, guidance: float) -> torch.Tensor:
        return teacher.solve(
            eps, [prompt], solver=solver, steps=2, guidance_scale=guidance, negative_prompt=negative
        )

    own = solve("cat", "", scale)
    assert not torch.allclose(own, solve("dog", "", scale), atol=1e-3)
    assert not torch.allclose(own, solve("cat", "", scale + 1), atol=1e-3)
    told = name == "flux"  # the scale is an input of the network, there is no second pass
    assert torch.allclose(own, solve("cat", "dog", scale), atol=1e-3) == told


def test_a_negative_prompt_of_sdxl_is_that_of_its_pipeline(families):
    teacher, pipeline = families.teacher("sdxl"), plain(families.folder("sdxl"))
    eps = noise(teacher)
    own = call_by_hand("sdxl", pipeline, eps, 2, guidance_scale=4.0, negative_prompt=["dog", "cat"])
    found = teacher.solve(
        eps, PROMPTS, solver="euler", steps=2, guidance_scale=4.0, negative_prompt=["dog", "cat"]
    )
    torch.testing.assert_close(found, own, rtol=0, atol=1e-4)
    assert not teacher.encode_negatives([""]).text.any()  # zeros, as force_zeros says
    assert teacher.encode_prompts([""]).text.any()


@pytest.mark.parametrize("name", list(BUILDERS))
def test_the_denoiser_s_x0_is_the_scheduler_s_own_prediction(families, name):
    teacher = families.teacher(name)
    schedule, eps = teacher.schedule, noise(teacher)
    cond = teacher.encode_prompts(PROMPTS)
    x_t = schedule.diffuse(torch.full_like(eps, 0.3), eps, torch.tensor([700, 700]))
    t = torch.tensor([700, 700])
    with torch.no_grad():
        raw = teacher.denoiser().raw(x_t, t, cond)
        found = teacher.denoiser()(x_t, t, cond)
    config, sigma = teacher.pipeline.scheduler.config, float(schedule.sigmas[700])
    if schedule.prediction_type == "flow_prediction":  # to σ = 0 in one step
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[sigma])
        expected = scheduler.step(raw, scheduler.timesteps[0], x_t).prev_sample
    elif schedule.prediction_type == "edm":
        scheduler = EDMEulerScheduler.from_config(config)
        scheduler.set_timesteps(1000)
        time = scheduler.timesteps[1000 - 1 - 700]
        scheduler.scale_model_input(x_t, time)
        expected = scheduler.step(raw, time, x_t).pred_original_sample
    else:
        scheduler = DDIMScheduler.from_config(config, clip_sample=False)
        scheduler.set_timesteps(1000)
        expected = scheduler.step(raw, 700, x_t).pred_original_sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_heun_of_edm_in_the_family_s_own_pipeline(families):
    teacher, pipeline = families.teacher("edm"), plain(families.folder("edm"))
    pipeline.scheduler = EDMHeunScheduler.from_config(pipeline.scheduler.config)
    eps, calls = noise(teacher), []
    hook = teacher.model.register_forward_hook(lambda *_: calls.append(1))
    found = teacher.solve(eps, PROMPTS, solver="edm_heun", steps=4, guidance_scale=1.0)
    hook.remove()
    own = call_by_hand("edm", pipeline, eps, 4)
    torch.testing.assert_close(found.clamp(-1, 1), own, rtol=0, atol=1e-4)
    assert len(calls) == 2 * 4 - 1


def test_classes_are_named_or_numbered_and_none_is_the_last_label(families):
    teacher = families.teacher("edm")
    labels = teacher.encode_prompts(["Ship", " dog ", "0", ""]).labels
    assert labels.tolist() == [2, 1, 0, len(CLASSES)]
    for wrong in ("lion", "3", "-1"):
        with pytest.raises(IndexError, match=r"is not a class of the teacher; expected cat, dog"):
            teacher.encode_prompts([wrong])
    with pytest.raises(IndexError, match="no class, for guidance"):
        families.teacher("ddpm").encode_prompts([""])
    assert families.teacher("unconditional").encode_prompts(["any"]).labels is None


def test_guidance_of_a_class_model_moves_away_from_no_class(families):
    teacher, eps = families.teacher("edm"), noise(families.teacher("edm"))
    cond, uncond = teacher.encode_prompts(PROMPTS), teacher.encode_negatives([""])
    x_t, t = eps * teacher.schedule.init_noise_sigma, torch.tensor([999, 999])
    with torch.no_grad():
        with_class = teacher.denoiser()(x_t, t, cond)
        without = teacher.denoiser()(x_t, t, uncond.expand(2))
        guided = GuidedDenoiser(teacher.denoiser(), 3.0, uncond)(x_t, t, cond)
    torch.testing.assert_close(guided, without + 3.0 * (with_class - without), rtol=1e-4, atol=1e-3)
    one = teacher.solve(eps, PROMPTS, solver="edm_euler", steps=1, guidance_scale=3.0)
    torch.testing.assert_close(one, guided, rtol=1e-4, atol=1e-3)


def test_pictures_survive_the_way_to_samples_and_back(families):
    pixels = torch.randint(0, 256, (2, 8, 8, 3), generator=torch.Generator().manual_seed(1))
    pictures = pixels.byte().numpy()
    teacher = families.teacher("edm")
    assert (teacher.decode(teacher.encode(pictures)) == pictures).all()
    assert latent_features(teacher.vae, pictures).shape == (2, 3 * 8 * 8)


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_latents_are_scaled_and_shifted_as_the_pipeline_decodes_them(families, name):
    teacher, pipeline = families.teacher(name), plain(families.folder(name))
    latents = noise(teacher)
    vae = pipeline.vae
    z = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
    with torch.no_grad():
        own = pipeline.image_processor.postprocess(vae.decode(z).sample, output_type="np")
    decoded = teacher.decode(latents)
    assert abs(decoded / 255 - own).max() < 0.5 / 255 + 1e-4
    with torch.no_grad():
        mean = vae.encode(
            torch.from_numpy(decoded).permute(0, 3, 1, 2) / 127.5 - 1
        ).latent_dist.mean
    mean = (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor
    torch.testing.assert_close(teacher.encode(decoded), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_shapes_are_known_without_weights(families, name):
    teacher = families.teacher(name)
    geometry = folder_geometry(families.folder(name))
    assert geometry == teacher.geometry
    side = {"flux": 256, "flux schnell": 256}.get(name, 8 if name in PIXELS else 16)
    assert geometry.own == (side, side)
    step = geometry.factor * geometry.patch
    if step > 1:
        with pytest.raises(TeacherError, match=f"height is {step + 1}; expected a multiple"):
            teacher.latent_shape(step + 1)


def test_a_dynamic_shift_goes_by_the_picture_s_size(families):
    folder = families.folder("flux")
    small, large = (load_teacher(folder, size=(side, side)) for side in (16, 32))
    assert small.schedule.sigmas[499] < large.schedule.sigmas[499]


# ------------------------------------------------------------------ refusals


def test_another_pipeline_is_refused_by_name(families, tmp_path):
    folder = _copy(families.folder("sd"), tmp_path)
    _edit(folder / "model_index.json", _class_name="StableDiffusionUpscalePipeline")
    with pytest.raises(TeacherError) as error:
        check_teacher(str(folder))
    assert "is a StableDiffusionUpscalePipeline; this version distils" in str(error.value)
    assert all(name in str(error.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("name", "part"),
    [("sdxl", "text_encoder_2"), ("sd3", "tokenizer_2"), ("flux", "text_encoder_2"),
     ("pixart", "vae"), ("edm", "scheduler")],
)  # fmt: skip
def test_a_missing_part_is_named(families, tmp_path, name, part):
    folder = _copy(families.folder(name), tmp_path)
    shutil.rmtree(folder / part)
    with pytest.raises(TeacherError, match=f"has no folder {part}/; expected"):
        load_teacher(str(folder))


def test_a_network_of_another_class_is_refused(families, tmp_path):
    folder = _copy(families.folder("sdxl"), tmp_path)
    _edit(folder / "unet" / "config.json", _class_name="UNet2DModel")
    with pytest.raises(TeacherError, match="has a UNet2DModel in unet/; expected UNet2DConditionM"):
        check_teacher(str(folder))


def test_weights_that_are_pickles_are_refused(families, tmp_path):
    folder = _copy(families.folder("sd3"), tmp_path)
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(TeacherError, match=r"no transformer/\*\.safetensors"):
        check_teacher(str(folder))


def test_sd3_s_third_encoder_may_be_left_out_of_the_folder(families, tmp_path):
    folder = _copy(families.folder("sd3"), tmp_path)
    shutil.rmtree(folder / "text_encoder_3")
    teacher = load_teacher(str(folder))
    assert teacher.pipeline.text_encoder_3 is None
    text = teacher.encode_prompts(["cat"]).text
    assert not text[:, 12:].any() and text[:, :12].any()
    assert teacher.revision != families.teacher("sd3").revision


def test_a_pixel_pipeline_that_cannot_run_its_scheduler_is_refused(families, tmp_path):
    folder = _copy(families.folder("unconditional"), tmp_path)
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(TeacherError, match="DDPMPipeline with a EDMEulerScheduler"):
        check_teacher(str(folder))


def test_names_that_are_no_list_are_refused(families, tmp_path):
    folder = _copy(families.folder("edm"), tmp_path)
    revision = teacher_revision(str(folder))
    (folder / "classes.json").write_text('{"0": "cat"}')
    assert teacher_revision(str(folder)) != revision
    with pytest.raises(TeacherError, match="is not a list of names"):
        check_teacher(str(folder))


def test_a_token_that_a_second_encoder_does_not_know_is_named(families, tmp_path):
    from tests.dmd_core.tiny_families import clip

    folder = _copy(families.folder("sdxl"), tmp_path)
    torch.manual_seed(0)
    clip(True, vocabulary=50).save_pretrained(folder / "text_encoder_2")
    with pytest.raises(IndexError, match="tokenizer_2 and text_encoder_2 do not fit together"):
        load_teacher(str(folder)).encode_prompts(["cat"])


def test_stable_diffusion_s_conditions_are_those_of_its_encoder(families):
    """Stored pairs were made with these bits."""
    teacher = families.teacher("sd")
    pipeline: StableDiffusionPipeline = teacher.pipeline
    tokens = pipeline.tokenizer(
        sorted(PROMPTS), padding="max_length", max_length=12, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        own = pipeline.text_encoder(tokens.input_ids)[0]
    assert torch.equal(teacher.encode_prompts(sorted(PROMPTS)).text, own)


def test_a_text_encoder_s_missing_weights_are_not_made_up(families, tmp_path):
    """transformers starts them at random, and says so in its log alone."""
    for name, part, lost in (
        ("sdxl", "text_encoder", "encoder.layers.0.mlp.fc1.weight"),
        ("pixart", "text_encoder", "encoder.block.0.layer.1.DenseReluDense.wo.weight"),
    ):
        folder = shutil.copytree(families.folder(name), tmp_path / name)
        file = folder / part / "model.safetensors"
        weights = load_file(file)
        (found,) = [key for key in weights if key.endswith(lost)]
        save_file({k: v for k, v in weights.items() if k != found}, file, {"format": "pt"})
        with pytest.raises(TeacherError, match=rf"{part} lacks 1 of the weights .* {lost}"):
            load_teacher(str(folder))


def test_a_text_encoder_s_weights_are_found_with_and_without_the_wrapper_s_name(families, tmp_path):
    folder = shutil.copytree(families.folder("sd"), tmp_path / "wrapped")
    file = folder / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    wrapped = {f"text_model.{name.removeprefix('text_model.')}": weights[name] for name in weights}
    assert wrapped.keys() != weights.keys()
    save_file(wrapped, file, {"format": "pt"})
    found = load_teacher(str(folder)).encode_prompts(["cat"]).text
    assert torch.equal(found, families.teacher("sd").encode_prompts(["cat"]).text)


def test_a_network_that_learned_its_variance_is_refused(families, tmp_path):
    folder = shutil.copytree(families.folder("unconditional"), tmp_path / "teacher")
    _edit(folder / "unet" / "config.json", out_channels=6)
    with pytest.raises(TeacherError, match="unet of 3 channels in and 6 out"):
        check_teacher(str(folder))


def test_an_old_file_s_size_is_read_as_diffusers_reads_it(families, tmp_path):
    folder = shutil.copytree(families.folder("sd"), tmp_path / "teacher")
    for version, size in (("0.6.0", 32), ("0.6.0", 96), ("0.9.0.dev0", 32), ("0.31.0", 32)):
        _edit(folder / "unet" / "config.json", _diffusers_version=version, sample_size=size)
        pipeline = plain(str(folder))
        side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        assert folder_geometry(folder).own == (side, side), version


@pytest.mark.skipif(find_spec("scipy") is not None, reason="scipy is here")
def test_a_scheduler_that_needs_another_package_says_so(families, tmp_path):
    folder = shutil.copytree(families.folder("sdxl"), tmp_path / "teacher")
    _edit(folder / "scheduler" / "scheduler_config.json", use_beta_sigmas=True)
    with pytest.raises(TeacherError, match=r"scheduler cannot be used here: .*scipy"):
        folder_scheduler(str(folder))


def _copy(folder: str, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "copy"))


def _edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
