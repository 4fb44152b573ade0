"""The true architecture of Stable Diffusion 1.5, random weights, on a CPU: pairs and export.

No training step: G, F and the teacher with Adam's state take about 24 GB in float32.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from dmd_core.denoiser import NetworkDenoiser
from dmd_core.diffusers_networks import DiffusersNetwork
from dmd_core.export import export_student
from dmd_core.noise import sample_noise
from dmd_core.student import Student
from dmd_core.teacher import load_teacher
from tests.dmd_core.family_calls import plain
from tests.dmd_core.tiny_families import clip_tokenizer

pytestmark = pytest.mark.slow

# As published with the weights (unet/config.json and so on); what is not named is diffusers'
# default, which is this model's.
UNET: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
}
SIDE = 128  # pixels; its own 512 takes sixteen times as long


def _random(make: Callable[[], nn.Module]) -> Any:
    """Without the initialisation of each layer, which takes minutes."""
    with torch.device("meta"):
        network: Any = make()
    nn.Module.to_empty(network, device="cpu")
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(float("norm" in name and name.endswith("weight")))
        for name, buffer in network.named_buffers():
            if "position_ids" in name:
                buffer.copy_(torch.arange(buffer.shape[-1])[None])
    return network


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 77
    absent: dict[str, Any] = {"safety_checker": None, "feature_extractor": None}
    scheduler: Any = PNDMScheduler(**SCHEDULER)
    pipeline = StableDiffusionPipeline(
        _random(lambda: AutoencoderKL(**VAE)),
        _random(lambda: CLIPTextModel(CLIPTextConfig(**TEXT))),
        tokenizer,
        _random(lambda: UNet2DConditionModel(**UNET)),
        scheduler,
        requires_safety_checker=False,
        **absent,
    )
    assert sum(p.numel() for p in pipeline.unet.parameters()) == 859_520_964
    target = tmp_path_factory.mktemp("sd15") / "teacher"
    pipeline.save_pretrained(target)
    return str(target)


def test_pairs_and_export(folder, tmp_path):
    teacher = load_teacher(folder, size=(SIDE, SIDE))
    assert teacher.latent_shape() == (4, 64, 64)
    eps = sample_noise([1], teacher.latent_shape(SIDE, SIDE))
    pair = teacher.solve(eps, ["a red fox"], solver="pndm", steps=2, guidance_scale=7.5)
    own = teacher.pipeline(  # the same networks: two copies would take 8 GB
        "a red fox", latents=eps, height=SIDE, width=SIDE, num_inference_steps=2,
        guidance_scale=7.5, output_type="latent",
    ).images  # fmt: skip
    assert torch.isfinite(pair).all() and own.std() > 0.1
    difference = float((pair - own).abs().max())
    print(f"pairs: {difference:.1e}")
    assert difference <= 1e-4
    assert teacher.decode(pair).shape == (1, SIDE, SIDE, 3)

    student = Student.one_step(NetworkDenoiser(DiffusersNetwork(teacher.model), teacher.schedule))
    with torch.no_grad():
        expected = student(eps, teacher.encode_prompts(["a red fox"]))
    target = str(tmp_path / "student")
    export_student(
        teacher, teacher.model.state_dict(), target,
        timesteps=(999,), card={}, dtype=torch.float32,
    )  # fmt: skip
    del teacher, student
    found = plain(target)(
        "a red fox", latents=eps, num_inference_steps=1, guidance_scale=0.0, output_type="latent"
    ).images
    relative = float((found - expected).abs().max() / expected.abs().max())
    print(f"export: {relative:.1e} of the largest")
    assert relative <= 1e-4
