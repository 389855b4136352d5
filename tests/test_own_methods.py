"""Methods of a user's own: a freezer (the docs'), a pruner and a regulariser, in a suite."""

import ast
import csv
import functools
import io
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from trials import assert_same_results, keep_tuning, render, run, toy

from harness import load_results
from harness.data.load import load_data
from harness.errors import UserError
from harness.methods import Training
from harness.report.forms import to_csv
from harness.report.model import load_report
from harness.run.executors import Ray
from harness.run.preflight import preflight
from harness.run.trials import specs, states
from harness.storage.frames import stores_named
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite.method_specs import KINDS
from harness.suite.parts import build_model

HERE = Path(__file__).parent
METHODS = ["freezer", "pruner", "regulariser"]


def stored(spec, root):
    return Store(root, spec.suite.name).load_checkpoint(spec.key)


def measures(root):
    return load_results("toys", root=str(root)).measures


def test_each_is_short(toys):
    for method in METHODS:
        assert len((toys / f"{method}.py").read_text().splitlines()) < 40


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(tmp_path, toys, method):
    spec = toy(toys, method)
    preflight([spec])
    run(spec, tmp_path / "through")
    for stop in (1, 2, 3):
        run(spec, tmp_path / str(stop), epochs=stop)
        run(spec, tmp_path / str(stop))
        assert_same_results(spec, tmp_path / "through", tmp_path / str(stop))
        assert measures(tmp_path / str(stop)).equals(measures(tmp_path / "through"))
    assert len(measures(tmp_path / "through")) >= 4


@pytest.mark.slow
def test_under_ray_stopped_and_resumed(tmp_path, toys, shared_ray):
    chosen = specs(str(toys), methods=",".join(METHODS), seeds="0")
    for root in ("ray", "through"):
        keep_tuning(chosen[0], tmp_path / root)
    events = Ray().run(chosen, str(tmp_path / "ray"))
    told = (event for _, event in events if isinstance(event, EpochRecord))
    assert next(told).epoch == 0
    events.close()
    done = [event for _, event in Ray().run(chosen, str(tmp_path / "ray"))]
    assert not [event for event in done if isinstance(event, Failure)]
    for spec in chosen:
        run(spec, tmp_path / "through")
        assert_same_results(spec, tmp_path / "through", tmp_path / "ray")
    columns = ["trial", "epoch", "name", "layer"]
    ray, through = (measures(tmp_path / root).sort_values(columns) for root in ("ray", "through"))
    assert ray.reset_index(drop=True).equals(through.reset_index(drop=True))


@pytest.mark.slow
def test_what_is_recorded_and_reported(tmp_path, toys):
    for method in ("baseline", *METHODS):
        for seed in (0, 1):
            run(toy(toys, method, seed=seed), tmp_path)
    rows = pd.read_parquet(tmp_path / "toys" / "measures")
    identity = ["trial", "group", "suite", "method", "seed"]
    assert list(rows.columns) == [*identity, "epoch", "layer", "name", "value"]
    zeros = rows[(rows["name"] == "zero_rows") & (rows["seed"] == 0)]
    whole = zeros[zeros["layer"].isna()]["value"].tolist()
    assert whole[:2] == [0, 0] and whole[2] == whole[3] > 0  # noqa: PT018
    assert zeros[zeros["layer"].notna()].groupby("epoch")["value"].sum().tolist() == whole
    assert rows[rows["name"] == "steps"]["value"].tolist() == 2 * [5, 10, 15, 20]

    (table,) = load_report(stored_in(tmp_path)).groups
    assert [row.method for row in table.methods] == ["baseline", *METHODS]
    by_name = {row.method: row for row in table.methods}
    whole_model, by_layer = by_name["pruner"].measures
    assert (whole_model.name, whole_model.layers, whole_model.mean) == ("zero_rows", 0, whole[3])
    last = zeros[zeros["epoch"] == 3].dropna()["value"]
    found = (by_layer.layers, by_layer.mean, by_layer.low, by_layer.high)
    assert found == (len(last), last.mean(), last.min(), last.max())
    assert by_name["baseline"].measures == []
    assert by_name["freezer"].savings.frozen > 0.1
    assert by_name["freezer"].savings.required < by_name["freezer"].savings.dense
    assert by_name["freezer"].parameters["share"] == 0.5
    pruned = by_name["pruner"]
    assert pruned.savings.required == pruned.savings.dense
    left = [s.effective_parameters for s in (pruned.savings, by_name["freezer"].savings)]
    sizes = [
        sum(int(w.count_nonzero()) for n, w in weights.items() if "running" not in n and w.dim())
        for seed in (0, 1)
        for weights in [stored(toy(toys, "pruner", seed=seed), tmp_path)["model"]]
    ]
    assert left == [sum(sizes) / 2, None]
    assert math.isnan(pruned.savings.saved)  # it is smaller, and has cost no less
    assert pruned.shorter_baseline.stopped_epochs is None
    text = " ".join(render([table], 160).split())
    assert "pruner has no verdict on accuracy" in text
    assert "executes" not in text[text.index("pruner has") : text.index("regulariser has")]
    listed = json.loads(load_report(stored_in(tmp_path)).to_json())["groups"][0]["methods"]
    assert {m["name"] for row in listed for m in row["measures"]} == set(rows["name"])


