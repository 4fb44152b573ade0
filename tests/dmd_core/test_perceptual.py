"""Station 6, LPIPS. Oracle: the authors' own code, packages lpips 0.1.4 and stlpips-pytorch 0.0.2.

The golden numbers are what that code gives, in float64, for a VGG-16 of an eighth of the width
whose weights and pictures are made below; those at the end are for its published weights.
"""

import math
import pickle
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from dmd_core import perceptual
from dmd_core.noise import sample_noise
from dmd_core.perceptual import Lpips, PerceptualError, load_perceptual

WIDTHS = (8, 16, 32, 64, 64)
# (pooling, side) → the distances of two pairs, and Σ|∂(their sum)/∂x|.
GOLDEN = {
    ("max", 32): ((0.351618923, 0.357607087), 11.4291153),
    ("max", 48): ((0.318991343, 0.331592512), 12.2220029),
    ("blur", 32): ((0.218108938, 0.211622743), 6.06536618),
    ("blur", 48): ((0.224856328, 0.239896950), 5.32121535),
}
BINOMIAL = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16


pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def published_weights(pooling: str) -> dict[str, torch.Tensor]:
    """Random weights under the names of the published files: torchvision's, or ST-LPIPS's."""
    tensors = {f"lin{k}.model.1.weight": torch.empty(1, w, 1, 1) for k, w in enumerate(WIDTHS)}
    layer, channels = 0, 3
    for block, (width, count) in enumerate(zip(WIDTHS, (2, 2, 3, 3, 3), strict=True)):
        for index in range(count):
            if block and not index:  # a pooling layer comes before, and a blur behind it
                layer += 1 if pooling == "max" else 2
            part = "features" if pooling == "max" else f"net.slice{block + 1}"
            tensors[f"{part}.{layer}.weight"] = torch.empty(width, channels, 3, 3)
            tensors[f"{part}.{layer}.bias"] = torch.empty(width)
            layer, channels = layer + 2, width
    for seed, name in enumerate(sorted(tensors)):
        noise = sample_noise([seed], tensors[name].shape)[0]
        if name.startswith("lin"):
            noise = noise.abs()
        elif name.endswith("weight"):
            noise = noise * math.sqrt(2 / (9 * noise.shape[1]))
        else:
            noise = 0.1 * noise
        tensors[name] = noise
    if pooling == "blur":
        tensors["scaling_layer.shift"] = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        tensors["scaling_layer.scale"] = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        for block, layer in enumerate((5, 11, 19, 27)):
            filters = BINOMIAL.repeat(WIDTHS[block], 1, 1, 1)
            tensors[f"net.slice{block + 2}.{layer}.filt"] = filters
    return tensors


def tiny(pooling: str, resize: int | None = None) -> Lpips:
    net = Lpips(pooling=pooling, widths=WIDTHS, resize=resize)
    net.load_published(published_weights(pooling))
    return net


