"""Groups that stand still together, against a quantile worked out one number at a time."""

import math

import pytest
import torch
from conftest import random_batches, train_epoch
from torch import nn

import neq
from neq import groups as neq_groups


@pytest.fixture
def index():
    return neq.NeuronIndex(nn.Sequential(nn.Linear(1, 10), nn.Linear(10, 7)))


def velocity(*values):
    return torch.tensor(values, dtype=torch.float64)


def quantile_of(values, q):
    """Of |values|, by linear interpolation; undefined ones are infinite. `q` must be a dyadic."""
    ordered = sorted(math.inf if math.isnan(v) else abs(v) for v in values)
    place = q * (len(ordered) - 1)
    low, part = int(place), place - int(place)
    if not part:
        return ordered[low]
    if ordered[low + 1] == math.inf:
        return math.inf
    return ordered[low] + part * (ordered[low + 1] - ordered[low])


def still(values, groups, q, eps, strict):
    """The neurons of the groups, lists of places, that stand still."""
    found = []
    for group in groups:
        value = quantile_of([values[i] for i in group], q)
        if value < eps or (value == eps and not strict):
            found += group
    return sorted(found)


def frozen_by(policy, index, v):
    return policy.frozen(3, index, v).nonzero().squeeze(1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("recursion", ["paper", "reference"])
@pytest.mark.parametrize(
    "groups, places",
    [
        ("layers", [range(10), range(10, 17)]),
        (4, [range(4), range(4, 8), range(8, 10), range(10, 14), range(14, 17)]),
        (1, [[i] for i in range(17)]),
        (100, [range(10), range(10, 17)]),
        (["1"], [range(10, 17)]),
        (["1", "0"], [range(10), range(10, 17)]),
    ],
)
def test_masks_are_those_of_the_definition(index, groups, places, recursion):
    generator = torch.Generator().manual_seed(0)
    sizes = set()
    for _ in range(60):
        v = torch.randint(-4, 5, (17,), generator=generator).double() / 4  # equals eps at times
        v[torch.rand(17, generator=generator) < 0.15] = math.nan
        for q in (0.0, 0.25, 0.5, 0.875, 1.0):
            policy = neq.GroupEquilibrium(0.5, recursion=recursion, groups=groups, quantile=q)
            strict = recursion == "paper"
            expected = still(v.tolist(), [list(p) for p in places], q, 0.5, strict)
            assert frozen_by(policy, index, v) == expected
            sizes.add(len(expected))
    assert len(sizes) > 1


def test_a_median_by_hand(index):
    # |v| of the first layer: median (0.02 + 0.04) / 2 = 0.03; the second's fourth is undefined.
    v = velocity(0.9, -0.01, 0.02, 0.04, -0.02, 0.01, 0.9, 0.0, -0.9, 0.5)
    v = torch.cat([v, velocity(0.1, 0.01, -0.02, math.nan, math.nan, math.nan, math.nan)])
    first = list(range(10))
    assert frozen_by(neq.GroupEquilibrium(0.0301), index, v) == first
    assert frozen_by(neq.GroupEquilibrium(0.0299), index, v) == []
    assert frozen_by(neq.GroupEquilibrium(1e9), index, v) == first
    assert frozen_by(neq.GroupEquilibrium(0.09, quantile=1 / 3), index, v) == first
    assert frozen_by(neq.GroupEquilibrium(0.11, quantile=1 / 3), index, v) == list(range(17))


def test_a_group_whose_median_is_eps_stands_still_by_the_reference_only(index):
    v = torch.full((17,), -0.125, dtype=torch.float64)
    assert frozen_by(neq.GroupEquilibrium(0.125), index, v) == []
    reference = neq.GroupEquilibrium(0.125, recursion="reference")
    assert frozen_by(reference, index, v) == list(range(17))


def test_eps_is_compared_in_float64(index):
    below, above = (torch.full((17,), 1e-3 * (1 + d), dtype=torch.float64) for d in (-1e-9, 1e-9))
    assert frozen_by(neq.GroupEquilibrium(1e-3), index, below) == list(range(17))
    assert frozen_by(neq.GroupEquilibrium(1e-3, recursion="reference"), index, above) == []


def test_quantiles_are_placed_in_decimal():
    """0.07 of 100 steps is the 8th value; in binary it is a little more, and infinite."""
    index = neq.NeuronIndex(nn.Linear(1, 101))
    v = torch.full((101,), math.nan, dtype=torch.float64)
    v[:8] = 0.5
    assert len(frozen_by(neq.GroupEquilibrium(1.0, quantile=0.07), index, v)) == 101
    assert frozen_by(neq.GroupEquilibrium(1.0, quantile=0.08), index, v) == []


@pytest.mark.parametrize("recursion", ["paper", "reference"])
@pytest.mark.parametrize("q", [0.5, 0.75, 1.0])
def test_a_group_without_any_velocity_trains_under_any_eps(index, recursion, q):
    nothing = velocity(*[math.nan] * 17)
    policy = neq.GroupEquilibrium(1e300, recursion=recursion, quantile=q)
    assert frozen_by(policy, index, nothing) == []


def test_excluded_members_do_not_count(net):
    """A module with a quick excluded layer is judged by its other layers."""
    model = nn.ModuleDict({"all": nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 9))})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = neq.GroupEquilibrium(0.1, groups=["all"])
    freezer = neq.NeuronFreezer(model, optimizer, policy, exclude=["all.1"])
    v = velocity(*[0.01] * 3, *[9.0] * 9)
    assert frozen_by(policy, freezer.neurons, v) == [0, 1, 2]
    everybody = neq.NeuronIndex(model)
    assert frozen_by(policy, everybody, v) == []


