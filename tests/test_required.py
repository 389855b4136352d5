"""What the least exact backward costs: by hand, by the harness's count, and by PyTorch's."""

import pytest
import torch
from conftest import Net, random_batches
from oracle import counted_by_torch
from torch import nn

import neq
from harness.flops.costs import count_costs
from suites.resnet import resnet8


class Words(nn.Module):
    """A small transformer whose class token enters after the embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), 1, 8), self.embed(x)], 1)
        return self.head(self.encoder(x)[:, 0])


class Odd(nn.Module):
    """A layer called twice, one not called, one whose output nobody needs, one without gradient."""

    def __init__(self):
        super().__init__()
        self.fixed, self.twice, self.lost, self.unused, self.last = (
            nn.Linear(4, 4) for _ in range(5)
        )
        self.fixed.requires_grad_(False)
        self.last.weight.requires_grad_(False)  # its bias trains

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(self.fixed(x))))
        self.lost(x)
        return self.last(x)


class Aided(nn.Module):
    """With a head that is there in training alone."""

    def __init__(self):
        super().__init__()
        self.body, self.aid, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.body(x))
        return (self.head(x), self.aid(x)) if self.training else self.head(x)


def resnet18(vision):
    return vision.models.resnet18(num_classes=4)


def mobilenet(vision):
    return vision.models.mobilenet_v2(num_classes=4, width_mult=0.35)


MODELS = {
    "resnet8": (lambda _: resnet8(), (1, 8, 8)),
    "resnet18": (resnet18, (3, 32, 32)),
    "mobilenet": (mobilenet, (3, 32, 32)),
    "transformer": (lambda _: Words(), (6, 5)),
    "net": (lambda _: Net(), (3, 6, 6)),
    "odd": (lambda _: Odd(), (4,)),
    "aided": (lambda _: Aided(), (4,)),
}


def masks_of(index, count=8):
    """Random rows and random whole layers, of many densities; the first layers; nobody; all."""
    generator = torch.Generator().manual_seed(0)
    yield torch.zeros(len(index), dtype=torch.bool)
    yield torch.ones(len(index), dtype=torch.bool)
    for number in range(count):
        rows = torch.rand(len(index), generator=generator) < number / count
        layers = torch.zeros(len(index), dtype=torch.bool)
        first = layers.clone()
        for place, part in enumerate(index[name] for name in index):
            layers[part] = bool(torch.rand((), generator=generator) < number / count)
            first[part] = place < number
        yield from (rows, layers, rows | layers, first, rows | first)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_harness_for_any_mask(name, vision):
    make, shape = MODELS[name]
    model = make(vision)
    costs, index = count_costs(model, shape), neq.NeuronIndex(model)
    required = neq.RequiredFlops.count(model, shape, index)
    found = set()
    for mask in masks_of(index):
        assert required(mask) == costs.backward(mask, samples=2).required
        found.add(required(mask))
    nobody = torch.zeros(len(index), dtype=torch.bool)
    assert required.dense == 2 * costs.backward(nobody).dense == max(found)
    assert required.order == costs.execution_order
    assert len(found) > (2 if name == "odd" else 8)
    given = costs.required()
    assert all(given(mask) == required(mask) for mask in masks_of(index, 3))


@pytest.mark.parametrize("name", ["resnet8", "transformer", "net"])
def test_flops_of_whole_layers_are_those_that_pytorch_counts(name, vision):
    make, shape = MODELS[name]
    model = make(vision)
    index = neq.NeuronIndex(model)
    required = neq.RequiredFlops.count(model, shape, index)
    assert required.dense == 2 * counted_by_torch(model, shape)[1]
    mask, modules = torch.zeros(len(index), dtype=torch.bool), dict(model.named_modules())
    for layer in [*list(index)[:3], *list(index)[4::2]]:
        mask[index[layer]] = True
        modules[layer].requires_grad_(False)
    assert required(mask) == 2 * counted_by_torch(model, shape)[1] < required.dense


def test_flops_by_hand():
    """Weight gradients of 4 · 3 and 3 · 2 products, an input gradient of 3 · 2, two samples."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    index = neq.NeuronIndex(model)
    required = neq.RequiredFlops.count(model, (4,), index)
    both = 2 * 2
    for frozen, products in (
        ([], 12 + 6 + 6),
        ([0], 8 + 6 + 6),
        ([0, 1, 2], 6),
        ([3, 4], 12 + 6),
        ([1, 2, 4], 4 + 3 + 6),
        ([0, 1, 2, 3], 3),
        ([0, 1, 2, 3, 4], 0),
    ):
        mask = torch.zeros(5, dtype=torch.bool)
        mask[frozen] = True
        assert required(mask) == both * products
    assert required.dense == both * 24
    assert required.order == ["0", "2"]


def test_counting_leaves_the_model_and_the_random_stream_alone():
    torch.manual_seed(0)
    model = Net()
    model.bn.eval()
    model.drop.train()
    model.norm.weight.requires_grad_(False)
    model(random_batches()[0][0]).sum().backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    learns = [p.requires_grad for p in model.parameters()]
    stream = torch.get_rng_state()
    neq.RequiredFlops.count(model, (3, 6, 6), neq.NeuronIndex(model))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == learns
    for parameter, before in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or torch.equal(parameter.grad, before)


@pytest.mark.parametrize("gradient", ["exact", "cut"])
def test_a_model_with_frozen_rows_and_half_precision_counts_like_a_plain_one(gradient):
    torch.manual_seed(0)
    model = resnet8()
    plain = neq.RequiredFlops.count(model, (1, 8, 8), neq.NeuronIndex(model))
    model.bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone(), gradient=gradient)
    index = freezer.neurons
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(0)) < 0.5
    mask[: index["layer2.0.bn1"].stop] = True
    freezer.freeze(mask)
    counted = neq.RequiredFlops.count(model, (1, 8, 8), index)
    assert counted.dense == plain.dense
    assert all(counted(m) == plain(m) for m in masks_of(index, 3))
    assert torch.equal(freezer.frozen, mask)
