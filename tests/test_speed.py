import json

import pytest
import torch

from harness.commands import speed as timing
from harness.commands.speed import parse_shares, speed
from harness.flops.subject import subject

SMALL = ["--model", "suites.resnet:resnet8", "--input", "1x16x16", "--batch", "4"]


NORM = "test_speed:normed"


def normed():
    """Needs two samples at least."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )


@pytest.fixture(autouse=True)
def few_pairs(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS", 0.0)


def row(rows, granularity, gradient, frozen):
    (found,) = [
        r
        for r in rows
        if (r["granularity"], r["gradient"], r["frozen"]) == (granularity, gradient, frozen)
    ]
    return found


def test_the_rows(neqbench):
    done = neqbench("speed", *SMALL, "--frozen", "0,0.5,1", "--format", "json")
    found = json.loads(done.stdout)
    rows = found["rows"]
    kinds = [("neuron", "exact"), ("layer", "exact"), ("neuron", "cut")]
    for granularity, gradient in kinds:
        nothing, half, all_ = (row(rows, granularity, gradient, f) for f in (0, 0.5, 1))
        assert nothing["required_ratio"] == nothing["executed_ratio"] == 1
        assert all_["executed_ratio"] == all_["required_ratio"] < 0.01  # the head
        assert all_["required_ratio"] < half["required_ratio"] <= half["executed_ratio"] <= 1
        for r in (nothing, half, all_):
            assert 0 < r["backward_ratio_low"] <= r["backward_ratio"] <= r["backward_ratio_high"]
            assert r["step_ratio"] > 0
    assert len(rows) == 9
    assert len({r["floor_ratio"] for r in rows}) == 1
    assert rows[0].keys() == timing.Row.__dataclass_fields__.keys()
    assert "thread" in found["device"]


def test_the_floor_keeps_every_input_gradient_but_no_weight_s():
    """Counted in a real step: half of what is dense, but for layers without an input gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    found = subject(None, (), "suites.resnet:resnet8", "1x16x16")
    recipe = timing._recipe(None, 2, None)
    bench = timing._Bench(found.module, found, recipe, timing.Tuning(), torch.device("cpu"))
    mask = torch.ones(len(found.costs.neurons), dtype=torch.bool)
    freezer = timing.neq.NeuronFreezer(bench.model, bench.optimizer, timing.neq.Everyone())
    counts = []
    for frozen in (torch.zeros_like(mask), mask):
        freezer.freeze(frozen)
        with bench._input_gradients(), FlopCounterMode(display=False) as counter:
            bench._step()
        counts.append(counter.get_total_flops())
    forward = found.costs.forward(2)
    entrance = 2 * 2 * 16 * 16 * 16 * 9
    assert counts == [forward + 2 * forward - entrance, forward + forward - entrance]


def test_nothing_moves():
    found = subject(None, (), "suites.resnet:resnet8", "1x16x16")
    before = [p.clone() for p in found.module.parameters()]
    speed(found, 2, [0.5], 0, "bf16", lambda text: None)
    assert all(torch.equal(p, q) for p, q in zip(found.module.parameters(), before, strict=True))


@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_not_cut_off(neqbench, width):
    text = neqbench("speed", *SMALL, "--frozen", "0.5,1", columns=width).stdout
    assert "…" not in text
    assert "█" in text
    assert all(len(line) <= width for line in text.splitlines())
    assert text.count("100%") == 3


@pytest.mark.parametrize(
    "arguments, says",
    [
        ([], "name a suite, or a model with --model"),
        (["digits", *SMALL], "name a suite, or a model with --model"),
        (["digits", "--batch", "4"], "--batch and --precision belong to --model"),
        (["digits", "--precision", "bf16"], "--batch and --precision belong to --model"),
        ([*SMALL[:4], "--batch", "0"], "--batch 0: must be at least 1"),
        ([*SMALL[:4], "--batch", "1", "--model", NORM, "--input", "4"], "can't be trained with"),
        (["digits", "--set", "recipe.optimizer={name='LBFGS', lr=1}"], "LBFGS"),
        (["digits", "--seed", "-1"], "Invalid value for '--seed'"),
        ([*SMALL, "--frozen", "2"], "--frozen 2: write shares from 0 to 1"),
        ([*SMALL, "--frozen", "0.5,x"], "--frozen 0.5,x: write shares from 0 to 1"),
        (["--model", "torch.nn:ReLU", "--input", "3"], "no convolution, linear or normalisation"),
        ([*SMALL[:3], "3x2"], "the model does not run on an input of 3x2"),
    ],
)
def test_bad_input(neqbench, arguments, says):
    done = neqbench("speed", *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_shares():
    assert parse_shares("0, 0.5,1") == [0, 0.5, 1]
