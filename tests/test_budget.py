"""Budgets of FLOPs: the share kept, who stands still for it, and how a freezer counts."""

import copy
import io
import math
from itertools import combinations

import pytest
import torch
from conftest import random_batches, train_epoch
from torch import nn
from torch.utils.data import DataLoader

import neq
from suites.resnet import resnet8

NAN = math.nan


def indexed(model, shape, exclude=()):
    index = neq.NeuronIndex(model)
    index.freezable = ~index.select(exclude)
    index.flops = neq.RequiredFlops.count(model, shape, index)
    return index


@pytest.fixture(scope="module")
def residual():
    return resnet8()


def velocities(index, seed, undefined=0.0):
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(len(index), generator=generator, dtype=torch.float64)
    for _, part in index.items():  # layers of different speeds
        v[part] *= 10 ** float(2 * torch.rand((), generator=generator))
    v[torch.rand(len(index), generator=generator) < undefined] = NAN
    return v


def decided(policy, index, v):
    """As the freezer asks: an excluded neuron trains whatever the policy says."""
    return policy.frozen(3, index, v) & index.freezable


def places_of(mask):
    return mask.nonzero().squeeze(1).tolist()


@pytest.mark.parametrize("exclude", [(), ("fc", "layer3.0.conv1")])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_single_neurons_keep_the_budget(residual, share, exclude):
    index = indexed(residual, (1, 8, 8), exclude)
    for seed in range(4):
        v = velocities(index, seed, undefined=(seed % 2) * 0.02)
        inner = neq.AtEquilibrium(0.05)
        mask = decided(neq.Budget(inner, share), index, v)
        alone = decided(inner, index, v)
        assert index.flops(alone) > share * index.flops.dense  # there is something to do
        if not v.isnan().any():  # else whole layers can't freeze
            assert index.flops(mask) <= share * index.flops.dense
        assert not (alone & ~mask).any()
        assert not mask[v.isnan()].any()
        for _, part in index.items():
            added, trains = v[part][(mask & ~alone)[part]], v[part][~mask[part]]
            if len(added) and not trains.isnan().all():
                assert added.abs().max() <= trains.abs().nan_to_num(math.inf).min()


def test_an_excluded_layer_at_equilibrium_saves_nothing():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 64, bias=False))
    index = indexed(model, (8,), exclude=["1"])
    v = torch.ones(72, dtype=torch.float64)
    v[8:] = 1e-9
    mask = decided(neq.Budget(neq.AtEquilibrium(1e-3), 0.95), index, v)
    assert index.flops(mask) <= 0.95 * index.flops.dense


@pytest.mark.parametrize(
    "groups", ["layers", 10, ["conv1", "bn1", "layer1.0.conv1", "layer2", "layer3"]]
)
@pytest.mark.parametrize("exclude", [(), ("layer3.0.conv2",)])
def test_groups_keep_the_budget_and_are_never_split(residual, groups, exclude):
    index = indexed(residual, (1, 8, 8), exclude)
    inner = neq.GroupEquilibrium(0.05, groups=groups)
    bundles = inner.speeds(index, torch.ones(len(index)))
    for seed, share in enumerate((0.9, 0.7, 0.8)):
        v = velocities(index, seed)
        v = torch.ones_like(v) if seed == 2 else v  # all alike
        budget = neq.Budget(inner, share)
        mask = decided(budget, index, v)
        assert index.flops(mask) <= share * index.flops.dense
        assert not (decided(inner, index, v) & ~mask).any()
        whole = [g for g, _ in bundles if mask[g].all()]
        assert all(mask[g].all() or not mask[g].any() for g, _ in bundles)
        assert mask.any()
        assert sum(map(len, whole)) == int(mask.sum())


def test_a_group_without_a_velocity_trains():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    index = indexed(model, (4,))
    v = torch.tensor([NAN, NAN, NAN, 1, *[5.0] * 4, *[9.0] * 4], dtype=torch.float64)
    mask = neq.Budget(neq.GroupEquilibrium(1e-3), 0.7).frozen(2, index, v)
    assert places_of(mask) == [*range(4, 12)]
    undefined = torch.full_like(v, NAN)
    for policy in (neq.GroupEquilibrium(1e-3), neq.AtEquilibrium(1e-3)):
        assert not neq.Budget(policy, 0.5).frozen(2, index, undefined).any()


@pytest.mark.parametrize("inner", [neq.AtEquilibrium(1.0), neq.GroupEquilibrium(1.0, groups=8)])
def test_nothing_is_added_below_the_budget(residual, inner):
    index = indexed(residual, (1, 8, 8))
    v = velocities(index, 1)
    mask = inner.frozen(3, index, v)
    share = index.flops(mask) / index.flops.dense
    assert 0 < share < 1
    assert torch.equal(neq.Budget(inner, share + 1e-9).frozen(3, index, v), mask)
    more = neq.Budget(inner, share - 1e-3).frozen(3, index, v)
    assert not (mask & ~more).any()
    assert (more & ~mask).any()