def test_blocks_lie_within_layers_and_the_last_is_smaller(index):
    blocks = neq_groups.members(4, index)
    assert [block.tolist() for block in blocks] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
        [10, 11, 12, 13],
        [14, 15, 16],
    ]


def test_named_groups_hold_all_layers_below_a_name_and_no_others(net):
    holder = nn.ModuleDict({"body": net, "body2": nn.Linear(2, 3), "head": nn.Linear(2, 2)})
    index = neq.NeuronIndex(holder)
    (body,) = neq_groups.members(["body"], index)
    assert body.tolist() == list(range(8 + 8 + 8 + 8 + 6 + 6 + 4))
    v = torch.zeros(len(index), dtype=torch.float64)
    found = frozen_by(neq.GroupEquilibrium(1.0, groups=("head", "body.fc1")), index, v)
    head, fc1 = index["head"], index["body.fc1"]
    assert found == [*range(fc1.start, fc1.stop), *range(head.start, head.stop)]


@pytest.mark.parametrize(
    "groups, message",
    [
        (["conv", "nowhere"], "nowhere"),
        (["con"], "no layer is called"),
        (["conv", "fc1", "conv"], "overlaps"),
    ],
)
def test_groups_that_do_not_fit_the_model_are_refused_at_once(net, groups, message):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    policies = [neq.GroupEquilibrium(groups=groups)]
    policies.append(neq.Budget(policies[0], 0.9))
    for policy in policies:
        with pytest.raises(ValueError, match=message):
            neq.NeuronFreezer(net, optimizer, policy)


def test_a_module_and_one_inside_it_overlap():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    for groups in (["0", "0.1"], ["0.1", "0"]):
        with pytest.raises(ValueError, match="overlaps"):
            neq_groups.members(groups, neq.NeuronIndex(model))
    assert len(neq_groups.members(["0.0", "0.1", "1"], neq.NeuronIndex(model))) == 3


def test_with_cka_a_group_stands_still_when_all_its_blocks_do(index):
    v = torch.zeros(17, dtype=torch.float64)
    for q in (0.0, 0.5):
        policy = neq.GroupEquilibrium(0.1, quantile=q, reading="cka")
        assert frozen_by(policy, index, v) == list(range(17))
        for value in (0.2, math.nan):
            moving = v.clone()
            moving[9] = value
            assert frozen_by(policy, index, moving) == list(range(10, 17))


def test_the_freezer_follows_the_readings_of_its_groups(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    policy = neq.GroupEquilibrium(eps=2e-3, groups=4)
    freezer = neq.NeuronFreezer(net, optimizer, policy, exclude=["fc2"])
    places = []
    for name, part in freezer.neurons.items():
        starts = range(part.start, part.stop, 4) if name != "fc2" else ()
        places += [list(range(start, min(start + 4, part.stop))) for start in starts]
    counts = set()
    freezer.update(random_batches(2, 7, seed=1))
    for epoch in range(5):
        train_epoch(net, optimizer, random_batches(seed=epoch))
        freezer.update(random_batches(2, 7, seed=1))
        v = freezer.reading.velocity.tolist()
        expected = still(v, places, 0.5, 2e-3, strict=True)
        assert freezer.frozen.nonzero().squeeze(1).tolist() == expected
        counts.add(len(expected))
    assert len(counts) > 1
    assert freezer.cka is None
    assert "cka" not in freezer.state_dict()
    assert freezer.cka_flops == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"eps": -1e-3}, "eps must be"),
        ({"eps": math.nan}, "eps must be"),
        ({"mu": 1.0}, "mu must be"),
        ({"recursion": "other"}, "recursion must be"),
        ({"quantile": 1.5}, "quantile must be"),
        ({"quantile": math.nan}, "quantile must be"),
        ({"groups": 0}, "at least 1 row"),
        ({"groups": "layer1"}, "list of names"),
        ({"reading": "other"}, "reading must be"),
        ({"align": 0}, "align must be"),
        ({"rounding": "other"}, "rounding must be"),
    ],
)
def test_values_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        neq.GroupEquilibrium(**arguments)
