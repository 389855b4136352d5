"""The speed of models that torch.compile has made, and what the command line says of it.

Graphs are compiled to torch's own operators, which needs no compiler and takes seconds; one step is
compiled in earnest.
"""

import json
import time
from contextlib import contextmanager
from itertools import count

import pytest
import torch
from test_speed import Scripted
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import neq
from harness import pays
from harness.compilations import compilations, room
from harness.errors import UserError
from harness.flops.costs import count_costs
from harness.flops.oracle import Rules
from harness.train import bench, compiling, watched
from harness.train.bench import Bench, Case
from harness.train.speeds import KINDS
from harness.train.watched import Watched

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """An entrance, a norm, layers in the middle, and a head with one output."""

    def __init__(self, channels=3, classes=1):
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 32, 3, bias=False)
        self.last = nn.Conv2d(32, 8, 3)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.middle(self.norm(self.first(x)).relu())
        return self.head(self.last(x.relu()).mean((2, 3)))


def in_place():
    model = Net()
    model.compile(backend="aot_eager")
    return model


def in_part():
    model = Net()
    model.last = torch.compile(model.last, backend="aot_eager")
    return model


def wrapped():
    return torch.compile(Net(), backend="aot_eager")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    # A graph too many is an error, not a silent return to eager.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def compiled_so(how, dtype=torch.float32):
    """A model, its optimizer, and a step that is compiled in one of the ways there are."""
    model = {"wrapped": wrapped, "in place": in_place, "in part": in_part}.get(how, Net)()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    inputs = torch.randn(4, *SHAPE)

    def loss_of(inputs):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(inputs).float().square().mean()

    if how == "a loss":
        loss_of = torch.compile(loss_of, backend="aot_eager")

    def step():
        optimizer.zero_grad()
        loss = loss_of(inputs)
        loss.backward()
        optimizer.step()
        return loss

    if how == "a step":
        step = torch.compile(step, backend="aot_eager")
    return model, optimizer, step


WAYS = ["wrapped", "in place", "in part", "a loss"]


def graphs():
    """How many dynamo has traced, and how often it has given up on a part."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("how", [*WAYS, "a step"])
def test_timed_steps_are_compiled_whole_and_compile_nothing(how, monkeypatch):
    model, optimizer, step = compiled_so(how)
    taken, timed = {}, []
    attempt, take = Watched._take, Watched.take

    def attempted(self):
        before = graphs()
        times = attempt(self)
        taken[times] = graphs() == before
        return times

    def settled(self):
        timed.append(take(self))
        return timed[-1]

    monkeypatch.setattr(Watched, "_take", attempted)
    monkeypatch.setattr(Watched, "take", settled)
    monkeypatch.setattr(bench, "VISIT", 1e-9)
    monkeypatch.setattr("harness.train.pays._timings", lambda *_: neq.Timings())
    shares = [0.5, 1.0] if how == "wrapped" else [0.5]
    found = pays(model, optimizer, step, frozen=shares, seconds=0.0)
    assert all(taken[times] for times in timed)
    # Dense; rows; layers whole that end a gradient, twice; with cut: rows, layers whole. What comes
    # by turns is compiled for once. Dynamo traces neither a backward nor an optimizer's zero_grad.
    made, broken = graphs()
    assert (0 < made <= 6 and not broken) or how == "a step"
    assert found.compiled
    assert found.batch == 4
    assert found.dense.compile_seconds > 0
    assert {(r.granularity, r.gradient) for r in found.rows} >= {
        *(("neuron", "exact"), ("layer", "exact"), ("neuron", "cut"))
    }
    costs = count_costs(model, SHAPE)
    for r in found.rows:
        assert r.backward_ratio > 0
        assert r.required_ratio <= r.executed_ratio <= 1
        if r.frozen == 1.0:  # the head alone
            dense = costs.backward(torch.zeros(len(costs.neurons), dtype=torch.bool)).dense
            assert r.executed_ratio == 2 * 8 / dense


def test_steps_are_looked_at_as_they_are_written():
    """A compiled one would show neither shape nor precision, and go on calling what looked."""
    for how in WAYS:
        model, optimizer, step = compiled_so(how, torch.bfloat16)
        with compilations() as causes:
            call = Watched(model, optimizer, step).look()
        assert not causes
        assert call.autocast == torch.bfloat16
        assert call.tensors[0].shape == (4, *SHAPE)
        step()
        assert not counters["graph_break"]


def test_training_goes_on_with_the_same_bits(monkeypatch):
    monkeypatch.setattr("harness.train.pays._timings", lambda *_: neq.Timings())
    ends = []
    for looked in (False, True):
        torch.manual_seed(0)
        model, optimizer, step = compiled_so("wrapped")
        step()
        if looked:
            pays(model, optimizer, step, frozen=[0.5], seconds=0.0)
            assert "harness" not in torch.autograd._engine_run_backward.__module__
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        step()
        ends.append([t.clone() for t in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_bytes_are_those_that_the_compiled_backward_keeps():
    model, optimizer, step = compiled_so("wrapped")
    outputs = model(torch.randn(4, *SHAPE))
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    node = outputs.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in node.saved_tensors}
    kept = sum(s.nbytes() for cdata, s in storages.items() if cdata not in own)
    dense = Bench(Watched(model, optimizer, step), neq.Timings(), []).kept
    assert dense == kept + 4 * 4  # and the output, of which the loss is made


@pytest.mark.parametrize("how", WAYS)
def test_the_floor_keeps_every_input_gradient_but_no_weight_s(how):
    model, optimizer, step = compiled_so(how)
    costs = count_costs(model, SHAPE)
    everybody = torch.ones(len(costs.neurons), dtype=torch.bool)
    entrance = 2 * 4 * 6 * 6 * 8 * 3 * 9
    counts, rules = [], Rules().mapping
    taker = Bench(Watched(model, optimizer, step), neq.Timings(), costs.entrances)
    backward = torch.autograd.backward

    def watching(*args, **kwargs):
        with FlopCounterMode(display=False, custom_mapping=rules) as counter:
            backward(*args, **kwargs)
        counts.append(counter.get_total_flops())

    for frozen in (torch.zeros_like(everybody), everybody):
        with taker._frozen(Case(frozen, floor=True)):
            step()  # compiles
            torch.autograd.backward = watching
            try:
                step()
            finally:
                torch.autograd.backward = backward
    assert counts == [costs.backward(~everybody, 4).dense, costs.forward(4) - entrance]


@pytest.mark.parametrize("how", WAYS)
def test_kernels_are_timed_compiled_where_the_model_is(how, monkeypatch):
    """Which neq sees by what it is given; names are those of the bare model's layers."""
    model, optimizer, step = compiled_so(how)
    given = []

    def measure(called, inputs, *_):
        given.append(neq.compiled.is_compiled(called))
        return neq.Timings({name: {} for name in neq.NeuronIndex(called)})

    monkeypatch.setattr("harness.train.pays.neq.measure", measure)
    monkeypatch.setattr("harness.train.pays.measured", lambda *args, **_: args[4])
    found = pays(model, optimizer, step, frozen=[0.5], seconds=0.0)
    assert given == [how != "a loss"]  # of a function nobody can tell
    bare = model._orig_mod if how == "wrapped" else model
    assert found.layers.keys() == set(neq.NeuronIndex(bare))


