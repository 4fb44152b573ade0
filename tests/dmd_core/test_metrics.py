"""Station 9. Oracles: closed forms on Gaussians, brute-force sums, coverage by simulation."""

from dataclasses import asdict
from math import comb

import numpy as np
import pytest

from dmd_core.gallery import Gallery, load_gallery, save_gallery
from dmd_core.metrics import (
    frechet_distance,
    frechet_distance_of_gaussians,
    kid,
    kid_difference,
    mean_estimate,
    regression_distance,
    retrieval,
    wilson_interval,
)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _moments(mean: float, std: float) -> np.ndarray:
    """E[x], E[x²], E[x³] of a normal variable."""
    return np.array([mean, mean**2 + std**2, mean**3 + 3 * mean * std**2])


def _gaussian_mmd(mean: float, std: float) -> float:
    """MMD² of N(mean, std²) and N(0, 1) under (x y + 1)³ = 1 + 3 x y + 3 x² y² + x³ y³."""
    gap = _moments(mean, std) - _moments(0.0, 1.0)
    return float(np.array([3.0, 3.0, 1.0]) @ gap**2)


def test_frechet_distance_of_a_set_with_itself_is_zero():
    features = _rng().normal(size=(400, 20)) @ _rng(1).normal(size=(20, 20))
    assert frechet_distance(features, features) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_of_commuting_gaussians_is_the_formula():
    rotation = np.linalg.qr(_rng().normal(size=(6, 6)))[0]
    std_a, std_b = _rng(1).uniform(0.1, 3, 6), _rng(2).uniform(0.1, 3, 6)
    mean_a, mean_b = _rng(3).normal(size=6), _rng(4).normal(size=6)
    found = frechet_distance_of_gaussians(
        mean_a, rotation * std_a**2 @ rotation.T, mean_b, rotation * std_b**2 @ rotation.T
    )
    assert found == pytest.approx(((mean_a - mean_b) ** 2).sum() + ((std_a - std_b) ** 2).sum())


def test_frechet_distance_when_covariances_do_not_commute():
    # tr (Σ_a Σ_b)^½ = Σ √λ over the eigenvalues λ of the plain product, an independent route.
    factor_a, factor_b = _rng(0).normal(size=(5, 5)), _rng(1).normal(size=(5, 5))
    cov_a, cov_b = factor_a @ factor_a.T, factor_b @ factor_b.T
    eigenvalues = np.linalg.eigvals(cov_a @ cov_b).real
    expected = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(eigenvalues).sum()
    zero = np.zeros(5)
    assert frechet_distance_of_gaussians(zero, cov_a, zero, cov_b) == pytest.approx(expected)


def test_frechet_distance_refuses_too_few_samples():
    with pytest.raises(ValueError, match="63 samples with 16 features; expected at least 64"):
        frechet_distance(np.zeros((63, 16)), np.zeros((63, 16)))


def test_kid_equals_the_brute_force_double_sum():
    x, y = _rng(0).normal(size=(9, 4)), _rng(1).normal(0.5, 1.3, size=(9, 4))

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    total = sum(
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(y[i], x[j])
        for i in range(9)
        for j in range(9)
        if i != j
    )
    assert kid(x, y).value == pytest.approx(total / (9 * 8))


def test_kid_of_a_set_with_itself_is_zero():
    features = _rng().normal(size=(50, 8))
    assert kid(features, features).value == 0.0


def test_kid_in_blocks_equals_kid_at_once(monkeypatch):
    x, y = _rng(0).normal(size=(23, 4)), _rng(1).normal(size=(23, 4))
    at_once = kid(x, y)
    monkeypatch.setattr("dmd_core.metrics._BLOCK", 5)
    assert kid(x, y).value == pytest.approx(at_once.value, rel=1e-12)
    assert kid(x, y).high == pytest.approx(at_once.high, rel=1e-12)


def _brute_force_interval(statistic, count: int) -> tuple[float, float]:
    """Leave-one-out by recomputing everything `count` times."""
    everything = np.arange(count)
    value = statistic(everything)
    left_out = np.array([statistic(np.delete(everything, i)) for i in everything])
    error = np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())
    return value - 1.959964 * error, value + 1.959964 * error


