import json
import math
import re
import shutil

import numpy
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from trials import percent, render, row_of, run, small

from harness import load_results
from harness.errors import UserError
from harness.report import model
from harness.report.phases import _bounds
from harness.run.trials import states
from harness.storage.frames import stores_named
from harness.storage.store import Store, find_stores

FLOPS = ("dense", "paper", "required", "executed")


@pytest.fixture(scope="module")
def root(mixed_results):
    return mixed_results


@pytest.fixture(scope="module")
def two_eps(tmp_path_factory):
    """A method with two parameters in one group, and a baseline that is called otherwise."""
    root = tmp_path_factory.mktemp("two")
    settings = ["recipe.epochs=3", "methods.plain={kind='baseline'}"]
    for seed in (0, 1):
        run(small("plain", *settings, seed=seed), root)
        for eps in (0.01, 9):
            run(small("neq", *settings, f"methods.neq.eps={eps}", seed=seed), root)
    return root


@pytest.mark.slow
def test_parameters_are_not_averaged(two_eps):
    (table,) = model.load_report(find_stores("digits", str(two_eps))).groups
    plain, one, two = table.methods
    assert [row.label for row in table.methods] == ["plain", "neq eps=0.01", "neq eps=9.0"]
    assert (one.n, two.n, one.seeds, two.seeds) == (2, 2, [0, 1], [0, 1])
    assert one.savings.required > two.savings.required
    assert plain.quality.difference is None
    assert one.quality.difference == pytest.approx(
        one.quality.metric_mean - plain.quality.metric_mean
    )
    assert "neq eps=9.0" in render([table], 80)


def test_a_trial_whose_rows_were_lost_is_run_again(two_eps, tmp_path):
    shutil.copytree(two_eps / "digits", tmp_path / "digits")
    spec = small("plain", "recipe.epochs=3", "methods.plain={kind='baseline'}")
    (tmp_path / "digits" / "epochs" / f"{spec.key}.parquet").unlink()
    (table,) = model.load_report([Store(tmp_path, "digits")]).groups
    assert table.methods[0].n == 1
    assert "plain seed 0: its rows of epochs are not whole" in table.unfinished[0]
    assert states([spec], str(tmp_path))[0].state == "partial"
    run(spec, tmp_path)
    (table,) = model.load_report([Store(tmp_path, "digits")]).groups
    assert table.methods[0].n == 2
    assert states([spec], str(tmp_path))[0].state == "done"


@pytest.fixture(scope="module")
def report(root):
    return model.load_report(find_stores("digits", str(root)))


@pytest.fixture(scope="module")
def tables(report):
    return report.groups


@pytest.mark.slow
def test_groups_stand_apart(tables):
    assert sorted(sum(row.n > 0 for row in table.methods) for table in tables) == [0, 1, 3]
    assert len({table.group for table in tables}) == 3


def main_table(tables):
    return next(table for table in tables if len(table.methods) == 3)


def test_the_figures_agree_with_the_stored_rows(root, tables):
    table = main_table(tables)
    epochs = pd.read_parquet(root / "digits" / "epochs")
    epochs = epochs[epochs["group"] == table.group]
    assert [row.method for row in table.methods] == ["baseline", "neq", "random"]
    for row in table.methods:
        mine = epochs[(epochs["method"] == row.method) & epochs["seed"].isin(row.seeds)]
        last = mine[mine["epoch"] == 4].set_index("seed")["test_metric"]
        assert row.quality.metric_mean == pytest.approx(numpy.mean(last))
        assert row.quality.metric_std == pytest.approx(numpy.std(last, ddof=1))
        per_sample = mine[[f"backward_flops_{c}" for c in FLOPS]] / 210
        saved = row.savings
        means = per_sample.mean().tolist()
        assert [saved.dense, saved.paper, saved.required, saved.executed] == pytest.approx(means)
        spent = mine["backward_flops_executed"].sum() + mine["overhead_flops"].sum()
        assert saved.saved == pytest.approx(1 - spent / mine["backward_flops_dense"].sum())
        full = 210 * 5 * len(row.seeds) * table.paper_dense
        assert saved.saved_paper == pytest.approx(1 - mine["backward_flops_paper"].sum() / full)
        assert row.measured.seconds_train == pytest.approx(
            mine["seconds_train"].sum() / len(row.seeds)
        )
    baseline, neq, random = table.methods
    assert (baseline.n, neq.n, random.n) == (2, 3, 2)
    saved = baseline.savings
    assert (saved.saved, saved.saved_paper, saved.overhead) == (0, 0, 0)
    assert saved.dense == saved.required == saved.executed == table.dense
    last = epochs[epochs["epoch"] == 4].pivot(index="seed", columns="method", values="test_metric")
    paired = (last["neq"] - last["baseline"]).loc[[0, 1]].mean()
    assert neq.quality.difference == pytest.approx(paired)
    assert baseline.quality.difference is None


