"""Everything that multiplies is counted, forward and backward, or named as not counted."""

import copy
import json

import numpy as np
import pytest
import torch
from test_flops import _Apply
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from harness.flops.costs import count_costs
from harness.flops.oracle import Rules, backward_flops_by_torch, forward_flops_by_torch
from neq.required import BATCH


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        by_x = by_weight = None
        if ctx.needs_input_grad[0]:
            by_x = gradient @ weight
        if ctx.needs_input_grad[1]:
            by_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        return by_x, by_weight


class Careless(Product):
    """Computes both gradients, whoever needs one, and multiplies twice forward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return (x @ weight.t()) @ weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        return (gradient @ weight.t()) @ weight, weight @ (flat.t() @ x.flatten(0, -2))


class Twofold(torch.autograd.Function):
    """Of three operands and two outputs."""

    @staticmethod
    def forward(ctx, x, left, right):
        ctx.save_for_backward(x, left, right)
        return x @ left.t(), x @ right.t()

    @staticmethod
    def backward(ctx, one, other):
        x, left, right = ctx.saved_tensors
        needed = ctx.needs_input_grad
        flat = x.flatten(0, -2)
        return (
            one @ left + other @ right if needed[0] else None,
            one.flatten(0, -2).t() @ flat if needed[1] else None,
            other.flatten(0, -2).t() @ flat if needed[2] else None,
        )


class Inside(Product):
    """Its backward runs nowhere but in autograd's engine."""

    @staticmethod
    def backward(ctx, gradient):
        if torch._C._current_autograd_node() is None:
            raise RuntimeError("not here")
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2)


@torch.library.custom_op("counted::product", mutates_args=())
def own_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.t()


own_product.register_autograd(
    lambda ctx, gradient: Product.backward(ctx, gradient),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("counted::double", mutates_args=())
def own_double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


own_double.register_autograd(lambda ctx, gradient: 2 * gradient)


@torch.library.custom_op("counted::elsewhere", mutates_args=())
def own_kernel(x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.matmul(x.numpy(), x.numpy().T))


class Weight(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))


def linear(inputs=4, outputs=4):
    return nn.Linear(inputs, outputs)


def of_vectors(m, x):
    y = m.a(x)
    return m.b(torch.addmv(m.a.bias, y.t() @ y, y[0])[None]) * torch.dot(y[0], y[1])


def grouped_queries(m, x):
    q = m.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
    k = m.k(x).unflatten(-1, (2, 2)).transpose(1, 2)
    p = 0.1 if m.training else 0.0
    return functional.scaled_dot_product_attention(q, k, k, dropout_p=p, enable_gqa=True)


def padded(m, x):
    keep = torch.zeros(x.shape[:2], dtype=torch.bool)
    return m.b(m.a(x, src_key_padding_mask=keep))


def encoder(**how):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **how)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not how)


def through(function, *, inputs=6, outputs=7):
    return _Apply(
        lambda m, x: m.c(function(m.a(x), m.b.weight)),
        a=linear(4, inputs),
        b=Weight(inputs, outputs),
        c=linear(inputs if function == Careless.apply else outputs, 3),
    )


def twofold(m, x):
    one, other = Twofold.apply(m.a(x), m.left.weight, m.right(x).flatten(0, 1)[:5])
    return m.c(one) + other.sum()


ENCODED = 2 * 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16) + 2 * 2 * 5 * 5 * 8  # of one sample in one layer
FIRST = 2 * 5 * 4  # FLOPs for each output of a layer with four inputs, at five positions
FUNCTION = FIRST * 6 + 2 * 5 * 6 * 7 + 2 * 5 * 7 * 3

