"""Activation checkpointing: what a backward recomputes is counted, for every mask."""

import copy
import json
from functools import partial

import pytest
import torch
from test_counted_operators import Product, Weight
from test_flops import _Apply
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import neq
from harness.flops.costs import count_costs
from harness.flops.oracle import backward_flops_by_torch
from neq.required import BATCH

again = partial(checkpoint, use_reentrant=False)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs)


def ends_in_a_product():
    return nn.Sequential(linear(6, 7), nn.ReLU(), linear(7, 8))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), linear(8, 24), linear(8, 8)
        self.up, self.down = linear(8, 16), linear(16, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (2, -1)).transpose(1, 2).chunk(3, -1)
        x = x + self.out(
            functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        )
        return x + self.down(functional.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, regions=True):
        super().__init__()
        self.regions = regions
        self.embed, self.head = linear(4, 8), linear(8, 3)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = again(partial(block.__call__), x) if self.training and self.regions else block(x)
        return self.head(x.mean(1))


class Function(Weight):
    def forward(self, x):
        return Product.apply(x, self.weight)


def to_the_end(m, x):
    with set_checkpoint_early_stop(False):
        return m.c(again(m.b, m.a(x)))


def products_kept(_context, operator, *_args, **_kwargs):
    kept = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def selective(m, x):
    contexts = partial(create_selective_checkpoint_contexts, products_kept)
    return m.c(again(m.b, m.a(x), context_fn=contexts))


def attending(m, x):
    def inside(y):
        keys = m.b(y)
        return torch.softmax(m.a(y) @ keys.transpose(1, 2), -1) @ keys

    return m.c(again(inside, x))


REGIONS = {
    "the last product is not repeated": (
        _Apply(
            lambda m, x: m.c(again(m.b, m.a(x))),
            a=linear(4, 6),
            b=ends_in_a_product(),
            c=linear(8, 3),
        ),
        (4,),
        2 * 6 * 7,
    ),
    "unless something after it is kept": (
        _Apply(lambda m, x: again(m.a, x), a=nn.Sequential(linear(4, 7), nn.ReLU())),
        (4,),
        2 * 4 * 7,
    ),
    "or PyTorch is told not to stop": (
        _Apply(to_the_end, a=linear(4, 6), b=ends_in_a_product(), c=linear(8, 3)),
        (4,),
        2 * (6 * 7 + 7 * 8),
    ),
    "in turn": (
        _Apply(
            lambda m, x: m.c(checkpoint_sequential(m.b, 2, x, use_reentrant=False)),
            b=nn.Sequential(linear(4, 7), nn.ReLU(), linear(7, 8), nn.GELU(), linear(8, 6)),
            c=linear(6, 3),
        ),
        (4,),
        2 * 4 * 7,  # the last part is no region
    ),
    "twice the same": (
        _Apply(
            lambda m, x: m.c(again(m.b, again(m.b, x))),
            b=nn.Sequential(linear(4, 4), nn.Tanh()),
            c=linear(4, 3),
        ),
        (4,),
        2 * 2 * 4 * 4,
    ),
    "convolutions": (
        _Apply(
            lambda m, x: m.c(again(m.b, m.a(x)).mean((2, 3))),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Sequential(
                nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Conv2d(5, 6, 1)
            ),
            c=linear(6, 3),
        ),
        (3, 9, 9),
        2 * 9 * 4 * 5 * 9,
    ),
    "one dimension": (
        _Apply(
            lambda m, x: m.c(again(m.b, m.a(x)).mean(2)),
            a=nn.Conv1d(3, 4, 3),
            b=nn.Sequential(nn.Conv1d(4, 6, 3, padding="same", dilation=2), nn.Conv1d(6, 5, 2)),
            c=linear(5, 3),
        ),
        (3, 12),
        2 * 10 * 4 * 6 * 3,
    ),
    "one in another": (
        _Apply(
            lambda m, x: m.c(again(lambda y: torch.relu(again(m.b, m.a(y))), x)),
            a=linear(4, 6),
            b=ends_in_a_product(),
            c=linear(8, 3),
        ),
        (4,),
        2 * (4 * 6 + 6 * 7 + 7 * 8) + 2 * 6 * 7,
    ),
    "attention": (
        _Apply(attending, a=linear(4, 6), b=linear(4, 6), c=linear(6, 3)),
        (5, 4),
        2 * (2 * 5 * 4 * 6 + 5 * 5 * 6),
    ),
    # A block as far as the input of its last product.
    "a transformer": (
        Transformer(),
        (5, 4),
        2 * (2 * 5 * (8 * 24 + 8 * 8 + 8 * 16) + 2 * 2 * 5 * 5 * 8),
    ),
    "with products that are kept": (
        _Apply(selective, a=linear(4, 8), b=Block(), c=linear(8, 3)),
        (5, 4),
        2 * 2 * 5 * 5 * 8,
    ),
    "with functions": (
        _Apply(
            lambda m, x: m.c(again(m.b, m.a(x))),
            a=linear(4, 6),
            b=nn.Sequential(Function(6, 7), nn.ReLU(), linear(7, 8)),
            c=linear(8, 3),
        ),
        (4,),
        2 * 6 * 7,
    ),
}


