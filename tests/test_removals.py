"""After trials that prune: what is left when dead neurons are removed, stored beside them."""

import json
import subprocess
import sys
from contextlib import contextmanager

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from test_pruning_methods import narrow
from torch import nn
from trials import render, small, toy
from trials import run as run_trial

from harness.commands.options import RunOptions
from harness.report.model import load_report
from harness.run.executors import Inline
from harness.run.removals import Removals
from harness.storage.store import Store
from harness.suite.parts import build_model
from harness.train import removal
from harness.train.tuning import Tuning
from neq.pruning import dead_neurons

NEURONS = "sparsity=0.4, end=1.0, units='neurons'"  # by magnitude it would empty a layer


@pytest.fixture(autouse=True)
def _few_pairs(monkeypatch):
    monkeypatch.setattr(removal, "SECONDS", 0.0)
    monkeypatch.setattr(removal, "LEAST", 3)


def pruned(*settings, **more):
    return narrow("random-pruning", "recipe.epochs=2", *settings, arguments=NEURONS, **more)


def after(trials, root, *, save=False, executor=None):
    """What is told."""
    found = (executor or Inline()).afterwards(Removals(save), trials, str(root), lambda text: None)
    return [one.text for one in found]


def rows(root, suite="digits-pruning"):
    return pd.read_parquet(root / suite / "removals").set_index("method")


def trained(spec, root):
    state = Store(root, spec.suite.name).load_checkpoint(spec.key)["model"]
    parts = spec.trained_suite.model
    model = build_model(parts.build, spec.folder, parts.arguments)
    model.load_state_dict(state)
    return model.eval()


def by_hand(widths):
    """(parameters, FLOPs of a forward) of a ResNet-8 for 16 × 16 pixels, from its widths; norms
    have no FLOPs.
    """
    parameters = flops = 0
    for name, (inputs, outputs) in widths.items():
        if name == "fc":
            parameters += inputs * outputs + outputs
            flops += 2 * inputs * outputs
            continue
        side = {"layer2": 8, "layer3": 4}.get(name.partition(".")[0], 16)
        parameters += 9 * inputs * outputs + 2 * outputs
        flops += 2 * 9 * inputs * outputs * side**2
    return parameters, flops


@pytest.mark.slow
def test_a_row_says_what_is_left_and_the_files_are_the_network(tmp_path):
    spec = pruned()
    run_trial(spec, tmp_path)
    (line,) = after([spec], tmp_path, save=True)
    assert line.startswith("removed random-pruning: 1 trial, ")
    row, model = rows(tmp_path).loc["random-pruning"], trained(spec, tmp_path)
    kept = torch.load(tmp_path / "digits-pruning" / "shrunk" / f"{spec.key}.pt")
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() > 1}
    dense = {name: (m.weight.shape[1], m.weight.shape[0]) for name, m in layers.items()}

    assert (row["parameters"], row["forward_flops"]) == by_hand(kept["widths"])
    assert (row["parameters_dense"], row["forward_flops_dense"]) == by_hand(dense)
    sizes = {name: tensor.shape for name, tensor in kept["state_dict"].items()}
    assert all(sizes[f"{name}.weight"][:2] == (b, a) for name, (a, b) in kept["widths"].items())
    zero = {n: int((~m.weight.flatten(1).any(1)).sum()) for n, m in layers.items()}
    assert row["neurons_dead"] == sum(zero.values()) > 0
    gone = sum(dense[name][1] - kept["widths"][name][1] for name in dense)
    assert row["neurons_removed"] == gone > 0
    stuck = json.loads(row["stuck"])
    assert sum(one["neurons"] for one in stuck) >= row["neurons_dead"] - gone
    assert row["reason"] is None or pd.isna(row["reason"])
    assert 0 <= row["difference"] < 1e-5
    assert row["batch"] == 40
    assert row["file_bytes"] < row["file_bytes_dense"]
    for size in ("one", "batch"):
        low, high = row[f"latency_{size}_low"], row[f"latency_{size}_high"]
        assert 0 < low <= row[f"latency_{size}"] <= high
        assert row[f"seconds_{size}"] > 0

    inputs = torch.randn(5, 1, 16, 16)
    torch.save(inputs, tmp_path / "inputs.pt")
    alone = (
        "import sys, torch; program = torch.export.load(sys.argv[1]);"
        "outputs = program.module()(torch.load('inputs.pt'));"
        "assert not {'neq', 'harness', 'suites'} & {*sys.modules}, 'not without neqbench';"
        "torch.save(outputs, 'outputs.pt')"
    )
    program = tmp_path / "digits-pruning" / "shrunk" / f"{spec.key}.pt2"
    subprocess.run([sys.executable, "-c", alone, program], check=True, cwd=tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "outputs.pt").detach(), model(inputs))


