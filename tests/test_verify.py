"""Counted = executed: the accounting against PyTorch's counter in a real selective backward."""

import copy

import pytest
import torch
from test_flops import MODELS, _Apply
from torch import nn
from trials import slow

import neq
from harness.flops.costs import count_costs
from harness.flops.oracle import Rules, backward_flops_by_torch
from neq.required import BATCH
from suites.resnet import resnet8

SAME = nn.Sequential(
    nn.Conv1d(4, 8, 3, padding="same"),
    nn.ReLU(True),
    nn.Conv1d(8, 8, 4, padding="same", padding_mode="circular"),
    nn.ReLU(True),
    nn.Conv1d(8, 3, 1),
)
SMALL = {name: case for name, case in MODELS.items() if name != "packed attention"}
SMALL |= {"padding": (SAME, (4, 20)), "resnet8": (resnet8(), (1, 16, 16))}


def draw(costs, share, seed):
    mask = torch.rand(len(costs.neurons), generator=torch.Generator().manual_seed(seed)) < share
    return mask & costs.called


def check(model, shape, share, seed, gradient):
    costs = count_costs(model, shape)
    mask = draw(costs, share, seed)
    plan = neq.plan(costs.neurons, mask, gradient)
    counted = costs.backward(mask, BATCH, plan)
    seen = backward_flops_by_torch(copy.deepcopy(model), shape, mask, gradient)
    assert seen == [counted.executed] * len(seen)
    assert counted.required <= counted.executed <= counted.dense
    by_layer = [backward for _, backward in costs.layers(mask, BATCH, plan).values()]
    assert sum(backward.executed for backward in by_layer) <= counted.executed
    return counted, len(seen)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize("name", SMALL)
def test_small_models(name, gradient):
    model, shape = SMALL[name]
    for seed, share in enumerate((0.0, 0.3, 0.6, 0.9, 0.97, 1.0)):
        check(model, shape, share, seed, gradient)


@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize(
    "name, unmapped",
    [
        ("resnet18", True),
        ("mobilenet_v3_small", False),
        ("shufflenet_v2_x0_5", False),
        ("regnet_x_400mf", False),
        slow("vit_b_32", False),
        slow("swin_t", True),
    ],
)
def test_torchvision_s_models(vision, name, unmapped, gradient):
    shape = (3, 224, 224) if name == "vit_b_32" else (3, 64, 64)
    counted, ways = check(getattr(vision.models, name)(), shape, 0.7, 0, gradient)
    assert ways == 1 + unmapped
    assert counted.executed < counted.dense


def fused(m, x):
    q, k, v = (layer(x).unsqueeze(1) for layer in (m.q, m.k, m.v))  # fused only with heads
    return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("frozen", [["q"], ["k", "v"], ["q", "k"], ["q", "k", "v"]])
def test_fused_attention_makes_all_its_products_or_none(frozen):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return fused(self, x)

    model = Attention()
    costs = count_costs(model, (5, 8))
    mask = costs.neurons.select(frozen)
    counted = costs.backward(mask, BATCH)
    assert set(backward_flops_by_torch(model, (5, 8), mask)) == {counted.executed}
    assert (counted.executed > counted.required) == (len(frozen) < 3)


@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize("kernel", ["gather", "gather/8", "swap", "swap/3", "swap/last"])
def test_every_kernel_is_counted_as_planned(kernel, gradient):
    model, shape = resnet8(), (1, 16, 16)
    costs = count_costs(model, shape)
    timings = neq.Timings(
        {
            layer.name: {"dense": {layer.size: 1.0}, kernel: {layer.size - 1: 0.1}}
            for layer in costs.neurons.layers
            if layer.name.endswith("conv2")  # stride 1
        }
    )
    mask = draw(costs, 0.6, 0)
    plan = neq.plan(costs.neurons, mask, gradient, timings)
    assert kernel in {part.kernel for part in plan.values()}
    counted = costs.backward(mask, BATCH, plan)
    assert set(backward_flops_by_torch(model, shape, mask, gradient, timings)) == {counted.executed}


def use_twice(m, x):
    return m.head(nn.functional.linear(m.embed(x), m.embed.weight))


def test_a_weight_that_a_function_uses_too_is_never_frozen():
    model = _Apply(use_twice, embed=nn.Linear(4, 4), head=nn.Linear(4, 3))
    costs = count_costs(model, (5, 4))
    assert costs.dense_only == {"embed": "a function uses its weight, too"}
    assert costs.called.tolist() == [False] * 4 + [True] * 3
    check(model, (5, 4), 1.0, 0, "exact")


def test_the_model_is_left_as_it_was(net):
    kinds = [type(module) for module in net.modules()]
    costs = count_costs(net, (3, 6, 6))
    backward_flops_by_torch(net, (3, 6, 6), draw(costs, 0.5, 0))
    assert [type(module) for module in net.modules()] == kinds
    assert not net._forward_hooks
    assert all(p.grad is None for p in net.parameters())


def test_the_rule_for_grouped_convolutions():
    rules = Rules()
    x = torch.randn(2, 6, 5, 5, requires_grad=True)
    layer = nn.Conv2d(6, 12, 3, groups=3)
    from torch.utils.flop_counter import FlopCounterMode

    output = layer(x).sum()
    with FlopCounterMode(display=False, custom_mapping=rules.mapping) as counter:
        output.backward()
    each = 2 * 2 * (3 * 3) * (12 * 2 * 3 * 3)  # 2 · samples · positions · weights
    assert counter.get_total_flops() == 2 * each
    assert rules.needed
