"""Backwards that multiply where the forward does not: counted, or named."""

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional

from harness.flops.costs import count_costs
from harness.flops.oracle import backward_flops_by_torch


class Transformer(nn.Module):
    """A spatial one: the gradient of its grid is a product."""

    def __init__(self):
        super().__init__()
        self.where, self.head = nn.Linear(36, 6), nn.Linear(36, 4)

    def forward(self, x):
        theta = self.where(x.flatten(1)).view(-1, 2, 3)
        grid = functional.affine_grid(theta, [len(x), 1, 6, 6], align_corners=False)
        return self.head(functional.grid_sample(x, grid, align_corners=False).flatten(1))


class Outer(nn.Module):
    """`addr` multiplies a matrix with a vector in its backward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.left, self.right = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return torch.addr(self.layer(x[0]), self.left, self.right)


class Hooked(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        y = self.body(x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient @ torch.eye(6))
        return self.head(y)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return Answer(self.head(x))


class Answer:
    def __init__(self, logits):
        self.logits = logits


class Early(Function):
    """Its backward multiplies nothing for a gradient of zeros."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        if not gradient.any():
            return torch.zeros_like(x), torch.zeros_like(weight)
        return gradient @ weight, gradient.t() @ x


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.weight = nn.Linear(6, 6), nn.Parameter(torch.randn(4, 6))

    def forward(self, x):
        return Early.apply(self.body(x), self.weight)


CASES = {"grid": (Transformer, (1, 6, 6)), "outer": (Outer, (6,)), "early": (Own, (6,))}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frozen", [False, True])
def test_products_that_only_a_backward_does_are_counted(case, frozen):
    build, shape = CASES[case]
    model = build()
    costs = count_costs(model, shape)
    mask = torch.full((len(costs.neurons),), frozen) & costs.called
    mask[: len(mask) // 2] = False
    measured = backward_flops_by_torch(model, shape, mask)[0]
    assert costs.backward(mask, 2).executed == measured
    assert costs.uncounted == []


def test_what_no_rule_counts_is_named_with_its_flops():
    costs = count_costs(Hooked(), (6,))
    nobody = torch.zeros(len(costs.neurons), dtype=torch.bool)
    more = backward_flops_by_torch(Hooked(), (6,), nobody)[0] - costs.backward(nobody, 2).executed
    assert more == 2 * 2 * 6 * 6
    assert costs.uncounted == [f"{more} FLOPs of a dense backward that no rule counts"]


def test_a_model_whose_output_hides_its_tensors_is_refused():
    with pytest.raises(ValueError, match=r"no tensor that can be found \(type Answer\)"):
        count_costs(Plain(), (6,))


def test_a_weight_of_one_dimension_is_one_row():
    class Vector(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Linear(6, 5), nn.Parameter(torch.randn(5))

        def forward(self, x):
            return functional.linear(self.body(x), self.weight)

    costs = count_costs(Vector(), (6,))
    assert costs.forward() == 2 * (6 * 5 + 5)
    assert costs.uncounted == []
