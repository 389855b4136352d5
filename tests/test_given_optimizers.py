"""Optimizers in other people's loops: several, wrapped, nested, or not the one given."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import random_batches
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks as optimizer_hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import neq
from neq import pruning
from neq.moved import _records, fingerprints

ROWS = slice(0, 4)  # of the convolution: these are frozen
MOVED = "rows moved while they were frozen, in layer 0: give NeuronFreezer every optimizer"


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def freezer_of(net, optimizer, policy=None):
    """One that has frozen ROWS."""
    freezer = neq.NeuronFreezer(net, optimizer, policy or neq.Everyone())
    freeze(freezer)
    return freezer


def freeze(freezer):
    mask = torch.zeros_like(freezer.frozen)
    mask[ROWS] = True
    freezer.freeze(mask)


def values(net):
    return [p[ROWS].detach().clone() for p in net[0].parameters()]


def stood_still(net, before):
    return all(map(torch.equal, values(net), before))


def backward(net, seed=0):
    (inputs, targets), *_ = random_batches(1, seed=seed)
    nn.functional.cross_entropy(net(inputs), targets).backward()


def train(net, *optimizers, steps=3):
    for step in range(steps):
        backward(net, seed=step)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as it is usually written."""

    def __init__(self, parameters, rho=0.05):
        super().__init__(parameters, {"rho": rho})
        self.base = sgd(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        with_gradient = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in with_gradient]).norm()
        for p in with_gradient:
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * (0.05 / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old"]
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def train_with_sam(net, sam, by_closure):
    for step in range(3):
        backward(net, step)
        if by_closure:
            sam.step(lambda step=step: backward(net, step))
        else:
            sam.first_step()
            backward(net, step)
            sam.second_step()


@pytest.mark.parametrize("by_closure", [False, True])
@pytest.mark.parametrize("give", ["base", "both", "outer"])
def test_sam_over_sgd(net, give, by_closure):
    sam = Sam(net.parameters())
    train_with_sam(net, sam, by_closure)  # momentum
    chosen = {"base": sam.base, "both": [sam, sam.base], "outer": sam}[give]
    freezer = freezer_of(net, chosen)
    before, trains = values(net), net[0].weight[4:].detach().clone()
    train_with_sam(net, sam, by_closure)
    assert (net[0].weight[4:] != trains).any()
    if give == "outer" and not by_closure:  # its own `step` is never called
        assert not stood_still(net, before)
        with pytest.raises(ValueError, match=MOVED):
            freezer.update()
    else:
        assert stood_still(net, before)
        freezer.update()


def test_two_optimizers_each_with_its_part(net):
    def two():
        return torch.optim.AdamW(net[0].parameters(), weight_decay=0.1), sgd(net[3].parameters())

    body, head = two()
    with pytest.raises(ValueError, match="rows of layer 0 would freeze, and no given optimizer"):
        freezer_of(net, head)
    freezer = neq.NeuronFreezer(net, (each for each in (body, head, body)), neq.Everyone())
    train(net, body, head)
    freeze(freezer)
    assert (body.state[net[0].weight]["exp_avg"][ROWS] == 0).all()
    assert (body.state[net[0].weight]["exp_avg"][4:] != 0).any()
    before = values(net)
    train(net, body, head)
    assert stood_still(net, before)
    freezer.update()
    freezer.remove()
    train(net, body, head)
    assert not stood_still(net, before)


def test_each_optimizer_keeps_the_rows_that_it_holds(net):
    """One steps alone, and gradients that another is to step stay as they are."""
    body, head = sgd(net[0].parameters()), sgd(net[3].parameters())
    freezer = neq.NeuronFreezer(net, [body, head], neq.Everyone())
    mask = torch.ones_like(freezer.frozen)
    mask[-1] = False
    freezer.freeze(mask)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    head.step()
    assert (net[0].weight.grad == 1).all()
    body.step()
    assert net[0].weight.grad is None


def test_nothing_has_changed_where_rows_are_in_no_optimizer(net):
    freezer = neq.NeuronFreezer(net, sgd(net[3].parameters()), neq.Everyone())
    only_head = torch.zeros_like(freezer.frozen)
    only_head[8:10] = True
    freezer.freeze(only_head)
    with pytest.raises(ValueError, match="layer 0"):
        freeze(freezer)
    assert torch.equal(freezer.frozen, only_head)
    freezer.remove()


def test_parameters_may_join_later(net):
    optimizer = sgd(net[3].parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    freezer.update()
    optimizer.add_param_group({"params": list(net[0].parameters())})
    freeze(freezer)
    before = values(net)
    train(net, optimizer)
    assert stood_still(net, before)
    freezer.update()


@pytest.mark.parametrize("steps", [0, 3], ids=["at once", "in the middle"])
def test_an_optimizer_that_is_rebuilt(net, steps):
    given = sgd(net.parameters())
    train(net, given)
    freezer = freezer_of(net, given)
    train(net, given, steps=steps)
    before, rebuilt = values(net), sgd(net.parameters())
    train(net, rebuilt)
    assert not stood_still(net, before)
    with pytest.raises(ValueError, match=MOVED):
        freezer.update()
    freezer.update()  # it can be used on
    freezer.remove()


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: never made as an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)

    def step(self, closure=None):
        self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


def test_wrappers_without_hooks(net):
    wrapped = Wrapper(Wrapper(sgd(net.parameters())))
    freezer = freezer_of(net, wrapped)
    before = values(net)
    train(net, wrapped)
    assert stood_still(net, before)
    freezer.update()
    pruner = pruning.MagnitudePruner(net, wrapped)
    pruner.prune(0.5)
    train(net, wrapped)
    assert pruner.masks.size().parameters_left < pruner.masks.size().parameters
    assert int((net[0].weight == 0).sum()) > 0


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda net: object(), TypeError, "must be a torch.optim.Optimizer, not object: give the"),
        (lambda net: "adam", TypeError, "not str"),
        (lambda net: net.parameters(), TypeError, "not Parameter"),
        (lambda net: [sgd(net.parameters()), None], TypeError, "not NoneType"),
        (lambda net: Wrapper(None), TypeError, "not Wrapper"),
        (lambda net: [], ValueError, "no optimizer was given"),
        (lambda net: [torch.optim.LBFGS(net.parameters())], ValueError, "LBFGS"),
        (lambda net: Wrapper(torch.optim.LBFGS(net.parameters())), ValueError, "LBFGS"),
    ],
)
def test_what_is_no_optimizer(net, make, error, message):
    with pytest.raises(error, match=message):
        neq.NeuronFreezer(net, make(net))


