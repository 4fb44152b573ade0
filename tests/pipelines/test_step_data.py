"""A step's data on its way to the device. What it holds: test_dmd_variants, test_resume_matrix."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dmd_core.teacher import Teacher
from pipelines import step_data
from pipelines.step_data import Progress, StepSource
from pipelines.train_config import TrainSection

((_, KEYS),) = TrainSection.model_validate(
    {"lambda_reg": 0, "regression_batch_size": 0, "train_batch_size": 2, "gan_weight": 1e-3,
     "real_pictures": "pictures", "r1_weight": 0.1}
).plan()  # fmt: skip


class _Tensor:
    """Stands for a tensor in memory that is not pinned; the copy of one that is, is `device`."""

    def float(self) -> "_Tensor":
        return self

    def pin_memory(self) -> SimpleNamespace:
        return SimpleNamespace(to=self._copied)

    def to(self, device: torch.device) -> None:
        pytest.fail(f"a copy to {device} that waits")

    def _copied(self, device: torch.device, *, non_blocking: bool) -> torch.device:
        assert non_blocking
        return device


def test_no_copy_to_a_gpu_waits_for_it(monkeypatch):
    for name in ("sample_noise", "sample_uniform"):
        monkeypatch.setattr(step_data, name, lambda *_: _Tensor())
    gpu = torch.device("cuda", 3)
    teacher = SimpleNamespace(device=gpu, encode_prompts=lambda prompts: None)
    stream: Any = SimpleNamespace(batch_from=lambda *_: (_Tensor(), ("a", "b")))
    source = StepSource(
        cast(Teacher, teacher), seed=0, rank=0, world=1, shape=(4, 8, 8), timesteps=1,
        prompts=SimpleNamespace(batch_from=lambda *_: ("a", "b")), pictures=stream,
    )  # fmt: skip
    (drawn,) = source.draw(Progress(), KEYS, None).unpaired
    real = drawn.pictures
    assert real is not None
    noise = drawn.noise
    for placed in (*noise.z, noise.eps_dm, noise.u_dm, noise.eps_fake, noise.u_fake, real.x,
                   real.eps, real.u, real.eps_x, real.u_x, real.eps_r1):  # fmt: skip
        assert placed == gpu

    pairs: Any = SimpleNamespace(
        batch_from=lambda *_: SimpleNamespace(noise=_Tensor(), latents=_Tensor(), prompts=("a",))
    )
    keys = KEYS.model_copy(update={"lambda_reg": 1.0, "regression_batch_size": 1})
    paired = source.draw(Progress(), keys, pairs).paired
    assert paired is not None and paired.eps == paired.y == gpu
