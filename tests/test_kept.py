"""Bytes that a step keeps, by hand and against PyTorch's own offloading."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

import neq
from harness.train.kept import kept_for_backward, state_bytes


def kept(model, inputs):
    with kept_for_backward(model) as found:
        _held = model(inputs).sum()
    return found.total


def test_what_linear_layers_keep():
    """The input of the first [5, 4], the output of its activation [5, 8]: float32."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    inputs = torch.randn(5, 4)
    assert kept(model, inputs) == 4 * (5 * 4 + 5 * 8)
    with torch.no_grad():
        assert kept(model, inputs) == 0


def test_what_is_saved_twice_counts_once():
    """Both factors are the same tensor [10], and a view of it keeps no more."""

    class Square(nn.Module):
        def forward(self, x):
            y = x.exp()
            return y * y + y[:5].exp().sum()

    inputs = torch.randn(10, requires_grad=True)
    assert kept(Square(), inputs) == 4 * 10 + 4 * 5


def test_frozen_layers_keep_nothing_where_nothing_flows_back():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    freezer = neq.NeuronFreezer(model, torch.optim.SGD(model.parameters(), 0.1), neq.Everyone())
    mask = torch.zeros(11, dtype=torch.bool)
    mask[:8] = True
    freezer.freeze(mask)
    assert kept(model, torch.randn(5, 4)) == 4 * (5 * 8)  # the input of the second layer


@pytest.mark.parametrize("gradient", ["exact", "cut"])
def test_hooks_of_the_caller_see_what_selective_layers_keep(gradient, net):
    """Offloading, PyTorch's own: gradients are the same, and none is passed over."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 3, 8, 8)
    freezer = neq.NeuronFreezer(
        net, torch.optim.SGD(net.parameters(), 0.1), neq.Everyone(), gradient=gradient
    )
    mask = torch.zeros(len(freezer.neurons), dtype=torch.bool)
    mask[::2] = True
    freezer.freeze(mask)
    found = []
    for offload in (False, True):
        net.zero_grad()
        torch.manual_seed(1)  # of the dropout
        if offload:
            with save_on_cpu():
                loss = net(inputs).square().sum()
        else:
            loss = net(inputs).square().sum()
        loss.backward()
        found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(map(torch.equal, *found))
    # A normalisation layer's input, at least, is counted in both ways.
    assert kept(net, inputs) >= 4 * 4 * 8 * 8 * 8


def test_the_optimizers_state():
    model = nn.Linear(4, 3)
    plain, adam = torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model.parameters())
    model(torch.randn(2, 4)).sum().backward()
    for optimizer in (plain, adam):
        optimizer.step()
    assert state_bytes(plain) == 0
    assert state_bytes(adam) == 2 * 4 * (12 + 3) + 2 * 4  # two moments, and a step count of each
