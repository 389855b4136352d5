"""Layers that the user keeps from training, and statistics that are held."""

import copy

import pytest
import torch
from conftest import random_batches
from torch import nn
from torch.utils.checkpoint import checkpoint
from trials import small

import neq
from harness.flops.costs import count_costs
from harness.flops.oracle import backward_flops_by_torch
from harness.train import assembly
from harness.train.tuning import Tuning
from neq import compiled
from neq.required import BATCH


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 4),
    )


def sgd(net):
    trained = [p for p in net.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.1, momentum=0.9, weight_decay=0.1)


def backward(net, model=None):
    (inputs, targets), *_ = random_batches(1)
    nn.functional.cross_entropy((model or net)(inputs), targets).backward()


def fix(net, *names, now=False):
    for name in names:
        net[int(name)].requires_grad_(now)


def test_who_is_fixed_follows_what_needs_a_gradient(net):
    neurons = neq.NeuronIndex(net)
    assert not neurons.fixed.any()
    fix(net, "0", "4")
    assert torch.equal(neurons.fixed, neurons.select(["0", "4"]))
    assert torch.equal(neurons.freezable, ~neurons.fixed)
    net[0].bias.requires_grad_(True)  # what trains in part can freeze
    assert torch.equal(neurons.fixed, neurons.select(["4"]))
    neurons.excluded = neurons.select(["7"])
    assert torch.equal(neurons.freezable, ~neurons.select(["4", "7"]))


POLICIES = [
    neq.FreezeAfter(1),
    neq.Random(0.5),
    neq.SmallestVelocity(0.5),
    neq.AtEquilibrium(eps=9),
    neq.AtEquilibrium(eps=9, align=8),
    neq.GroupEquilibrium(eps=9),
    neq.GroupEquilibrium(eps=9, groups=["0", "3"]),
    neq.GroupEquilibrium(eps=9, groups=3),
    neq.Budget(neq.AtEquilibrium(eps=0), 0.6),
    neq.Budget(neq.GroupEquilibrium(eps=0), 0.6),
    neq.RandomLayers(0.05),
    neq.SlowestLayers(0.05),
    neq.FreezeFirst(0.05),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_no_policy_freezes_what_is_fixed(net, policy):
    fix(net, "0", "1")
    optimizer = sgd(net)
    freezer = neq.NeuronFreezer(net, optimizer, policy, exclude=["7"])
    inputs, before = torch.randn(8, 3, 6, 6), net[0].weight.detach().clone()
    counts = []
    for epoch in range(6):
        freezer.update([inputs])
        assert not (freezer.frozen & freezer.neurons.fixed).any()
        assert not (freezer.moved & freezer.neurons.fixed).any()
        assert freezer.plan["0"].kernel == "dense" or epoch > 4
        counts.append(int(freezer.frozen.sum()))
        if epoch == 3:
            fix(net, "3")
        if epoch == 4:
            fix(net, "0", "1", "3", now=True)
            optimizer.add_param_group({"params": [*net[:2].parameters()]})
        backward(net)
        optimizer.step()
        optimizer.zero_grad()
        assert epoch > 3 or torch.equal(net[0].weight, before)
    assert counts[3] > 0
    assert counts[4] <= 8
    state = freezer.state_dict()
    fix(net, "3")
    freezer.load_state_dict(state)
    expected = state["frozen"] & ~freezer.neurons.select(["3"])
    assert torch.equal(freezer.frozen, expected)


def test_a_budget_that_fixing_a_layer_keeps_freezes_nobody(net):
    freezer = neq.NeuronFreezer(net, sgd(net), neq.Budget(neq.AtEquilibrium(eps=0), 0.6))
    for _ in range(3):
        freezer.update([torch.randn(8, 3, 6, 6)])
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    assert freezer.frozen.any()
    fix(net, "0", "1", "3")
    freezer.update([torch.randn(8, 3, 6, 6)])
    assert not freezer.frozen.any()


def test_a_layer_is_fixed_and_freed_while_its_rows_are_frozen(net):
    optimizer = sgd(net)
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    mask = freezer.neurons.select(["3"])
    mask[freezer.neurons["3"].start] = False
    freezer.freeze(mask)
    before = net[3].weight.detach().clone()

    def step():
        backward(net)
        optimizer.step()
        optimizer.zero_grad()

    fix(net, "3")
    step()
    freezer.update()
    assert not freezer.frozen.any()
    step()
    assert torch.equal(net[3].weight, before)
    fix(net, "3", now=True)
    freezer.freeze(mask)
    step()
    assert torch.equal(freezer.frozen, mask)
    assert torch.equal(net[3].weight[1:], before[1:])
    assert (net[3].weight[0] != before[0]).any()


def test_a_group_of_fixed_layers_is_no_group_and_no_mistake(net):
    policy = neq.GroupEquilibrium(groups=["0", "3"])
    fix(net, "3")
    neurons = neq.NeuronIndex(net)
    (group,) = neq.groups.members(policy.groups, neurons)
    assert group.tolist() == list(range(8))
    neurons.excluded = neurons.select(["3"])
    with pytest.raises(ValueError, match="'3' has no neuron that may freeze"):
        neq.groups.members(policy.groups, neurons)


@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize(
    "fixed", [["0."], ["0.", "1."], ["3."], ["4.", "7."], ["0.weight"], ["3.weight"], ["7."]]
)
def test_counted_is_measured_where_layers_are_fixed(net, fixed, gradient):
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(not name.startswith(tuple(fixed)))
    costs = count_costs(net, (3, 6, 6))
    for seed, share in enumerate((0.0, 0.4, 0.8, 1.0)):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(len(costs.neurons), generator=generator) < share
        mask &= costs.neurons.freezable
        plan = neq.plan(costs.neurons, mask, gradient)
        counted = costs.backward(mask, BATCH, plan)
        seen = backward_flops_by_torch(copy.deepcopy(net), (3, 6, 6), mask, gradient)
        assert seen == [counted.executed] * len(seen)
        assert counted.required <= counted.executed <= counted.dense


def statistics(net):
    return [(m.running_mean.clone(), m.running_var.clone()) for m in (net[1], net[4])]


def moved(net, before):
    """Which statistics are others than `before`: bool [neurons] of each norm."""
    pairs = zip(before, statistics(net), strict=True)
    return [(a[0] != b[0]) | (a[1] != b[1]) for a, b in pairs]


def _checkpointed(net, inputs):
    checkpoint(net, inputs, use_reentrant=False).sum().backward()


def _without_gradient(net, inputs):
    with torch.no_grad():
        net(inputs)


FORWARDS = {
    "training": lambda net, inputs: net(inputs).sum().backward(),
    "checkpointed": _checkpointed,
    "no gradient": _without_gradient,
    "functional": lambda net, inputs: torch.func.functional_call(net, {}, (inputs,)),
}


@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("how", FORWARDS)
def test_statistics_of_frozen_neurons_are_held(net, how, whole, gradient):
    freezer = neq.NeuronFreezer(
        net, sgd(net), neq.Everyone(), gradient=gradient, hold_statistics=True
    )
    mask = freezer.neurons.select(["1", "4"])
    if not whole:
        mask[::3] = False
    freezer.freeze(mask)
    before, keys = statistics(net), list(net.state_dict())
    for _ in range(2):
        FORWARDS[how](net, torch.randn(8, 3, 6, 6))
    for layer, changed in zip(("1", "4"), moved(net, before), strict=True):
        assert torch.equal(changed, ~mask[freezer.neurons[layer]])
    assert list(net.state_dict()) == keys
    freezer.remove()
    FORWARDS[how](net, torch.randn(8, 3, 6, 6))
    assert all(changed.all() for changed in moved(net, before))


def test_outputs_and_gradients_are_those_without_holding(net):
    plain = copy.deepcopy(net)
    for model, hold in ((net, True), (plain, False)):
        freezer = neq.NeuronFreezer(model, sgd(model), neq.Everyone(), hold_statistics=hold)
        freezer.freeze(torch.arange(len(freezer.frozen)) % 3 == 0)
        backward(model)
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    still = torch.arange(8, 16) % 3 == 0
    assert torch.equal(net[1].running_mean[~still], plain[1].running_mean[~still])
    assert (plain[1].running_mean[still] != 0).all()
    assert (net[1].running_mean[still] == 0).all()
    assert int(net[1].num_batches_tracked) == 1


@pytest.mark.slow
def test_in_a_graph_another_mask_is_no_new_graph(net):
    called = torch.compile(net, backend="aot_eager", fullgraph=True)
    freezer = neq.NeuronFreezer(called, sgd(net), neq.Everyone(), hold_statistics=True)
    compiled.forgotten()
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.5, 0.8):
        mask = torch.rand(len(freezer.frozen), generator=generator) < share
        freezer.freeze(mask)
        before = statistics(net)
        for _ in range(2):
            backward(net, called)
        for layer, changed in zip(("1", "4"), moved(net, before), strict=True):
            assert torch.equal(changed, ~mask[freezer.neurons[layer]])
    assert compiled.graphs() == 1