@pytest.mark.slow
def test_what_is_there_is_not_done_again_and_what_is_missing_is(tmp_path):
    spec = pruned()
    run_trial(spec, tmp_path)
    assert len(after([spec], tmp_path)) == 1
    assert after([spec], tmp_path) == []
    before = rows(tmp_path)
    assert after([spec], tmp_path, save=True) == ["saved random-pruning: 1 trial"]
    assert after([spec], tmp_path, save=True) == []
    pd.testing.assert_frame_equal(rows(tmp_path), before)  # what was measured alone stays
    (path,) = (tmp_path / "digits-pruning" / "removals").iterdir()
    table = pq.read_table(path)
    place = table.schema.get_field_index("trials_on_device")
    pq.write_table(table.set_column(place, table.schema.field(place), [[2]]), path)
    assert len(after([spec], tmp_path)) == 1  # it was not alone
    path.unlink()
    assert len(after([spec], tmp_path)) == 1


@pytest.mark.slow
def test_only_what_prunes_has_a_row(tmp_path, toys):
    trials = [small("neq", "recipe.epochs=1"), small("baseline", "recipe.epochs=1")]
    for spec in trials:
        run_trial(spec, tmp_path)
    assert after(trials, tmp_path) == []
    own = [toy(toys, name, "recipe.epochs=3") for name in ("pruner", "regulariser")]
    for spec in own:
        run_trial(spec, tmp_path)
    (line,) = after(own, tmp_path)
    assert line.startswith("removed pruner: ")


@pytest.mark.slow
def test_a_smaller_model_is_compared_with_that_of_the_suite(tmp_path):
    spec = narrow("smaller", "recipe.epochs=1")
    run_trial(spec, tmp_path)
    (line,) = after([spec], tmp_path)
    assert "(nothing is dead)" in line
    row = rows(tmp_path).loc["smaller"]
    assert row["reason"] == "nothing is dead"
    assert row["parameters"] == sum(p.numel() for p in trained(spec, tmp_path).parameters())
    plain = build_model(spec.suite.model.build, spec.folder, spec.suite.model.arguments)
    assert row["parameters_dense"] == sum(p.numel() for p in plain.parameters())


