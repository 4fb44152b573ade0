"""Reading diffusers' schedulers: which family, and its numbers.

A scheduler that has been used carries the grid of its last run, so numbers are read from a fresh
one of the same configuration.
"""

from collections.abc import Mapping
from math import exp
from typing import Any, Literal

import torch

Family = Literal["vp", "edm", "flow"]

_PREDICTIONS: dict[Family, tuple[str, ...]] = {
    "vp": ("epsilon", "v_prediction", "sample"),
    "edm": ("epsilon", "v_prediction"),
    "flow": ("flow_prediction",),
}

ZERO_SNR_EPSILON = (
    "epsilon-prediction with a zero-terminal-SNR schedule: x0 = (x_t - σ ε)/α "
    "is undefined at α = 0; expected v_prediction or sample"
)


def family(class_name: str, config: Mapping[str, Any]) -> Family:
    """The family by the scheduler's class, or by its settings where the class is not known ("")."""
    if "FlowMatch" in class_name or config.get("use_flow_sigmas", False):
        return "flow"
    if class_name.startswith("EDM"):
        return "edm"
    if not class_name and "beta_schedule" not in config:
        if "sigma_data" in config:
            return "edm"
        if "shift" in config:
            return "flow"
    return "vp"


def prediction_type(scheduler) -> str:
    """What the network predicts, in diffusers' words; refuses what this reading would get wrong."""
    name, config = type(scheduler).__name__, scheduler.config
    kind_of = family(name, config)
    if "FlowMatch" in name:  # these have no such setting
        kind = "flow_prediction"
    else:
        kind = config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS[kind_of]:
        raise ValueError(
            f"{name} has prediction_type {kind!r}; "
            f"expected one of {', '.join(_PREDICTIONS[kind_of])}"
        )
    # By the setting, not by ᾱ_T: some schedulers put 2^-24 in place of its zero, and the cosine
    # schedule, which ε-prediction can use, ends lower than that.
    if kind == "epsilon" and config.get("rescale_betas_zero_snr", False):
        raise ValueError(ZERO_SNR_EPSILON)
    if config.get("invert_sigmas", False):
        raise ValueError(
            f"{name} has invert_sigmas: its time runs from data to noise; expected it to be false"
        )
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f"{name} has timestep_type {config.timestep_type!r}: its network is told log σ / 4, "
            "not the index; expected 'discrete'"
        )
    return kind


def flow_shift(config: Mapping[str, Any], image_tokens: int | None) -> float:
    """The s of σ' = s σ / (1 + (s − 1) σ); dynamic shifting takes it from the picture's size."""
    if not config.get("use_dynamic_shifting", False):
        # A VP class on flow sigmas calls it flow_shift.
        own = "flow_shift" if config.get("use_flow_sigmas", False) else "shift"
        return float(config.get(own, 1.0))
    mu = flow_mu(config, image_tokens)
    return mu if config.get("time_shift_type", "exponential") == "linear" else exp(mu)


def flow_mu(config: Mapping[str, Any], image_tokens: int | None) -> float:
    """The μ that schedulers with dynamic shifting are told (s = e^μ, or μ for the linear type)."""
    if image_tokens is None:
        raise ValueError(
            "the scheduler shifts by resolution (use_dynamic_shifting); "
            "expected the number of latent patches of a picture (image_tokens)"
        )
    # Linear in the number of patches. The defaults, for classes without these settings, are those
    # of FLUX's pipeline.
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return base + (top - base) / (high - low) * (image_tokens - low)


def edm_sigmas(scheduler) -> torch.Tensor:
    """σ of each training time, from clean (σ_min) to noise (σ_max): (T,) float64."""
    fresh = _fresh(scheduler)
    fresh.set_timesteps(scheduler.config.num_train_timesteps)
    return fresh.sigmas[: scheduler.config.num_train_timesteps].double().flip(0)


def alphas_cumprod(scheduler) -> torch.Tensor:
    """ᾱ_t of a variance-preserving scheduler: (T,) float64."""
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alphas_cumprod; expected a variance-preserving, "
            "an EDM or a flow-matching scheduler"
        )
    found = scheduler.alphas_cumprod.double().cpu()
    rescaled = scheduler.config.get("rescale_betas_zero_snr", False)
    # Some classes put 2^-24 in place of its last, for the sake of their own σ; others keep the
    # setting of the class before them, and do not rescale.
    if rescaled and found[-1] <= 2**-24:
        found = torch.cat([found[:-1], found.new_zeros(1)])
    return found


def _fresh(scheduler) -> Any:
    return type(scheduler).from_config(scheduler.config)
