"""Pruned weights under every optimizer of torch, sizes by hand, and what can be pruned."""

import copy
import io
import math

import pytest
import torch
from conftest import random_batches, train_epoch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

from neq.pruning import Masks, Size, prunable
from neq.pruning.masks import weight

NOT_HERE = {"Optimizer", "LBFGS", "SparseAdam"}  # abstract, refused, for sparse gradients
CLASSES = sorted(
    name
    for name, found in vars(torch.optim).items()
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer)
)
PLAIN = {name: (name, {}) for name in CLASSES if name not in NOT_HERE | {"Muon"}}
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
VARIANTS = {
    f"{name}, {variant}": (name, options | {variant: True})
    for name, options in {
        "SGD": SGD,
        "Adam": {"weight_decay": 0.1, "amsgrad": True},
        "AdamW": {"weight_decay": 0.5},
        "Adagrad": {"weight_decay": 0.1},
    }.items()
    for variant in ("foreach", "fused")
}
OTHERS = {
    "momentum": ("SGD", SGD),
    "Nesterov": ("SGD", SGD | {"nesterov": True}),
    "one by one": ("SGD", SGD | {"foreach": False}),
    "RMSprop, momentum": ("RMSprop", {"momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    "NAdam, decay": ("NAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    "maximised": ("Adamax", {"maximize": True, "weight_decay": 0.1}),
}
OPTIMIZERS = PLAIN | VARIANTS | OTHERS


def optimizer_of(model, name):
    kind, options = OPTIMIZERS[name]
    return getattr(torch.optim, kind)(model.parameters(), **options)


def some(masks, seed=0):
    """Half of the weights, one layer whole, and one neuron of another gone."""
    generator = torch.Generator().manual_seed(seed)
    kept = {n: torch.rand(m.shape, generator=generator) < 0.5 for n, m in masks.kept.items()}
    first, *_, last = kept
    kept[first][1] = False
    kept[last][:] = True
    return kept


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_stay_zero_and_the_others_move(net, name):
    optimizer = optimizer_of(net, name)
    masks = Masks(net, optimizer)
    train_epoch(net, optimizer, random_batches())  # moments build up before anything is pruned
    kept = some(masks)
    masks.set(kept)
    weights = {name: weight(layer) for name, layer in masks.layers.items()}
    for batch in random_batches(4, seed=1):
        before = {name: w.detach().clone() for name, w in weights.items()}
        train_epoch(net, optimizer, [batch])
        for layer, w in weights.items():
            assert bool((w[~kept[layer]] == 0).all())
            assert bool((w != before[layer])[kept[layer]].any())
            assert bool(w.isfinite().all())


def test_pruned_stay_zero_under_muon():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    optimizer = torch.optim.Muon(model.parameters(), lr=0.1)
    masks = Masks(model, optimizer)
    kept = some(masks)
    masks.set(kept)
    for batch in random_batches(4, shape=(6,)):
        before = copy.deepcopy(model.state_dict())
        train_epoch(model, optimizer, [batch])
        for layer, mask in kept.items():
            w = weight(masks.layers[layer])
            assert bool((w[~mask] == 0).all())
            assert bool((w != before[f"{layer}.weight"])[mask].all())


@pytest.mark.parametrize("name", ["momentum", "SGD, fused", "Nesterov", "Adam", "AdamW", "RMSprop"])
def test_the_others_move_as_if_zeroed_by_hand(net, name):
    net.drop.p = 0.0
    other = copy.deepcopy(net)
    optimizer, plain = optimizer_of(net, name), optimizer_of(other, name)
    masks = Masks(net, optimizer)
    kept = some(masks)
    masks.set(kept)
    pairs = [(other.get_submodule(layer).weight, mask) for layer, mask in kept.items()]
    for w, mask in pairs:
        w.data[~mask] = 0
    for inputs, targets in random_batches(5):
        train_epoch(net, optimizer, [(inputs, targets)])
        plain.zero_grad()
        nn.functional.cross_entropy(other(inputs), targets).backward()
        for w, mask in pairs:
            w.grad[~mask] = 0
        plain.step()
        for w, mask in pairs:
            w.data[~mask] = 0
        for a, b in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_pruned_stay_zero_where_their_gradient_is_not_finite():
    """That of a hand-written group lasso is NaN at a pruned row."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masks = Masks(model, optimizer)
    masks.set({"": torch.tensor([[True] * 3, [False] * 3])})
    model.weight.square().sum(1).sqrt().sum().backward()
    assert model.weight.grad[1].isnan().all()
    optimizer.step()
    assert torch.equal(model.weight[1], torch.zeros(3))


def test_lbfgs_is_refused():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="LBFGS moves all parameters along one direction"):
        Masks(model, torch.optim.LBFGS(model.parameters()))


def masks_of(model, **options):
    return Masks(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def test_sizes_by_hand():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2),  # 24 + 3
        nn.BatchNorm2d(3),  # 6
        nn.Flatten(),
        nn.Linear(3, 2, bias=False),  # 6
    )
    masks = masks_of(model)
    assert masks.size() == Size(39, 39, 5, 5)
    conv = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    conv[0] = True
    conv[2, 1, 0, 0] = True
    masks.set({"0": conv})
    assert masks.sizes() == {"0": Size(27, 3 + 9, 3, 2), "3": Size(6, 6, 2, 2)}
    masks.set({"3": torch.tensor([[False] * 3, [True, False, True]])})
    assert masks.sizes() == {"0": Size(27, 12, 3, 2), "3": Size(6, 2, 2, 1)}
    assert masks.size() == Size(39, 39 - 15 - 4, 5, 3)
    assert torch.equal(model[0].weight == 0, ~conv)


@pytest.mark.parametrize(
    "mask, shares",
    [
        ([[1, 0, 0], [0, 0, 0]], (1 / 6, 1 / 6)),
        ([[1, 0, 1], [0, 0, 0]], (2 / 6, 2 / 6)),
        ([[1, 0, 0], [0, 0, 1]], (4 / 6, 2 / 6)),
        ([[1, 1, 1], [1, 1, 1]], (1, 1)),
        ([[0, 0, 0], [0, 0, 0]], (0, 0)),
    ],
)
def test_forward_shares_of_a_linear_layer(mask, shares):
    masks = masks_of(nn.Linear(3, 2))
    masks.set({"": torch.tensor(mask, dtype=torch.bool)})
    assert masks.forward_shares()[""] == pytest.approx(shares)


def test_forward_shares_of_convolutions():
    conv = torch.zeros(2, 2, 3, 3, dtype=torch.bool)
    conv[0, 0, 1, 1] = True  # one tap
    conv[1, 0] = True
    masks = masks_of(nn.Conv2d(2, 2, 3))
    masks.set({"": conv})
    assert masks.forward_shares()[""] == pytest.approx((2 * 1 / 4, 10 / 36))
    grouped = torch.tensor([[1, 0], [0, 0], [1, 0], [0, 1]], dtype=torch.bool)
    masks = masks_of(nn.Conv2d(4, 4, 1, groups=2))
    masks.set({"": grouped.view(4, 2, 1, 1)})
    assert masks.forward_shares()[""] == pytest.approx(((1 * 1 + 2 * 2) / 8, 3 / 8))


def test_forward_shares_are_those_of_a_smaller_layer():
    """By torch's counter, of random masks in two dimensions and in one."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        mask = torch.rand(9, 7, 3, generator=generator) < 0.08
        rows, columns = int(mask.any(2).any(1).sum()), int(mask.any(2).any(0).sum())
        flops = []
        for size in ((7, 9), (columns, rows)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                nn.Conv1d(*size, 3)(torch.zeros(1, size[0], 5))
            flops.append(counter.get_total_flops())
        masks = masks_of(nn.Conv1d(7, 9, 3))
        masks.set({"": mask})
        assert masks.forward_shares()[""][0] == pytest.approx(flops[1] / flops[0])


def test_a_fresh_model_goes_on(net):
    optimizer = optimizer_of(net, "momentum")
    masks = Masks(net, optimizer)
    kept = some(masks)
    masks.set(kept)
    file = io.BytesIO()
    torch.save(masks.state_dict(), file)
    file.seek(0)
    fresh = type(net)()
    other = optimizer_of(fresh, "momentum")
    loaded = Masks(fresh, other)
    loaded.set({"fc1": torch.zeros(6, 8, dtype=torch.bool)})  # of which the state knows nothing
    loaded.load_state_dict(torch.load(file))
    assert loaded.sizes() == masks.sizes()
    train_epoch(fresh, other, random_batches())
    for name, mask in kept.items():
        assert torch.equal(loaded.kept[name], mask)
        assert bool((weight(loaded.layers[name])[~mask] == 0).all())
    loaded.load_state_dict({})
    assert loaded.size().parameters_left == loaded.size().parameters
    assert Masks(net, optimizer).state_dict() == {}


def test_what_is_given_and_taken_is_no_ones_to_change():
    masks = masks_of(nn.Linear(3, 2))
    mask = torch.eye(2, 3, dtype=torch.bool)
    masks.set({"": mask})
    mask[:] = True
    masks.state_dict()[""][:] = True
    assert int(masks.kept[""].sum()) == 2


@pytest.mark.parametrize(
    "name, mask, message",
    [
        ("9", torch.ones(2, 3).bool(), "mask of '9' must be bool, and the layer prunable"),
        ("1", torch.ones(2).bool(), "mask of '1' must be bool, and the layer prunable"),
        ("2", torch.ones(2, 2), "mask of '2' must be bool, and the layer prunable"),
        ("2", torch.ones(2).bool(), r"mask of '2' must be \[2, 2\] as its weight, got \[2\]"),
    ],
)
def test_wrong_masks_are_refused_and_change_nothing(name, mask, message):
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    before = copy.deepcopy(model.state_dict())
    masks = masks_of(model)
    with pytest.raises(ValueError, match=message):
        masks.set({"0": torch.zeros(2, 3).bool(), name: mask})
    assert all(torch.equal(a, before[n]) for n, a in model.state_dict().items())
    assert masks.state_dict() == {}


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
def test_layers_of_wrapped_models_have_their_own_names(net, wrap):
    masks = masks_of(wrap(net), exclude=["fc2"])
    assert list(masks.kept) == ["conv", "grouped", "fc1"]
    masks.set({"fc1": torch.zeros(6, 8, dtype=torch.bool)})
    assert bool((net.fc1.weight == 0).all())
    assert masks.size().parameters == sum(math.prod(p.shape) for p in net.parameters())


def test_remove(net):
    optimizer = optimizer_of(net, "momentum")
    masks = Masks(net, optimizer)
    masks.set(some(masks))
    masks.remove()
    train_epoch(net, optimizer, random_batches())
    assert not bool((net.conv.weight[1] == 0).any())


def test_prunable():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv3d(1, 2, 1),
            "bn": nn.BatchNorm3d(2),
            "deep": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
            "up": nn.ConvTranspose2d(2, 2, 1),
            "embedding": nn.Embedding(4, 2),
            "tied": nn.Linear(2, 4),
            "normed": parametrizations.weight_norm(nn.Linear(2, 2)),
            "masked": prune.identity(nn.Linear(2, 2), "weight"),
            "line": nn.Conv1d(2, 2, 1),
        }
    )
    model["tied"].weight = model["embedding"].weight
    names = [layer.name for layer in prunable(model)]
    assert names == ["conv", "deep.0", "deep.1", "line"]
    assert [each.name for each in prunable(model, ["deep", "bn", "normed"])] == ["conv", "line"]
    assert [each.name for each in prunable(model, ["deep.1"])] == ["conv", "deep.0", "line"]
    with pytest.raises(ValueError, match="no layer is called 'dee'"):
        prunable(model, ["dee"])
    for part, exclude in (("bn", []), ("normed", []), ("deep", ["0", "1"])):
        with pytest.raises(ValueError, match="no linear or convolution layer"):
            prunable(model[part], exclude)