def test_a_step_that_calls_the_step_of_its_base_class(net):
    class Decayed(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.mul_(0.9)

    sgd(net.parameters())  # now the base class's step has hooks, too
    optimizer = Decayed(net.parameters(), lr=0.1)
    freezer = freezer_of(net, optimizer)
    before = values(net)
    train(net, optimizer)
    assert stood_still(net, before)
    freezer.update()


EDITS = {
    "rows": lambda net: net[0].weight[0].add_(1),
    "data": lambda net: net[0].weight.data[0].add_(1),
    "bias": lambda net: net[0].bias.data[1].mul_(1.001),
    "signs": lambda net: net[0].weight.data[2].view(-1)[1:4:2].neg_(),
    "order": lambda net: net[0].weight.data[2].copy_(net[0].weight.data[2].flip(-1)),
    "layer": lambda net: net[0].reset_parameters(),
}


@pytest.mark.parametrize("steps", [(0, 0), (0, 2), (2, 0), (2, 2)], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_rows_that_are_changed_by_hand(net, edit, steps):
    optimizer = sgd(net.parameters())
    train(net, optimizer)
    freezer = freezer_of(net, optimizer)
    train(net, optimizer, steps=steps[0])
    with torch.no_grad():
        EDITS[edit](net)
    train(net, optimizer, steps=steps[1])
    with pytest.raises(ValueError, match=MOVED):
        freezer.update()


def test_a_loop_that_steps_by_hand(net):
    freezer = freezer_of(net, sgd(net.parameters()))
    backward(net)
    with torch.no_grad():
        for p in net.parameters():
            p -= 0.1 * p
    with pytest.raises(ValueError, match=MOVED):
        freezer.update()


def test_what_trains_may_be_changed_by_hand(net):
    optimizer = sgd(net.parameters())
    freezer = freezer_of(net, optimizer)
    train(net, optimizer)
    with torch.no_grad():
        net[0].weight[4:] += 1
        net[0].weight[0] = net[0].weight[0].clone()
        net[3].reset_parameters()
    freezer.update()


def _by_data(ours, theirs):
    ours.data, theirs.data = theirs.data, ours.data


def _in_place(ours, theirs):
    kept = ours.clone()
    ours.copy_(theirs)
    theirs.copy_(kept)


SWAPS = {
    "copied data": lambda ours, theirs: _in_place(ours.data, theirs.data),
    "data": _by_data,
    "in place": _in_place,
    "tensors": torch.utils.swap_tensors,
}


def swap(how, net, average):
    if how == "loaded":
        kept = copy.deepcopy(net.state_dict())
        net.load_state_dict(average.module.state_dict())
        average.module.load_state_dict(kept)
        return
    with torch.no_grad():
        for ours, theirs in zip(net.parameters(), average.parameters(), strict=True):
            SWAPS[how](ours, theirs)


class More(neq.Everyone):
    """Two neurons more in each epoch, up to eight."""

    def frozen(self, epoch, neurons, velocity):
        return torch.arange(len(neurons)) < min(2 * epoch, 8)


@pytest.mark.parametrize("policy", [More(), neq.FreezeAfter(2)], ids=["more", "all"])
@pytest.mark.parametrize("during", [False, True], ids=["before", "during"])
@pytest.mark.parametrize("how", [*SWAPS, "loaded"])
def test_averaged_weights_are_swapped_in_and_back(net, how, during, policy):
    optimizer = sgd(net.parameters())
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    freezer = neq.NeuronFreezer(net, optimizer, policy)
    for _ in range(5):
        swap(how, net, average)
        if not during:
            swap(how, net, average)
        freezer.update()
        freezer.freeze(freezer.frozen)
        if during:
            swap(how, net, average)
        for _ in range(3):
            train(net, optimizer, steps=1)
            average.update_parameters(net)
    assert freezer.frozen.any()
    kept = values(net)
    train(net, optimizer)
    assert all(torch.equal(a[:2], b[:2]) for a, b in zip(values(net), kept, strict=True))


def test_averaged_weights_that_stay_are_found_one_update_later(net):
    optimizer = sgd(net.parameters())
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    freezer = neq.NeuronFreezer(net, optimizer, More())
    for _ in range(3):
        freezer.update()
        train(net, optimizer)
        average.update_parameters(net)
    swap("copied data", net, average)
    freezer.update()
    train(net, optimizer)
    with pytest.raises(ValueError, match=MOVED):
        freezer.update()


def test_rows_that_moved_are_found_though_each_update_is_during_a_swap(net):
    optimizer = sgd(net.parameters())
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    freezer = neq.NeuronFreezer(net, optimizer, More())

    def epoch():
        train(net, optimizer)
        average.update_parameters(net)
        swap("copied data", net, average)
        try:
            freezer.update()
        finally:
            swap("copied data", net, average)

    for _ in range(4):
        epoch()
    net[0].weight.data[0] += 1
    with pytest.raises(ValueError, match=MOVED):
        epoch()


@pytest.mark.parametrize("part", [lambda net: net, lambda net: net[0]], ids=["model", "layer"])
@pytest.mark.parametrize("plain", [False, True])
def test_loaded_weights_have_not_moved(net, part, plain):
    other = copy.deepcopy(part(net).state_dict())
    optimizer = sgd(net.parameters())
    train(net, optimizer)
    freezer = freezer_of(net, optimizer)
    train(net, optimizer)
    if plain:
        with freezer.plain():
            part(net).load_state_dict(other)
    else:
        part(net).load_state_dict(other)
    train(net, optimizer)
    freezer.update()
    freeze(freezer)
    net[0].weight.data[0] += 1  # from then on they are watched again
    with pytest.raises(ValueError, match=MOVED):
        freezer.update()


def test_rows_that_moved_before_are_found_after_plain(net):
    freezer = freezer_of(net, sgd(net.parameters()))
    net[0].weight.data[0] += 1
    with freezer.plain():
        pass
    with pytest.raises(ValueError, match=MOVED):
        freezer.update()


def test_other_models_in_the_process_do_not_matter(net):
    other = copy.deepcopy(net)
    optimizer, others = sgd(net.parameters()), sgd(other.parameters())
    freezer = freezer_of(net, optimizer)
    before = values(net)
    for _ in range(3):
        train(net, optimizer, steps=1)
        train(other, others, steps=1)
    freezer.update()
    assert stood_still(net, before)


def test_a_freezer_that_is_gone_watches_nobody(net):
    gc.collect()
    count, hooks = len(_records), len(optimizer_hooks)
    freezer = freezer_of(net, sgd(net.parameters()))
    assert len(_records) == count + 1
    freezer.remove()
    assert len(_records) == count
    other = copy.deepcopy(net)
    forgotten = weakref.ref(freezer_of(other, sgd(other.parameters())))
    del other
    gc.collect()
    assert forgotten() is None
    assert len(_records) == count
    assert len(optimizer_hooks) == hooks


def test_a_freezer_may_be_collected_during_a_step_of_another_optimizer(net):
    other = copy.deepcopy(net)
    freezer_of(other, sgd(other.parameters()))
    optimizer = sgd(net.parameters())
    del other
    handle = register_optimizer_step_pre_hook(lambda *_: (gc.collect(), None)[1])
    try:
        train(net, optimizer)
    finally:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 2, 3, 8])
def test_each_change_of_a_value_changes_a_row_s_fingerprint(dtype, width):
    torch.manual_seed(0)
    weight, rows = torch.randn(20, width, 2).to(dtype), torch.arange(0, 20, 2)
    prints = fingerprints(weight, rows)
    assert torch.equal(prints, fingerprints(weight.clone(), rows))
    for first in range(width):
        for second in range(first + 1):
            changed = weight.clone()
            changed[:, first, 1] *= -1
            changed[:, second, 0 if first == second else 1] *= -1
            assert (fingerprints(changed, rows) != prints).all()
    zeros = torch.zeros(3, width, dtype=dtype)
    assert torch.equal(fingerprints(zeros, rows[:1]), fingerprints(-zeros, rows[:1]))
