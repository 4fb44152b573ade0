"""Station 9: how far are the student's pictures from the teacher's?

Pure functions of arrays, computed in float64. Row i of every set of pictures belongs to one prompt,
so a prompt, not a picture, is the unit of every confidence interval. Where prompts have several
pictures each, `units` (N,) says which rows are of one prompt; without it each row is a unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from statistics import NormalDist

import numpy as np

_BLOCK = 1024  # rows of the kernel matrix in memory at a time
# A covariance of d features needs several samples for each; below this the distance is mostly bias.
_SAMPLES_PER_FEATURE = 4


@dataclass(frozen=True)
class Estimate:
    """A number with the ends of its confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Retrieval:
    """Share of `counted` pictures with the right name among the k nearest real ones; `chance` is
    what pictures drawn from the gallery at random would reach."""

    k: int
    share: Estimate
    chance: float
    counted: int


def frechet_distance(features_a: np.ndarray, features_b: np.ndarray) -> float:
    """Squared Fréchet distance of Gaussians fitted to (N,d) and (M,d) features.

    Raises ValueError when d > N/4: the covariance would then be mostly sampling error.
    """
    moments = []
    for features in (features_a, features_b):
        count, dimension = _matrix(features).shape
        if not enough_for_frechet(features):
            raise ValueError(
                f"Fréchet distance of {count} samples with {dimension} features; expected at least "
                f"{least_for_frechet(dimension)} samples. Use kid, which is unbiased at any N"
            )
        features = _matrix(features)
        moments += [features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False))]
    return frechet_distance_of_gaussians(*moments)


def enough_for_frechet(features: np.ndarray) -> bool:
    """Are (N,d) features enough for `frechet_distance`?"""
    return features.shape[0] >= least_for_frechet(features.shape[1])


def least_for_frechet(dimension: int) -> int:
    """Samples that `frechet_distance` takes: four for each feature."""
    return _SAMPLES_PER_FEATURE * dimension


def frechet_distance_of_gaussians(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """|μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½), for (d,) means and (d,d) covariances."""
    # tr (Σ_a Σ_b)^½ is the sum of the singular values of Σ_a^½ Σ_b^½: no matrix square root of a
    # non-symmetric product, which turns complex by rounding.
    root = _matrix_sqrt(cov_a) @ _matrix_sqrt(cov_b)
    cross = np.linalg.svd(root, compute_uv=False).sum()
    difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
    distance = difference @ difference + np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
    return max(0.0, float(distance))


def kid(
    features_a: np.ndarray,
    features_b: np.ndarray,
    *,
    confidence: float = 0.95,
    units: np.ndarray | None = None,
) -> Estimate:
    """Kernel distance (Bińkowski et al., ICLR 2018) of two (N,d) sets: an unbiased MMD².

    The kernel is (x·y/d + 1)³. Because row i of both sets belongs to one prompt, pictures i and i
    are not independent and the cross term leaves the diagonal out too: the one-sample U-statistic
    of Gretton et al. (JMLR 2012, eq. 4), which stays unbiased then; so are all pairs of one unit. A
    set's distance to itself is exactly 0; an estimate may be negative.
    """
    units = _units(units, len(features_a))
    return _jackknife(_interactions(features_a, features_b, units), units, confidence)


def kid_difference(
    candidate: np.ndarray,
    baseline: np.ndarray,
    reference: np.ndarray,
    *,
    confidence: float = 0.95,
    units: np.ndarray | None = None,
) -> Estimate:
    """KID(candidate, reference) − KID(baseline, reference), all (N,d) over the same prompts.

    The jackknife deletes a prompt from all three sets at once, so what they share cancels.
    `high < 0`: the candidate is nearer than the baseline beyond the confidence interval.
    """
    units = _units(units, len(reference))
    nearer = _interactions(candidate, reference, units) - _interactions(baseline, reference, units)
    return _jackknife(nearer, units, confidence)


def regression_distance(
    pictures_a: np.ndarray, pictures_b: np.ndarray, *, confidence: float = 0.95
) -> Estimate:
    """Mean over pairs of the root-mean-square difference of two (N,…) sets in [0, 1]."""
    return mean_estimate(pair_distances(pictures_a, pictures_b), confidence=confidence)


def pair_distances(pictures_a: np.ndarray, pictures_b: np.ndarray) -> np.ndarray:
    """The root-mean-square difference of each pair of two (N,…) sets: (N,) float64."""
    if pictures_a.shape != pictures_b.shape:
        raise ValueError(
            f"pairs of pictures differ in shape: {pictures_a.shape}, {pictures_b.shape}"
        )
    difference = pictures_a.astype(np.float64) - pictures_b.astype(np.float64)
    return np.sqrt(np.square(difference).reshape(len(difference), -1).mean(axis=1))


def mean_estimate(
    values: np.ndarray, *, confidence: float = 0.95, units: np.ndarray | None = None
) -> Estimate:
    """The mean over units of one value per row, (N,), with its normal interval."""
    values = unit_means(values, units)
    _at_least(len(values), 2, "a confidence interval over prompts")
    return _normal_interval(
        float(values.mean()), float(values.std(ddof=1)) / sqrt(len(values)), confidence
    )


def unit_means(values: np.ndarray, units: np.ndarray | None = None) -> np.ndarray:
    """(N,) → the mean of each unit's rows."""
    units = _units(units, len(values))
    return np.bincount(units, weights=values) / np.bincount(units)


def retrieval(
    features: np.ndarray,
    captions: Sequence[str],
    gallery_features: np.ndarray,
    gallery_captions: Sequence[str],
    *,
    k: Sequence[int] = (1, 5),
    confidence: float = 0.95,
    units: np.ndarray | None = None,
) -> list[Retrieval]:
    """Is one of the k nearest real pictures (Euclidean) named as the prompt? One entry per k.

    `features` (N,d) with N captions against a gallery (G,d) with G captions. Prompts that name no
    picture of the gallery cannot be scored and are left out; an empty list when none remain.
    """
    frequency = {name: 0 for name in gallery_captions}
    for name in gallery_captions:
        frequency[name] += 1
    rows = [row for row, caption in enumerate(captions) if caption in frequency]
    if not rows:
        return []
    counted = _units(_units(units, len(captions))[rows], len(rows))
    wanted = np.array([captions[row] for row in rows])
    order = np.argsort(
        _squared_distances(_matrix(features)[rows], _matrix(gallery_features)),
        axis=1,
        kind="stable",
    )
    names = np.array(gallery_captions)
    total = len(names)
    results = []
    for top in k:
        hits = unit_means((names[order[:, :top]] == wanted[:, None]).any(axis=1), counted)
        misses = [comb(total - frequency[name], top) / comb(total, top) for name in wanted.tolist()]
        chance = 1.0 - float(np.mean(misses))
        # A prompt's pictures are one look at it: its share of hits varies less than one picture's.
        share = wilson_interval(float(hits.sum()), len(hits), confidence)
        results.append(Retrieval(top, share, chance, len(rows)))
    return results


def wilson_interval(hits: float, count: int, confidence: float = 0.95) -> Estimate:
    """The share hits/count with Wilson's score interval, which stays inside [0, 1]."""
    _at_least(count, 1, "a share")
    z = _normal_quantile(confidence)
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half))


