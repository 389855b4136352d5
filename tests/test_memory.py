"""What deciding needs: last epoch's parameters, and the outputs of one batch."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neq
from harness.flops.costs import count_costs
from neq import equilibrium
from neq.equilibrium import phi, snapshot


class Peak(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are still alive, at the most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and key(tensor) not in before | self.known:
                self.add(tensor)
        return result

    def add(self, tensor):
        storage = tensor.untyped_storage()
        place, size = key(tensor), storage.nbytes()
        self.known.add(place)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.free, place, size)

    def free(self, place, size):
        self.known.discard(place)
        self.alive -= size


def key(tensor):
    return tensor.untyped_storage()._cdata


def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(True)]
    for _ in range(6):
        layers += [nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


# Of one sample's outputs: seven convolutions, seven norms, and five logits.
BYTES = 4 * (14 * 16 * 24 * 24 + 5)


def peak_of(images, batch):
    model = build()
    neurons, before = neq.NeuronIndex(model), snapshot(model)
    with Peak() as memory:
        phi(model, before, images.split(batch), neurons, "dataset")
    return memory.peak


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [2**12, 2**22])
def test_deciding_keeps_the_outputs_of_one_batch(monkeypatch, chunk):
    monkeypatch.setattr(equilibrium, "CHUNK", chunk)
    images = torch.randn(48, 3, 24, 24)
    outputs = BYTES
    most, some = peak_of(images, 4), peak_of(images[:8], 4)
    assert most == some  # however many images there are
    assert peak_of(images, 8) > 1.7 * most - 10 * 8 * chunk
    largest = 16 * 24 * 24 * 4 * 4  # of a layer, one batch
    # The second run holds a few layers at a time; a comparison, what it does in float64.
    assert most < 4 * outputs + 4 * largest + 8 * 8 * min(chunk, largest // 4)
    assert most < 0.15 * 48 * outputs  # storing everything


def test_the_batch_follows_from_the_model_and_the_memory():
    costs = count_costs(build(), (3, 24, 24))
    assert costs.batch_within(10 * BYTES, 500) == 10
    assert costs.batch_within(10 * BYTES - 1, 500) == 9
    assert costs.batch_within(1, 500) == 1
    assert costs.batch_within(2**60, 500) == 500
