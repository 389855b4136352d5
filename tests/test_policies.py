import math

import pytest
import torch
from torch import nn

import neq


@pytest.fixture
def index():
    return neq.NeuronIndex(nn.Sequential(nn.Linear(1, 10), nn.Linear(10, 7)))


def velocity(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("policy", [neq.AtEquilibrium, "neq", 1e-3])
def test_what_is_no_policy_is_refused(net, policy):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"policy must be one such as neq\.AtEquilibrium\(\)"):
        neq.NeuronFreezer(net, optimizer, policy)


def test_one_tensor_is_no_batches(net):
    freezer = neq.NeuronFreezer(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="put it into a list"):
        freezer.update(torch.zeros(5, 3, 6, 6))


def test_equilibrium_is_strict_in_the_paper_and_not_in_the_reference():
    v = velocity(0.0, 1e-3, -1e-3, 5e-4, -0.2, math.nan)
    paper = neq.AtEquilibrium(eps=1e-3).frozen(3, None, v)
    reference = neq.AtEquilibrium(eps=1e-3, recursion="reference").frozen(3, None, v)
    assert paper.tolist() == [True, False, False, True, False, False]
    assert reference.tolist() == [True, True, True, True, False, False]
    assert not neq.AtEquilibrium(eps=0.0).frozen(3, None, v).any()
    assert neq.AtEquilibrium(eps=0.0, recursion="reference").frozen(3, None, v).sum() == 1


@pytest.mark.parametrize(
    "keep, shares",
    [(1.0, (0, 0)), (0.8, (2, 1)), (0.5, (5, 3)), (0.9, (1, 0)), (0.0, (10, 7)), (0.3, (7, 4))],
)
def test_shares_are_rounded_down_in_decimal(index, keep, shares):
    drawn = neq.Random(keep).frozen(1, index, velocity(*[math.nan] * 17))
    slowest = neq.SmallestVelocity(keep).frozen(1, index, torch.arange(17.0, dtype=torch.float64))
    for mask in (drawn, slowest):
        assert (int(mask[:10].sum()), int(mask[10:].sum())) == shares


def test_random_draws_anew_each_epoch_and_not_from_the_global_stream(index):
    policy, nothing = neq.Random(0.5, seed=3), velocity(*[math.nan] * 17)
    state = torch.get_rng_state()
    draws = [policy.frozen(epoch, index, nothing) for epoch in range(1, 9)]
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(draw.tolist()) for draw in draws}) > 5
    assert torch.equal(policy.frozen(1, index, nothing), draws[0])
    assert not torch.equal(neq.Random(0.5, seed=4).frozen(1, index, nothing), draws[0])
    counts = sum(neq.Random(0.5, seed=s).frozen(1, index, nothing).float() for s in range(2000))
    assert ((counts[:10] / 2000 - 0.5).abs() < 0.06).all()  # 5 sigma


def test_smallest_velocity_ranks_by_size_within_each_layer(index):
    v = velocity(*[9, -8, 7, -6, 5, -4, 3, -2, 1, 0.5], *[0.1, -0.2, math.nan, 0.4, -0.5, 0.6, 0])
    mask = neq.SmallestVelocity(0.7).frozen(1, index, v)
    assert mask.nonzero().squeeze(1).tolist() == [7, 8, 9, 10, 16]
    undefined = velocity(*[math.nan] * 17)
    assert not neq.SmallestVelocity(0.0).frozen(1, index, undefined).any()


def test_freeze_after_and_everyone(index):
    nothing = velocity(*[math.nan] * 17)
    masks = [neq.FreezeAfter(3).frozen(epoch, index, nothing) for epoch in (1, 2, 3, 4)]
    assert [bool(mask.all()) for mask in masks] == [False, False, True, True]
    assert [bool(mask.any()) for mask in masks] == [False, False, True, True]
    assert not neq.Everyone().frozen(5, index, nothing).any()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: neq.AtEquilibrium(eps=-1e-3), "eps must be at least 0"),
        (lambda: neq.AtEquilibrium(eps=math.nan), "eps must be at least 0"),
        (lambda: neq.AtEquilibrium(mu=1.0), "mu must be in"),
        (lambda: neq.AtEquilibrium(recursion="other"), "recursion must be"),
        (lambda: neq.SmallestVelocity(0.5, mu=-0.1), "mu must be in"),
        (lambda: neq.SmallestVelocity(1.5), "keep must be between"),
        (lambda: neq.Random(-0.1), "keep must be between"),
        (lambda: neq.FreezeAfter(0), "epoch must be at least 1"),
    ],
)
def test_values_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
