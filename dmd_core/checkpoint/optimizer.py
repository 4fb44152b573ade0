"""An optimizer's state as named tensors, so that it fits the same network under any parallelism."""

from collections.abc import Collection, Mapping, Sequence

import torch

from dmd_core.checkpoint.format import CheckpointError, Tensors


def pack_optimizer(optimizer: torch.optim.Optimizer, names: Sequence[str] | None = None) -> Tensors:
    """The state of each parameter as a flat dict "<name>.<key>" → tensor, not copied.

    `names`: of the optimizer's parameters in their order; without it, their index.
    """
    named = _names(optimizer, names)
    return {
        f"{named[index]}.{key}": torch.as_tensor(value)
        for index, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if value is not None
    }


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    packed: Mapping[str, torch.Tensor],
    names: Sequence[str] | None = None,
) -> None:
    """Inverse of `pack_optimizer`; hyperparameters stay those of `optimizer` (the recipe's).

    Raises `CheckpointError` if `packed` is the state of other parameters. Empty: no state yet.
    """
    by_name: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in packed.items():
        owner, key = name.rsplit(".", 1)
        by_name.setdefault(owner, {})[key] = value
    ours = _names(optimizer, names)
    _check_names(by_name.keys(), ours)
    state = {index: by_name[name] for index, name in enumerate(ours) if name in by_name}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _check_names(stored: Collection[str], ours: list[str]) -> None:
    if not stored or set(stored) == set(ours):
        return
    odd = sorted(set(stored) ^ set(ours))
    raise CheckpointError(
        f"optimizer state is for {len(set(stored))} parameters, expected {len(ours)}; "
        f"in one of the two only: {', '.join(odd[:5])}{', …' if len(odd) > 5 else ''}"
    )


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _names(optimizer: torch.optim.Optimizer, names: Sequence[str] | None) -> list[str]:
    count = len(_parameters(optimizer))
    ours = [str(index) for index in range(count)] if names is None else list(names)
    if len(ours) != count or len(set(ours)) != count:
        raise ValueError(f"{len(set(ours))} different names for {count} parameters")
    return ours
