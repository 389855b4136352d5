"""Magnitude pruning against sorting in plain Python, and its bisection against trying all."""

import copy
import math
import random

import pytest
import torch
from conftest import random_batches, train_epoch
from torch import nn

from neq.pruning import Bisection, MagnitudePruner
from neq.pruning.masks import weight


def build(seed, values=None):
    """A model of random widths; with few `values` of its weights some tie."""
    torch.manual_seed(seed)
    a, b, c = torch.randint(2, 7, (3,)).tolist()
    model = nn.Sequential(
        nn.Conv2d(2, 2 * a, 3),
        nn.BatchNorm2d(2 * a),
        nn.Conv2d(2 * a, 2 * b, 1, groups=2),
        nn.Flatten(),
        nn.Linear(2 * b, c),
        nn.LayerNorm(c),
        nn.Linear(c, 3),
    )
    if values:
        for parameter in model.parameters():
            parameter.data = torch.randint(-values, values + 1, parameter.shape).float()
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data[0, 0] = 9.0  # nothing is emptied
    return model


def pruner_of(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return MagnitudePruner(model, optimizer, **options)


def units_of(pruner):
    """By unit, in order: its magnitude and whether a weight of it is left."""
    found = []
    for name, layer in pruner.masks.layers.items():
        w, kept = weight(layer).detach(), pruner.masks.kept[name]
        if pruner.units == "weights":
            found += zip(w.abs().flatten().tolist(), kept.flatten().tolist(), strict=True)
            continue
        for row, left_of_it in zip(w.flatten(1).tolist(), kept.flatten(1).tolist(), strict=True):
            found.append((math.sqrt(sum(v * v for v in row) / len(row)), any(left_of_it)))
    return found


def smallest(units, sparsity):
    """Which are left after a global sort: what was pruned goes first, then the smallest."""
    order = sorted(range(len(units)), key=lambda i: (units[i][1], units[i][0] * units[i][1], i))
    gone = set(order[: round(sparsity * len(units))])
    return [k and i not in gone for i, (_, k) in enumerate(units)]


def left(pruner):
    return [kept for _, kept in units_of(pruner)]


def masks_of(pruner):
    """By parameter."""
    return {f"{name}.weight": mask for name, mask in pruner.masks.kept.items()}


def snapshot(pruner):
    weights = [weight(layer) for layer in pruner.masks.layers.values()]
    return [tensor.tolist() for tensor in (*weights, *pruner.masks.kept.values())]


@pytest.mark.parametrize("units, values", [("weights", None), ("weights", 3), ("neurons", None)])
def test_prune_against_a_global_sort(units, values):
    for seed in range(5):
        model = build(seed, values)
        pruner = pruner_of(model, units=units, exclude=["6"] if seed % 2 else [])
        others = {n: p.clone() for n, p in model.named_parameters() if n not in masks_of(pruner)}
        assert pruner.sparsity == 0
        before = left(pruner)
        for sparsity in (0.0, 0.3, 0.31, 0.5, 0.4, 0.6):
            expected = smallest(units_of(pruner), sparsity)
            threshold = pruner.prune(sparsity)
            now = units_of(pruner)
            assert [kept for _, kept in now] == expected
            assert sum(expected) == min(len(now) - round(sparsity * len(now)), sum(before))
            assert all(was or not kept for was, kept in zip(before, expected, strict=True))
            assert pruner.sparsity == pytest.approx(1 - sum(expected) / len(now))
            assert threshold == pytest.approx(min(m for m, kept in now if kept))
            assert all(magnitude == 0 for magnitude, kept in now if not kept)
            before = expected
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in others.items())


def test_of_equal_neurons_the_first_go():
    model = nn.Linear(3, 8)
    model.weight.data[:] = torch.tensor([1.0, -2.0, 3.0])
    pruner = pruner_of(model, units="neurons")
    assert pruner.prune(0.5) == pytest.approx(math.sqrt(14 / 3))
    assert left(pruner) == [False] * 4 + [True] * 4