@pytest.mark.parametrize("share", [1.0, 0.9, 0.75, 0.5, 0.3, 0.125, 0.1])
def test_of_a_single_layer_the_chosen_set_is_the_best_of_all(share):
    index = indexed(nn.Linear(3, 8), (3,))
    for seed in range(6):
        v = velocities(index, seed)
        kept = next(
            sets
            for count in range(9)
            if (
                sets := [
                    c
                    for c in combinations(range(8), count)
                    if index.flops(~torch.isin(torch.arange(8), torch.tensor(c)) == 0)
                    <= share * index.flops.dense
                ]
            )
        )
        best = min(kept, key=lambda c: sum(abs(float(v[i])) for i in c))
        mask = neq.Budget(neq.AtEquilibrium(0.0), share).frozen(2, index, v)
        assert places_of(mask) == list(best)


class Branches(nn.Module):
    def __init__(self, narrow=(2, 4), wide=(64, 4)):
        super().__init__()
        self.narrow, self.wide = nn.Linear(*narrow), nn.Linear(*wide)

    def forward(self, x):
        inputs = x.split([self.narrow.in_features, self.wide.in_features], 1)
        return self.narrow(inputs[0]), self.wide(inputs[1])


def test_of_equal_velocities_those_that_save_more_stand_still():
    """A row of the wide layer saves 64 of 264, one of the narrow layer 2."""
    index = indexed(Branches(), (66,))

    def chosen(narrow, wide, share):
        v = torch.tensor([narrow] * 4 + [wide] * 4, dtype=torch.float64)
        return places_of(neq.Budget(neq.AtEquilibrium(1e-3), share).frozen(2, index, v))

    assert chosen(1.0, 1.0, 0.99) == [4]
    assert chosen(-1.0, 31.0, 0.7) == [4, 5]  # 31 / 64 is less than 1 / 2
    assert chosen(1.0, -33.0, 0.985) == [0, 1]


def test_savings_are_those_of_one_neuron_and_not_of_its_layer():
    """Of 40 a row of the first layer saves 4, and one of the second, which has 16, saves 2."""
    index, v = indexed(Branches((4, 2), (2, 16)), (6,)), torch.ones(18, dtype=torch.float64)
    assert places_of(neq.Budget(neq.AtEquilibrium(1e-3), 0.9).frozen(2, index, v)) == [0]
    single = neq.Budget(neq.GroupEquilibrium(1e-3, groups=1), 0.8)
    assert places_of(single.frozen(2, index, v)) == [0, 1]


def test_input_gradients_that_end_count_as_saved():
    """The first layer's weight gradient costs 64, the second's as much as its input gradient."""
    index = indexed(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (8,))
    v = torch.ones(16, dtype=torch.float64)
    for policy in (neq.AtEquilibrium(1e-3), neq.GroupEquilibrium(1e-3)):
        v[:8], v[8:] = 1.9, 1.0  # each saves 16 a row, against 8
        assert places_of(neq.Budget(policy, 0.34).frozen(2, index, v)) == list(range(8))
        v[:8] = 2.1
        found = places_of(neq.Budget(policy, 0.67).frozen(2, index, v))
        assert found == list(range(8, 16))


def test_alignment_goes_on_from_the_budget(residual):
    index = indexed(residual, (1, 8, 8))
    optimizer = torch.optim.SGD(residual.parameters(), 0.05)
    policy = neq.Budget(neq.AtEquilibrium(1e-6, recursion="reference", align=8), 0.6)
    freezer = neq.NeuronFreezer(residual, optimizer, policy, flops=index.flops)
    assert freezer.neurons.flops is index.flops
    x = [torch.randn(8, 1, 8, 8)]
    freezer.update(x)
    assert not freezer.frozen.any()
    for p in residual.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.05)
    freezer.update(x)
    assert index.flops(freezer.frozen) <= 0.6 * index.flops.dense
    assert freezer.moved.any()
    for _, part in index.items():
        still = int(freezer.frozen[part].sum())
        assert not still or (part.stop - part.start - still) % 8 == 0
    freezer.remove()


