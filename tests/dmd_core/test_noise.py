"""Station 2. Oracles: the Philox reference vector, the law of the normal, batch invariance."""

import numpy as np
import torch

from dmd_core.noise import sample_noise, sample_uniform, stable_seed, uniform_words


def test_noise_is_the_same_alone_and_in_a_batch():
    seeds = [stable_seed("x", i) for i in range(64)]
    batch = sample_noise(seeds, (4, 8, 8))
    for index in (0, 17, 63):
        assert torch.equal(sample_noise([seeds[index]], (4, 8, 8))[0], batch[index])


def test_philox_words_are_those_of_the_reference_generator():
    # NumPy's documented bit stream for key 7, fixed here so that no change of ours can move it.
    expected = np.random.Philox(key=7).random_raw(4)
    assert np.array_equal(uniform_words(7, 4), expected)
    assert np.array_equal(uniform_words(7, 9)[:4], expected)


def test_noise_of_a_seed_never_changes():
    first = sample_noise([12345], (1, 2, 2), torch.float64).flatten()
    golden = torch.tensor(GOLDEN, dtype=torch.float64)
    torch.testing.assert_close(first, golden, rtol=0, atol=1e-12)


GOLDEN: list[float] = [
    0.21200911692005905,
    0.38481418573804543,
    -0.9098279931007017,
    0.6029871522479049,
]


def test_noise_is_standard_normal_and_uncorrelated_between_neighbouring_seeds():
    noise = sample_noise(range(2000), (256,), torch.float64)
    count = noise.numel()
    assert abs(noise.mean()) < 5 / count**0.5
    assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 5 * (96 / count) ** 0.5
    assert abs((noise[1:] * noise[:-1]).mean()) < 5 / count**0.5


def test_noise_is_rounded_to_the_stored_dtype():
    half = sample_noise([3], (16,), torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(half, sample_noise([3], (16,), torch.float64).to(torch.float16))


def test_uniform_is_uniform():
    u = sample_uniform(range(20000))
    assert 0 <= u.min() and u.max() < 1
    assert torch.histc(u, 10, 0, 1).sub(2000).abs().max() < 5 * 1800**0.5


def test_stable_seed_separates_parts_and_fits_a_signed_64_bit_column():
    assert stable_seed("ab", "c") != stable_seed("a", "bc")
    assert stable_seed("noise", 0, "fox", 0) == stable_seed("noise", 0, "fox", 0)
    assert all(0 <= stable_seed("s", i) < 2**63 for i in range(1000))