def test_what_is_left_out_is_said(tables):
    table = main_table(tables)
    assert table.unfinished == ["random seed 2: 2 of 5 epochs"]
    (failed,) = [t for t in tables if t.failed]
    assert failed.failed[0].startswith("baseline seed 0: the training loss became")
    assert [(row.method, row.n, row.failed) for row in failed.methods] == [("baseline", 0, 1)]
    (single,) = [t for t in tables if t.epochs == 1]
    assert single.methods[0].quality.metric_std is None


@pytest.mark.parametrize("width", [80, 160])
def test_nothing_is_cut_off(tables, width):
    text = render(tables, width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert not any(line.endswith(" ") for line in text.splitlines() if "─" not in line)
    table = main_table(tables)
    for row in table.methods:
        reached, saved = re.findall(rf"^{row.method} +\d.*", text, re.MULTILINE)[:2]
        assert f"{100 * row.quality.metric_mean:.2f}" in reached
        for share in (row.savings.saved, row.savings.saved_required, row.savings.saved_paper):
            assert percent(share) in saved
        assert f"{row.savings.executed / 1e6:.2f}" in saved
    assert "Unfinished: random seed 2: 2 of 5 epochs" in text
    assert "Failed: baseline seed 0: the training loss" in text
    assert "No trial is finished yet." in text


def test_json_is_valid_and_complete(report):
    tables = report.groups
    value = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert {group["group"] for group in value["groups"]} == {table.group for table in tables}
    group = next(g for g in value["groups"] if len(g["methods"]) == 3)
    assert group["methods"][1]["parameters"]["eps"] == 0.01
    empty = next(g for g in value["groups"] if g["failed"])
    assert empty["dense"] is None
    assert empty["methods"][0]["metric_mean"] is None
    assert math.isnan(next(t for t in tables if t.failed).dense)
    assert value["not_begun"] == []


def test_seconds_of_different_devices_are_not_averaged(root, tables, tmp_path):
    shutil.copytree(root / "digits", tmp_path / "digits")
    group = main_table(tables).group
    paths = (tmp_path / "digits" / "trials").iterdir()
    path = next(p for p in paths if pq.read_table(p)["group"][0].as_py() == group)
    table = pq.read_table(path)
    other = pa.array(["another"], pa.string())
    place = table.schema.get_field_index("cpu")
    pq.write_table(table.set_column(place, table.schema.field("cpu"), other), path)
    mixed = next(
        t for t in model.load_report([Store(tmp_path, "digits")]).groups if t.group == group
    )
    assert {row.measured.seconds_train for row in mixed.methods} == {None}
    assert "different devices" in render([mixed], 80)
    assert {row.measured.seconds_train for row in main_table(tables).methods}.isdisjoint({None})


def test_a_name_a_root_or_a_folder(root):
    folder = root / "digits"
    for where in (("digits", str(root)), (str(root), "results"), (str(folder), "results")):
        (store,) = find_stores(*where)
        assert (store.location.uri, store.name) == (str(folder), "digits")
    with pytest.raises(UserError, match=r"no results for 'nothing' below .*: run `neqbench run"):
        find_stores("nothing", str(root))
    (root / "empty" / "trials").mkdir(parents=True)
    with pytest.raises(UserError, match="no trial has been started yet"):
        model.load_report([Store(root, "empty")])


def test_the_difference_has_its_interval_and_verdict(root, tables):
    """Against scipy, over the seeds that both have; two are too few for a verdict."""
    table = main_table(tables)
    epochs = pd.read_parquet(root / "digits" / "epochs")
    last = epochs[(epochs["group"] == table.group) & (epochs["epoch"] == 4)]
    last = last.pivot(index="seed", columns="method", values="test_metric")
    neq = row_of(table, "neq")
    test = stats.ttest_rel(last["neq"][:2], last["baseline"][:2])
    low, high = test.confidence_interval()
    assert (neq.quality.difference_low, neq.quality.difference_high) == pytest.approx((low, high))
    assert (neq.quality.difference_n, neq.quality.paired, neq.quality.verdict) == (2, True, None)
    assert "No verdict from fewer than 3 seeds." in table.notes
    low, high = stats.t.interval(0.95, 2, loc=last["neq"].mean(), scale=stats.sem(last["neq"]))
    assert (neq.quality.metric_low, neq.quality.metric_high) == pytest.approx((low, high))


def test_phases_follow_the_learning_rate_and_add_up(root, tables):
    table = main_table(tables)
    assert [(p.first, p.last) for p in table.phases] == [(0, 1), (2, 3), (4, 4)]
    epochs = pd.read_parquet(root / "digits" / "epochs")
    for row in table.methods:
        parts = [next(p for p in phase.methods if p.label == row.label) for phase in table.phases]
        assert sum(part.share for part in parts) == pytest.approx(row.savings.saved)
        assert parts[-1].metric == pytest.approx(row.quality.metric_mean)
        mine = epochs[(epochs["group"] == table.group) & (epochs["method"] == row.method)]
        mine = mine[mine["seed"].isin(row.seeds) & mine["epoch"].isin([2, 3])]
        spent = mine["backward_flops_executed"].sum() + mine["overhead_flops"].sum()
        assert parts[1].saved == pytest.approx(1 - spent / mine["backward_flops_dense"].sum())


def test_a_baseline_stopped_at_the_same_cost(two_eps):
    """Everything stands still in the last of three epochs: the baseline can afford two."""
    (table,) = model.load_report(find_stores("digits", str(two_eps))).groups
    plain, less, more = table.methods
    assert 0 < more.savings.saved < 1 / 3
    assert more.shorter_baseline.stopped_epochs == 2
    epochs = pd.read_parquet(two_eps / "digits" / "epochs").set_index(["method", "epoch", "seed"])
    stopped = epochs.loc["plain"].loc[1]["test_metric"]
    assert more.shorter_baseline.stopped_metric == pytest.approx(stopped.mean())
    ends = epochs.reset_index()
    ends = ends[ends["epoch"] == 2].sort_values("frozen_neurons").groupby("seed").last()
    assert more.shorter_baseline.stopped_difference == pytest.approx(
        (ends["test_metric"] - stopped).mean()
    )
    assert plain.shorter_baseline.stopped_epochs is None
    assert less.shorter_baseline.stopped_epochs is None
    assert "2 of 3" in render([table], 80)


def test_groups_say_in_what_they_differ(tables):
    single = next(table for table in tables if table.epochs == 1)
    assert single.apart["recipe.epochs"] == 1
    assert "recipe.batch_size" not in single.apart
    assert "Stands apart from the suite's other groups by recipe.epochs 1" in render(tables, 200)


@pytest.mark.slow
def test_several_results_are_taken_together(root, tmp_path, neqbench):
    """Each trial once, from where it went furthest."""
    run(small("random", seed=2), tmp_path)
    run(small("baseline", seed=2), tmp_path)
    run(small("neq", seed=1), tmp_path)  # lies in both
    both = load_results(str(root), str(tmp_path))
    assert both.trials["trial"].is_unique
    assert set(both.twice) == {small("random", seed=2).key, small("neq", seed=1).key}
    report = model.load_report(stores_named([str(root), str(tmp_path / "digits")], "results"))
    table = main_table(report.groups)
    assert [row.n for row in table.methods] == [3, 3, 3]
    assert not table.unfinished
    assert len(pd.merge(both.epochs, both.trials, on="trial")) == len(both.epochs)
    assert "2 trials in several of these folders; each counts once." in table.notes
    text = neqbench("report", root, tmp_path, "--results", tmp_path).stdout
    assert "2 trials in several" in text


def test_results_are_data_frames(root):
    results = load_results("digits", root=str(root))
    stored = pd.read_parquet(root / "digits" / "layers")
    assert len(results.layers) == len(stored)
    assert set(results.epochs["trial"]) <= set(results.trials["trial"])
    some = results.layers_of({small("neq").key})
    assert set(some["trial"]) == {small("neq").key}
    with pytest.raises(UserError, match="no results for"):
        load_results("nothing", root=str(root))


def test_phases_of_other_schedules():
    assert _bounds([0.1] * 6 + [0.01] * 3) == [(0, 5), (6, 8)]
    assert _bounds([0.02, 0.06, 0.1, 0.1, 0.01, 0.01]) == [(0, 3), (4, 5)]  # after a warm-up
    smooth = [0.5 * (1 + math.cos(math.pi * e / 9)) for e in range(9)]
    assert _bounds(smooth) == [(0, 2), (3, 5), (6, 8)]
    assert _bounds([0.1] * 7) == [(0, 1), (2, 3), (4, 6)]
    assert _bounds([0.1]) == [(0, 0)]