@pytest.mark.slow
def test_without_torch_pruning_it_is_said_and_done_another_time(tmp_path, monkeypatch):
    spec = pruned()
    run_trial(spec, tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch_pruning", None)
        (line,) = after([spec], tmp_path)
    assert line == (
        "not removed: random-pruning (1 trial): removal needs torch-pruning: "
        "pip install 'neqbench[pruning]'"
    )
    assert after([spec], tmp_path)[0].startswith("removed random-pruning")


UNTRACEABLE = """
import torch
from suites.resnet import ResNet
class Net(ResNet):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return super().forward(x)
"""


@pytest.mark.slow
def test_a_model_that_can_not_be_traced_leaves_the_trial_as_it_is(tmp_path, toys):
    (toys / "net.py").write_text(UNTRACEABLE)
    table = "methods.drawn={kind='random-pruning', sparsity=0.4, end=1.0, units='neurons'}"
    spec = toy(toys, "drawn", "model.build=net:Net", "recipe.epochs=2", table)
    run_trial(spec, tmp_path)
    (line,) = after([spec], tmp_path)
    assert "0 neurons (torch-pruning can't trace the model: ValueError: its outputs have no" in line
    row = rows(tmp_path, spec.suite.name).loc["drawn"]
    assert row["parameters"] == row["parameters_dense"]
    assert row["neurons_removed"] == 0
    dead = sum(dead_neurons(trained(spec, tmp_path)).values())
    assert row["neurons_dead"] == dead > 0
    assert sum(one["neurons"] for one in json.loads(row["stuck"])) == dead
    assert pd.isna(row["difference"])
    assert pd.isna(row["difference_float64"])
    assert Store(tmp_path, spec.suite.name).trial(spec.key)["state"] == "done"


@pytest.mark.slow
def test_one_that_fails_does_not_hold_up_the_others(tmp_path):
    trials = [pruned(seed=seed) for seed in range(3)]
    for spec in trials:
        run_trial(spec, tmp_path)
    for path in (tmp_path / "digits-pruning" / "checkpoints" / trials[1].key).iterdir():
        path.unlink()
    well, lost = after(trials, tmp_path)
    assert well.startswith("removed random-pruning: 2 trials, ")
    assert lost.startswith("not removed: random-pruning (1 trial): the trained model is not there")
    assert sorted(rows(tmp_path)["seed"]) == [0, 2]


@pytest.mark.slow
def test_what_was_trained_elsewhere_is_counted_and_not_timed(tmp_path):
    spec = pruned()
    run_trial(spec, tmp_path)
    (path,) = (tmp_path / "digits-pruning" / "trials").iterdir()
    table = pq.read_table(path)
    place = table.schema.get_field_index("cpu")
    pq.write_table(table.set_column(place, table.schema.field(place), [["Another CPU"]]), path)
    (line,) = after([spec], tmp_path)
    assert line.endswith("; no latency, since it was trained on another kind of machine")
    row = rows(tmp_path).loc["random-pruning"]
    assert row["parameters"] < row["parameters_dense"]
    assert pd.isna(row["latency_batch"])
    (again,) = after([spec], tmp_path)
    assert again.startswith("removed random-pruning before: 1 trial; no latency")


class Priced(nn.Module):
    """A forward that costs what `prices` say for its batch; keeps what it was given."""

    def __init__(self, clock, prices):
        super().__init__()
        self.clock, self.prices, self.given = clock, prices, []
        self.weight = nn.Parameter(torch.ones(1))

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.given.append((x.shape, x.is_contiguous(memory_format=torch.channels_last)))
        self.half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.clock.append(self.prices[len(x)])
        return x


def test_latency_is_of_the_smaller_over_the_whole_model_in_the_suites_precision(monkeypatch):
    clock, looks = [], []

    @contextmanager
    def stopwatch(_device):
        seconds, begun = [], len(clock)
        yield seconds
        seconds.append(sum(clock[begun:]))

    monkeypatch.setattr(removal.neq, "stopwatch", stopwatch)
    suite = small("baseline", "recipe.precision=bf16").suite
    pictures = suite.model.model_copy(update={"input": (3, 8, 8)})
    suite = suite.model_copy(update={"model": pictures})
    timed = removal.Clock(
        suite=suite,
        device=torch.device("cpu"),
        tuning=Tuning(channels_last=True),
        look=lambda: looks.append(None),
    )
    smaller, whole = Priced(clock, {1: 0.03, 40: 0.5}), Priced(clock, {1: 0.04, 40: 2.0})
    one, many = timed(smaller, whole, 1), timed(smaller, whole, 40)
    assert (one.ratio, one.low, one.high) == pytest.approx((0.75, 0.75, 0.75))
    assert (one.seconds, one.dense) == pytest.approx((0.03, 0.04))
    assert (many.ratio, many.seconds, many.dense) == pytest.approx((0.25, 0.5, 2.0))
    assert len(looks) == 6  # three pairs of each
    shape = suite.model.input
    assert set(smaller.given) == {((1, *shape), True), ((40, *shape), True)} == set(whole.given)
    assert smaller.half is whole.half is torch.bfloat16


def test_the_option_goes_with_a_job():
    options = {"suite": "digits", "results": "x", "methods": None, "seeds": None, "settings": None}
    words = RunOptions(**options, synthetic=False, save_shrunk=True).words()
    assert "--save-shrunk" in words


@pytest.mark.slow
def test_what_was_counted_elsewhere_is_timed_at_home(tmp_path):
    spec = pruned()
    run_trial(spec, tmp_path)
    store = Store(tmp_path, "digits-pruning")
    ((_, row),) = Removals(False).lacking([spec], store)
    counted = list(Removals(False).count([(spec, row)], str(tmp_path), print))
    assert len(counted) == 1
    assert rows(tmp_path)[["trials_on_device", "other_load", "device"]].isna().all(axis=None)
    assert "latency was not measured" in render(load_report([store]).groups, 200).replace("\n", " ")
    (line,) = after([spec], tmp_path)
    assert line.startswith("removed random-pruning")
    before = rows(tmp_path)
    assert before["latency_one"].notna().all()
    list(Removals(False).count([(spec, row)], str(tmp_path), print))
    pd.testing.assert_frame_equal(rows(tmp_path), before)


@pytest.mark.slow
def test_a_network_that_can_not_be_exported(tmp_path, monkeypatch):
    spec = pruned()
    run_trial(spec, tmp_path)
    with monkeypatch.context() as patch:

        def fails(*_arguments, **_named):
            raise ValueError("it branches")

        patch.setattr(torch.export, "export", fails)
        removed, unsaved = after([spec], tmp_path, save=True)
    assert removed.startswith("removed random-pruning: 1 trial, ")
    assert unsaved == "not saved: random-pruning (1 trial): ValueError: it branches"
    assert not list((tmp_path / "digits-pruning").glob("shrunk/*"))
    assert after([spec], tmp_path) == []
