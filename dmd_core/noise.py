"""Station 2: the noise ε of a sample, a pure function of one integer seed.

Philox is counter-based: the stream depends on the key alone, not on how many numbers anyone drew
before. So ε is the same for a sample alone, in a batch of 64, on any worker and for any device
(it is always drawn on the CPU and then moved). Box-Muller over Philox's raw 64-bit words is used
instead of NumPy's own normal sampler because NumPy does not promise that stream between versions.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

_SEED_BITS = 63  # seeds live in a signed 64-bit Parquet column


def stable_seed(*parts: str | int) -> int:
    """A 63-bit integer that depends only on `parts`, on any machine and in any process."""
    # The length before each part keeps ("ab", "c") and ("a", "bc") apart.
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        raw = str(part).encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return int.from_bytes(digest.digest(), "little") >> (64 - _SEED_BITS)


def uniform_words(seed: int, count: int) -> np.ndarray:
    """`count` raw 64-bit words of the Philox4x64-10 stream with key `seed`."""
    return np.random.Philox(key=seed).random_raw(count)


def sample_noise(
    seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """ε ~ N(0, I) for each seed: (B, *shape) on the CPU, rounded to `dtype`.

    Rounding comes here, before any integration, so that the ε that is stored is the ε that was
    integrated.
    """
    per_sample = int(np.prod(shape))
    half = (per_sample + 1) // 2
    noise = np.empty((len(seeds), 2 * half), dtype=np.float64)
    for row, seed in enumerate(seeds):
        words = uniform_words(int(seed), 2 * half)
        # 53 bits each; u1 in (0, 1] so that log(u1) is finite.
        u1 = ((words[:half] >> np.uint64(11)).astype(np.float64) + 1.0) * 2.0**-53
        u2 = (words[half:] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(u1))  # Box-Muller
        noise[row, :half] = radius * np.cos(2.0 * np.pi * u2)
        noise[row, half:] = radius * np.sin(2.0 * np.pi * u2)
    return torch.from_numpy(noise[:, :per_sample].reshape(len(seeds), *shape)).to(dtype)


def sample_uniform(seeds: Sequence[int]) -> torch.Tensor:
    """One number in [0, 1) for each seed: (B,) float64."""
    words = np.array([uniform_words(int(seed), 1)[0] for seed in seeds], dtype=np.uint64)
    return torch.from_numpy((words >> np.uint64(11)).astype(np.float64) * 2.0**-53)