@pytest.mark.parametrize("units", ["weights", "neurons"])
def test_a_random_draw(units):
    """As many as by magnitude, again with the same stream, and no others once some are gone."""
    state, drawn = torch.get_rng_state(), []
    for seed in (1, 1, 2):
        pruner = pruner_of(build(5), units=units, exclude=["4", "6"])
        torch.set_rng_state(state)
        stream = torch.Generator().manual_seed(seed)
        before = left(pruner)
        for sparsity in (0.2, 0.5, 0.5, 0.7):
            found = units_of(pruner)
            threshold, kept = pruner.prune(sparsity, stream), left(pruner)
            magnitudes = [m for (m, _), k in zip(found, kept, strict=True) if k]
            assert threshold == pytest.approx(min(magnitudes))
            assert sum(kept) == len(before) - round(sparsity * len(before))
            assert all(was or not k for was, k in zip(before, kept, strict=True))
            before = kept
        drawn.append(before)
        assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1] != drawn[2]


def test_draws_do_not_look_at_magnitudes():
    counts, draws = torch.zeros(20), 400
    for seed in range(draws):
        pruner = pruner_of(nn.Linear(10, 2))
        pruner._model.weight.data = torch.arange(20.0).view(2, 10)
        pruner.prune(0.5, torch.Generator().manual_seed(seed))
        counts += torch.tensor(left(pruner))
    assert bool(((counts - draws / 2).abs() < 5 * math.sqrt(draws / 4)).all())


@pytest.mark.parametrize("units", ["weights", "neurons"])
def test_no_layer_is_emptied(units):
    model = build(0)
    pruner = pruner_of(model, units=units)
    model[2].weight.data *= 1e-4
    before = snapshot(pruner)
    with pytest.raises(ValueError, match=r"sparsity 0\.95 would leave '2' without a weight"):
        pruner.prune(0.95)
    with pytest.raises(ValueError, match="without a weight"):
        pruner.prune(0.999, torch.Generator().manual_seed(0))
    assert snapshot(pruner) == before


def test_wrong_arguments():
    pruner = pruner_of(build(0))
    before = snapshot(pruner)
    for sparsity in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="sparsity must be at least 0 and below 1"):
            pruner.prune(sparsity)
    for tolerance in (-0.1, math.nan):
        with pytest.raises(ValueError, match="tolerance must be 0 or more"):
            pruner.bisect(lambda: 1.0, tolerance)
    with pytest.raises(ValueError, match="evaluations must be 2 or more"):
        pruner.bisect(lambda: 1.0, 0.1, evaluations=1)
    assert snapshot(pruner) == before
    with pytest.raises(ValueError, match="units must be 'weights' or 'neurons'"):
        pruner_of(build(0), units="filters")


def importance_lost(pruner):
    """A loss that rises with all that is gone: each weight has a random importance."""
    pairs = [(w, torch.rand(w.shape)) for w in map(weight, pruner.masks.layers.values())]
    return lambda: 1.0 + sum(float(importance[w == 0].sum()) for w, importance in pairs)


def best_threshold(pruner, loss, tolerance):
    """The largest of all thresholds within the bound, by trying each on the model."""
    layers = [weight(layer) for layer in pruner.masks.layers.values()]
    before = copy.deepcopy(layers)
    bound, found = (1 + tolerance) * loss(), 0.0
    magnitudes = sorted({m for m, kept in units_of(pruner) if kept})
    for threshold in magnitudes[1:]:
        units = iter(units_of(pruner))
        for w in layers:
            for part in w.data.view(-1) if pruner.units == "weights" else w.data:
                part *= next(units)[0] >= threshold
        if all(bool(w.any()) for w in layers) and loss() <= bound:
            found = threshold
        for w, old in zip(layers, before, strict=True):
            w.data.copy_(old)
    return found


@pytest.mark.parametrize("units", ["weights", "neurons"])
def test_bisect_against_all_thresholds(units):
    """Where the loss rises with the threshold; also where some are pruned before, and with ties."""
    kinds = set()
    for seed in range(8):
        model = build(seed, values=9 if seed % 3 == 0 and units == "weights" else None)
        pruner = pruner_of(model, units=units, exclude=["0", "2"] if units == "weights" else [])
        if seed % 2:
            pruner.prune(0.2)
        loss, tolerance = importance_lost(pruner), (0.0, 0.3, 2.0, 1e9)[seed % 4]
        expected, before = best_threshold(pruner, loss, tolerance), loss()
        was = units_of(pruner)
        found = pruner.bisect(loss, tolerance, evaluations=40)
        assert left(pruner) == [kept and m >= expected for m, kept in was]
        assert (found.loss_before, found.loss) == (before, loss())
        assert not expected or found.threshold == pytest.approx(expected)
        kinds.add((found.emptied is None, found.threshold == 0))
    assert kinds == {(True, True), (True, False), (False, False)}


