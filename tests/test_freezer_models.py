"""Models that are copied, wrapped, refused, or let go of."""

import copy
import pickle

import pytest
import torch
from conftest import random_batches, train_epoch
from test_freezer import OPTIMIZERS
from torch import nn

import neq


def test_copies_and_pickles_of_the_model_are_plain(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    freezer.freeze(torch.ones_like(freezer.frozen))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        nn.functional.cross_entropy(other(torch.randn(2, 3, 6, 6)), torch.tensor([0, 1])).backward()
        assert all(p.grad is not None for p in other.parameters())


def test_remove_restores_the_plain_model(net):
    plain = copy.deepcopy(net)
    keys = list(net.state_dict())
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer)
    assert list(net.state_dict()) == keys
    freezer.freeze(torch.ones_like(freezer.frozen))
    freezer.remove()
    torch.manual_seed(0)
    train_epoch(net, optimizer, random_batches())
    torch.manual_seed(0)
    train_epoch(plain, OPTIMIZERS["sgd"](plain.parameters()), random_batches())
    for name, value in net.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])


def test_wrapped_models_are_unwrapped(net):
    for wrapped in (nn.DataParallel(net), torch.compile(net), torch.compile(nn.DataParallel(net))):
        freezer = neq.NeuronFreezer(wrapped, OPTIMIZERS["sgd"](net.parameters()), exclude=["fc2"])
        assert "conv" in freezer.neurons


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"exclude": ["head"]}, "no layer is called 'head'"),
        ({"exclude": "fc2"}, "must be a list"),
        ({"similarity": "image"}, "similarity must be"),
    ],
)
def test_bad_arguments(net, arguments, message):
    with pytest.raises(ValueError, match=message):
        neq.NeuronFreezer(net, OPTIMIZERS["sgd"](net.parameters()), **arguments)


def test_what_can_not_be_frozen_is_refused(net):
    with pytest.raises(ValueError, match="LBFGS"):
        neq.NeuronFreezer(net, torch.optim.LBFGS(net.parameters()))
    bare = nn.PReLU()
    with pytest.raises(ValueError, match="no convolution"):
        neq.NeuronFreezer(bare, OPTIMIZERS["sgd"](bare.parameters()))
    freezer = neq.NeuronFreezer(net, OPTIMIZERS["sgd"](net.parameters()))
    with pytest.raises(ValueError, match=r"mask must be bool \[48\]"):
        freezer.freeze(torch.zeros(3))


def test_fused_sgd_starts_late_for_what_was_frozen_at_first(net):
    """torch's own fused SGD fails on a first gradient that comes later than others'."""
    plain = copy.deepcopy(net)
    for model, fused in ((net, True), (plain, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=fused)
        freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
        torch.manual_seed(0)
        freezer.freeze(freezer.neurons.select(["conv", "bn"]))
        train_epoch(model, optimizer, random_batches())
        freezer.freeze(torch.zeros_like(freezer.frozen))
        train_epoch(model, optimizer, random_batches())
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_first_step_that_overflows_leaves_no_unwritten_momentum(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, fused=True)
    neq.NeuronFreezer(net, optimizer, neq.Everyone())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    loss = net(torch.randn(2, 3, 6, 6)).sum() * torch.inf
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in net.parameters())
