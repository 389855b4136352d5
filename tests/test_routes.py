"""Whether each forward of a model does the same work."""

import random

import numpy
import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.run import routes
from harness.run.routes import check_routes


class Odd(nn.Module):
    """Eight inputs, one linear layer, called as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how = nn.Linear(8, 8), how

    def forward(self, x):
        return self.how(self.layer, x)


RANDOM = {
    "torch": lambda layer, x: layer(x) if torch.rand(()) < 0.5 else x,
    "seldom": lambda layer, x: layer(x) if torch.rand(()) < 0.9 else x,
    "twice": lambda layer, x: layer(layer(x) if torch.rand(()) < 0.5 else x),
    "fewer rows": lambda layer, x: layer(x[: int(torch.randint(1, 3, ()))]),
    "a product": lambda layer, x: layer(x) @ x.t() if torch.rand(()) < 0.5 else layer(x),
}


@pytest.mark.parametrize("how", RANDOM)
def test_work_that_differs_by_chance_is_found(how):
    model, state = Odd(RANDOM[how]), torch.get_rng_state()
    with pytest.raises(UserError, match=r"layer was called|matrix products differ"):
        check_routes(model, (8,))
    assert torch.equal(torch.get_rng_state(), state)


def _needs_values(layer, x):
    y = layer(x)
    assert float(y.abs().sum()) > 0
    return y


STEADY = {
    "dropout": lambda layer, x: nn.functional.dropout(layer(x)),
    "drop path": lambda layer, x: x + layer(x) * (torch.rand(len(x), 1) < 0.5),
    "an activation": lambda layer, x: layer(x).relu() if torch.rand(()) < 0.5 else layer(x),
    "no zeros": _needs_values,
    "checkpointed": lambda layer, x: torch.utils.checkpoint.checkpoint(
        layer, x, use_reentrant=True
    ),
}


@pytest.mark.parametrize("how", STEADY)
def test_chance_that_changes_no_work_is_none(how):
    model = Odd(STEADY[how])
    before = [p.clone() for p in model.parameters()]
    check_routes(model, (8,))
    assert all(map(torch.equal, before, model.parameters()))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


SELDOM = {
    "torch": lambda: torch.rand(()) < 0.05,
    "torch, in double": lambda: torch.rand(1, dtype=torch.float64).item() < 0.05,
    "bernoulli": lambda: torch.bernoulli(torch.tensor(0.05)) > 0,
    "numpy": lambda: numpy.random.rand() < 0.05,
    "random": lambda: random.random() < 0.05,
    "the other end": lambda: torch.rand(()) > 0.95,
    "random, the other end": lambda: random.uniform(0, 1) > 0.95,
    "a later draw": lambda: torch.rand(6)[-1] < 0.05,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", SELDOM)
def test_a_layer_that_is_seldom_left_out_is_found(how):
    model = Odd(lambda layer, x: x if SELDOM[how]() else layer(x))
    with pytest.raises(UserError, match=r"layer was called in 1\d\d of 128 forwards"):
        check_routes(model, (8,))


# Loops that halt on what a layer says


def halts(layer, x, steps):
    """Adaptive computation: steps until the halting comes to 3."""
    total = torch.zeros(())
    while total < 3:
        x = layer(x)
        total = total + (x.mean() > 0.5)
        steps.pop()
    return x


def waits(layer, x, steps):
    """No product in the loop."""
    y = layer(x).abs().mean()
    while y < 10:
        y = 2 * y
        steps.pop()
    return layer(x)


def built(how):
    model = Odd(how)
    nn.init.constant_(model.layer.bias, 1.0)
    nn.init.constant_(model.layer.weight, 0.1)
    return model


@pytest.mark.parametrize("how", [halts, waits])
def test_a_loop_that_halts_on_values_comes_to_an_end(how):
    """On zeros it would not: there, all steps that there are would be taken."""
    steps = list(range(20_000))
    check_routes(built(lambda layer, x: how(layer, x, steps)), (8,))
    assert len(steps) > 10_000


def dropped(layer, x):
    """Halts where dropout has left enough."""
    for _ in range(50):
        x = nn.functional.dropout(layer(x), 0.3)
        if x.mean() > 1.2:
            break
    return layer(x)


def endless(layer, x):
    """Steps by a draw: some, or without end."""
    if torch.rand(()) < 0.2:
        while True:
            x = layer(x)
    return layer(layer(x) if float(layer(x).sum()) > 0 else x)


@pytest.mark.parametrize("how", [dropped, endless])
def test_chance_in_such_a_loop_is_found(how):
    with pytest.raises(UserError, match="layer was called"):
        check_routes(built(how), (8,))


@pytest.mark.parametrize(("how", "forwards"), [("an activation", 12), ("no zeros", 4)])
def test_forwards_that_take_long_are_few(monkeypatch, how, forwards):
    monkeypatch.setattr(routes, "SECONDS", 0.0)
    calls = []

    def counted(layer, x):
        calls.append(STEADY[how])
        return STEADY[how](layer, x)

    check_routes(Odd(counted), (8,))
    # One that is computed comes first; on zeros, it ends with the first that fails.
    assert len(calls) == 1 + forwards + 2 * (how == "no zeros")
