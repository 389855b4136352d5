"""What a step does beside the backward: gradients and saved rows whose memory is used again."""

import json

import pytest
import torch
from torch import nn

import neq
from neq.kernels import rows_for
from neq.selective import Work, assign, geometry


@pytest.fixture
def layer():
    """A convolution whose even rows are frozen, and a function that runs its backward."""
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 8, 3)
    frozen = torch.arange(8) % 2 == 0
    shape = geometry(layer)
    assign(layer, Work("gather", rows_for("gather", frozen, shape), False, shape))
    return layer


def backward(layer):
    layer.zero_grad()
    layer(torch.randn(2, 3, 6, 6)).square().sum().backward()
    return layer.weight.grad


def test_the_memory_of_a_gradient_that_nobody_holds_is_used_again(layer):
    places = [backward(layer).data_ptr() for _ in range(4)]
    assert len(set(places)) == 1


def test_a_gradient_that_somebody_holds_stays_as_it_is(layer):
    for held in (backward(layer), backward(layer)[1], backward(layer).detach().numpy()):
        before = torch.as_tensor(held).clone()
        backward(layer)
        assert torch.equal(torch.as_tensor(held), before)


def test_frozen_rows_that_somebody_wrote_to_are_zero_in_the_next_gradient(layer):
    backward(layer).add_(1)
    assert (backward(layer)[::2] == 0).all()


def test_gradients_accumulate_in_memory_of_their_own(layer):
    x = torch.randn(2, 3, 6, 6)
    layer(x).sum().backward()
    once = layer.weight.grad.clone()
    for times in (2, 3, 4):
        layer(x).sum().backward()
        torch.testing.assert_close(layer.weight.grad, times * once)


@pytest.mark.parametrize("change", [lambda g: g + 1, lambda g: g.add_(1)])
def test_a_hook_that_changes_a_gradient_moves_nothing_frozen(change):
    layer = nn.Conv2d(3, 8, 3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    freezer = neq.NeuronFreezer(layer, optimizer, neq.Everyone())
    frozen = torch.arange(8) % 2 == 0
    freezer.freeze(frozen)
    layer.weight.register_hook(change)
    before = layer.weight[frozen].clone()
    for _ in range(3):
        assert (backward(layer)[frozen] == 0).all()
        optimizer.step()
    assert torch.equal(layer.weight[frozen], before)


def test_what_a_user_writes_to_frozen_rows_between_steps_stays():
    layer = nn.Linear(3, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    freezer = neq.NeuronFreezer(layer, optimizer, neq.Everyone())
    freezer.freeze(torch.arange(8) % 2 == 0)
    for value in (1.0, 2.0, 3.0):
        layer.weight.data[::2] = value
        layer(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        assert (layer.weight[::2] == value).all()


TABLE = {
    "fc": {
        "dense": {8: 1.0},
        "gather": {4: 0.9},
        "swap": {4: 0.6},
        "cut": {4: 0.95},
        "cut/dense": {8: 0.7},
    }
}


def test_a_cut_through_rows_has_to_be_faster_than_a_dense_one():
    timings = neq.Timings.from_json(json.loads(json.dumps(neq.Timings(TABLE).to_json())))
    assert timings.kernel("fc", 4, 8) == "swap"  # "cut/dense" is no kernel
    assert timings.cut_pays("fc", 4, 8, "swap")  # 0.6 + 0.95 - 0.9
    assert not timings.cut_pays("fc", 4, 8)
    old = {name: times for name, times in TABLE["fc"].items() if name != "cut/dense"}
    assert neq.Timings({"fc": old}).cut_pays("fc", 4, 8)