def pictures(seed: int, side: int, amount: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pictures, and the same two with more noise: (2,3,side,side) in [−1, 1]."""
    x = sample_noise([seed, seed + 1], (3, side, side)).clamp(-1, 1)
    return x, (x + amount * sample_noise([seed + 2, seed + 3], (3, side, side))).clamp(-1, 1)


@pytest.mark.parametrize(("pooling", "side"), list(GOLDEN))
def test_distance_and_gradient_are_those_of_the_authors_code(pooling, side):
    distances, gradient_sum = GOLDEN[pooling, side]
    x, y = pictures(100, side)
    x.requires_grad_()
    distance = tiny(pooling)(x, y)
    assert distance.shape == (2,) and distance.dtype == torch.float32
    torch.testing.assert_close(distance, torch.tensor(distances), rtol=1e-5, atol=0)
    distance.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().sum()) == pytest.approx(gradient_sum, rel=1e-5)


@pytest.mark.parametrize("pooling", ["max", "blur"])
def test_distance_is_a_symmetric_measure_that_grows_with_the_distortion(pooling):
    net = tiny(pooling)
    x, y = pictures(7, 32)
    assert net(x, x).abs().max() == 0
    torch.testing.assert_close(net(x, y), net(y, x))
    grades = [net(*pictures(7, 32, amount)) for amount in (0.05, 0.2, 0.8)]
    assert (grades[0] > 0).all() and (grades[0] < grades[1]).all() and (grades[1] < grades[2]).all()


def test_gradient_reaches_both_pictures_and_no_parameter():
    net = tiny("max").train()
    x, y = (picture.requires_grad_() for picture in pictures(7, 32))
    net(x, y).sum().backward()
    for picture in (x, y):
        assert picture.grad is not None and (picture.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(not p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("pooling", ["max", "blur"])
def test_gradient_is_finite_where_every_feature_is_zero(pooling):
    net = tiny(pooling)
    net.trunk[-2].bias.fill_(-1e6)  # the ReLU behind it lets nothing pass
    x, y = pictures(7, 32)
    x.requires_grad_()
    net(x, y).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0


def test_small_pictures_are_upsampled_and_bigger_ones_are_not():
    x, y = pictures(7, 24)
    plain = tiny("max")
    expected = plain(*(F.interpolate(p, size=(40, 40), mode="bilinear") for p in (x, y)))
    torch.testing.assert_close(tiny("max", resize=40)(x, y), expected)
    torch.testing.assert_close(tiny("max", resize=20)(x, y), plain(x, y))
    # The shorter side decides, and the shape of the picture stays.
    x, y = x[..., :20], y[..., :20]
    expected = plain(*(F.interpolate(p, size=(48, 40), mode="bilinear") for p in (x, y)))
    torch.testing.assert_close(tiny("max", resize=40)(x, y), expected)


def test_precision_stays_float32_under_autocast_and_for_half_pictures():
    net = tiny("max")
    x, y = pictures(7, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = net(x, y)
    torch.testing.assert_close(inside, net(x, y), rtol=0, atol=0)
    assert net(x.bfloat16(), y.bfloat16()).dtype == torch.float32


def test_pictures_that_cannot_be_compared_are_refused():
    net = tiny("blur")
    x, _ = pictures(7, 32)
    for other in (x[:1], x[..., :16], x[:, :1]):
        with pytest.raises(ValueError, match="expected two"):
            net(x, other)
    with pytest.raises(ValueError, match="at least 18"):
        net(x[..., :17], x[..., :17])
    assert net(x[..., :18], x[..., :18]).max() == 0


@pytest.mark.parametrize("pooling", ["max", "blur"])
def test_weights_must_fit_name_by_name(pooling):
    net, weights = tiny(pooling), published_weights(pooling)
    for name in weights:
        lacking = {key: value for key, value in weights.items() if key != name}
        with pytest.raises(RuntimeError, match="Missing"):
            net.load_published(lacking)
    with pytest.raises(RuntimeError, match="Unexpected"):
        net.load_published(weights | {"epoch": torch.ones(1)})


@pytest.fixture
def small_files(tmp_path, monkeypatch) -> tuple[str, str]:
    """(trunk, lins): the two files of lpips, for a network of an eighth of the width."""
    monkeypatch.setattr(perceptual, "Lpips", partial(Lpips, widths=WIDTHS))
    weights = published_weights("max")
    trunk = {name: tensor for name, tensor in weights.items() if name.startswith("features")}
    lins = {name: tensor for name, tensor in weights.items() if name.startswith("lin")}
    torch.save(trunk | {"classifier.0.bias": torch.ones(5)}, tmp_path / "trunk.pth")
    torch.save(lins, tmp_path / "lins.pth")
    return str(tmp_path / "trunk.pth"), str(tmp_path / "lins.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_lpips_is_loaded_from_the_trunk_and_the_lins(small_files, suffix):
    trunk, lins = small_files
    if suffix == "safetensors":
        save_file(torch.load(trunk, weights_only=True), trunk := trunk.replace("pth", suffix))
    net = load_perceptual("lpips", trunk=trunk, weights=lins, resize=None)
    x, y = pictures(100, 32)
    torch.testing.assert_close(net(x, y), torch.tensor(GOLDEN["max", 32][0]), rtol=1e-5, atol=0)
    # Files that are not the published ones are named in reports.
    for name in ("LPIPS-VGG v0.1", Path(trunk).name, "lins.pth"):
        assert name in net.description
    assert "not comparable" not in net.description


def test_shift_tolerant_lpips_is_loaded_from_one_file_and_says_what_it_is(small_files, tmp_path):
    path = str(tmp_path / "whole.pth")
    torch.save(published_weights("blur"), path)
    net = load_perceptual("st-lpips", weights=path, resize=32)
    torch.testing.assert_close(net(*pictures(100, 32)), tiny("blur")(*pictures(100, 32)))
    for part in ("ST-LPIPS", "not comparable", "whole.pth", "upsampled to 32"):
        assert part in net.description


def test_missing_weights_say_what_to_install_and_what_to_use_instead(monkeypatch, small_files):
    monkeypatch.setattr(perceptual, "find_spec", lambda name: None)
    with pytest.raises(PerceptualError) as st:
        load_perceptual("st-lpips")
    with pytest.raises(PerceptualError) as lins:
        load_perceptual("lpips", trunk=small_files[0])
    with pytest.raises(PerceptualError) as trunk:
        load_perceptual("lpips")
    assert "pip install --no-deps stlpips-pytorch" in str(st.value)
    assert "pip install --no-deps lpips==0.1.4" in str(lins.value)
    assert "vgg16-397923af.pth" in str(trunk.value)
    for error in (st, lins, trunk):
        for way_out in ("`perceptual`", "l1", "l2", "huber"):
            assert way_out in str(error.value)


def test_requests_that_make_no_sense_are_refused(small_files):
    with pytest.raises(PerceptualError, match="dists"):
        load_perceptual("dists")
    with pytest.raises(PerceptualError, match="brings its own"):
        load_perceptual("st-lpips", trunk=small_files[0])
    with pytest.raises(PerceptualError, match=r"nowhere\.pth is not a file"):
        load_perceptual("lpips", trunk="nowhere.pth", weights=small_files[1])
    with pytest.raises(PerceptualError, match=r"lins\.pth: not the weights of st-lpips"):
        load_perceptual("st-lpips", weights=small_files[1])


def test_packaged_weights_that_are_damaged_are_refused_without_an_import(monkeypatch, tmp_path):
    for package, file in (
        ("lpips", "weights/v0.1/vgg.pth"),
        ("stlpips_pytorch", "weights/vST0.0/vgg_shift_tolerant.pth"),
    ):
        (tmp_path / package / file).parent.mkdir(parents=True)
        (tmp_path / package / file).write_bytes(b"damaged")
        (tmp_path / package / "__init__.py").write_text("import torchvision_that_is_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PerceptualError, match=r"vgg_shift_tolerant\.pth is damaged"):
        load_perceptual("st-lpips")
    with pytest.raises(PerceptualError, match=r"vgg\.pth is damaged"):
        load_perceptual("lpips", trunk="trunk.pth")


class Harmful:
    def __reduce__(self):
        return print, ("code from a weights file ran",)


@pytest.mark.parametrize("damage", ["torn", "empty", "altered", "code", "text.safetensors"])
def test_a_file_that_is_not_weights_is_refused_with_its_name(small_files, tmp_path, damage, capsys):
    path = tmp_path / f"bad-{damage}"
    whole = Path(small_files[0]).read_bytes()
    path.write_bytes(
        {
            "torn": whole[: len(whole) // 2],
            "empty": b"",
            "altered": b"\x80\x02" + whole[2:],
            "code": pickle.dumps({"features.0.weight": Harmful()}, protocol=2),
            "text.safetensors": b"not a tensor",
        }[damage]
    )
    with pytest.raises(PerceptualError, match=f"bad-{damage} cannot be read"):
        load_perceptual("lpips", trunk=str(path), weights=small_files[1])
    assert "ran" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(find_spec("stlpips_pytorch") is None, reason="needs the extra perceptual")
def test_published_shift_tolerant_weights_give_the_authors_distances():
    x, y = pictures(100, 32)
    x.requires_grad_()
    net = load_perceptual("st-lpips")
    assert net.description == "ST-LPIPS-VGG vST0.0 (not comparable with LPIPS), upsampled to 224"
    distance = net(x, y)
    torch.testing.assert_close(distance, torch.tensor([0.12581849, 0.12713222]), rtol=1e-4, atol=0)
    distance.sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) == pytest.approx(3.34096, rel=1e-4)
