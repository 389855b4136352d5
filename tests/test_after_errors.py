"""Freezers go on rightly after what was refused, failed, or has changed the model."""

import pytest
import torch
from torch import nn

import neq


def net(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 4))


def step(model, optimizer, seed=0):
    optimizer.zero_grad()
    inputs = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    torch.autograd.backward(model(inputs).square().mean())
    optimizer.step()


def batches():
    return [torch.randn(8, 6, generator=torch.Generator().manual_seed(9))]


def test_an_update_that_is_refused_reads_the_same_epoch_again():
    model = net()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.AtEquilibrium(eps=2.0))
    freezer.update(batches())
    step(model, optimizer)
    freezer.update(batches())  # phi, and no velocity yet
    step(model, optimizer, seed=1)
    readings = freezer.reading
    with pytest.raises(ValueError, match="layer 0 would freeze"):
        freezer.update(batches())
    assert freezer.reading is readings
    assert freezer.epoch == 2
    optimizer.add_param_group({"params": model[0].parameters()})
    freezer.update(batches())
    assert freezer.frozen.all()
    assert freezer.reading.phi[8:].max() < 1  # of the head, against its weights before that step


def test_a_smaller_head_is_no_index_error_for_whoever_steps_next():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    freezer.freeze(torch.ones(12, dtype=torch.bool))
    model[2].weight.data, model[2].bias.data = torch.randn(2, 8), torch.randn(2)
    with freezer.plain():
        assert model(batches()[0]).shape == (8, 2)
    step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"layer 2 had 4 neurons and has 2: make a new freezer$"):
        freezer.update(batches())


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_a_layer_without_inputs_freezes():
    model = nn.Sequential(nn.Linear(6, 0), nn.Linear(0, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    freezer.freeze(torch.ones(len(freezer.neurons), dtype=torch.bool))
    freezer.update(batches())


def test_an_average_of_a_model_of_which_the_head_alone_is_stepped_is_no_move():
    model = net()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    mask = torch.zeros(12, dtype=torch.bool)
    mask[8:10] = True
    freezer.freeze(mask)
    step(model, optimizer)
    kept = [p.detach().clone() for p in model.parameters()]
    for parameter in model[2].parameters():
        parameter.data.mul_(0.9)
    freezer.update(batches())
    for parameter, value in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(value)
    step(model, optimizer)
    freezer.update(batches())


def test_steps_that_fail_leave_no_copies_behind():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    freezer.freeze(torch.arange(12) < 4)

    def fails():
        raise MemoryError

    for _ in range(20):
        with pytest.raises(MemoryError):
            optimizer.step(fails)
    (kept,) = freezer._kept.values()
    assert len(kept) < 5
    before = model[0].weight[:4].clone()
    step(model, optimizer)
    assert torch.equal(model[0].weight[:4], before)


def test_what_is_copied_after_each_step_is_bounded():
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    freezer.freeze(torch.arange(1024) % 2 == 0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.step()
    assert sum(s.values.numel() for s in freezer._record._sample) < 10_000


def test_a_budget_counts_again_where_a_fixed_layer_is_freed():
    model = net(width=32)
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Budget(neq.AtEquilibrium(), 0.5))
    freezer.update(batches())
    fixed = freezer.neurons.flops.dense
    model[0].requires_grad_(True)
    step(model, optimizer)
    freezer.update(batches())
    whole = neq.RequiredFlops.count(model, (6,), freezer.neurons).dense
    assert freezer.neurons.flops.dense == whole > fixed
