"""Replays: what the masks of finished trials cost, measured after them."""

import json
import math
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from trials import SMALL, altered, run, small, toy

from harness.report.model import Report, load_report
from harness.report.sections import sections
from harness.run.executors import Inline, Ray
from harness.run.replays import Replays
from harness.storage.store import Store
from harness.train import replay as replaying
from harness.train.assembly import assemble
from harness.train.loop import Loop
from harness.train.neighbours import Neighbours

QUIET = {"other_load": 0.0, "trials_on_device": 1}


def replay(trials, root, seconds=0.01, executor=None):
    """The lines that are told."""
    executor = executor or Inline()
    found = executor.afterwards(Replays(seconds), trials, str(root), lambda text: None)
    return [one.text for one in found]


def replayed(root, suite="digits"):
    return pd.read_parquet(root / suite / "replays").set_index(["method", "seed"])


@pytest.fixture
def prices(monkeypatch):
    """A clock that shows what steps would cost by a made-up price list: the first of an epoch 5,
    or 7 with anybody frozen, the others 4, less the share of neurons that are frozen; a decision 2.
    Steps are really taken; a row lasts as long as it has steps.
    """
    taken = []

    @contextmanager
    def stopwatch(_device):
        seconds = []
        taken.clear()
        yield seconds
        seconds.append(sum(taken) if taken else 2.0)

    class Training(replaying._Training):
        def take(self, steps):
            super().take(steps)
            freezer = getattr(self.work.method, "freezer", None)
            share = 0.0 if freezer is None else float(freezer.frozen.float().mean())
            first = 7.0 if share else 5.0
            taken.append(first if steps == 1 else steps * (4.0 - share))

    monkeypatch.setattr(replaying, "_Training", Training)
    monkeypatch.setattr(replaying.neq, "stopwatch", stopwatch)


@pytest.mark.slow
def test_the_sum_over_epochs(tmp_path, prices):
    """By the price list: from the frozen shares that the trial has published."""
    spec = small("neq")
    run(spec, tmp_path)
    epochs = pd.read_parquet(tmp_path / "digits" / "epochs").sort_values("epoch")
    assert replay([spec], tmp_path, seconds=1e9) == [
        "replayed neq: 1 trial, 4 of their 4 masks measured"
    ]
    row = replayed(tmp_path).loc["neq", 0]
    shares = epochs["frozen_neurons"] / epochs["total_neurons"]
    assert shares.nunique() > 2
    steps = math.ceil(epochs["samples"].iloc[0] / 40)
    each = [(7.0 if share else 5.0) + (steps - 1) * (4.0 - share) for share in shares]
    plain = 5.0 + (steps - 1) * 4.0
    assert row["seconds"] == pytest.approx(sum(each) + len(epochs) * 2.0)
    assert row["seconds_plain"] == pytest.approx(len(epochs) * plain)
    assert row["ratio"] == pytest.approx(row["seconds"] / row["seconds_plain"])
    assert row["ratio_low"] == pytest.approx(row["ratio"])  # this clock does not waver
    assert row["plans"] == row["plans_measured"] == shares.nunique()
    assert "thread" in row["device"]


@pytest.mark.slow
def test_what_there_is_no_time_for_is_interpolated(tmp_path, prices):
    spec = small("neq")
    run(spec, tmp_path)
    (line,) = replay([spec], tmp_path)
    row = replayed(tmp_path).loc["neq", 0]
    assert row["plans_measured"] == 2 < row["plans"]
    assert line.startswith(f"replayed neq: 1 trial, 2 of their {row['plans']} masks")
    assert 0 < row["ratio"] < 2
    table = load_report([Store(tmp_path, "digits")]).groups[0]
    notes = [note for t in sections_of(table) for note in t.notes]
    assert f"Replayed were 2 of {row['plans']} masks; others lie between" in " ".join(notes)


def sections_of(table):
    (section,) = sections(Report(groups=[table], not_begun=[], done={}, results=None))
    return section.tables


