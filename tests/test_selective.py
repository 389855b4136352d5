"""Selective layers against plain PyTorch: equal gradients for rows that train, no others."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq.kernels import KERNELS, rows_for
from neq.selective import assign, geometry
from neq.work import Work

# torch's own, once a process, where one side has to be padded more.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# (layer, input): every kind, with and without groups, padding that aten's kernels can't do.
LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 5)),
    "conv stride dilation": (
        lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), dilation=2, bias=False),
        (2, 3, 9, 8),
    ),
    "conv grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3, padding=1), (2, 6, 5, 5)),
    "conv depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "conv depthwise x2": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv 1x1": (lambda: nn.Conv2d(5, 6, 1, stride=2), (3, 5, 5, 4)),
    "conv same": (lambda: nn.Conv2d(3, 6, 4, padding="same"), (2, 3, 6, 6)),
    "conv valid": (lambda: nn.Conv2d(3, 6, 3, padding="valid"), (2, 3, 6, 6)),
    "conv circular": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "conv unbatched": (lambda: nn.Conv2d(3, 6, 3), (3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), (3, 4, 9)),
    "conv1d reflect": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9)),
    "conv1d unbatched": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, groups=2), (2, 2, 4, 4, 4)),
    "linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "linear tokens": (lambda: nn.Linear(5, 6, bias=False), (2, 3, 5)),
    "linear vector": (lambda: nn.Linear(5, 6), (5,)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (3, 6, 4, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
}
MASKS = {
    "some": [0, 2, 3],
    "all but one": [0, 1, 2, 3, 4],
    "one": [5],
    "a whole group": [0, 1, 2, 3],
    "all": range(12),
}


def masked(layer, rows):
    mask = torch.zeros(len(layer.weight), dtype=torch.bool)
    mask[[row for row in rows if row < len(mask)]] = True
    return mask


def case(name, mask):
    """A layer, its frozen rows, an input, and weights of its outputs that make a loss."""
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    return layer, masked(layer, MASKS[mask]), x, torch.randn_like(layer(x))


def allowed(layer):
    shape = geometry(layer)
    if shape is None:
        return ["gather"]
    names = ["dense", "gather", "gather/8"] + ["swap", "swap/3"] * shape.swaps
    return (
        names
        + ["swap/last"] * (shape.swaps and len(shape.stride) == 2)
        + ["matmul"] * (shape.multiplies)
    )


def work_for(layer, mask, kernel, cut=False):
    shape = geometry(layer)
    if mask.all():
        return Work("skip", None, cut, shape)
    return Work(kernel, rows_for(kernel, mask, shape), cut, shape)


def gradients(layer, x, weights):
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * weights).sum().backward()
    return output.detach(), x.grad, [p.grad for p in layer.parameters()]


NORMS = ("batch norm", "batch norm 1d", "group norm", "layer norm")  # plain unless frozen whole


@pytest.mark.parametrize(
    "name, mask", [(n, m) for n in LAYERS for m in MASKS if m == "all" or n not in NORMS]
)
def test_rows_that_train_get_the_plain_gradient(name, mask):
    plain, mask, x, weights = case(name, mask)
    output, by_input, by_rows = gradients(plain, x, weights)
    for kernel in allowed(plain):
        layer = copy.deepcopy(plain)
        for p in layer.parameters():
            p.grad = None
        assign(layer, work_for(layer, mask, kernel))
        ours = gradients(layer, x, weights)
        assert torch.equal(ours[0], output)
        torch.testing.assert_close(ours[1], by_input)
        for row, grad in zip(ours[2], by_rows, strict=True):
            if mask.all():
                assert row is None
            else:
                torch.testing.assert_close(row[~mask], grad[~mask])
                assert (row[mask] == 0).all()


@pytest.mark.parametrize("mask", ["some", "one", "all"])
@pytest.mark.parametrize("name", LAYERS)
def test_cut_is_the_plain_backward_of_a_masked_output_gradient(name, mask):
    plain, mask, x, weights = case(name, mask)
    keeps = (~mask).to(weights)
    if not isinstance(plain, (nn.Linear, nn.LayerNorm)):
        keeps = keeps.view(-1, *[1] * (weights.dim() - 1 - ("unbatched" not in name)))
    _, by_input, by_rows = gradients(copy.deepcopy(plain), x, weights * keeps)
    for kernel in ["dense"] if name in NORMS else {"dense", *allowed(plain)}:
        layer = copy.deepcopy(plain)
        assign(layer, work_for(layer, mask, kernel, cut=True))
        if mask.all():
            assert not layer(x.clone().requires_grad_()).requires_grad
            continue
        ours = gradients(layer, x, weights)
        torch.testing.assert_close(ours[1], by_input)
        for row, grad in zip(ours[2], by_rows, strict=True):
            torch.testing.assert_close(row[~mask], grad[~mask])
            assert name in NORMS or (row[mask] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv", "conv grouped", "conv1d", "linear tokens"])
@pytest.mark.parametrize("cut", [False, True])
def test_gradcheck(name, cut):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    if cut:  # not the gradient of any function, unless frozen rows have none to pass on
        with torch.no_grad():
            layer.weight[0] = 0
    assign(layer, work_for(layer, masked(layer, [0]), "gather", cut))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_channels_last_stays_channels_last(kernel):
    torch.manual_seed(0)
    layout = torch.channels_last
    plain = nn.Conv2d(4, 8, 1 if kernel == "matmul" else 3, padding=0 if kernel == "matmul" else 1)
    plain = plain.to(memory_format=layout)
    x = torch.randn(3, 4, 5, 5).to(memory_format=layout)
    weights = torch.randn(3, 8, 5, 5).to(memory_format=layout)
    theirs = gradients(copy.deepcopy(plain), x, weights)
    layer, mask = copy.deepcopy(plain), masked(plain, [1, 4, 5])
    assign(layer, work_for(layer, mask, kernel))
    ours = gradients(layer, x, weights)
    assert ours[0].is_contiguous(memory_format=layout)
    assert ours[1].is_contiguous(memory_format=layout)
    assert ours[2][0].stride() == theirs[2][0].stride()
    torch.testing.assert_close(ours[1], theirs[1])
    torch.testing.assert_close(ours[2][0][~mask], theirs[2][0][~mask])


def freeze(model, mask, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone(), **options)
    freezer.freeze(mask)
    return freezer


@pytest.mark.parametrize("frozen", [[0], range(12)])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_only_what_autograd_grad_asks_for_is_computed(name, frozen):
    build, shape = LAYERS[name]
    layer = build()
    work = work_for(layer, masked(layer, frozen), "gather")
    x = torch.randn(shape, requires_grad=True)
    flops = []
    for chosen in (None, work):
        assign(layer, chosen)
        output = layer(x).sum()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(output, x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    if work.rows is not None:
        (weight,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        assign(layer, None)
        (plain,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        torch.testing.assert_close(weight[1:], plain[1:])


@pytest.mark.parametrize("frozen", [[1], range(12)])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_may_be_changed_in_place(name, frozen):
    build, shape = LAYERS[name]
    layer = build()
    x = torch.randn(shape, requires_grad=True)
    freeze(layer, masked(layer, frozen))
    output = layer(x)
    output *= torch.randn_like(output)
    output.sum().backward()
    assert x.grad.abs().sum() > 0


def test_padding_that_was_assigned_later():
    plain = nn.Conv2d(3, 8, 3, padding=1)
    plain.padding = plain.dilation = (2, 2)
    layer, mask = copy.deepcopy(plain), masked(plain, [0, 3])
    assign(layer, work_for(layer, mask, "gather"))
    x = torch.randn(2, 3, 8, 8)
    weights = torch.randn(2, 8, 8, 8)
    ours, theirs = gradients(layer, x, weights), gradients(plain, x, weights)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("name", ["conv", "linear", "linear tokens"])
def test_an_empty_batch(name):
    build, shape = LAYERS[name]
    layer = build()
    assign(layer, work_for(layer, masked(layer, [0]), "gather"))
    x = torch.randn(0, *shape[1:], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert (layer.weight.grad == 0).all()


def test_many_gradients_at_once_and_forward_mode():
    layer = nn.Linear(3, 4)
    assign(layer, work_for(layer, masked(layer, [0]), "gather"))
    output = layer(torch.randn(2, 3))
    (rows,) = torch.autograd.grad(
        output, layer.weight, torch.eye(8).view(8, 2, 4), is_grads_batched=True
    )
    assert rows.shape == (8, 4, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(2, 3), torch.randn(2, 3))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
