"""An optimizer's state by name goes into the same network, and into no other."""

import pytest
import torch
from torch import nn

from dmd_core.checkpoint import (
    CheckpointError,
    pack_optimizer,
    unpack_optimizer,
)


@pytest.mark.parametrize("named", [True, False])
def test_optimizer_state_round_trips_bitwise(named):
    def trained(steps: int, resume_at: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        network = nn.Linear(4, 4)
        names = [name for name, _ in network.named_parameters()] if named else None
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
        for step in range(steps):
            if step == resume_at:
                packed = pack_optimizer(optimizer, names)
                optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
                unpack_optimizer(optimizer, packed, names)
            optimizer.zero_grad()
            network(torch.ones(2, 4) * step).square().sum().backward()
            optimizer.step()
        return network.weight.detach()

    assert torch.equal(trained(6), trained(6, resume_at=3))


def _stepped(network: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


def test_names_not_order_say_whose_state_it_is():
    network = nn.Linear(2, 2)
    packed = pack_optimizer(_stepped(network), ["weight", "bias"])
    other = nn.Linear(2, 2)
    turned = torch.optim.AdamW([other.bias, other.weight], lr=0.5)
    unpack_optimizer(turned, packed, ["bias", "weight"])
    assert torch.equal(turned.state[other.weight]["exp_avg"], packed["weight.exp_avg"])
    assert turned.param_groups[0]["lr"] == 0.5  # the recipe's, not the checkpoint's


def test_optimizer_state_of_another_network_is_refused():
    one, two = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    packed = pack_optimizer(_stepped(two))
    with pytest.raises(CheckpointError, match=r"4 parameters, expected 2.*two only: 2, 3"):
        unpack_optimizer(torch.optim.AdamW(one.parameters()), packed)
    with pytest.raises(CheckpointError, match="in one of the two only: 0, 1, bias, weight"):
        named = pack_optimizer(_stepped(one), ["weight", "bias"])
        unpack_optimizer(torch.optim.AdamW(one.parameters()), named)
    with pytest.raises(ValueError, match="1 different names for 2 parameters"):
        pack_optimizer(_stepped(one), ["weight", "weight"])


def test_no_state_yet_and_states_without_a_value():
    network = nn.Linear(2, 2)
    assert pack_optimizer(torch.optim.AdamW(network.parameters())) == {}
    unpack_optimizer(_stepped(network), {})
    plain = torch.optim.SGD(network.parameters(), lr=0.1)  # its momentum_buffer is None
    network(torch.ones(1, 2)).sum().backward()
    plain.step()
    assert pack_optimizer(plain) == {}