def test_steps_are_those_of_training(tmp_path):
    """As many, with the same batches and losses: `train` is made of them."""
    spec = small("baseline", "recipe.epochs=1")
    run(spec, tmp_path)  # and its tuning is there
    losses = []
    for by_steps in (False, True):
        location = Store(tmp_path, "digits").location
        work = assemble(spec, torch.device("cpu"), location, None)
        loop = Loop(work, spec.suite.recipe, spec.seed)
        if by_steps:
            totals = [float(total) for total in loop.steps(0)]
            assert len(totals) == work.batches.steps
            losses.append(totals[-1] / work.batches.size("train"))
        else:
            losses.append(loop.train(0))
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_only_what_is_new_is_measured(tmp_path, monkeypatch):
    trials = [small(method, seed=seed) for seed in (0, 1) for method in ("baseline", "neq")]
    for spec in trials[:2]:
        run(spec, tmp_path)
    assert len(replay(trials, tmp_path)) == 1
    assert list(replayed(tmp_path).index) == [("neq", 0)]
    before = (tmp_path / "digits" / "replays" / f"{trials[1].key}.parquet").read_bytes()
    assert replay(trials, tmp_path) == []
    run(trials[3], tmp_path)
    assert len(replay(trials, tmp_path)) == 1
    assert set(replayed(tmp_path).index) == {("neq", 0), ("neq", 1)}
    after = (tmp_path / "digits" / "replays" / f"{trials[1].key}.parquet").read_bytes()
    assert before == after


@pytest.mark.slow
def test_weights_do_not_move_and_streams_stay(tmp_path, monkeypatch):
    """A replay trains at a rate of zero, and nothing outside notices."""
    spec, seen = small("neq"), []
    run(spec, tmp_path)

    class Seen(replaying.Sides):
        def __init__(self, *given):
            super().__init__(*given)
            self.remember()

        def decisions(self):
            found = super().decisions()
            self.remember()
            return found

        def remember(self):
            models = [side.work.model for side in (self.method, self.plain)]
            seen.append([p.detach().clone() for model in models for p in model.parameters()])

    monkeypatch.setattr(replaying, "Sides", Seen)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    replay([spec], tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    before, after = seen
    assert all(map(torch.equal, before, after))


def replayed_seeds(root, count):
    """Trials of so many seeds, replayed; all of them, and those of neq."""
    trials = [small(m, "recipe.epochs=2", seed=seed) for seed in range(count) for m in METHODS]
    for spec in trials:
        run(spec, root)
    replay(trials, root)
    return trials, [spec for spec in trials if spec.method == "neq"]


@pytest.mark.slow
def test_a_device_that_was_not_free(tmp_path):
    """It is said, there is no verdict, and the same command measures anew."""
    trials, neqs = replayed_seeds(tmp_path, 3)
    for number, spec in enumerate(neqs):
        plant(tmp_path, spec, QUIET | ratios(0.5 + number / 100))
    (group,) = load_report([Store(tmp_path, "digits")]).groups
    found = next(row for row in group.methods if row.method == "neq").replays
    assert found.seconds_replayed_verdict == "less"
    assert found.seconds_replayed_withheld is None
    assert Replays(1.0).lacking(trials, Store(tmp_path, "digits")) == []
    for what in ({"trials_on_device": 2}, {"other_load": 1.5}):
        plant(tmp_path, neqs[0], QUIET | what)
        (group,) = load_report([Store(tmp_path, "digits")]).groups
        found = next(row for row in group.methods if row.method == "neq").replays
        assert found.seconds_replayed_verdict is None
        assert found.seconds_replayed_withheld
        left = Replays(1.0).lacking(trials, Store(tmp_path, "digits"))
        assert [spec.seed for spec, _ in left] == [0]


METHODS = ("baseline", "neq")


def ratios(ratio):
    """With ends that are near."""
    return {"ratio": ratio, "ratio_low": 0.98 * ratio, "ratio_high": 1.03 * ratio}


def plant(root, spec, values):
    """Replace some values of a trial's replay."""
    path = root / "digits" / "replays" / f"{spec.key}.parquet"
    table = pq.read_table(path)
    (row,) = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([row | values], schema=table.schema), path)