@pytest.mark.parametrize("units", ["weights", "neurons"])
def test_bisect_keeps_its_promise_for_any_loss(units):
    """Within the bound and the evaluations; survivors are as they were, to the bit."""
    draws = random.Random(0)
    for trial in range(40):
        model = build(trial % 4)
        pruner = pruner_of(model, units=units)
        pruner.prune(draws.choice([0.0, 0.3]))
        known, calls = {}, []

        def loss(model=model, known=known, calls=calls):
            zeros = tuple(int((p == 0).sum()) for p in model.parameters())
            calls.append(known.setdefault(zeros, draws.choice([draws.uniform(0, 3), math.nan])))
            return calls[-1]

        tolerance, limit = draws.choice([0.0, 0.05, 1.0]), draws.randint(2, 15)
        was, values = left(pruner), copy.deepcopy(model.state_dict())
        found = pruner.bisect(loss, tolerance, limit)
        assert len(calls) == found.evaluations <= limit
        if math.isnan(calls[0]):
            assert left(pruner) == was
            continue
        assert found.loss_before == calls[0]
        assert found.loss == loss() <= (1 + tolerance) * calls[0]
        assert all(w or not k for w, k in zip(was, left(pruner), strict=True))
        masks = masks_of(pruner)
        for name, value in model.state_dict().items():
            kept = masks.get(name, torch.ones_like(value, dtype=torch.bool))
            assert torch.equal(value, torch.where(kept, values[name], 0))


def two_layers():
    """Magnitudes 1 to 4 in the first layer, 10 in the second."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[-3.0, 1.0], [4.0, -2.0]])
    model[1].weight.data.fill_(10.0)
    return model, lambda: 1 + 0.1 * int((model[0].weight == 0).sum())


@pytest.mark.parametrize(
    "tolerance, evaluations, expected, weights",
    [
        (0.25, 12, (3.0, 1.0, 1.2, 3, None), [[-3, 0], [4, 0]]),  # tries 2, 3 of them
        (1.0, 12, (4.0, 1.0, 1.3, 3, "0"), [[0, 0], [4, 0]]),
        (1.0, 2, (4.0, 1.0, 1.3, 2, "0"), [[0, 0], [4, 0]]),  # the last one tries the largest
        (0.25, 2, (0.0, 1.0, 1.0, 2, None), [[-3, 1], [4, -2]]),  # which may be too much
        (0.15, 12, (2.0, 1.0, 1.1, 3, None), [[-3, 0], [4, -2]]),
        (0.0, 12, (0.0, 1.0, 1.0, 3, None), [[-3, 1], [4, -2]]),
    ],
)
def test_bisect_by_hand(tolerance, evaluations, expected, weights):
    model, loss = two_layers()
    found = pruner_of(model).bisect(loss, tolerance, evaluations)
    assert found == Bisection(*map(pytest.approx, expected[:3]), *expected[3:])
    assert model[0].weight.tolist() == weights


def test_bisect_where_nothing_is_left_to_try():
    model, _ = two_layers()
    pruner = pruner_of(model)
    assert pruner.bisect(lambda: 5.0, 0.0) == Bisection(4.0, 5.0, 5.0, 3, "0")
    assert pruner.bisect(lambda: 5.0, 1.0) == Bisection(0.0, 5.0, 5.0, 1, "0")
    assert model[0].weight.tolist() == [[0, 0], [4, 0]]


def test_a_threshold_below_which_nothing_lies_is_0():
    model = nn.Linear(3, 2, bias=False)
    model.weight.data = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
    found = pruner_of(model).bisect(lambda: 1.0 + int((model.weight == 0).sum()), 0.0)
    assert (found.threshold, found.loss) == (0.0, 1.0)


def test_rewind(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    pruner = MagnitudePruner(net, optimizer, exclude=["fc2"])
    train_epoch(net, optimizer, random_batches())
    early = copy.deepcopy(net.state_dict())
    train_epoch(net, optimizer, random_batches(seed=1))
    pruner.prune(0.6)
    pruner.rewind(early)
    masks = masks_of(pruner)
    for name, value in net.state_dict().items():
        kept = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(value, torch.where(kept, early[name], 0))
    assert not optimizer.state
    train_epoch(net, optimizer, random_batches(seed=2))
    assert bool(optimizer.state[net.fc1.weight]["momentum_buffer"].any())
    assert bool((net.fc1.weight != early["fc1.weight"])[masks["fc1.weight"]].any())
    assert all(bool((net.state_dict()[name][~kept] == 0).all()) for name, kept in masks.items())