# (model, shape of a sample, FLOPs of its forward)
COUNTED = {
    "tensordot": (
        _Apply(
            lambda m, x: torch.tensordot(m.a(x), m.b.weight, ([2], [1])), a=linear(), b=linear()
        ),
        (5, 4),
        FIRST * 4 + FIRST * 4,
    ),
    "matrix and vector": (
        _Apply(lambda m, x: m.a(x) @ m.b(x).mean((0, 1)), a=linear(), b=linear()),
        (5, 4),
        2 * FIRST * 4 + 2 * 5 * 4,
    ),
    # Twice two rows, a matrix [4, 4] of them, times a vector of four, and one row through `b`; of
    # a dot product of four; what is done once per batch is halved.
    "addmv, dot": (
        _Apply(of_vectors, a=linear(), b=linear()),
        (4,),
        2 * 16 + (2 * 2 * 16 + 2 * 16 + 2 * 16 + 2 * 4) // 2,
    ),
    "addbmm": (
        _Apply(
            lambda m, x: torch.addbmm(torch.zeros(5, 5), m.a(x), m.b(x).transpose(1, 2)),
            a=linear(),
            b=linear(),
        ),
        (5, 4),
        2 * FIRST * 4 + 2 * 5 * 4 * 5,
    ),
    "a chain": (
        _Apply(
            lambda m, x: torch.linalg.multi_dot([m.a(x)[0], m.b.weight, m.a.weight]),
            a=linear(),
            b=linear(),
        ),
        (5, 4),
        FIRST * 4 + 2 * (4 * 4 * 4 + 5 * 4 * 4) // 2,  # the two weights first
    ),
    "an outer product multiplies element by element": (
        _Apply(lambda m, x: torch.einsum("bi,bj->bij", m.a(x), m.b(x)), a=linear(), b=linear()),
        (4,),
        2 * 2 * 16,
    ),
    "a transposed convolution as a function": (
        _Apply(
            lambda m, x: functional.conv_transpose2d(m.a(x), m.b.weight, stride=2),
            a=nn.Conv2d(4, 8, 3),
            b=nn.ConvTranspose2d(8, 3, 2),
        ),
        (4, 6, 6),
        2 * 16 * (4 * 9 * 8 + 8 * 3 * 4),
    ),
    "recurrent cells": (
        _Apply(lambda m, x: m.b(m.a(x)), a=nn.GRUCell(4, 6), b=linear(6, 2)),
        (4,),
        2 * (4 * 18 + 6 * 18 + 12),
    ),
    "encoder layers": (
        _Apply(lambda m, x: m.b(m.a(x)), a=encoder(), b=linear(8, 2)),
        (5, 8),
        2 * ENCODED + 2 * 5 * 16,
    ),
    "encoder layers, normalised first": (
        _Apply(
            lambda m, x: m.b(m.a(x)), a=encoder(norm_first=True, activation="gelu"), b=linear(8)
        ),
        (5, 8),
        2 * ENCODED + 2 * 5 * 32,
    ),
    "encoder layers under a mask": (
        _Apply(padded, a=encoder(), b=linear(8, 2)),
        (5, 8),
        2 * ENCODED + 2 * 5 * 16,
    ),
    "attention without weights": (
        _Apply(
            lambda m, x: m.b(m.a(x, x, x, need_weights=False)[0]),
            a=nn.MultiheadAttention(8, 2, batch_first=True),
            b=linear(8, 2),
        ),
        (5, 8),
        2 * 5 * 8 * 32 + 2 * 2 * 25 * 8 + 2 * 5 * 16,
    ),
    "grouped queries": (
        _Apply(grouped_queries, q=linear(8, 8), k=linear(8, 4)),
        (5, 8),
        2 * 5 * 8 * 12 + 2 * 2 * 25 * 8,
    ),
    "spectral norm": (
        _Apply(lambda m, x: m.b(m.a(x)), a=nn.utils.spectral_norm(linear()), b=linear()),
        (4,),
        2 * 2 * 16 + (3 * 2 * 16 + 2 * 4) // 2,  # three products with the weight, and a dot product
    ),
    "a function": (through(Product.apply), (5, 4), FUNCTION),
    "a careless function": (
        through(Careless.apply),
        (5, 4),
        FIRST * 6 + 2 * 2 * 5 * 6 * 7 + 2 * 5 * 6 * 3,
    ),
    "a function of three": (
        _Apply(twofold, a=linear(4, 6), left=Weight(6, 7), right=linear(4, 6), c=linear(7, 3)),
        (5, 4),
        2 * FIRST * 6 + 2 * 5 * 6 * (7 + 5) + 2 * 5 * 7 * 3,
    ),
    "an operator of one's own": (through(own_product), (5, 4), FUNCTION),
    "another, without a product": (
        _Apply(lambda m, x: m.c(own_double(m.a(x))), a=linear(), c=linear()),
        (5, 4),
        2 * FIRST * 4,
    ),
}


def masks(costs):
    """Nobody; part of the rows; layers whole and others in part; everybody."""
    yield torch.zeros(len(costs.neurons), dtype=torch.bool)
    draws = torch.Generator().manual_seed(0)
    yield torch.rand(len(costs.neurons), generator=draws) < 0.5
    for _ in range(3):
        mask = torch.rand(len(costs.neurons), generator=draws) < 0.2
        for _, part in costs.neurons.items():
            if torch.rand(1, generator=draws) < 0.5:
                mask[part] = True
        yield mask
    yield torch.ones(len(costs.neurons), dtype=torch.bool)


@pytest.mark.filterwarnings(
    "ignore:`torch.nn.utils.spectral_norm`", "ignore:The PyTorch API of nes"
)
@pytest.mark.parametrize("name", COUNTED)
def test_what_is_counted_is_what_pytorch_executes(name):
    model, shape, forward = COUNTED[name]
    costs = count_costs(model, shape)
    assert costs.uncounted == []
    assert costs.forward() == forward
    seen = forward_flops_by_torch(copy.deepcopy(model), shape, costs.foreign)
    assert seen == (costs.forward(BATCH), costs.evaluation(BATCH))
    for mask in masks(costs):
        counted = costs.backward(mask & costs.called, BATCH)
        copied = copy.deepcopy(model)
        measured = backward_flops_by_torch(
            copied, shape, mask & costs.called, foreign=costs.foreign
        )
        assert set(measured) == {counted.executed}
        assert counted.required <= counted.executed <= counted.dense


