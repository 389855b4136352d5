"""The controls that freeze whole layers down to a share of a backward's FLOPs."""

import math
from statistics import median

import pytest
import torch
from test_budget import NAN, Branches, indexed, velocities
from torch import nn

import neq
from suites.resnet import resnet8


@pytest.fixture(scope="module")
def residual():
    return resnet8()


def units(index):
    """Names of the layers with a product, each with the norms behind it."""
    found = []
    for name in index.flops.order:
        if "bn" in name:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def as_many_as_fit(index, order, share, *, skip):
    """Names of the layers that stand still, taken one unit at a time."""
    chosen = []
    for unit in order:
        mask = index.select([*chosen, *unit]) & index.freezable
        if index.flops(mask) >= share * index.flops.dense:
            chosen += unit
        elif not skip:
            break
    return [name for name in index if name in chosen and index.freezable[index[name]].any()]


def layers_of(mask, index):
    assert all(mask[part].all() or not mask[part].any() for _, part in index.items())
    return [name for name, part in index.items() if mask[part].any()]


def assert_as_near_as_another_unit_allows(mask, index, share):
    assert index.flops(mask) >= share * index.flops.dense
    for unit in units(index):
        further = mask | (index.select(unit) & index.freezable)
        if not torch.equal(further, mask):
            assert index.flops(further) < share * index.flops.dense


@pytest.mark.parametrize("policy", [neq.RandomLayers, neq.SlowestLayers, neq.FreezeFirst])
def test_with_the_whole_share_nobody_stands_still(residual, policy):
    """Norms neither, which cost nothing by themselves."""
    index = indexed(residual, (1, 8, 8))
    assert not policy(1.0).frozen(3, index, velocities(index, 0)).any()


@pytest.mark.parametrize("share", [0.9, 0.5])
@pytest.mark.parametrize("exclude", [(), ("layer2", "fc")])
def test_random_layers_depend_on_seed_and_epoch_alone(residual, share, exclude):
    index = indexed(residual, (1, 8, 8), exclude)
    nothing, stream = torch.full((len(index),), NAN).double(), torch.get_rng_state()
    policy, draws = neq.RandomLayers(share, seed=3), []
    for epoch in range(1, 9):
        mask = policy.frozen(epoch, index, nothing)
        draws.append(tuple(layers_of(mask, index)))
        assert not mask[~index.freezable].any()
        assert_as_near_as_another_unit_allows(mask, index, share)
    assert torch.equal(torch.get_rng_state(), stream)
    assert len(set(draws)) > 2
    again = neq.RandomLayers(share, seed=3).frozen(1, index, torch.zeros_like(nothing))
    assert tuple(layers_of(again, index)) == draws[0]
    others = {tuple(layers_of(neq.RandomLayers(share, seed=s).frozen(1, index, nothing), index))
              for s in range(8)}  # fmt: skip
    assert len(others) > 2


@pytest.mark.parametrize("share", [0.9, 0.5, 0.35])
def test_the_slowest_layers_are_those_of_the_smallest_median(residual, share):
    index = indexed(residual, (1, 8, 8))
    for seed in range(4):
        v = velocities(index, seed, undefined=0.1)
        v[index["conv1"]] = v[index["bn1"]] = NAN  # their median is not defined
        speeds = {
            tuple(unit): median(
                math.inf if math.isnan(x) else abs(x)
                for name in unit
                for x in v[index[name]].tolist()
            )
            for unit in units(index)
        }
        order = [unit for unit in sorted(speeds, key=speeds.get) if unit[0] != "conv1"]
        mask = neq.SlowestLayers(share).frozen(3, index, v)
        assert layers_of(mask, index) == as_many_as_fit(index, order, share, skip=True)
        assert index.flops(mask) >= share * index.flops.dense
    assert not neq.SlowestLayers(share).frozen(1, index, torch.full_like(v, NAN)).any()


class Backwards(nn.Module):
    """Registered from the last layer to the first."""

    def __init__(self):
        super().__init__()
        self.d, self.c, self.b, self.a = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x))))


@pytest.mark.parametrize(
    "share, frozen", [(1.0, ""), (0.72, ""), (0.71, "a"), (0.43, "a"), (0.42, "ab"), (0.1, "abc")]
)
def test_freeze_first_goes_in_the_order_of_execution(share, frozen):
    """Of 7 equal products each layer ends its own and the next one's input gradient."""
    index = indexed(Backwards(), (8,))
    assert index.flops.order == ["a", "b", "c", "d"]
    mask = neq.FreezeFirst(share).frozen(1, index, None)
    assert sorted(layers_of(mask, index)) == list(frozen)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.5, 0.2])
def test_freeze_first_stops_where_the_next_layer_would_be_too_much(residual, share):
    index = indexed(residual, (1, 8, 8), exclude=["layer1.0.conv1"])
    mask = neq.FreezeFirst(share).frozen(1, index, None)
    assert layers_of(mask, index) == as_many_as_fit(
        index, [[n] for n in index.flops.order], share, skip=False
    )


def test_a_layer_that_leaves_exactly_the_share_stands_still():
    index = indexed(Branches((3, 4), (3, 4)), (6,))
    assert layers_of(neq.FreezeFirst(0.5).frozen(1, index, None), index) == ["narrow"]
    assert len(layers_of(neq.RandomLayers(0.5).frozen(1, index, None), index)) == 1