def test_jackknife_equals_recomputing_without_each_prompt():
    x, y, z = (_rng(seed).normal(0.3 * seed, 1, size=(12, 3)) for seed in range(3))
    low, high = _brute_force_interval(lambda rows: kid(x[rows], y[rows]).value, 12)
    assert (kid(x, y).low, kid(x, y).high) == pytest.approx((low, high), rel=1e-6)

    def difference(rows):
        return kid(x[rows], z[rows]).value - kid(y[rows], z[rows]).value

    low, high = _brute_force_interval(difference, 12)
    found = kid_difference(x, y, z)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)


def test_kid_is_unbiased_even_when_rows_of_one_prompt_depend_on_each_other():
    rng, mean, std, repetitions = _rng(), 0.5, 1.2, 4000
    values = []
    for _ in range(repetitions):
        shared = rng.normal(size=(10, 1))  # the prompt: correlation 0.8 within a row
        x, y = (0.8 * shared + 0.6 * rng.normal(size=(10, 1)) for _ in range(2))
        values.append(kid(mean + std * x, y).value)
    error = np.std(values) / np.sqrt(repetitions)
    assert abs(np.mean(values) - _gaussian_mmd(mean, std)) < 4 * error


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, repetitions = _rng(7), 400
    covered = better = 0
    for _ in range(repetitions):
        eps, again = rng.normal(size=(150, 1)), rng.normal(size=(150, 1))
        candidate, baseline = 0.3 + eps, 0.6 + eps  # same noise, as student and baseline have
        found = kid_difference(candidate, baseline, again, confidence=0.9)
        truth = _gaussian_mmd(0.3, 1.0) - _gaussian_mmd(0.6, 1.0)
        covered += found.low <= truth <= found.high
        better += found.high < 0
    assert 0.84 <= covered / repetitions <= 0.94
    assert better / repetitions > 0.9


def test_equal_systems_are_seldom_called_better():
    rng, repetitions = _rng(8), 400
    wrong = 0
    for _ in range(repetitions):
        a, b, reference = (rng.normal(0.2, 1, size=(60, 2)) for _ in range(3))
        wrong += kid_difference(a, b, reference - 0.2).high < 0
    assert wrong / repetitions < 0.05  # one-sided at 95 % two-sided: 2.5 % expected


def test_kid_refuses_sets_over_different_prompts():
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(5, 2\)"):
        kid(np.zeros((4, 2)), np.zeros((5, 2)))


def test_regression_distance_is_the_rmse_of_each_pair():
    a = np.zeros((4, 2, 2, 3))
    b = np.stack([np.full((2, 2, 3), value) for value in (0.1, 0.2, 0.3, 0.4)])
    found = regression_distance(a, b)
    assert found.value == pytest.approx(0.25)
    assert found.high - found.value == pytest.approx(1.959964 * np.std([1, 2, 3, 4], ddof=1) / 20)
    b[0, 0, 0, 0] = 1.0  # squares are averaged before the root
    assert regression_distance(a, b).value == pytest.approx(
        (np.sqrt((11 * 0.01 + 1.0) / 12) + 0.9) / 4
    )


def test_retrieval_of_the_gallery_from_itself_is_certain():
    features = _rng().normal(size=(30, 5))
    captions = [f"name {index % 10}" for index in range(30)]
    first, fifth = retrieval(features, captions, features, captions)
    assert (first.share.value, fifth.share.value) == (1.0, 1.0)
    assert first.chance == pytest.approx(3 / 30)
    assert fifth.chance == pytest.approx(1 - comb(27, 5) / comb(30, 5))


def test_retrieval_of_noise_is_at_chance():
    rng, captions = _rng(3), [f"name {index % 10}" for index in range(40)]
    queries = captions * 50
    first, fifth = retrieval(
        rng.normal(size=(2000, 64)), queries, 0.01 * rng.normal(size=(40, 64)), captions
    )
    assert first.share.low < first.chance < first.share.high
    assert fifth.share.low < fifth.chance < fifth.share.high


