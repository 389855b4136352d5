"""What a step does beside the backward: gradients and saved rows whose memory is used again."""

import pytest
import torch
from torch import nn

import neq
from neq.kernels import rows_for
from neq.selective import assign, geometry
from neq.work import Work


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


@pytest.mark.parametrize(
    "write", [lambda g: g.add_(1), lambda g: g.data.add_(1), lambda g: g.numpy().fill(1)]
)
def test_frozen_rows_that_somebody_wrote_to_are_zero_in_the_next_gradient(layer, write):
    write(backward(layer))
    assert (backward(layer)[::2] == 0).all()


class OldStyle(torch.optim.SGD):
    """Adds its weight decay through `.data`, as many optimizers of old do."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.data.add_(parameter.data, alpha=0.1)
        return super().step(closure)


def test_an_optimizer_that_writes_through_data_finds_zeros_in_every_step():
    model = nn.Conv2d(3, 8, 3)
    optimizer = OldStyle(model.parameters(), lr=0.1, momentum=0.9)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    frozen = torch.arange(8) % 2 == 0
    freezer.freeze(frozen)
    before = model.weight[frozen].clone()
    for _ in range(4):
        assert (backward(model)[frozen] == 0).all()
        optimizer.step()
    assert torch.equal(model.weight[frozen], before)


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
