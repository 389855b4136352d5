import json
import random
import time
from dataclasses import dataclass

import numpy
import pytest
import torch
from conftest import random_batches
from torch import nn
from torch.nn import functional

import neq
from harness import pays
from harness.errors import UserError
from harness.flops.costs import count_costs
from harness.flops.drawing import draw
from harness.train.kept import state_bytes
from harness.train.speeds import Row
from harness.train.watched import Watched

QUICK = {"seconds": 0.0}


def training(model, optimizer, batches, autocast=False):
    """A step as people write it, on the next batch each time."""
    number = 0

    def step():
        nonlocal number
        inputs, targets = batches[number % len(batches)]
        number += 1
        model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def mlp():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def squares(model, optimizer, inputs):
    def step():
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def of(rows, granularity, frozen, gradient="exact"):
    (found,) = [
        r for r in rows if (r.granularity, r.gradient, r.frozen) == (granularity, gradient, frozen)
    ]
    return found


def test_what_it_finds(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    found = pays(net, optimizer, training(net, optimizer, random_batches(), autocast=True), **QUICK)
    assert (found.name, found.batch, found.precision) == ("Net", 8, "bf16")
    assert {r.frozen for r in found.rows} == {0.5, 0.75, 0.9}
    costs = count_costs(net, (3, 6, 6))
    freezable = ~costs.neurons.select(["fc2"])  # the last linear layer is the head
    for row in found.rows:
        assert 0 < row.step_ratio_low <= row.step_ratio <= row.step_ratio_high
        assert 0 < row.backward_ratio_low <= row.backward_ratio <= row.backward_ratio_high
        assert row.required_ratio <= row.executed_ratio <= 1
        mask = draw(row.granularity, row.frozen, 0, costs.neurons, freezable, 16)
        assert row.drawn == int(mask.sum()) / int(freezable.sum())
        if row.gradient == "exact":
            backward = costs.backward(mask)
            assert row.required_ratio == backward.required / backward.dense
    assert found.dense.optimizer_bytes == 0  # no momentum
    assert found.rows[0].optimizer_ratio is None
    assert len(found.sentences) == len({(r.granularity, r.gradient) for r in found.rows}) + 1
    assert json.loads(json.dumps(found.json()))["rows"][0].keys() == Row.__dataclass_fields__.keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_training_goes_on_as_if_nothing_had_been(net, kind):
    """Six steps with dropout, in their midst none or many of pays: the same bits."""
    arguments = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    plain, ends = {k: v.clone() for k, v in net.state_dict().items()}, []
    for looked in (False, True):
        net.load_state_dict(plain)
        optimizer = kind(net.parameters(), lr=0.1, **arguments)
        torch.manual_seed(1)
        step = training(net, optimizer, random_batches(count=1))
        for _ in range(3):
            step()
        if looked:
            net.fc1.eval()
            random.seed(3)
            numpy.random.seed(3)
            states = {id(v) for s in optimizer.state.values() for v in s.values()}
            gradients = [p.grad for p in net.parameters()]

            def noisy(step=step):
                random.random(), numpy.random.rand()
                return step()

            pays(net, optimizer, noisy, frozen=[0.5, 1.0], **QUICK)
            assert states == {id(v) for s in optimizer.state.values() for v in s.values()}
            assert all(p.grad is g for p, g in zip(net.parameters(), gradients, strict=True))
            assert random.random() == random.Random(3).random()
            assert numpy.random.rand() == numpy.random.RandomState(3).rand()
            assert not net.fc1.training
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
            assert not any("_neq_work" in vars(m) for m in net.modules())
            assert not optimizer._optimizer_step_pre_hooks
            assert not optimizer._optimizer_step_post_hooks
        for _ in range(3):
            step()
        ends.append([t.clone() for t in net.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.slow
def test_bytes_by_hand():
    """float32; the backward keeps the input [5, 4], the hidden [5, 16] and the output [5, 3]."""
    model, optimizer = mlp()
    found = pays(
        model, optimizer, squares(model, optimizer, torch.randn(5, 4)), frozen=[0, 1], **QUICK
    )
    assert found.dense.activation_bytes == 4 * 5 * (4 + 16 + 3)
    assert found.dense.optimizer_bytes == 4 * (4 * 16 + 16 + 16 * 3 + 3)
    for granularity in ("neuron", "neuron-aligned", "layer"):
        nobody, everybody = (of(found.rows, granularity, share) for share in (0, 1))
        assert nobody.activation_ratio == nobody.optimizer_ratio == 1
        assert everybody.activation_ratio == (16 + 3) / (4 + 16 + 3)  # the input is not kept
        assert everybody.optimizer_ratio == (16 * 3 + 3) / (4 * 16 + 16 + 16 * 3 + 3)


def test_optimizer_state_is_that_of_a_fresh_one_under_the_mask(net):
    optimizer = torch.optim.Adam(net.parameters())
    step, trains = training(net, optimizer, random_batches()), ["conv", "fc2"]
    found = pays(net, optimizer, step, frozen=[1.0], exclude=trains, **QUICK)
    fresh = torch.optim.Adam(net.parameters())
    freezer = neq.NeuronFreezer(net, fresh, neq.Everyone())
    freezer.freeze(~freezer.neurons.select(trains))
    training(net, fresh, random_batches())()
    row = of(found.rows, "layer", 1.0)
    assert row.optimizer_ratio == state_bytes(fresh) / found.dense.optimizer_bytes < 1


class Words(nn.Module):
    """Takes whole numbers, by name, and returns a data class."""

    @dataclass
    class Output:
        logits: torch.Tensor

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.inner = nn.Linear(8, 16)
        self.head = nn.Linear(16, 10)

    def forward(self, *, words):
        return self.Output(self.head(self.inner(self.embedding(words)).relu()))


def test_a_model_whose_flops_cannot_be_counted():
    model = Words()
    optimizer = torch.optim.AdamW(model.parameters())
    words = torch.randint(10, (4, 6))

    def step():
        loss = functional.cross_entropy(model(words=words).logits.flatten(0, 1), words.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    found = pays(model, optimizer, step, frozen=[0.5], **QUICK)
    assert found.batch == 4
    for row in found.rows:
        assert row.required_ratio is row.executed_ratio is row.floor_ratio is None
        assert row.backward_ratio > 0
        assert row.drawn == (0 if row.granularity in ("layer", "neuron-aligned") else 0.5)
    assert not any("Floor" in sentence for sentence in found.sentences)


def test_kernels_are_timed_as_the_step_calls_the_model(net, monkeypatch):
    seen = []

    def measure(model, inputs, *_):
        with torch.no_grad():
            seen.append(model(inputs).dtype)
        return neq.Timings({name: {} for name in neq.NeuronIndex(model)})

    monkeypatch.setattr("harness.train.pays.neq.measure", measure)
    given = []
    original = neq.NeuronFreezer.__init__

    def spy(self, *args, timings=None, **kwargs):
        given.append(timings)
        original(self, *args, timings=timings, **kwargs)

    monkeypatch.setattr(neq.NeuronFreezer, "__init__", spy)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    step = training(net, optimizer, random_batches(), autocast=True)
    pays(net, optimizer, step, frozen=[0.5], **QUICK)
    assert seen == [torch.bfloat16]
    assert given[0].layers.keys() == set(neq.NeuronIndex(net))


class Slow(torch.autograd.Function):
    """Takes 20 ms forward, and 30 ms back."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.02)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.03)
        return gradient


def test_the_backward_is_timed_within_the_step():
    class Sleepy(nn.Linear):
        def forward(self, x):
            return Slow.apply(super().forward(x))

    model = Sleepy(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs = torch.randn(3, 4)

    def step():
        for _ in range(2):  # gradients of two batches
            model(inputs).sum().backward()
        optimizer.step()
        with torch.no_grad():
            return model(inputs).sum()

    backward, whole = Watched(model, optimizer, step).take()
    assert backward >= 2 * 0.03
    assert whole - backward >= 3 * 0.02


def test_who_may_freeze(net):
    """Neither the excluded, nor layers that the optimizer does not train."""
    optimizer = torch.optim.SGD([*net.conv.parameters(), *net.fc1.parameters()], 0.1)
    step = training(net, optimizer, random_batches())
    found = pays(net, optimizer, step, frozen=[1.0], exclude=["fc1"], **QUICK)
    weights = net.conv.weight.numel() + net.conv.bias.numel()
    rest = net.fc1.weight.numel() + net.fc1.bias.numel()
    assert found.dense.optimizer_bytes == 0
    (row,) = [r for r in found.rows if r.granularity == "layer"]
    assert row.drawn == 1
    optimizer = torch.optim.SGD(optimizer.param_groups[0]["params"], 0.1, momentum=0.9)
    step = training(net, optimizer, random_batches())
    found = pays(net, optimizer, step, frozen=[1.0], exclude=["fc1"], **QUICK)
    assert of(found.rows, "layer", 1.0).optimizer_ratio == rest / (weights + rest)
    with pytest.raises(UserError, match="exclude: no layer is called 'nobody'"):
        pays(net, optimizer, step, exclude=["nobody"], **QUICK)


def test_one_process_alone(net, monkeypatch):
    monkeypatch.setattr("harness.train.pays.neq.parallel.workers", lambda: 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(UserError, match="one process alone"):
        pays(net, optimizer, lambda: 0.0)


# What `--step` may name, right and wrong.

number = 3


def good():
    model, optimizer = mlp()
    return model, optimizer, squares(model, optimizer, torch.randn(5, 4))


def returns_nothing():
    pass


def returns_two():
    return mlp()


def returns_others():
    return torch.ones(1), mlp()[1], sorted


def fails():
    raise ZeroDivisionError("no data")


def without_a_loss():
    model, optimizer, step = good()
    return model, optimizer, lambda: (step(), None)[1]


def losses():
    model, optimizer, step = good()
    return model, optimizer, lambda: step() * torch.ones(2, 3)


def failing_step():
    return *mlp(), lambda: 1 / 0


def other_model():
    return mlp()[0], mlp()[1], lambda: 0.0


def never_called():
    return *mlp(), lambda: 0.0


def never_stepped():
    model, optimizer = mlp()
    return model, optimizer, lambda: model(torch.randn(5, 4)).sum()


def only_a_head():
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return model, optimizer, squares(model, optimizer, torch.randn(5, 4))


def lbfgs():
    model, _ = mlp()
    return model, torch.optim.LBFGS(model.parameters()), lambda: 0.0


@pytest.mark.slow
def test_the_command_line_takes_one_s_own_step(neqbench):
    words = ["speed", "--step", "test_pays:good", "--seconds", "0", "--frozen", "0.5,1"]
    found = json.loads(neqbench(*words, "--format", "json").stdout)
    assert (found["name"], found["batch"]) == ("test_pays:good", 5)
    assert len(found["rows"]) == 8
    text = neqbench(*words).stdout
    assert text.startswith("test_pays:good: batch 5, float32\n")
    assert "Neurons at random: it " in text


@pytest.mark.parametrize(
    "name, says",
    [
        ("nowhere:step", "'nowhere:step' cannot be loaded: ModuleNotFoundError"),
        ("test_pays:nobody", "'test_pays:nobody' cannot be loaded"),
        ("test_pays", "'test_pays': write it as module:callable"),
        ("test_pays:number", "not a function; write one that returns (model, optimizer, step)"),
        ("test_pays:returns_nothing", "returned NoneType; it must return (model, optimizer, step)"),
        (
            "test_pays:returns_two",
            "returned (Sequential, SGD); it must return (model, optimizer, s",
        ),
        ("test_pays:returns_others", "returned (Tensor, SGD, builtin_function_or_method); it must"),
        ("test_pays:fails", "'test_pays:fails' failed: ZeroDivisionError: no data (test_pays.py"),
        ("test_pays:without_a_loss", "step() returned NoneType, not the loss"),
        ("test_pays:losses", "step() returned a tensor of shape [2, 3], not the loss"),
        ("test_pays:failing_step", "a step failed: ZeroDivisionError: division by zero (test_pays"),
        ("test_pays:other_model", "the optimizer has none of the model's parameters"),
        ("test_pays:never_called", "step() does not call the model"),
        ("test_pays:never_stepped", "step() does not step the optimizer"),
        ("test_pays:only_a_head", "the model has no neuron that may freeze"),
        ("test_pays:lbfgs", "LBFGS moves all parameters along one direction"),
    ],
)
def test_steps_that_are_none(neqbench, name, says):
    done = neqbench("speed", "--step", name)
    assert done.returncode == 2
    assert says in done.stderr
    assert name in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "more",
    [
        ["digits"],
        ["--model", "torch.nn:ReLU"],
        ["--input", "3"],
        ["--batch", "4"],
        ["--precision", "bf16"],
        ["--set", "recipe.epochs=1"],
    ],
)
def test_a_step_stands_alone(neqbench, more):
    done = neqbench("speed", "--step", "test_pays:good", *more)
    assert done.returncode == 2
    assert "--step brings its own model, data and precision" in done.stderr


@pytest.mark.parametrize("shares", [[], [50], [0.5, -0.1]])
def test_shares_that_are_none(shares):
    with pytest.raises(UserError, match="name shares from 0 to 1"):
        pays(*good(), frozen=shares)
