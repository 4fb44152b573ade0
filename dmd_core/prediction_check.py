"""Does a network predict what its scheduler says? Found on the teacher's own samples.

Under each reading of the output (ε, v or x₀) a few samples are drawn, noised again, and the
network is asked once more. Under the right reading its samples look like data to it and its
answer is near the target; under a wrong one the error is as large as the target itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast, get_args

import torch

from dmd_core.condition import Condition
from dmd_core.denoiser import RawNetwork
from dmd_core.noise import sample_noise, stable_seed
from dmd_core.schedule import PredictionType, Schedule
from dmd_core.teacher import Teacher

READINGS: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
# x₀ from ε divides by α: no sample is started where that is less.
_LEAST_ALPHA = 0.01
_QUANTILES = (0.2, 0.4, 0.6, 0.8)  # of the schedule's times, where the network is asked
# Of the target's variance. A trained network is far below the first; a reading is called wrong
# when another's error is less than this share of its own.
UNTRAINED, WRONG = 0.8, 0.5


@dataclass(frozen=True)
class Verdict:
    """`errors`: the mean squared error under each reading, as a share of its target's; `best`: the
    reading with the least. `trained` is False where no reading denoises."""

    labelled: PredictionType
    best: PredictionType
    errors: dict[str, float]

    @property
    def trained(self) -> bool:
        return self.errors[self.best] < UNTRAINED

    @property
    def mislabelled(self) -> bool:
        return self.trained and self.errors[self.best] < WRONG * self.errors[self.labelled]


def has_readings(schedule: Schedule) -> bool:
    """Can a scheduler of this family be labelled wrong? A flow's and EDM's says one thing only."""
    return schedule.prediction_type in READINGS


@torch.no_grad()
def check_prediction(
    teacher: Teacher, prompts: Sequence[str], *, seed: int = 0, samples: int = 4, steps: int = 8
) -> Verdict:
    """Ask the network under every reading; `prompts` are repeated as needed."""
    if not has_readings(teacher.schedule):
        raise ValueError(
            f"a network of prediction type {teacher.schedule.prediction_type} has no other reading"
        )
    assert set(READINGS) <= set(get_args(PredictionType))
    chosen = [prompts[index % len(prompts)] for index in range(samples)]
    cond, network = teacher.encode_prompts(chosen), teacher.network()
    shape = teacher.latent_shape()
    seeds = [stable_seed(seed, "prediction", index) for index in range(samples)]
    noises = [
        sample_noise([stable_seed(one, turn) for one in seeds], shape).to(teacher.device)
        for turn in range(1 + len(_QUANTILES))
    ]
    errors = {}
    for reading in READINGS:
        schedule = replace(teacher.schedule, prediction_type=reading)
        x0 = _sampled(network, schedule, noises[0], cond, steps)
        errors[reading] = _error(network, schedule, x0, noises[1:], cond)
    best = min(READINGS, key=errors.__getitem__)
    return Verdict(cast(PredictionType, teacher.schedule.prediction_type), best, errors)


def _sampled(
    network: RawNetwork, schedule: Schedule, eps: torch.Tensor, cond: Condition, steps: int
) -> torch.Tensor:
    """x₀ by DDIM from ε, without guidance."""
    last = int((schedule.alphas >= _LEAST_ALPHA).nonzero().max())
    times = torch.linspace(last, 0, steps + 1).long()[:-1]
    x_t, x0 = eps * float(schedule.sigmas[last]), eps
    for index, time in enumerate(times):
        t = time.expand(len(eps)).to(eps.device)
        x0 = schedule.x0_from_output(network(x_t, t, cond).float(), x_t, t)
        if index + 1 < steps:
            later = times[index + 1].expand(len(eps)).to(eps.device)
            noise = _noise_in(schedule, x_t, x0, t)
            x_t = schedule.diffuse(x0, noise, later)
    return x0


def _noise_in(
    schedule: Schedule, x_t: torch.Tensor, x0: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    alpha_t, sigma_t = schedule.coefficients(t, x_t)
    return ((x_t - alpha_t * x0) / sigma_t).float()


def _error(
    network: RawNetwork,
    schedule: Schedule,
    x0: torch.Tensor,
    noises: Sequence[torch.Tensor],
    cond: Condition,
) -> float:
    """Mean squared error over several times, as a share of the target's mean square."""
    found = []
    for share, eps in zip(_QUANTILES, noises, strict=True):
        t = torch.full((len(x0),), round(share * (schedule.num_timesteps - 1)), device=x0.device)
        x_t = schedule.diffuse(x0, eps, t)
        target = schedule.output_from_x0(x0, x_t, t)
        output = network(x_t, t, cond).float()
        found.append(float((output - target).square().mean() / target.square().mean()))
    return sum(found) / len(found) if all(map(_finite, found)) else float("inf")


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")
