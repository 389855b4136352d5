"""What a dense backward multiplies and no rule counts has a name, and nothing else has."""

import pytest
import torch
from test_counted_operators import Product, Weight, masks
from test_flops import _Apply
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harness.flops.costs import count_costs
from harness.flops.oracle import backward_flops_by_torch, forward_flops_by_torch
from neq.required import BATCH


def linear(inputs=4, outputs=4):
    return nn.Linear(inputs, outputs)


class Spare(torch.autograd.Function):
    """Of two outputs; the gradient of one that is not used is not made."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return x @ weight.t(), x @ weight

    @staticmethod
    def backward(ctx, one, other):
        x, weight = ctx.saved_tensors
        by_x = [g @ w for g, w in ((one, weight), (other, weight.t())) if g is not None]
        return sum(by_x), one.t() @ x if one is not None else None


class Early(Product):
    @staticmethod
    def backward(ctx, gradient):
        if not gradient.any():
            return None, None
        return Product.backward(ctx, gradient)


def failing(m, x):
    y = m.b(m.a(x))
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient.view(-1, 3))
    return y


def hooked(m, x):
    y = m.a(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient @ torch.eye(4))
    return m.b(y)


def transformed(m, x):
    grid = functional.affine_grid(m.a(x.flatten(1)).view(-1, 2, 3), x.shape)
    return m.b(functional.grid_sample(x, grid, align_corners=False)).mean((2, 3))


def transformed_volumes(m, x):
    grid = functional.affine_grid(m.a(x.flatten(1)).view(-1, 3, 4), x.shape, align_corners=False)
    return m.b(functional.grid_sample(x, grid, align_corners=False)).mean((2, 3, 4))


def through(function):
    return _Apply(
        lambda m, x: m.c(function(m.a(x), m.b.weight)), a=linear(), b=Weight(4, 4), c=linear()
    )


COUNTED = {
    "addr": (
        _Apply(lambda m, x: torch.addr(m.a(x), m.a(x)[:, 0], m.b.bias), a=linear(), b=linear()),
        (4,),
    ),
    "affine_grid": (_Apply(transformed, a=linear(36, 6), b=nn.Conv2d(1, 2, 3)), (1, 6, 6)),
    "affine_grid of volumes": (
        _Apply(transformed_volumes, a=linear(27, 12), b=nn.Conv3d(1, 2, 2)),
        (1, 3, 3, 3),
    ),
    "a function that looks at its gradient": (through(Early.apply), (4,)),
    "a weight of one row": (
        _Apply(lambda m, x: functional.linear(m.a(x), m.b.bias), a=linear(), b=linear()),
        (5, 4),
    ),
    "by whether there are gradients": (
        _Apply(
            lambda m, x: m.b(m.b(m.a(x))) if torch.is_grad_enabled() else m.a(x),
            a=linear(),
            b=linear(),
        ),
        (4,),
    ),
}


@pytest.mark.filterwarnings("ignore:Default grid_sample", "ignore:Default affine_grid")
@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted_is_what_pytorch_executes(name):
    model, shape = COUNTED[name]
    costs = count_costs(model, shape)
    assert costs.uncounted == []
    seen = forward_flops_by_torch(model, shape)
    assert seen == (costs.forward(BATCH), costs.evaluation(BATCH))
    for mask in masks(costs):
        counted = costs.backward(mask & costs.called, BATCH).executed
        assert set(backward_flops_by_torch(model, shape, mask & costs.called)) == {counted}


@pytest.mark.filterwarnings("ignore:Default grid_sample", "ignore:Default affine_grid")
def test_an_affine_grid_multiplies_forward():
    model, shape = COUNTED["affine_grid"]
    assert count_costs(model, shape).forward() == 2 * (36 * 6 + 36 * 2 * 3 + 16 * 2 * 9)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (
            through(lambda x, weight: Spare.apply(x, weight)[0]),
            "64 FLOPs of a dense backward that are counted and not done",
        ),
        (
            _Apply(hooked, a=linear(), b=linear()),
            "64 FLOPs of a dense backward that no rule counts",
        ),
    ],
)
def test_differences_have_a_name(model, name):
    costs = count_costs(model, (4,))
    nobody = torch.zeros(len(costs.neurons), dtype=torch.bool)
    counted = costs.backward(nobody, BATCH).executed
    measured = backward_flops_by_torch(model, (4,), nobody)[0]
    assert abs(measured - counted) == 64
    assert costs.uncounted == [name]


def frozen(model, *layers):
    for layer in layers:
        getattr(model, layer).requires_grad_(False)
    return model


def two(function=lambda m, x: m.b(m.a(x))):
    return _Apply(function, a=linear(), b=linear())


def again(m, x):
    return m.b(checkpoint(lambda y: m.a(y).relu() @ m.b.weight, x, use_reentrant=False))


NOTHING = {
    "a frozen layer": frozen(two(), "a"),
    "nothing trains": frozen(two(), "a", "b"),
    "checkpointed": two(again),
    "numbers beside tensors": two(lambda m, x: {"y": m.b(m.a(x)), "n": x.argmax(1), "s": "s"}),
    "complex": two(lambda m, x: torch.complex(m.a(x), m.b(x))),
    "a backward that fails on a sum": two(failing),
    "without a gradient": two(lambda m, x: m.b(m.a(x)).detach()),
}


@pytest.mark.parametrize("name", NOTHING)
def test_where_nothing_differs_nothing_has_a_name(name):
    model = NOTHING[name]
    assert count_costs(model, (4,)).uncounted == []
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_model_has_no_name():
    assert count_costs(torch.compile(two(), backend="eager"), (4,)).uncounted == []


class Answer:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    ("wrapped", "kind"),
    [(Answer, "Answer"), (lambda y: iter([y]), "list_iterator"), (lambda _: None, "NoneType")],
)
def test_outputs_without_a_tensor_are_refused(wrapped, kind):
    model = two(lambda m, x: wrapped(m.b(m.a(x))))
    with pytest.raises(ValueError, match=rf"returns no tensor that can be found \(type {kind}\)"):
        count_costs(model, (4,))