def stored_in(root):
    return stores_named([str(root)], str(root))


def test_evaluations_are_counted_and_weights_brought_back(tmp_path, toys):
    spec, plain = toy(toys, "regulariser"), toy(toys, "baseline")
    for each in (spec, plain):
        run(each, tmp_path)
    ours, theirs = (pd.DataFrame(Store(tmp_path, "toys").epochs(s.key)) for s in (spec, plain))
    one_forward = theirs["forward_flops"] // theirs["samples"]
    assert (ours["overhead_flops"] == 30 * one_forward + 1).all()  # of validation, and 1
    assert (theirs["overhead_flops"] == 0).all()
    state = stored(spec, tmp_path)
    kept = state["method"]["best_loss"]
    assert kept == pytest.approx(evaluated(spec, state["best"], "validation")[0], abs=1e-6)


def evaluated(spec, weights, part):
    """Loss and accuracy by hand, in one batch."""
    model = build_model(spec.suite.model.build, spec.folder, spec.suite.model.arguments)
    model.load_state_dict(weights)
    batches = load_data(spec.suite, spec.folder).open(torch.device("cpu"), 0, spec.suite.recipe)
    ((inputs, targets),) = batches.evaluate(part, 10_000)
    with torch.no_grad():
        outputs = model.eval()(inputs)
    loss = torch.nn.functional.cross_entropy(outputs, targets)
    return float(loss), float((outputs.argmax(1) == targets).float().mean())


@pytest.mark.slow
def test_what_is_reported_is_of_the_weights_that_are_kept(tmp_path, toys):
    spec = toy(toys, "pruner", "recipe.epochs=3")  # it zeroes rows at the last epoch's end
    preflight([spec])
    run(spec, tmp_path)
    state, last = stored(spec, tmp_path), Store(tmp_path, "toys").epochs(spec.key)[-1]
    zero = [bool((w.flatten(1) == 0).all(1).any()) for w in state["model"].values() if w.dim() == 4]
    assert all(zero)
    for part, loss in (("test", last["test_loss"]), ("validation", last["val_loss"])):
        found, accuracy = evaluated(spec, state["model"], part)
        assert found == pytest.approx(loss, rel=1e-5)
    _, accuracy = evaluated(spec, state["model"], "test")
    assert accuracy == pytest.approx(last["test_metric"], abs=1e-7)


@pytest.mark.slow
def test_no_step_is_told_that_a_scaler_has_skipped(tmp_path, toys, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**24)  # float16 ends at 2**16
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    spec = toy(toys, "regulariser", "recipe.precision=fp16", "recipe.epochs=4")
    run(spec, tmp_path)
    state = stored(spec, tmp_path)
    steps = state["method"]["steps"]
    assert 0 < steps < 20
    assert state["scaler"]["scale"] == 2.0 ** (24 - (20 - steps))  # halved by each step skipped
    assert all(bool(value.isfinite().all()) for value in state["model"].values())


def without(toys, *methods):
    """The suite's file without these tables."""
    path = toys / "suite.toml"
    text = path.read_text()
    for method in methods:
        text = re.sub(rf"\[methods\.{method}\]\n(.+\n)+\n", "", text)
    path.write_text(text)


@pytest.mark.slow
def test_doctor_examines_them(toys, neqbench):
    without(toys, "freezer", "pruner")
    done = neqbench("doctor", toys)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1] == "ok    two workers"
    text = (toys / "regulariser.py").read_text()
    drift = text.replace("p.sub_(self.lam", "p.sub_((1 + parallel.rank()) * self.lam").replace(
        "import torch\n", "import torch\n\nfrom harness import parallel\n"
    )
    (toys / "regulariser.py").write_text(drift)
    done = neqbench("doctor", toys)
    assert done.returncode == 1
    assert "wrong two workers: method regulariser fails on two workers" in done.stdout
    assert "drifted apart" in done.stdout


def test_a_method_s_code_is_its_own_trials(toys):
    before = {m: toy(toys, m).key for m in ("baseline", *METHODS)}
    (toys / "pruner.py").write_text((toys / "pruner.py").read_text() + "\n# other\n")
    after = {m: toy(toys, m).key for m in ("baseline", *METHODS)}
    assert [m for m in before if before[m] != after[m]] == ["pruner"]
    (toys / "tools").mkdir()
    (toys / "tools" / "rank.py").write_text("x = 1\n")
    (toys / "pruner.py").write_text("import tools.rank\n" + (toys / "pruner.py").read_text())
    once = toy(toys, "pruner")
    (toys / "tools" / "rank.py").write_text("x = 2\n")
    again = toy(toys, "pruner")
    assert once.key != again.key
    assert once.group == again.group == toy(toys, "baseline").group