@pytest.mark.parametrize(
    "norm, shape",
    [
        (nn.BatchNorm1d, (8, 6)),
        (nn.BatchNorm3d, (8, 6, 2, 2, 2)),
        (nn.SyncBatchNorm, (8, 6, 3)),
    ],
)
def test_norms_of_other_kinds(norm, shape):
    layer = norm(6)
    freezer = neq.NeuronFreezer(layer, sgd(layer), neq.Everyone(), hold_statistics=True)
    freezer.freeze(torch.arange(6) < 2)
    layer(torch.randn(shape))
    assert (layer.running_mean == 0).tolist() == [True] * 2 + [False] * 4
    assert (layer.running_var == 1).tolist() == [True] * 2 + [False] * 4
    layer.eval()
    layer(torch.randn(shape))
    bare = norm(6, track_running_stats=False)
    neq.NeuronFreezer(bare, sgd(bare), neq.Everyone(), hold_statistics=True)
    bare(torch.randn(shape))


def test_by_default_statistics_move_on(net):
    freezer = neq.NeuronFreezer(net, sgd(net), neq.Everyone())
    freezer.freeze(torch.ones_like(freezer.frozen))
    before = statistics(net)
    backward(net)
    assert all(changed.all() for changed in moved(net, before))


def test_a_suite_may_hold_statistics():
    held = small("random", "methods.random.hold_statistics=true", "methods.random.keep=0.0")
    usual = small("random", "methods.random.keep=0.0")
    explicit = small("random", "methods.random.hold_statistics=false", "methods.random.keep=0.0")
    assert held.key != usual.key
    assert explicit.key == usual.key
    dumped = [spec.suite.methods["random"].model_dump() for spec in (held, usual)]
    assert dumped[0]["hold_statistics"]
    assert "hold_statistics" not in dumped[1]  # as it was before there was one
    moved = []
    for spec in (held, usual):
        work = assembly.assemble(spec, torch.device("cpu"), None, {"tuning": Tuning().to_json()})
        work.method.freezer.freeze(work.method.freezer.neurons.select(["bn1"]))
        work.model.train()(torch.randn(4, *spec.suite.model.input))
        moved.append(bool((work.model.bn1.running_mean != 0).any()))
    assert moved == [False, True]
