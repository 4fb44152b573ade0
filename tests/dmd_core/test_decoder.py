"""The regression loss on pixels: a gradient through the decoder, and none through the target."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny

from dmd_core.decoder import check_decoder, decoded, load_decoder
from dmd_core.losses import regression_distance
from dmd_core.noise import sample_noise
from dmd_core.perceptual import Lpips
from dmd_core.teacher import TeacherError, load_teacher


def test_a_decoded_distance_is_that_of_the_pipeline_s_own_pictures(tiny_teacher_dir):
    teacher = load_teacher(tiny_teacher_dir)
    vae = teacher.pipeline.vae
    x, y = sample_noise([1, 2], (4, 4, 4)), sample_noise([3, 4], (4, 4, 4))
    leaf = x.clone().requires_grad_()
    distance = decoded(regression_distance("l2"), load_decoder(teacher, "vae"))(leaf, y)
    pixels = [vae.decode(z / vae.config.scaling_factor).sample for z in (x, y)]
    expected = (pixels[0] - pixels[1]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(distance, expected)

    distance.sum().backward()
    step = 1e-3 * leaf.grad / leaf.grad.norm()  # downhill by as much as the gradient says
    with torch.no_grad():
        lower = decoded(regression_distance("l2"), load_decoder(teacher, "vae"))(leaf - step, y)
    fall = float((distance.detach() - lower).sum())
    assert fall == pytest.approx(float((leaf.grad * step).sum()), rel=0.02)
    assert all(p.grad is None for p in vae.parameters())


def test_lpips_reaches_the_latents(tiny_teacher_dir):
    teacher = load_teacher(tiny_teacher_dir)
    torch.manual_seed(0)
    measure = decoded(Lpips(widths=(4, 4, 8, 8, 8), resize=32), load_decoder(teacher, "vae"))
    x = sample_noise([1, 2], (4, 4, 4)).requires_grad_()
    assert measure(x, x.detach()).abs().max() == 0
    measure(x, sample_noise([3, 4], (4, 4, 4))).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_a_tiny_decoder_folder(tiny_teacher_dir, tmp_path):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), scaling_factor=0.5,
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    x = sample_noise([1], (4, 4, 4))
    decode = load_decoder(load_teacher(tiny_teacher_dir), str(tmp_path / "tiny"))
    with torch.no_grad():
        torch.testing.assert_close(decode(x), tiny.eval().decode(x / 0.5).sample)


def test_folders_that_are_no_decoder_are_refused(tiny_teacher_dir, tmp_path):
    check_decoder("vae", tiny_teacher_dir)
    with pytest.raises(TeacherError, match=r"no config\.json"):
        check_decoder(str(tmp_path), tiny_teacher_dir)
    with pytest.raises(TeacherError, match="UNet2DConditionModel"):
        check_decoder(f"{tiny_teacher_dir}/unet", tiny_teacher_dir)


def test_a_decoder_of_other_latents_is_refused(tiny_teacher_dir, families, tmp_path):
    check_decoder(f"{tiny_teacher_dir}/vae", tiny_teacher_dir)
    config = {"_class_name": "AutoencoderTiny", "latent_channels": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TeacherError, match="latents of 16 channels; expected 4"):
        check_decoder(str(tmp_path), tiny_teacher_dir)
    check_decoder(str(tmp_path), families.folder("unconditional"))  # its pixels are not decoded