def steps_that_compile(monkeypatch, *numbers):
    """Those with these numbers are told to have compiled something."""
    steps = count()

    @contextmanager
    def told():
        yield [1.0] if next(steps) in numbers else []

    monkeypatch.setattr(watched, "compilations", told)


class Priced(Scripted):
    """Scripted, but that steps are compiled as `steps_that_compile` says."""

    take = Watched.take

    def _take(self):
        return Scripted.take(self)


def test_compilations_are_in_no_ratio(monkeypatch):
    """The first step takes 100 + 1, some later ones 1000, the others 1 or, frozen, 0.7."""
    steps_that_compile(monkeypatch, 0, 4, 5, 9)

    def seconds(number, frozen):
        return {0: 101.0, 4: 1000.0, 5: 1000.0, 9: 1000.0}.get(number, 0.7 if frozen else 1.0)

    cases = [Case(torch.tensor([True] * 4 + [False] * 2)) for _ in range(2)]
    taker = Bench(Priced(seconds), neq.Timings(), [])
    taker.run(cases, -1e9, lambda text: None)
    assert taker.compile_seconds == 100
    assert [case.step().high for case in cases] == pytest.approx([0.7, 0.7])
    assert [case.backward().high for case in cases] == pytest.approx([0.7, 0.7])
    assert taker.plain() == (0.5, 1.0)


def test_compiling_takes_its_time_on_top():
    taker = Bench(Scripted(lambda number, frozen: 1.0), neq.Timings(), [])
    for seconds, rounds in ([], bench.LEAST), ([1e9, 1e9], bench.ENOUGH):
        taker._watched.compiling[:] = seconds
        case = Case(torch.tensor([True] * 4 + [False] * 2))
        taker.run([case], time.perf_counter() - 1e9, lambda text: None)
        assert len(case.ratios) == rounds


def test_compilations_are_noticed_and_timed():
    call = torch.compile(nn.Linear(4, 2), backend="aot_eager")
    made = []
    for _ in range(2):
        with compilations() as seconds:
            call(torch.ones(3, 4)).sum().backward()
        made.append(len(seconds))
        assert all(each > 0 for each in seconds)
    assert made[0] > 0
    assert made[1] == 0
    with compilations() as seconds:  # which drops all that look on
        torch._dynamo.reset()
    assert seconds == []


