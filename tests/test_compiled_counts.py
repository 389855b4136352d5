"""Counted FLOPs, and replays, of models that torch.compile has made; see test_compiled_speed."""

import copy
import json
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from test_compiled_speed import ONE, SHAPE, SUITE, Net, in_part, in_place, quick, wrapped
from test_verify import SMALL, draw
from torch._dynamo.utils import counters
from trials import run, small

import neq
from harness.flops import oracle
from harness.flops.costs import count_costs
from harness.flops.oracle import backward_flops_by_torch
from harness.run.executors import Inline
from harness.run.replays import Replays
from harness.train import replay as replaying
from neq.required import BATCH

__all__ = ["quick"]  # for every test here, too


def masks(costs):
    """Part rows; layers whole at the entrance and in the middle, others in part; all; nobody."""
    nobody = torch.zeros(len(costs.neurons), dtype=torch.bool)
    names = [name for name in costs.neurons if bool(costs.called[costs.neurons[name]].all())]
    found = [nobody, draw(costs, 0.5, 0)]
    for whole in (names[:1], names[1:2], names[:2] + names[-1:]):
        found.append(draw(costs, 0.4, 1))
        for name in whole:
            found[-1][costs.neurons[name]] = True
    return [*found, costs.called]


FEW = ["fused attention", "grouped", "biases only"]
COUNTED = {"net": (Net(), SHAPE)} | {name: SMALL[name] for name in FEW}


@pytest.mark.slow
@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize("name", COUNTED)
def test_counted_is_what_a_compiled_backward_executes(name, gradient):
    model, shape = COUNTED[name]
    costs = count_costs(model, shape)
    for mask in masks(costs):
        plan = neq.plan(costs.neurons, mask, gradient)
        counted = costs.backward(mask, BATCH, plan).executed
        copied = copy.deepcopy(model)
        seen = backward_flops_by_torch(copied, shape, mask, gradient, None, True)
        assert seen == [counted] * len(seen)
    assert counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]


@pytest.mark.parametrize("build", [wrapped, in_place, in_part])
def test_models_that_come_compiled_are_counted(build):
    plain, model = count_costs(Net(), SHAPE), build()
    costs = count_costs(model, SHAPE)
    assert not counters["stats"]["unique_graphs"]
    for mask in masks(costs)[2::3]:
        assert costs.backward(mask) == plain.backward(mask)
        seen = backward_flops_by_torch(model, SHAPE, mask)
        assert set(seen) == {costs.backward(mask, BATCH).executed}


@pytest.mark.parametrize("words", [[*ONE, "--compile"], SUITE], ids=["model", "suite"])
def test_flops_on_the_command_line(neqbench, words, monkeypatch):
    made = []
    compile = torch.compile

    def seen(*args, **keywords):
        made.append(keywords)
        return compile(*args, **keywords)

    monkeypatch.setattr(torch, "compile", seen)
    words = ["flops", *words, "--frozen", "0.5", "--verify", "--format", "json"]
    done = neqbench(*words)
    assert done.returncode == 0
    found = json.loads(done.stdout)["verify"]
    assert found["counted"] == found["measured"] > 0
    assert [keywords["backend"] for keywords in made] == [oracle.BACKEND]


REPLAYED = [
    *("recipe.compile=true", "recipe.epochs=3", "methods.neq.eps=0.03"),
    *("model.build=test_compiled_speed:Net", "model.arguments={channels=1, classes=10}"),
    "model.exclude=['head']",
]


def test_epochs_that_compile_are_taken_again(monkeypatch):
    """A trial has them once, and a plan that comes often would pay for them as often."""
    taken, told = [], [[1.0], [], []]

    @contextmanager
    def compiled():
        yield told.pop(0)

    @contextmanager
    def stopwatch(_device):
        yield (seconds := [])
        seconds.append(float(len(taken)))

    class Side:
        def take(self, steps):
            taken.append(steps)

    monkeypatch.setattr(replaying, "compilations", compiled)
    monkeypatch.setattr(replaying.neq, "stopwatch", stopwatch)
    sides = object.__new__(replaying.Sides)
    sides._device, sides._row, sides._length = torch.device("cpu"), 4, 9
    begun = []
    # The second time the first step ends at 3, the row of four at 4.
    assert sides._epoch(Side(), lambda: begun.append(len(taken))) == 3 + 8 * 4 / 4
    assert begun == [0, 2]
    told[:] = [[1.0]] * replaying.SETTLED
    with pytest.raises(replaying.UnreplayableError, match="compiled something anew"):
        sides._epoch(Side(), lambda: None)


@pytest.mark.slow
def test_compiled_trials_are_replayed(tmp_path, monkeypatch):
    spec = small("neq", *REPLAYED)
    run(spec, tmp_path)
    sides = []

    class Seen(replaying.Sides):
        def __init__(self, *given):
            super().__init__(*given)
            sides.append(self)

    monkeypatch.setattr(replaying, "Sides", Seen)
    told = Inline().afterwards(Replays(0.01), [spec], str(tmp_path), lambda text: None)
    assert [one.text.partition(", ")[0] for one in told] == ["replayed neq: 1 trial"]
    (side,) = sides
    for training in (side.method, side.plain):
        assert hasattr(training.work.trained, "_orig_mod")
    (row,) = pd.read_parquet(tmp_path / "digits" / "replays").to_dict("records")
    assert row["plans"] > 1
    assert row["seconds"] > 0
    assert row["activation_bytes"] <= row["activation_bytes_plain"]
