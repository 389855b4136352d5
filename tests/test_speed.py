import json
import math
import re
import time
from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import neq
from harness.commands.speed import _recipe, _step, parse_shares, speed
from harness.flops.drawing import draw
from harness.flops.subject import subject
from harness.train import bench
from harness.train.bench import Bench, Case
from harness.train.optimizers import build_optimizer
from harness.train.pays import SHARES, Asked, align_of
from harness.train.speeds import KINDS, Dense, Row, Speed
from harness.train.watched import Watched

SMALL = [
    *("--model", "suites.resnet:resnet8", "--input", "1x16x16", "--batch", "4"),
    *("--seconds", "0"),
]
NORM = "test_speed:normed"
CPU = torch.device("cpu")


def normed():
    """Needs two samples at least."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)
    )


def row(rows, granularity, gradient, frozen):
    (found,) = [
        r
        for r in rows
        if (r["granularity"], r["gradient"], r["frozen"]) == (granularity, gradient, frozen)
    ]
    return found


@pytest.mark.slow
def test_the_rows(neqbench):
    done = neqbench("speed", *SMALL, "--frozen", "0,0.5,1", "--format", "json")
    found = json.loads(done.stdout)
    rows = found["rows"]
    for granularity, gradient in KINDS:
        nothing, half, all_ = (row(rows, granularity, gradient, f) for f in (0, 0.5, 1))
        assert nothing["required_ratio"] == nothing["executed_ratio"] == 1
        assert nothing["activation_ratio"] == nothing["optimizer_ratio"] == 1
        assert all_["executed_ratio"] == all_["required_ratio"] < 0.01  # the head
        assert all_["activation_ratio"] < 0.01
        assert all_["required_ratio"] < half["required_ratio"] <= half["executed_ratio"] <= 1
        assert (nothing["drawn"], all_["drawn"]) == (0, 1)
        assert 0 < half["drawn"] <= 0.501
        for r in (nothing, half, all_):
            assert 0 < r["backward_ratio_low"] <= r["backward_ratio"] <= r["backward_ratio_high"]
            assert 0 < r["step_ratio_low"] <= r["step_ratio"] <= r["step_ratio_high"]
            assert r["pairs"] == bench.LEAST
        assert found["pays_from"][granularity][gradient] in (None, 0.5, 1)
    assert len(rows) == 12
    assert len({r["floor_ratio"] for r in rows}) == 1
    assert rows[0].keys() == Row.__dataclass_fields__.keys()
    assert "thread" in found["device"]
    assert found["dense"]["step_seconds"] > found["dense"]["backward_seconds"] > 0
    parameters = sum(p.numel() for p in subject(None, (), *SMALL[1:4:2]).module.parameters())
    assert found["dense"]["optimizer_bytes"] == 4 * parameters  # SGD's momentum


def test_at_most_a_dozen_rows_by_default():
    found = subject(None, (), "suites.resnet:resnet8", "1x16x16")
    cases = Asked(SHARES, 0, 0.0, print).cases(found.module, found.freezable, 16)
    assert len(cases) <= 12
    assert {(case.granularity, case.gradient) for case in cases} == KINDS.keys()


def test_the_floor_keeps_every_input_gradient_but_no_weight_s():
    """Counted in a real step: half of what is dense, but for layers without an input gradient."""
    found = subject(None, (), "suites.resnet:resnet8", "1x16x16")
    optimizer, _ = build_optimizer("", _recipe(None, 2, None), found.module)
    step = _step(found.module, optimizer, torch.randn(2, 1, 16, 16), "float32")
    watched = Watched(found.module, optimizer, step)
    taker = Bench(watched, neq.Timings(), found.costs.entrances)
    everybody = torch.ones(len(found.costs.neurons), dtype=torch.bool)
    counts = []
    for frozen in (torch.zeros_like(everybody), everybody):
        with taker._frozen(Case(frozen, floor=True)), FlopCounterMode(display=False) as counter:
            step()
        counts.append(counter.get_total_flops())
    forward = found.costs.forward(2)
    entrance = 2 * 2 * 16 * 16 * 16 * 9
    assert counts == [forward + 2 * forward - entrance, forward + forward - entrance]


class Scripted(Watched):
    """Each step takes what `times(number of the step, whether something is frozen)` says."""

    def __init__(self, times):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        super().__init__(model, torch.optim.SGD(model.parameters(), 0.1), lambda: 0.0)
        self._times, self._number = times, count()

    def take(self):
        frozen = type(self.model[0]) is not nn.Linear
        seconds = self._times(next(self._number), frozen)
        return seconds / 2, seconds


def scripted(times, cases=1, ends=math.inf):
    masks = [torch.tensor([True] * 4 + [False] * 2) for _ in range(cases)]
    found = [Case(mask) for mask in masks]
    taker = Bench(Scripted(times), neq.Timings(), [])
    taker.run(found, ends, lambda text: None)
    return taker, found


def test_drift_is_no_ratio():
    """A machine that slows down tenfold while it measures."""
    _, cases = scripted(lambda n, frozen: (1 + 0.03 * n) * (0.7 if frozen else 1.0), cases=8)
    for case in cases:
        assert case.step().middle == pytest.approx(0.7, abs=0.02)
        assert case.backward().middle == pytest.approx(0.7, abs=0.02)


def test_masks_are_dropped_as_soon_as_their_medians_are_known():
    draws = torch.Generator().manual_seed(0)

    def noisy(number, frozen):
        return 1 + 0.5 * float(torch.rand(1, generator=draws))

    _, (steady,) = scripted(lambda n, frozen: 1.0)
    assert len(steady.ratios) == bench.ENOUGH
    _, (wild,) = scripted(noisy)
    assert len(wild.ratios) == bench.MOST
    _, hurried = scripted(noisy, cases=3, ends=time.perf_counter() - 1)
    assert [len(case.ratios) for case in hurried] == [bench.LEAST] * 3


def test_the_first_round_does_not_count_where_there_are_others():
    taker, (case,) = scripted(lambda n, frozen: 9.0 if n < 4 else 1.0)
    assert case.step().high == 1
    assert taker.plain()[1] == 1


def test_short_steps_are_taken_several_in_a_row():
    seen = []

    def times(number, frozen):
        seen.append(frozen)
        return 0.01

    scripted(times, ends=0.0)
    frozen, dense = "f" * (1 + 5), "d" * (1 + 5)  # the first one finds its memory again
    assert "".join("f" if f else "d" for f in seen) == "ddf" + frozen + dense + frozen + dense
    seen.clear()
    scripted(lambda n, frozen: times(n, frozen) + 1, ends=0.0)
    assert "".join("f" if f else "d" for f in seen) == "ddfdfd"


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_what_is_drawn(share):
    found = subject(None, (), "suites.resnet:resnet8", "1x16x16")
    neurons, freezable = found.costs.neurons, found.freezable

    def drawn(granularity, seed=0):
        return draw(granularity, share, seed, neurons, freezable, 16)

    assert int(drawn("neuron").sum()) == round(share * int(freezable.sum()))
    for mask in map(drawn, ("neuron", "neuron-aligned", "layer")):
        assert not (mask & ~freezable).any()
        assert int(mask.sum()) <= round(share * int(freezable.sum()))
    for _, part in neurons.items():
        assert int(drawn("layer")[part].sum()) in (0, part.stop - part.start)
        trains = (part.stop - part.start) - int(drawn("neuron-aligned")[part].sum())
        fewest = (1 - share) * (part.stop - part.start)
        assert trains % 16 == 0 or part.stop - part.start == 10  # the head
        assert fewest <= trains < fewest + 17 or not freezable[part].any()
    assert torch.equal(drawn("neuron"), found.draw(share, 0))  # as `neqbench flops` counts it
    for granularity in ("neuron", "neuron-aligned", "layer"):
        if share == 0.5:
            assert not torch.equal(drawn(granularity), drawn(granularity, seed=1))


def test_blocks_that_are_too_large_for_any_layer_have_no_rows(neqbench):
    """Of eight rows none stands still unless all do."""
    words = ["--model", "test_speed:normed", "--input", "4", "--seconds", "0"]
    done = neqbench("speed", *words, "--frozen", "0.5", "--format", "json")
    kinds = {(r["granularity"], r["gradient"]) for r in json.loads(done.stdout)["rows"]}
    assert kinds == KINDS.keys() - {("neuron-aligned", "exact")}


def test_how_many_rows_a_kernel_computes_at_once():
    gpu = torch.device("cuda")
    assert align_of(CPU, "bf16") == align_of(CPU, "float32") == align_of(gpu, "float32") == 16
    assert align_of(gpu, "bf16") == align_of(gpu, "fp16") == 8


def speed_of(*rows):
    """Of (share, upper quartile of a step) or (share, quartile, drawn)."""
    made = [
        Row(
            granularity="layer",
            gradient="exact",
            frozen=share,
            drawn=drawn[0] if drawn else share,
            backward_ratio=None,
            backward_ratio_low=None,
            backward_ratio_high=None,
            step_ratio=high - 0.02,
            step_ratio_low=high - 0.04,
            step_ratio_high=high,
            required_ratio=None,
            executed_ratio=None,
            floor_ratio=0.5,
            activation_ratio=1.0,
            optimizer_ratio=None,
            pairs=9,
        )
        for share, high, *drawn in rows
    ]
    dense = Dense(step_seconds=1, backward_seconds=None, activation_bytes=1, optimizer_bytes=0)
    about = {"batch": None, "precision": "float32", "channels_last": False, "align": 16}
    return Speed(name="it", device="here", dense=dense, rows=made, **about)


@pytest.mark.parametrize(
    "rows, start, says",
    [
        ([(0.5, 1.01), (0.75, 0.99), (0.9, 0.8)], 0.75, "it pays from 75% on, where a step takes"),
        ([(0.9, 0.8), (0.5, 0.9), (0.75, 1.0)], 0.9, "from 90% on, where a step takes 0.78"),
        ([(0.5, 0.9), (0.9, 1.01)], None, "it does not pay here, up to 90% frozen"),
        ([(0.5, 0.9, 0.0)], None, "it does not pay here, up to 50% frozen"),  # nobody froze
    ],
)
def test_from_which_share_on_it_pays(rows, start, says):
    found = speed_of(*rows)
    assert found.pays_from(("layer", "exact")) == start
    assert found.json()["pays_from"] == {"layer": {"exact": start}}
    pays, floor = found.sentences
    assert pays.startswith("Whole layers at random: ")
    assert says in pays
    assert "0.50" in floor


def test_nothing_moves():
    found = subject(None, (), "suites.resnet:resnet8", "1x16x16")
    before = [p.clone() for p in found.module.parameters()]
    speed(found, 2, "bf16", Asked([0.5], 0, 0.0, lambda text: None))
    assert all(torch.equal(p, q) for p, q in zip(found.module.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 160])
def test_the_table_is_not_cut_off(neqbench, width):
    text = neqbench("speed", *SMALL, "--frozen", "0.5,1", columns=width).stdout
    assert "…" not in text
    assert "█" in text
    assert all(len(line) <= width for line in text.splitlines())
    # A sentence may break before its "100% frozen."; a row goes on with a number.
    assert len(re.findall(r"^ *100% +[\d.]+%? ", text, re.MULTILINE)) == len(KINDS)
    assert "Floor: " in text


@pytest.mark.slow
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
        (["digits", "--seconds", "-1"], "Invalid value for '--seconds'"),
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