@pytest.mark.slow
def test_what_else_runs_is_seen(tmp_path, monkeypatch):
    spec = small("neq", "recipe.epochs=2")
    run(spec, tmp_path)
    monkeypatch.setattr(Neighbours, "load", lambda self: 1.25)
    (line,) = replay([spec], tmp_path)
    assert line.endswith(
        "while other processes used the device (load 1.2): no verdict; run it again"
    )
    monkeypatch.setattr(Neighbours, "trials", lambda self: 2)
    (line,) = replay([spec], tmp_path)
    assert "while 2 trials were on the device" in line


@pytest.mark.slow
def test_in_the_report(tmp_path):
    """Mean and interval are those of scipy, on logarithms; the first sentence says them."""
    _, neqs = replayed_seeds(tmp_path, 4)
    found = [0.81, 0.78, 0.85, 0.80]
    for spec, ratio in zip(neqs, found, strict=True):
        planted = ratios(ratio) | {"activation_bytes": 60.0, "activation_bytes_plain": 80.0}
        plant(tmp_path, spec, QUIET | planted)
    report = load_report([Store(tmp_path, "digits")])
    baseline, neq = report.groups[0].methods
    logs = np.log(found)
    low, high = stats.t.interval(0.95, 3, logs.mean(), stats.sem(logs))
    found = neq.replays
    assert found.seconds_replayed_ratio == pytest.approx(math.exp(logs.mean()))
    assert found.seconds_replayed_ratio_low == pytest.approx(math.exp(low))
    assert found.seconds_replayed_ratio_high == pytest.approx(math.exp(high))
    assert found.seconds_replayed_n == 4
    assert found.seconds_replayed_verdict == "less"
    # Measured together, so that their errors don't average out.
    assert found.seconds_replayed_pairs_low == pytest.approx(math.exp(logs.mean()) * 0.98)
    assert found.seconds_replayed_pairs_high == pytest.approx(math.exp(logs.mean()) * 1.03)
    assert found.activation_ratio == 0.75
    assert baseline.replays.seconds_replayed_ratio is None
    (section,) = sections(report)
    ends = f"{math.exp(low):.2f} to {math.exp(high):.2f}"
    first = section.answers[0].partition(". It executes")[0]
    assert first.endswith(
        f"takes × 0.81 of the baseline's time (replayed; {ends}) and × 0.75 of its activations' "
        "bytes"
    )
    value = json.loads(report.to_json())["groups"][0]["methods"][1]
    assert value["seconds_replayed_ratio"] == found.seconds_replayed_ratio
    for spec in neqs:  # seeds that had the same masks, and so the same figure
        plant(tmp_path, spec, {"ratio": 0.99, "ratio_low": 0.97, "ratio_high": 1.01})
    (group,) = load_report([Store(tmp_path, "digits")]).groups
    found = group.methods[1].replays
    assert found.seconds_replayed_ratio_low == pytest.approx(0.99)
    assert found.seconds_replayed_verdict == "unclear"
    assert found.ends == pytest.approx((0.97, 1.01))


