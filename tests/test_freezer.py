import copy
import io

import pytest
import torch
from conftest import random_batches, train_epoch
from torch import nn

import neq

OPTIMIZERS = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **kw),
    "nesterov": lambda p, **kw: torch.optim.SGD(
        p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1, **kw
    ),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True, **kw),
    "rmsprop": lambda p, **kw: torch.optim.RMSprop(
        p, lr=0.01, momentum=0.9, weight_decay=0.1, **kw
    ),
    "adagrad": lambda p, **kw: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1, **kw),
}
VARIANTS = [{"foreach": True}, {"foreach": False}, {"fused": True}]


def half_of(freezer, seed=0):
    """A random half of the neurons, with one layer frozen whole and one not at all."""
    mask = torch.rand(len(freezer.neurons), generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[freezer.neurons["grouped"]] = True
    mask[freezer.neurons["fc1"]] = False
    return mask


def rows(net, freezer, mask):
    """Values of the parameters' rows that `mask` names, by layer."""
    return {
        layer.name: [p[mask[layer.neurons]].detach().clone() for p in layer.parameters]
        for layer in freezer.neurons.layers
    }


def equal(a, b):
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: next(iter(v.items())).__repr__())
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_rows_are_bit_identical_and_the_others_move(net, name, variant):
    if name == "rmsprop" and "fused" in variant:
        variant = {}  # torch has none
    optimizer = OPTIMIZERS[name](net.parameters(), **variant)
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    train_epoch(net, optimizer, random_batches())  # momentum builds up before anything freezes
    mask = half_of(freezer)
    freezer.freeze(mask)
    before, moving = rows(net, freezer, mask), rows(net, freezer, ~mask)
    train_epoch(net, optimizer, random_batches(seed=1))
    assert equal(rows(net, freezer, mask), before)
    for layer, (weight, *_) in rows(net, freezer, ~mask).items():
        if weight.dim() > 1:
            assert (weight != moving[layer][0]).flatten(1).any(1).all()
    freezer.freeze(~mask)
    before = rows(net, freezer, ~mask)
    train_epoch(net, optimizer, random_batches(seed=2))
    assert equal(rows(net, freezer, ~mask), before)


def test_gradients_right_after_the_backward(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    plain = copy.deepcopy(net)
    mask = half_of(freezer)
    freezer.freeze(mask)
    (inputs, targets), *_ = random_batches()
    for model in (net, plain):
        torch.manual_seed(0)
        nn.functional.cross_entropy(model(inputs), targets).backward()
    others = dict(plain.named_modules())
    for layer in freezer.neurons.layers:
        frozen = mask[layer.neurons]
        for ours, theirs in zip(layer.parameters, others[layer.name].parameters(), strict=True):
            if frozen.all():
                assert ours.grad is None
            else:
                torch.testing.assert_close(ours.grad[~frozen], theirs.grad[~frozen])
                assert (ours.grad[frozen] == 0).all()


def test_a_wholly_frozen_parameter_is_left_alone_by_the_optimizer(net):
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    train_epoch(net, optimizer, random_batches(2))
    freezer.freeze(half_of(freezer))
    weight = net.grouped.weight
    state = {name: value.clone() for name, value in optimizer.state[weight].items()}
    train_epoch(net, optimizer, random_batches(2))
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[weight].items())
    assert state["step"] == 2
    assert optimizer.state[net.fc1.weight]["step"] == 4