def masks(costs):
    """Nobody; one row in each layer; a part; layers whole and others in part; everybody."""
    nobody = torch.zeros(len(costs.neurons), dtype=torch.bool)
    yield nobody
    first = nobody.clone()
    for _, part in costs.neurons.items():
        first[part.start] = True
    yield first
    draws = torch.Generator().manual_seed(0)
    for share in (0.0, 0.4, 0.8):
        mask = torch.rand(len(costs.neurons), generator=draws) < share
        for _, part in costs.neurons.items():
            if torch.rand(1, generator=draws) < 0.5:
                mask[part] = True
        yield mask & costs.called
    yield costs.called


def gathering(costs):
    """Timings by which every layer computes the rows that train, and no others."""
    layers = costs.neurons.layers
    times = {x.name: {"dense": {x.size: 9.0}, "gather": {x.size: 1.0}} for x in layers}
    return neq.Timings(times)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("gradient", ["exact", "cut", "exact, some rows"])
@pytest.mark.parametrize("name", REGIONS)
def test_what_is_recomputed_is_what_pytorch_executes(name, gradient):
    model, shape, recomputed = REGIONS[name]
    costs = count_costs(model, shape)
    dense = costs.backward(torch.zeros(len(costs.neurons), dtype=torch.bool))
    assert (dense.recomputed, dense.dense) == (recomputed, dense.executed)
    timings = gathering(costs) if "some" in gradient else None
    gradient = gradient.partition(",")[0]
    for mask in masks(costs):
        plan = neq.plan(costs.neurons, mask, gradient, timings)
        counted = costs.backward(mask, BATCH, plan)
        seen = backward_flops_by_torch(copy.deepcopy(model), shape, mask, gradient, timings)
        assert set(seen) == {counted.executed}
        assert counted.required <= counted.executed <= counted.dense == BATCH * dense.dense
        assert counted.recomputed <= BATCH * recomputed


def test_beside_the_model_without_regions():
    """What trains is the same; a region with nothing to do is not recomputed."""
    model, shape, recomputed = REGIONS["a transformer"]
    costs, others = count_costs(model, shape), count_costs(Transformer(regions=False), shape)
    assert costs.forward() == others.forward()
    early = costs.neurons.select(["embed", "blocks.0"])
    for mask, share in ((torch.zeros_like(early), 1.0), (early, 0.5), (costs.called, 0.0)):
        found, beside = costs.backward(mask), others.backward(mask)
        assert beside.recomputed == 0
        assert found.recomputed == share * recomputed
        assert found.executed == beside.executed + found.recomputed
        assert (found.required, found.paper) == (beside.required, beside.paper)


def ending(gradients):
    """A model whose region ends in a product, and its gradients by a batch."""
    torch.manual_seed(0)
    model, shape, _ = copy.deepcopy(REGIONS["convolutions"])
    inputs = torch.randn(4, *shape)
    index = neq.NeuronIndex(model)
    mask = torch.rand(len(index), generator=torch.Generator().manual_seed(0)) < 0.5
    freezer = neq.NeuronFreezer(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        neq.Everyone(),
        timings=neq.Timings(
            {x.name: {"dense": {x.size: 9.0}, "gather": {x.size: 1.0}} for x in index.layers}
        ),
    )
    freezer.freeze(mask)
    if not gradients:
        model.run = lambda m, x: m.c(m.b(m.a(x)).mean((2, 3)))
    output = model(inputs)
    output.square().sum().backward()
    return output, [p.grad for p in model.parameters()]


def test_outputs_and_gradients_are_those_without_regions():
    found, expected = ending(True), ending(False)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def transformer():
    return copy.deepcopy(REGIONS["a transformer"][0])


def test_on_the_command_line(neqbench):
    words = ["flops", "--model", "test_recomputed:transformer", "--input", "5x4", "--frozen", "0.6"]
    done = neqbench(*words, "--verify", "--format", "json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["backward"]["recomputed"] == REGIONS["a transformer"][2]
    assert found["verify"]["measured"] == BATCH * found["backward"]["executed"]
    assert found["uncounted"] == []
    assert "backward, recomputed" in neqbench(*words).stdout


def test_models_that_come_compiled_recompute_what_the_compiler_likes():
    model = torch.compile(transformer(), backend="eager")
    (name,) = count_costs(model, (5, 4)).uncounted
    assert "compiled" in name