def _units(units: np.ndarray | None, rows: int) -> np.ndarray:
    """The unit of each row as 0, 1, … (N,)."""
    if units is None:
        return np.arange(rows)
    if len(units) != rows:
        raise ValueError(f"units are given for {len(units)} of {rows} rows")
    return np.unique(units, return_inverse=True)[1]


def _interactions(features_a: np.ndarray, features_b: np.ndarray, units: np.ndarray) -> np.ndarray:
    """H_i = Σ_j k(a_i,a_j) + k(b_i,b_j) − k(a_i,b_j) − k(b_i,a_j) over the rows j of other units:
    (N,) float64.

    Everything the estimate and its jackknife need, in O(N²) time and O(N) blocks of memory.
    """
    a, b = _matrix(features_a), _matrix(features_b)
    if a.shape != b.shape:
        raise ValueError(
            f"feature sets are {a.shape} and {b.shape}; expected one row per prompt in both"
        )
    _at_least(int(units.max(initial=-1)) + 1, 3, "a jackknife")
    sums = np.empty(len(a))
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, start + _BLOCK)
        kernel = _kernel(a[rows], a) + _kernel(b[rows], b)
        kernel -= _kernel(a[rows], b) + _kernel(b[rows], a)
        kernel[units[rows, None] == units] = 0.0
        sums[rows] = kernel.sum(axis=1)
    return sums


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _jackknife(interactions: np.ndarray, units: np.ndarray, confidence: float) -> Estimate:
    """The U-statistic, Σ_i H_i over the number of its pairs of rows, and its interval from leaving
    out one unit at a time."""
    rows, total = np.bincount(units), interactions.sum()
    count, pairs = len(rows), len(units) ** 2 - np.square(rows).sum()
    # What a unit takes part in, it does as the row and as the column.
    without = total - 2.0 * np.bincount(units, weights=interactions)
    left_out = without / (pairs - 2 * rows * (len(units) - rows))
    variance = (count - 1) / count * np.square(left_out - left_out.mean()).sum()
    return _normal_interval(float(total / pairs), float(np.sqrt(variance)), confidence)


def _normal_interval(value: float, std_error: float, confidence: float) -> Estimate:
    half = _normal_quantile(confidence) * std_error
    return Estimate(value, value - half, value + half)


def _normal_quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2.0)


def _matrix(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2:
        raise ValueError(f"features have shape {features.shape}; expected (N, d)")
    return features


def _matrix_sqrt(matrix: np.ndarray) -> np.ndarray:
    """Square root of a symmetric positive semi-definite (d,d) matrix."""
    values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (vectors * np.sqrt(values.clip(0.0))) @ vectors.T


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,d), (M,d) → (N,M)."""
    squares_x, squares_y = np.square(x).sum(axis=1), np.square(y).sum(axis=1)
    return squares_x[:, None] + squares_y[None, :] - 2.0 * x @ y.T


def _at_least(count: int, needed: int, what: str) -> None:
    if count < needed:
        raise ValueError(f"{count} prompts are too few for {what}; expected at least {needed}")