def test_what_compiles_nothing_has_no_seconds_for_it():
    taker = Bench(Scripted(lambda number, frozen: 1.0), neq.Timings(), [])
    assert taker.compile_seconds is None


def test_steps_that_are_compiled_anew_each_time(monkeypatch):
    model, optimizer, step = compiled_so("wrapped")
    numbers = count()

    def changing():
        model._orig_mod.training = not model.training
        model._orig_mod.name = str(next(numbers))
        return step()

    model._orig_mod.register_forward_pre_hook(lambda module, args: (args[0] * len(module.name),))
    monkeypatch.setattr(watched, "SETTLED", 3)
    with pytest.raises(UserError, match="each of 3 steps was compiled anew"), room():
        Watched(model, optimizer, changing).take()


def test_there_is_room_for_all_masks_and_afterwards_as_little_as_ever():
    kept, limit = neq.compiled.GRAPHS, torch._dynamo.config.recompile_limit
    with room():
        assert min(neq.compiled.GRAPHS, torch._dynamo.config.recompile_limit) > 1000
    assert (neq.compiled.GRAPHS, torch._dynamo.config.recompile_limit) == (kept, limit)


ONE = ["--model", "test_compiled_speed:Net", "--input", "3x8x8"]
SUITE = [
    *("digits", "--set", "recipe.compile=true", "--set", "recipe.batch_size=4"),
    *("--set", "model.build=test_compiled_speed:Net", "--set", "model.arguments={channels=1}"),
    *("--set", "model.exclude=['head']"),
]


@pytest.mark.slow
def test_the_speed_of_a_suite_that_compiles(neqbench, monkeypatch):
    monkeypatch.setattr(bench, "VISIT", 1e-9)
    words = ["speed", *SUITE, "--seconds", "0", "--frozen", "0.5", "--format", "json"]
    found = json.loads(neqbench(*words).stdout)
    assert found["compiled"] is True
    assert found["dense"]["compile_seconds"] > 0
    assert {(r["granularity"], r["gradient"]) for r in found["rows"]} == KINDS.keys()


def test_the_speed_of_a_model_to_be_compiled(neqbench, monkeypatch):
    monkeypatch.setattr(bench, "VISIT", 1e-9)
    words = ["--batch", "4", "--compile", "--seconds", "0", "--frozen", "1"]
    text = neqbench("speed", *ONE, *words).stdout
    assert ": batch 4, float32, " in text
    assert ", compiled\n" in text
    assert "the first was compiled for " in " ".join(text.split())
    assert all(len(line) <= 80 for line in text.splitlines())


def test_speed_says_what_is_not_compiled(neqbench):
    words = ["speed", *ONE, "--batch", "4", "--seconds", "0", "--frozen", "0.5"]
    found = json.loads(neqbench(*words, "--format", "json").stdout)
    assert found["compiled"] is False
    assert found["dense"]["compile_seconds"] is None
    text = neqbench(*words).stdout
    assert ", compiled" not in text
    assert "was compiled" not in text


def test_a_machine_that_can_not_compile_is_told_before_the_first_step(neqbench, monkeypatch):
    def lacking(device):
        raise UserError("no compiler here")

    def taken(*_):
        raise AssertionError("a step was taken")

    monkeypatch.setattr("harness.commands.speed.check_compiler", lacking)
    monkeypatch.setattr("harness.commands.speed.tune", taken)
    done = neqbench("speed", *ONE, "--compile")
    assert (done.returncode, done.stderr) == (2, "error: no compiler here\n")


@pytest.mark.parametrize(
    "words, says",
    [
        (["speed", "digits", "--compile"], "--compile belongs to --model; for a suite: --set rec"),
        (["flops", "digits", "--compile", "--verify"], "--compile belongs to --model; for a suit"),
        (["flops", *ONE, "--compile"], "--compile says how --verify runs a backward"),
        (["speed", "--step", "test_pays:good", "--compile"], "--step brings its own model, data"),
    ],
)
def test_where_compile_does_not_belong(neqbench, words, says):
    done = neqbench(*words)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_step_compiled_in_earnest(monkeypatch):
    """By inductor: two layers, half of the rows of one frozen."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    made = compiling.compiled(model)
    inputs = torch.randn(5, 4)

    def step():
        loss = made(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    taker = Bench(Watched(made, optimizer, step), neq.Timings(), [])
    case = Case(torch.tensor([True, False] * 8 + [False] * 3))
    with room():
        taker.run([case], 0.0, lambda text: None)
    assert taker.compile_seconds > 0
    assert len(case.ratios) == bench.LEAST
    assert counters["stats"]["unique_graphs"] == 2
