"""Deciding leaves no trace: modes, buffers, random streams, precision, memory."""

import copy
import gc
import random

import numpy
import pytest
import torch
from conftest import random_batches
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import neq
from neq.equilibrium import phi, snapshot


class _Drawing(TensorDataset):
    """Augments from the global streams, as many transforms do."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0] * random.random() + numpy.random.rand()


def test_deciding_leaves_no_trace(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(net, optimizer)
    net.train()
    net.bn.eval()
    data = _Drawing(torch.randn(10, 3, 6, 6))
    loader = DataLoader(data, batch_size=4, shuffle=True)
    assert net.fc2.calls == 0
    torch.manual_seed(5)
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    streams = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    hooks = sum(len(module._forward_hooks) for module in net.modules())
    with torch.autocast("cpu", torch.bfloat16):
        freezer.update(loader)
        freezer.update(loader)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert (numpy.random.get_state()[1] == streams[2]).all()
    assert sum(len(module._forward_hooks) for module in net.modules()) == hooks
    assert all(p.grad is None for p in net.parameters())


def test_deciding_is_in_float32_under_autocast_and_in_half_precision(net):
    before = snapshot(net)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p), alpha=0.01)
    index, batches = neq.NeuronIndex(net), random_batches(1, 9)
    plain = phi(net, before, batches, index, "dataset")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(phi(net, before, batches, index, "dataset"), plain)
    half = copy.deepcopy(net).bfloat16()
    rounded = {name: t.bfloat16() for name, t in before.items()}
    upcast = {name: t.float() for name, t in rounded.items()}
    inputs = [inputs.bfloat16() for inputs, _ in batches]
    expected = phi(half.float(), upcast, inputs, neq.NeuronIndex(half), "dataset")
    half.bfloat16()
    assert torch.equal(phi(half, rounded, inputs, neq.NeuronIndex(half), "dataset"), expected)


@pytest.fixture
def newborn():
    """What other tests have left is not among the garbage collector's objects, and not counted."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_validation_set(newborn):
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3))
    index, before = neq.NeuronIndex(model), snapshot(model)
    alive = []

    def batches(count):
        for _ in range(count):
            alive.append(_tensor_bytes())
            yield torch.randn(4, 1, 24, 24)

    def peak(count):
        alive.clear()
        phi(model, before, batches(count), index, "dataset")
        return max(alive[1:])

    few = peak(3)
    assert few > 0
    assert peak(12) == few


def _tensor_bytes():
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = (
        thing.untyped_storage()
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, nn.Parameter)
    )
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_bad_validation_batches_are_said_plainly(net):
    before, index = snapshot(net), neq.NeuronIndex(net)
    with pytest.raises(ValueError, match="validation set is empty"):
        phi(net, before, [], index, "dataset")
    with pytest.raises(TypeError, match="begin with a tensor, not str"):
        phi(net, before, ["x"], index, "dataset")
    with pytest.raises(ValueError, match="validation set is empty"):
        phi(net, before, [torch.zeros(0, 3, 6, 6)], index, "dataset")