@pytest.mark.parametrize("name, moment", [("sgd", "momentum_buffer"), ("adam", "exp_avg")])
def test_the_first_moment_is_zero_when_a_row_trains_again(net, name, moment):
    optimizer = OPTIMIZERS[name](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    train_epoch(net, optimizer, random_batches())
    mask = half_of(freezer)
    freezer.freeze(mask)
    train_epoch(net, optimizer, random_batches())
    freezer.freeze(torch.zeros_like(mask))
    for layer in freezer.neurons.layers:
        frozen = mask[layer.neurons]
        for parameter in layer.parameters:
            assert (optimizer.state[parameter][moment][frozen] == 0).all()
            alive = optimizer.state[parameter][moment][~frozen]
            assert layer.name == "conv" or not len(alive) or (alive != 0).any()


def test_gradients_from_before_the_freeze_and_accumulated_ones_are_cleared(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    batches = random_batches()
    nn.functional.cross_entropy(net(batches[0][0]), batches[0][1]).backward()
    mask = half_of(freezer)
    freezer.freeze(mask)
    before = rows(net, freezer, mask)
    for inputs, targets in batches:  # accumulates
        nn.functional.cross_entropy(net(inputs), targets).backward()
    assert net.grouped.weight.grad is None
    assert (net.conv.weight.grad[mask[freezer.neurons["conv"]]] == 0).all()
    optimizer.step()
    assert equal(rows(net, freezer, mask), before)


def test_clipping_sees_only_what_trains(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone(), exclude=["fc2"])
    freezer.freeze(torch.ones_like(freezer.frozen))
    (inputs, targets), *_ = random_batches()
    nn.functional.cross_entropy(net(inputs), targets).backward()
    head = torch.stack([p.grad.norm() for p in net.fc2.parameters()]).norm()
    assert float(nn.utils.clip_grad_norm_(net.parameters(), 1.0)) == pytest.approx(float(head))
    assert [n for n, p in net.named_parameters() if p.grad is not None] == [
        "fc2.weight",
        "fc2.bias",
    ]


def test_eps_zero_is_plain_training_to_the_bit(net):
    plain = copy.deepcopy(net)
    for model, freeze in ((net, True), (plain, False)):
        torch.manual_seed(1)
        optimizer = OPTIMIZERS["nesterov"](model.parameters())
        freezer = neq.NeuronFreezer(model, optimizer, neq.AtEquilibrium(eps=0)) if freeze else None
        for epoch in range(4):
            if freezer:
                freezer.update(random_batches(1, seed=9))
            train_epoch(model, optimizer, random_batches(seed=epoch))
    ours, theirs = net.state_dict(), plain.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_when_each_policy_may_freeze(net):
    def masks(policy):
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        freezer = neq.NeuronFreezer(net, optimizer, policy, exclude=["fc2"])
        counts = []
        for epoch in range(5):
            freezer.update(random_batches(1))
            counts.append(int(freezer.frozen.sum()))
            train_epoch(net, optimizer, random_batches(seed=epoch))
        freezer.remove()
        return counts

    freezable = 8 + 8 + 8 + 8 + 6 + 6
    everything = [freezable] * 5
    # Before epoch 0 nothing freezes; the paper's first velocity exists after epoch 1, the
    # reference's after epoch 0; a policy that looks at no velocity may freeze from epoch 1.
    assert masks(neq.AtEquilibrium(eps=9)) == [0, 0, *everything[:3]]
    assert masks(neq.AtEquilibrium(eps=9, recursion="reference")) == [0, *everything[:4]]
    assert masks(neq.SmallestVelocity(0.0)) == [0, 0, *everything[:3]]
    assert masks(neq.Random(0.0)) == [0, *everything[:4]]
    assert masks(neq.FreezeAfter(3)) == [0, 0, 0, *everything[:2]]
    assert masks(neq.Everyone()) == [0] * 5


def test_a_policy_without_velocity_evaluates_nothing(net):
    freezer = neq.NeuronFreezer(net, OPTIMIZERS["sgd"](net.parameters()), neq.Random(0.5))

    def forbidden():
        raise AssertionError("looked at the validation set")
        yield

    freezer.update(forbidden())
    freezer.update(forbidden())
    assert freezer.frozen.any()
    assert freezer.state_dict()["before"] == {}


@pytest.mark.parametrize("similarity", ["dataset", "sample"])
def test_resumed_equals_uninterrupted(net, similarity):
    def build(model):
        optimizer = OPTIMIZERS["adam"](model.parameters())
        policy = neq.AtEquilibrium(eps=2e-3)
        freezer = neq.NeuronFreezer(model, optimizer, policy, similarity=similarity)
        return model, optimizer, freezer

    def epochs(parts, numbers):
        model, optimizer, freezer = parts
        for epoch in numbers:
            torch.manual_seed(epoch)
            train_epoch(model, optimizer, random_batches(seed=epoch))
            freezer.update(random_batches(1, seed=99))

    other = copy.deepcopy(net)
    through = build(net)
    through[2].update(random_batches(1, seed=99))
    epochs(through, range(3))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in through], buffer)
    epochs(through, range(3, 7))
    buffer.seek(0)
    resumed = build(other)
    for part, state in zip(resumed, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    epochs(resumed, range(3, 7))
    assert 0 < through[2].frozen.sum() < len(through[2].frozen)
    assert torch.equal(through[2].frozen, resumed[2].frozen)
    assert torch.equal(through[2].reading.velocity, resumed[2].reading.velocity)
    for name, value in net.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_going_back_to_a_checkpoint_in_the_same_process(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Random(0.5))
    parts = net, optimizer, freezer

    def epochs(numbers):
        for epoch in numbers:
            torch.manual_seed(epoch)
            train_epoch(net, optimizer, random_batches(seed=epoch))
            freezer.update()

    freezer.update()
    epochs(range(2))
    states = copy.deepcopy([part.state_dict() for part in parts])
    epochs(range(2, 4))
    first = copy.deepcopy(net.state_dict())
    for part, state in zip(parts, states, strict=True):
        part.load_state_dict(state)
    epochs(range(2, 4))
    assert all(torch.equal(value, first[name]) for name, value in net.state_dict().items())


def test_state_of_another_model_is_refused(net):
    freezer = neq.NeuronFreezer(net, OPTIMIZERS["sgd"](net.parameters()))
    layer = nn.Linear(2, 2)
    other = neq.NeuronFreezer(layer, OPTIMIZERS["sgd"](layer.parameters()))
    with pytest.raises(ValueError, match="other layers"):
        freezer.load_state_dict(other.state_dict())


@pytest.mark.parametrize("how", ["freeze", "remove"])
def test_no_way_to_thaw_brings_old_momentum_back(net, how):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    mask = half_of(freezer)
    freezer.freeze(mask)
    train_epoch(net, optimizer, random_batches())  # weight decay feeds the momentum of all rows
    rows_of_conv = mask[freezer.neurons["conv"]]
    assert (optimizer.state[net.conv.weight]["momentum_buffer"][rows_of_conv] != 0).any()
    if how == "freeze":
        freezer.freeze(torch.zeros_like(mask))
    else:
        freezer.remove()
    assert (optimizer.state[net.conv.weight]["momentum_buffer"][rows_of_conv] == 0).all()


def test_what_the_user_unfreezes_later_is_frozen_too(net):
    net.conv.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    net.conv.requires_grad_(True)
    mask = half_of(freezer)
    freezer.freeze(mask)
    (inputs, targets), *_ = random_batches()
    nn.functional.cross_entropy(net(inputs), targets).backward()
    assert (net.conv.weight.grad[mask[freezer.neurons["conv"]]] == 0).all()
    assert (net.conv.weight.grad[~mask[freezer.neurons["conv"]]] != 0).any()


def test_a_gradient_assigned_by_hand_moves_nothing_frozen(net):
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    mask = half_of(freezer)
    freezer.freeze(mask)
    before = rows(net, freezer, mask)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert equal(rows(net, freezer, mask), before)
    assert net.grouped.weight.grad is None


def test_an_excluded_layer_stays_free_when_another_s_state_is_loaded(net):
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    everything = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    everything.freeze(torch.ones_like(everything.frozen))
    state = everything.state_dict()
    everything.remove()
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone(), exclude=["fc2"])
    freezer.load_state_dict(state)
    assert not freezer.frozen[freezer.neurons["fc2"]].any()
    assert freezer.frozen[freezer.neurons["conv"]].all()


def test_a_policy_with_a_mask_of_another_shape_is_refused(net):
    class Wrong(neq.Everyone):
        def frozen(self, epoch, neurons, velocity):
            return torch.ones(1, dtype=torch.bool)

    freezer = neq.NeuronFreezer(net, torch.optim.SGD(net.parameters(), lr=0.1), Wrong())
    freezer.update()
    with pytest.raises(ValueError, match="mask must be bool"):
        freezer.update()
