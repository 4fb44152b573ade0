"""Pictures and samples, whatever their size, a few at a time."""

import numpy as np
import pytest
import torch

from dmd_core.features import latent_features
from dmd_core.latents import decode_samples, encode_pictures, from_latents
from tests.dmd_core.tiny_families import vae


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return vae(shift_factor=0.1).eval()


def _rows_of_calls(part: torch.nn.Module) -> list[int]:
    rows: list[int] = []
    part.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    return rows


def test_a_megapixel_at_a_time_goes_through_the_vae(tiny):
    decoded, encoded = _rows_of_calls(tiny.decoder), _rows_of_calls(tiny.encoder)
    pictures = decode_samples(tiny, torch.randn(3, 4, 320, 320))
    assert pictures.shape == (3, 640, 640, 3)
    latent_features(tiny, pictures)
    assert decoded == encoded == [2, 1]


def test_pieces_give_what_the_whole_batch_gives(tiny, monkeypatch):
    samples = torch.randn(5, 4, 8, 8)
    with torch.no_grad():
        whole = tiny.decode(from_latents(tiny, samples)).sample
        whole = ((whole / 2 + 0.5).clamp(0, 1) * 255).permute(0, 2, 3, 1).numpy()
    expected = encode_pictures(tiny, whole.round().astype(np.uint8), "cpu")
    monkeypatch.setattr("dmd_core.latents._AT_ONCE", 2 * 16 * 16)
    decoded, encoded = _rows_of_calls(tiny.decoder), _rows_of_calls(tiny.encoder)
    pictures = decode_samples(tiny, samples)
    assert np.abs(pictures - whole).max() <= 0.5 + 1e-3
    found = encode_pictures(tiny, whole.round().astype(np.uint8), "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert decoded == encoded == [2, 2, 1]


def test_pixels_need_no_pieces():
    samples = torch.rand(5, 3, 8, 8) * 2 - 1
    pictures = decode_samples(None, samples)
    torch.testing.assert_close(
        encode_pictures(None, pictures, "cpu"), samples, rtol=0, atol=1 / 127
    )