def test_a_budget_out_of_reach_names_the_least_share():
    """All may freeze but the last layer's 24 of 96."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    flops = neq.RequiredFlops.count(model, (4,), neq.NeuronIndex(model))
    policies = [neq.Budget(inner, 0.24) for inner in (neq.AtEquilibrium(), neq.GroupEquilibrium())]
    policies += [kind(0.24) for kind in (neq.RandomLayers, neq.SlowestLayers, neq.FreezeFirst)]
    for policy in policies:
        with pytest.raises(ValueError, match=r"out of reach.* 0\.25 "):
            neq.NeuronFreezer(model, optimizer, policy, exclude=["1"], flops=flops)
        freezer = neq.NeuronFreezer(model, optimizer, policy, exclude=["1"])
        with pytest.raises(ValueError, match=r"out of reach.* 0\.25 "):
            freezer.update([torch.randn(2, 4)])
        freezer.remove()
    for kind in (neq.RandomLayers, neq.FreezeFirst):
        policy = kind(0.25)
        freezer = neq.NeuronFreezer(model, optimizer, policy, exclude=["1"], flops=flops)
        freezer.update()
        freezer.update()
        assert freezer.frozen.tolist() == [True] * 3 + [False] * 2
        freezer.remove()


@pytest.mark.parametrize("flops", [0.0, -0.5, 1.01, NAN])
def test_shares_out_of_range(flops):
    makers = [neq.RandomLayers, neq.SlowestLayers, neq.FreezeFirst]
    makers.append(lambda share: neq.Budget(neq.AtEquilibrium(), share))
    for make in makers:
        with pytest.raises(ValueError, match="flops must be a share"):
            make(flops)


def test_alignment_up_has_no_budget():
    for kind in (neq.AtEquilibrium, neq.GroupEquilibrium):
        with pytest.raises(ValueError, match="'up' lets more train"):
            neq.Budget(kind(align=8, rounding="up"), 0.5)
        neq.Budget(kind(align=8, rounding="down"), 0.5)
    with pytest.raises(ValueError, match="mu must be"):
        neq.SlowestLayers(0.5, mu=1.0)


def build(model, policy=None, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    policy = policy or neq.Budget(neq.AtEquilibrium(1e-4), 0.6)
    return optimizer, neq.NeuronFreezer(model, optimizer, policy, exclude=["fc2"], **arguments)


def epochs(model, optimizer, freezer, numbers, once=False):
    masks = []
    for epoch in numbers:
        torch.manual_seed(epoch)
        train_epoch(model, optimizer, random_batches(seed=epoch))
        batches = random_batches(3, 5, seed=99)
        freezer.update((batch for batch in batches) if once else batches)
        masks.append(freezer.frozen.clone())
    return masks


def test_the_freezer_keeps_the_budget_once_velocities_exist(net):
    required = neq.RequiredFlops.count(net, (3, 6, 6), neq.NeuronIndex(net))
    optimizer, freezer = build(net)
    freezer.update(random_batches(3, 5, seed=99))
    assert freezer.neurons.flops.dense == required.dense
    counted = freezer.neurons.flops
    masks = epochs(net, optimizer, freezer, range(5))
    assert freezer.neurons.flops is counted  # once is enough
    assert [bool(mask.any()) for mask in masks] == [False, True, True, True, True]
    for mask in masks[1:]:
        assert required(mask) <= 0.6 * required.dense
        assert not mask[freezer.neurons["fc2"]].any()


@pytest.mark.parametrize("groups", [None, "layers"])
def test_a_resumed_freezer_counts_again_and_loses_no_sample(net, groups):
    other = copy.deepcopy(net)
    inner = neq.AtEquilibrium(1e-4) if groups is None else neq.GroupEquilibrium(1e-4, groups=groups)
    policy = neq.Budget(inner, 0.6)
    optimizer, freezer = build(net, policy)
    freezer.update(batch for batch in random_batches(3, 5, seed=99))
    epochs(net, optimizer, freezer, range(3))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (net, optimizer, freezer)], buffer)
    buffer.seek(0)
    resumed = (other, *build(other, policy))
    for part, state in zip(resumed, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert resumed[2].frozen.any()
    through = epochs(net, optimizer, freezer, range(3, 6))
    again = epochs(*resumed, range(3, 6), once=True)
    assert all(torch.equal(a, b) for a, b in zip(through, again, strict=True))
    assert torch.equal(freezer.reading.velocity, resumed[2].reading.velocity)
    assert freezer.neurons.flops.dense == resumed[2].neurons.flops.dense


POLICIES = [neq.Budget(neq.AtEquilibrium(), 0.5), neq.RandomLayers(0.3), neq.FreezeFirst(0.3)]


@pytest.mark.parametrize("policy", [*POLICIES, neq.SlowestLayers(0.5)])
def test_without_a_batch_there_is_nothing_to_count_by(net, policy):
    for nothing in ((), iter([])):
        with pytest.raises(ValueError, match="needs one validation batch"):
            build(net, policy)[1].update(nothing)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_policy_without_velocity_looks_at_one_batch_once(net, policy):
    def one():
        yield random_batches(1)[0]
        raise AssertionError("looked at a second batch")

    _, freezer = build(net, policy)
    freezer.update(one())
    for _ in range(2):
        freezer.update(one())
        assert freezer.frozen.any()
    assert freezer.state_dict()["before"] == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_counting_on_a_loader_leaves_the_random_stream_alone(net, policy):
    _, freezer = build(net, policy)
    loader = DataLoader(random_batches(1, 12)[0][0], batch_size=4, shuffle=True)
    state = torch.get_rng_state()
    freezer.update(loader)
    assert torch.equal(torch.get_rng_state(), state)