def test_a_method_that_leaves_the_suite_leaves_the_baselines_as_they_are(toys):
    before = toy(toys, "baseline")
    without(toys, "pruner")
    assert toy(toys, "baseline").key == before.key
    for line in ("from harness import methods", "from harness.methods.method import Method"):
        (toys / "pruner.py").write_text(f"{line}\n\nx = 2\n")
        assert toy(toys, "baseline").key == before.key
    (toys / "more.py").write_text("x = 1\n")  # no method: it may be the suite's
    assert toy(toys, "baseline").key != before.key


@pytest.mark.slow
def test_other_code_of_a_method_is_another_row(tmp_path, toys, neqbench):
    run(toy(toys, "pruner"), tmp_path)
    (toys / "pruner.py").write_text((toys / "pruner.py").read_text() + "\n# other\n")
    for seed in (0, 1):
        run(toy(toys, "pruner", seed=seed), tmp_path)
    (table,) = load_report(stored_in(tmp_path)).groups
    assert sorted(row.n for row in table.methods) == [1, 2]
    codes = {row.parameters["code"] for row in table.methods}
    assert {row.label for row in table.methods} == {f"pruner code={code}" for code in codes}


def test_measures_that_are_lost_are_rewritten(tmp_path, toys):
    spec = toy(toys, "pruner")
    run(spec, tmp_path)
    before = measures(tmp_path)
    (tmp_path / "toys" / "measures" / f"{spec.key}.parquet").unlink()
    assert [trial.state for trial in states([spec], str(tmp_path))] == ["partial"]
    run(spec, tmp_path)
    assert measures(tmp_path).equals(before)
    assert [trial.state for trial in states([spec], str(tmp_path))] == ["done"]


def test_arguments_do_not_hide_the_columns_of_the_report(tmp_path, toys):
    arguments = "methods.pruner.arguments={share=0.5, at=2, n=77}"
    text = (toys / "pruner.py").read_text().replace("share, at)", "share, at, n)", 1)
    (toys / "pruner.py").write_text(text)
    run(toy(toys, "pruner", arguments), tmp_path)
    (row,) = csv.DictReader(io.StringIO(to_csv(load_report(stored_in(tmp_path)))))
    assert (row["n"], row["parameters.n"], row["share"]) == ("1", "77", "0.5")


@pytest.mark.slow
def test_a_method_may_want_another_model(tmp_path, toys):
    text = (
        (toys / "suite.toml")
        .read_text()
        .replace("at = 2 }", "at = 2 }\nmodel_arguments = {width = 4}")
    )
    (toys / "suite.toml").write_text(text)
    spec = toy(toys, "pruner")
    preflight([spec])
    run(spec, tmp_path)
    assert stored(spec, tmp_path)["model"]["conv1.weight"].shape[0] == 4
    plain = toy(toys, "baseline")
    assert spec.group == plain.group
    run(plain, tmp_path)
    (table,) = load_report(stored_in(tmp_path)).groups
    base, narrow = table.methods
    assert base.savings.dense == narrow.savings.dense > 2 * narrow.savings.executed


def test_arguments_can_be_swept(toys):
    swept = specs(
        str(toys),
        ["methods.pruner.arguments=[{share=0.2, at=1}, {share=0.4, at=1}]"],
        "pruner",
        "0",
    )
    assert [t.method for t in swept] == ["pruner share=0.2", "pruner share=0.4"]
    assert len({t.key for t in swept}) == 2


def test_values_of_a_sweep_that_would_be_called_alike(toys):
    with pytest.raises(UserError, match="two of its values are both called 'pruner share=a_b'"):
        toy(toys, "pruner", "methods.pruner.arguments=[{share='a/b'}, {share='a b'}]")


def test_doctor_looks_at_the_first_experiment_of_a_sweep(toys, neqbench):
    without(toys, "freezer", "pruner")
    path = toys / "regulariser.py"
    path.write_text(path.read_text().replace("self.steps += 1", "raise ValueError"))
    done = neqbench("doctor", toys, "--set", "recipe.optimizer.lr=[0.1, 0.2]")
    assert "wrong the methods: suite toys: method regulariser: Shrink: after_step() failed" in (
        done.stdout
    )


@pytest.mark.slow
def test_a_mask_that_follows_from_the_weights_is_brought_back_with_them(toys):
    """A resumed trial restores the model first."""
    text = (toys / "pruner.py").read_text()
    text = text.replace(
        'self.kept = dict(state["kept"])',
        "self.kept = {n: (w.flatten(1) != 0).any(1).float().view(-1, 1, 1, 1)"
        " for n, w in self.weights().items() if n in state['kept']}",
    )
    (toys / "pruner.py").write_text(text.replace("epoch == self.at", "epoch == 0"))
    preflight([toy(toys, "pruner")])


def test_the_trial_knows_no_method():
    for path in (HERE.parent / "harness" / "train").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        froms = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not {"NeuronFreezer", "Freezing"} & names
        assert "harness.methods.freezing" not in froms
        assert not set(KINDS) & words


def test_random_streams_follow_from_the_seed():
    streams = [SimpleNamespace(seed=seed) for seed in (0, 0, 1)]
    draws = [torch.rand(3, generator=Training.generator(s, "x", 2)).tolist() for s in streams]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] != torch.rand(3, generator=Training.generator(streams[0], "x", 3)).tolist()
