"""What a training worker holds beside its networks and their passes. These figures are coarse:
bytes for each pixel or token of the usual networks, which are not played through."""

import torch

from pipelines.network_sizes import NetworkSizes
from pipelines.stage_settings import StageKeys
from pipelines.streams import pictures_at_once

GIB = 2**30
# For one sample and each pixel of its picture, in float32: what LPIPS holds of x and of y, and the
# decoder of latents for its backward pass. `vae`: the usual one (SD, SDXL, SD 3, FLUX), otherwise
# an AutoencoderTiny. By the true classes, played through without memory.
_PERCEPTUAL = {"lpips": 3_000, "st-lpips": 4_500}
_DECODER_VAE, _DECODER_TINY = 23_300, 2_700
# A VAE at work on a picture without gradient, for each of its pixels: 3 GiB for a megapixel.
_ENCODING = 3 * GIB // 2**20
# A text encoder at work, for each byte of its output: T5-XXL's attention over 512 tokens.
_READING = 25
# Tensors of a sample's size that are drawn for it and each update: inputs of the student's steps,
# noise of each loss, a real picture.
_DRAWN = 10


def regression_bytes(sizes: NetworkSizes, keys: StageKeys, resize: int, samples: float) -> float:
    """Of a perceptual loss on `samples` pairs at once, while its gradient is computed; 0 for the
    other losses. `resize`: `train.perceptual_resize`."""
    per_pixel = _PERCEPTUAL.get(keys.regression_loss, 0)
    if not samples or not per_pixel:
        return 0.0
    height, width = sizes.picture
    enlarged = max(1.0, resize / min(height, width)) ** 2
    decoder = _DECODER_VAE if keys.regression_decoder == "vae" else _DECODER_TINY
    per_pixel = per_pixel * enlarged + decoder * sizes.decoded
    return samples * height * width * per_pixel


def drawn_bytes(sizes: NetworkSizes, keys: StageKeys, fresh: int, paired: int) -> int:
    """Of this step's data and of the next one's, which is drawn meanwhile: conditions, noise,
    pictures. `fresh`, `paired`: samples of a worker in one update."""
    judged = int(keys.gan_weight > 0)  # each real picture has its own condition
    update = fresh * (_DRAWN * sizes.sample + (1 + judged) * sizes.condition)
    return 2 * (keys.fake_updates * update + paired * (_DRAWN * sizes.sample + sizes.condition))


def encoding_bytes(
    sizes: NetworkSizes, keys: StageKeys, use_gpu: bool, fresh: int, paired: int
) -> int:
    """At most, of the text encoders (all prompts of an update together) or of the VAE (some real
    pictures together), which make the next step's data while this one trains."""
    reading = _READING * sizes.condition * max(fresh, paired)
    if not sizes.decoded or keys.gan_weight == 0:
        return reading
    device = torch.device("cuda" if use_gpu else "cpu")
    height, width = sizes.picture
    return max(reading, pictures_at_once((height, width), device) * height * width * _ENCODING)