REFUSED = [
    ("trials", "cpu", "Another CPU", "neq (1 trial): trained on Another CPU, and here is "),
    ("epochs", "backward_flops_executed", 7, "would not execute what they did execute"),
    ("layers", "layer", "elsewhere", "its layers are not those of the model"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind, column, value, says", REFUSED)
def test_what_can_not_be_replayed_is_said(tmp_path, kind, column, value, says):
    spec = small("neq", "recipe.epochs=2")
    run(spec, tmp_path)
    altered(tmp_path, spec.key, kind, column, value)
    (line,) = replay([spec], tmp_path)
    assert line.startswith("not replayed: neq (1 trial): ")
    assert says in line
    assert not (tmp_path / "digits" / "replays").exists()


@pytest.mark.slow
def test_a_method_that_raises_does_not_end_the_run(tmp_path, monkeypatch):
    spec = small("neq", "recipe.epochs=2")
    run(spec, tmp_path)

    def fails(self):
        raise KeyError("a bug")

    monkeypatch.setattr(replaying.Sides, "decisions", fails)
    (line,) = replay([spec], tmp_path)
    assert line == "not replayed: neq (1 trial): KeyError: 'a bug'"


def test_results_without_masks(tmp_path):
    spec = small("neq", "recipe.epochs=2")
    run(spec, tmp_path)
    (tmp_path / "digits" / "layers" / f"{spec.key}.parquet").unlink()
    (line,) = replay([spec], tmp_path)
    assert line.endswith("its results don't hold the masks of all epochs")


@pytest.mark.slow
def test_what_prunes_is_passed_over(tmp_path):
    spec = small("gradual", "methods.gradual={sparsity=0.5}", "recipe.epochs=2")
    run(spec, tmp_path)
    assert replay([spec], tmp_path) == []


@pytest.mark.slow
def test_two_replays_at_a_time_see_each_other(tmp_path):
    """As of two runs that end together: neither is alone."""
    spec = small("neq", "recipe.epochs=2")
    run(spec, tmp_path)
    with Neighbours(torch.device("cpu"), "another run's replay").registered():
        (line,) = replay([spec], tmp_path)
    assert "while 2 trials were on the device" in line
    assert replayed(tmp_path)["trials_on_device"].tolist() == [2]


@pytest.mark.slow
def test_own_methods_are_replayed_if_they_have_a_freezer(toys, tmp_path):
    for method in ("freezer", "regulariser"):
        run(toy(toys, method), tmp_path)
    lines = replay([toy(toys, method) for method in ("freezer", "regulariser")], tmp_path)
    assert lines[0].startswith("replayed freezer: 1 trial")
    assert lines[1] == (
        "not replayed: regulariser (1 trial): its method has no NeuronFreezer whose masks could be "
        "set"
    )
    assert list(replayed(tmp_path, "toys").index) == [("freezer", 0)]


@pytest.mark.parametrize("words, says", [(["--replay-seconds", "0"], "must be above 0")])
def test_bad_input(neqbench, words, says):
    done = neqbench("run", "digits", *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_command(neqbench, tmp_path):
    """After the trials, unless that is not wanted; again it has nothing to do."""
    settings = [w for s in [*SMALL, "recipe.epochs=2"] for w in ("--set", s)]
    words = ["run", "digits", "--methods", "baseline,neq", "--seeds", "0", "--executor", "inline"]
    words += ["--results", str(tmp_path), *settings]
    assert "replayed" not in neqbench(*words, "--no-replay").stdout
    assert not (tmp_path / "digits" / "replays").exists()
    assert "replayed neq: 1 trial, 1 of their 1 masks measured" in neqbench(*words).stdout
    assert "masks measured" not in neqbench(*words).stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_on_a_cluster(tmp_path, shared_ray):
    """One task on its only node; what ran on another kind of machine is named."""
    here, elsewhere = (small("neq", "recipe.epochs=2", seed=seed) for seed in (0, 1))
    for spec in (here, elsewhere):
        run(spec, tmp_path)
    altered(tmp_path, elsewhere.key, "trials", "cpu", "Another CPU")
    lines = replay([here, elsewhere], tmp_path, executor=Ray())
    assert len(lines) == 2
    assert lines[0].startswith("replayed neq: 1 trial, 1 of their 1 masks measured")
    assert "trained on Another CPU, and here is " in lines[1]
    assert list(replayed(tmp_path).index) == [("neq", 0)]