@pytest.mark.filterwarnings("ignore:The PyTorch API of nes")
@pytest.mark.parametrize("name", ["encoder layers", "encoder layers under a mask"])
def test_fused_encoder_layers_count_as_their_parts(name):
    model, shape, forward = COUNTED[name]
    counter = FlopCounterMode(display=False, custom_mapping=Rules().mapping)
    with torch.no_grad(), counter:
        copy.deepcopy(model).eval()(torch.randn(BATCH, *shape))
    seen = counter.get_flop_counts()["Global"]
    assert torch.ops.aten._transformer_encoder_layer_fwd in seen
    assert sum(seen.values()) == BATCH * forward


def trained_inside(m, x):
    return m.c(torch.utils.checkpoint.checkpoint(m.b, m.a(x), use_reentrant=True))


NAMED = {
    "aten::lstm": _Apply(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(4, 6), b=linear(6, 2)),
    "aten::bilinear": _Apply(
        lambda m, x: m.c(m.a(x), m.b(x)), a=linear(), b=linear(), c=nn.Bilinear(4, 4, 3)
    ),
    "aten::cdist": _Apply(lambda m, x: torch.cdist(m.a(x), m.b(x)), a=linear(), b=linear()),
    "aten::conv_tbc": _Apply(
        lambda m, x: torch.conv_tbc(m.a(x), torch.ones(3, 4, 2), torch.zeros(2)), a=linear()
    ),
    "aten::_fft_r2c": _Apply(lambda m, x: torch.fft.rfft(m.a(x)).abs(), a=linear()),
    "aten::linalg_matrix_exp": _Apply(
        lambda m, x: m.a(x), a=nn.utils.parametrizations.orthogonal(linear())
    ),
    "aten::_sparse_addmm of sparse tensors": _Apply(
        lambda m, x: torch.sparse.mm(torch.eye(2).to_sparse(), m.a(x)[:, 0]), a=linear()
    ),
    "Inside (a custom autograd.Function: its backward is its own)": through(Inside.apply),
    "torch.utils.checkpoint with use_reentrant=True": _Apply(
        trained_inside, a=linear(), b=linear(), c=linear()
    ),
    "counted::elsewhere": _Apply(lambda m, x: m.a(x) + own_kernel(x.flatten(1)).sum(), a=linear()),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", NAMED)
def test_what_is_not_counted_has_a_name(name):
    assert count_costs(NAMED[name], (5, 4)).uncounted == [name]


def lost(m, x):
    m.b(x)
    m.seen.copy_(m.c(x).detach())
    return m.a(x)


def test_products_that_nothing_depends_on():
    """fvcore leaves out what is lost, and keeps what is written down somewhere."""
    model = _Apply(lost, a=linear(4, 3), b=linear(4, 5), c=linear(4, 7))
    model.register_buffer("seen", torch.zeros(BATCH, 7))
    costs = count_costs(model, (4,))
    assert (costs.forward(), costs.forwards.train.done) == (2 * 4 * (3 + 7), 2 * BATCH * 4 * 15)
    assert costs.uncounted == []


class OfAModule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, module):
        return module(x)


def test_a_function_that_calls_a_module_is_refused_in_plain_words():
    model = _Apply(lambda m, x: m.a(OfAModule.apply(x, m.b)), a=linear(), b=linear())
    with pytest.raises(RuntimeError, match="calls a module in its forward"):
        count_costs(model, (4,))


def tensordot():
    return copy.deepcopy(COUNTED["tensordot"][0])


def recurrent():
    return copy.deepcopy(NAMED["aten::lstm"])


def flops(neqbench, name, *words):
    what = "--model", f"test_counted_operators:{name}", "--input", "5x4"
    return neqbench("flops", *what, *words)


def test_forwards_are_verified_on_the_command_line(neqbench, monkeypatch):
    done = flops(neqbench, "tensordot", "--verify", "--format", "json")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    assert found["uncounted"] == []
    assert found["forward"] == 2 * FIRST * 4
    both = {"counted": BATCH * 2 * FIRST * 4, "measured": BATCH * 2 * FIRST * 4}
    assert (found["verify"]["forward"], found["verify"]["evaluation"]) == (both, both)
    wrong = (both["measured"], both["measured"] + 1)
    monkeypatch.setattr("harness.commands.flops.forward_flops_by_torch", lambda *_: wrong)
    done = flops(neqbench, "tensordot", "--verify")
    assert done.returncode == 1
    assert "2, forward in eval mode: counted 640, measured 641: does NOT agree" in done.stdout


def test_what_is_not_counted_is_said_on_the_command_line(neqbench):
    assert "not counted: aten::lstm" in flops(neqbench, "recurrent").stdout
    found = json.loads(flops(neqbench, "recurrent", "--format", "json").stdout)
    assert found["uncounted"] == ["aten::lstm"]