def test_retrieval_counts_the_nearest_and_skips_unknown_names():
    gallery = np.array([[0.0], [1.0], [2.0], [10.0]])
    found = retrieval(
        np.array([[1.1], [1.6], [5.0]]),
        ["b", "b", "not in the gallery"],
        gallery,
        ["a", "b", "c", "d"],
        k=(1, 2),
    )
    assert [(entry.k, entry.share.value, entry.counted) for entry in found] == [
        (1, 0.5, 2),
        (2, 1.0, 2),
    ]
    assert retrieval(np.zeros((1, 1)), ["x"], gallery, ["a", "b", "c", "d"]) == []


def test_wilson_interval_against_published_values():
    # Newcombe (1998), table I: 81/263 and 0/20.
    found = wilson_interval(81, 263)
    assert (found.low, found.high) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    found = wilson_interval(0, 20)
    assert (found.low, found.high) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_gallery_comes_back_as_it_was_saved(tmp_path):
    features = _rng().normal(size=(3, 4)).astype(np.float16)
    gallery = Gallery(("fox", "crème", "狐"), np.array([False, True, False]), features)
    save_gallery(str(tmp_path), gallery)
    loaded = load_gallery(str(tmp_path))
    assert loaded is not None and loaded.captions == gallery.captions
    assert np.array_equal(loaded.held_out, gallery.held_out)
    assert np.array_equal(loaded.features, features) and loaded.features.dtype == np.float16


def test_missing_gallery_is_none_and_half_a_gallery_is_an_error(tmp_path):
    assert load_gallery(str(tmp_path)) is None
    (tmp_path / "gallery.json").write_text("{}")
    with pytest.raises(ValueError, match=r"gallery\.json alone"):
        load_gallery(str(tmp_path))


def test_pictures_of_one_prompt_are_one_look_at_it():
    """A copy of each picture tells nothing new: neither value nor interval may change."""
    a, b, c = (_rng(seed).normal(seed / 10, 1, size=(10, 3)) for seed in (1, 2, 3))
    units = np.tile(np.arange(len(a)), 3)
    tiled_a, tiled_b, tiled_c = (np.tile(one, (3, 1)) for one in (a, b, c))
    values = np.arange(len(a), dtype=float)
    pairs = [
        (kid(tiled_a, tiled_b, units=units), kid(a, b)),
        (kid_difference(tiled_a, tiled_b, tiled_c, units=units), kid_difference(a, b, c)),
        (mean_estimate(np.tile(values, 3), units=units), mean_estimate(values)),
    ]
    for together, alone in pairs:
        assert asdict(together) == pytest.approx(asdict(alone), rel=1e-9)
    narrower = mean_estimate(np.tile(values, 3))
    assert narrower.high - narrower.low < 0.7 * (pairs[2][1].high - pairs[2][1].low)


def test_rows_of_units_of_other_sizes_are_weighed_by_the_pairs_they_are_in():
    """Against the U-statistic written out, one unit left out at a time."""
    a, b = (_rng(seed).normal(seed / 10, 1, size=(10, 3)) for seed in (1, 2))
    units = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4, 5])

    def statistic(kept: np.ndarray) -> float:
        def k(x, y):
            return (x @ y / len(x) + 1) ** 3

        rows = np.flatnonzero(kept)
        pairs = [(i, j) for i in rows for j in rows if units[i] != units[j]]
        found = [k(a[i], a[j]) + k(b[i], b[j]) - k(a[i], b[j]) - k(b[i], a[j]) for i, j in pairs]
        return float(np.mean(found))

    left_out = np.array([statistic(units != unit) for unit in range(6)])
    error = np.sqrt(5 / 6 * np.square(left_out - left_out.mean()).sum())
    found = kid(a, b, units=units)
    assert found.value == pytest.approx(statistic(units >= 0))
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * error, rel=1e-5)
    with pytest.raises(ValueError, match="units are given for 3 of 10 rows"):
        kid(a, b, units=units[:3])


def test_retrieval_counts_a_prompt_once_however_many_pictures_it_has():
    rng = _rng(5)
    names = [f"name {index}" for index in range(12)]
    gallery = rng.normal(size=(12, 3))
    features = gallery + rng.normal(scale=1.0, size=(12, 3))
    alone = retrieval(features, names, gallery, names, k=(1,))
    units = np.tile(np.arange(12), 4)
    together = retrieval(np.tile(features, (4, 1)), names * 4, gallery, names, k=(1,), units=units)
    assert together[0].share == alone[0].share and together[0].counted == 48
