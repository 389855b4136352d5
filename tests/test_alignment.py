"""Masks in blocks: how many train in a layer, who was moved, and who never is."""

import math

import pytest
import torch
from conftest import random_batches, train_epoch
from torch import nn

import neq
from neq.alignment import aligned

NAN = math.nan


@pytest.fixture
def index():
    return neq.NeuronIndex(nn.Sequential(nn.Linear(1, 10), nn.Linear(10, 7)))


def mask_of(places, size=17):
    mask = torch.zeros(size, dtype=torch.bool)
    mask[list(places)] = True
    return mask


def places_of(mask):
    return mask.nonzero().squeeze(1).tolist()


def by_definition(frozen, v, layers, freezable, k, rounding):
    """Places that stand still, moved one at a time; where too few can follow, as they were."""
    result = []
    for layer in layers:
        before = [i for i in layer if i in frozen]
        still = list(before)
        while still and (len(layer) - len(still)) % k:
            if rounding == "up":
                still.remove(max(still, key=lambda i: math.inf if math.isnan(v[i]) else abs(v[i])))
                continue
            others = [i for i in layer if i not in still and freezable[i] and not math.isnan(v[i])]
            if not others:
                still = before
                break
            still.append(min(others, key=lambda i: abs(v[i])))
        result += still
    return sorted(result)


@pytest.mark.parametrize("rounding", ["down", "up"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 8, 16])
def test_masks_are_those_of_the_definition(index, k, rounding):
    generator = torch.Generator().manual_seed(k)
    layers = [list(range(10)), list(range(10, 17))]
    changed = 0
    for number in range(150):
        v = torch.randn(17, generator=generator, dtype=torch.float64)  # no two are equal
        frozen = torch.rand(17, generator=generator) < (0.1, 0.5, 0.9)[number % 3]
        if number % 2:
            v[torch.rand(17, generator=generator) < 0.3] = NAN
            frozen &= ~v.isnan()
        index.freezable = torch.rand(17, generator=generator) < (1.0, 0.8)[number % 5 == 0]
        frozen &= index.freezable
        before = frozen.clone()
        found = places_of(aligned(frozen, v, index, k, rounding))
        freezable = index.freezable.tolist()
        wanted = by_definition(places_of(frozen), v.tolist(), layers, freezable, k, rounding)
        assert found == wanted
        assert torch.equal(frozen, before)
        changed += found != places_of(before)
    assert (changed > 10) == (k > 1)


def test_by_hand(index):
    v = torch.tensor([5, -4, 3, -2, 1, 6, -7, 8, 9, 10, *range(1, 8)], dtype=torch.float64)
    frozen = mask_of([3, 4])  # 8 of 10 train, and all of 7
    assert places_of(aligned(frozen, v, index, 4, "down")) == [3, 4]
    assert places_of(aligned(frozen, v, index, 3, "down")) == [1, 2, 3, 4]  # 6: |-4| and 3 join
    assert places_of(aligned(frozen, v, index, 3, "up")) == [4]  # 9: |-2| trains
    assert places_of(aligned(frozen, v, index, 16, "down")) == list(range(10))
    assert places_of(aligned(frozen, v, index, 16, "up")) == []


def test_nobody_without_a_velocity_is_frozen_for_the_sake_of_others(index):
    v = torch.tensor([0.0, 1, *[NAN] * 8, *range(7)], dtype=torch.float64)
    assert places_of(aligned(mask_of([0]), v, index, 8, "down")) == [0, 1]
    assert places_of(aligned(mask_of([0]), v, index, 7, "down")) == [0]  # 9 train: 2 must follow
    assert places_of(aligned(mask_of([0]), v, index, 5, "down")) == [0]


class Wish:
    """A policy whose velocity never moves, and which asks for the same mask every epoch."""

    needs_velocity, mu, recursion = True, 0.5, "paper"

    def __init__(self, places, align, rounding):
        self.places, self.align, self.rounding = places, align, rounding

    def frozen(self, epoch, neurons, velocity):
        return mask_of(self.places, len(neurons))


@pytest.mark.parametrize("rounding, count", [("down", 12), ("up", 4)])
def test_the_freezer_tells_whom_alignment_moved(rounding, count):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 20), nn.Linear(20, 16), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = Wish([*range(10), *range(36, 41)], 8, rounding)  # 10 of 20, none of 16, all of 5
    freezer = neq.NeuronFreezer(model, optimizer, policy, exclude=["2"])
    batches = [torch.randn(6, 3)]
    freezer.update(batches)
    assert not freezer.moved.any()
    for epoch in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
        freezer.update(batches)
        moved = freezer.frozen ^ mask_of(range(10), 41)
        assert torch.equal(freezer.moved, moved)
        if epoch == 0 and rounding == "down":  # no velocity yet: nobody may follow
            assert not moved.any()
            continue
        assert int(freezer.frozen.sum()) == count
        speed = freezer.reading.velocity.abs()[:20].nan_to_num(torch.inf)
        if epoch:
            stay = freezer.frozen[:20] if rounding == "down" else freezer.frozen[:10]
            slow, fast = speed[: len(stay)][stay], speed[: len(stay)][~stay]
            slow = slow if rounding == "up" else speed[10:][freezer.frozen[10:20]]
            fast = fast if rounding == "up" else speed[10:][~freezer.frozen[10:20]]
            assert slow.max() < fast.min()


@pytest.mark.parametrize("align", [4, 5])
def test_what_trains_is_a_multiple_in_every_layer_where_somebody_stands_still(net, align):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    plain = neq.AtEquilibrium(eps=2e-3)
    policy = neq.AtEquilibrium(eps=2e-3, align=align)
    freezer = neq.NeuronFreezer(net, optimizer, policy, exclude=["fc2"])
    moved = 0
    freezer.update(random_batches(1, seed=9))
    for epoch in range(6):
        train_epoch(net, optimizer, random_batches(seed=epoch))
        freezer.update(random_batches(1, seed=9))
        wanted = plain.frozen(epoch + 1, freezer.neurons, freezer.reading.velocity)
        wanted &= freezer.neurons.freezable
        assert torch.equal(freezer.moved, freezer.frozen & ~wanted)
        assert not (wanted & ~freezer.frozen).any()
        for name, part in freezer.neurons.items():
            still = int(freezer.frozen[part].sum())
            assert not still or (part.stop - part.start - still) % align == 0
            assert name != "fc2" or not still
        moved += int(freezer.moved.sum())
    assert moved


def test_a_mask_set_by_hand_stays_as_it_is(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    freezer = neq.NeuronFreezer(net, optimizer, neq.AtEquilibrium(eps=1e9, align=4))
    mask = mask_of([0, 9, 10, 17], len(freezer.neurons))
    freezer.freeze(mask)
    assert torch.equal(freezer.frozen, mask)


@pytest.mark.parametrize("policy", [neq.AtEquilibrium, neq.GroupEquilibrium])
def test_values_out_of_range(policy):
    with pytest.raises(ValueError, match="align must be at least 1"):
        policy(align=0)
    with pytest.raises(ValueError, match="rounding must be"):
        policy(rounding="nearest")
    with pytest.raises(ValueError, match="rounding must be"):
        neq.SmallestVelocity(0.5, rounding="nearest")
