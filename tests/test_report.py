import io
import json
import math
import shutil

import numpy
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from trials import run, small

from harness import plan
from harness.errors import UserError
from harness.report import model, terminal
from harness.storage import Store, stores

FLOPS = ("dense", "paper", "required", "executed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for seed in (0, 1):
        for method in ("random", "neq", "baseline"):
            run(small(method, seed=seed), root)
    run(small("neq", seed=2), root)  # no baseline to compare with
    run(small("random", seed=2), root, epochs=2)  # unfinished
    run(small("baseline", "recipe.optimizer.lr=1e30"), root)  # failed, in a group of its own
    run(small("baseline", "recipe.epochs=1"), root)  # one seed, in a group of its own
    return root


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


def test_parameters_are_not_averaged(two_eps):
    (table,) = model.load(stores("digits", str(two_eps)))
    plain, one, two = table.methods
    assert [row.label for row in table.methods] == ["plain", "neq eps=0.01", "neq eps=9.0"]
    assert (one.n, two.n, one.seeds, two.seeds) == (2, 2, [0, 1], [0, 1])
    assert one.required > two.required
    assert plain.difference is None
    assert one.difference == pytest.approx(one.metric_mean - plain.metric_mean)
    assert "neq eps=9.0" in render([table], 80)


def test_a_trial_whose_rows_were_lost_is_run_again(two_eps, tmp_path):
    shutil.copytree(two_eps / "digits", tmp_path / "digits")
    spec = small("plain", "recipe.epochs=3", "methods.plain={kind='baseline'}")
    (tmp_path / "digits" / "epochs" / f"{spec.key}.parquet").unlink()
    (table,) = model.load([Store(tmp_path, "digits")])
    assert table.methods[0].n == 1
    assert "plain seed 0: its rows are missing" in table.unfinished[0]
    assert plan.states([spec], str(tmp_path))[0].state == "partial"
    run(spec, tmp_path)
    (table,) = model.load([Store(tmp_path, "digits")])
    assert table.methods[0].n == 2
    assert plan.states([spec], str(tmp_path))[0].state == "done"


@pytest.fixture(scope="module")
def tables(root):
    return model.load(stores("digits", str(root)))


def test_groups_stand_apart(tables):
    assert sorted(len(table.methods) for table in tables) == [0, 1, 3]
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
        assert row.metric_mean == pytest.approx(numpy.mean(last))
        assert row.metric_std == pytest.approx(numpy.std(last, ddof=1))
        per_sample = mine[[f"backward_flops_{c}" for c in FLOPS]] / 210
        means = per_sample.mean().tolist()
        assert [row.dense, row.paper, row.required, row.executed] == pytest.approx(means)
        spent = mine["backward_flops_executed"].sum() + mine["overhead_flops"].sum()
        assert row.saved == pytest.approx(1 - spent / mine["backward_flops_dense"].sum())
        full = 210 * 5 * len(row.seeds) * table.paper_dense
        assert row.saved_paper == pytest.approx(1 - mine["backward_flops_paper"].sum() / full)
        assert row.seconds_train == pytest.approx(mine["seconds_train"].sum() / len(row.seeds))
    baseline, neq, random = table.methods
    assert (baseline.n, neq.n, random.n) == (2, 3, 2)
    assert (baseline.saved, baseline.saved_paper, baseline.overhead) == (0, 0, 0)
    assert baseline.dense == baseline.required == baseline.executed == table.dense
    last = epochs[epochs["epoch"] == 4].pivot(index="seed", columns="method", values="test_metric")
    paired = (last["neq"] - last["baseline"]).loc[[0, 1]].mean()
    assert neq.difference == pytest.approx(paired)
    assert baseline.difference is None


def test_what_is_left_out_is_said(tables):
    table = main_table(tables)
    assert table.unfinished == ["random seed 2: 2 of 5 epochs"]
    (failed,) = [t for t in tables if not t.methods]
    assert failed.failed[0].startswith("baseline seed 0: the training loss became")
    (single,) = [t for t in tables if len(t.methods) == 1]
    assert single.methods[0].metric_std is None


def render(tables, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    terminal.show(tables, console)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 160])
def test_nothing_is_cut_off(tables, width):
    text = render(tables, width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert not any(line.endswith(" ") for line in text.splitlines() if "─" not in line)
    table = main_table(tables)
    for row in table.methods:
        (line,) = [li for li in text.splitlines() if li.startswith(f"{row.method} ")][:1]
        assert f"{100 * row.metric_mean:.2f}" in line
        assert f"{100 * row.saved:.1f}" in line
        assert f"{row.paper / 1e6:.2f}" in line
    assert "Unfinished: random seed 2: 2 of 5 epochs" in text
    assert "Failed: baseline seed 0: the training loss" in text
    assert "No trial is finished yet." in text


def test_json_is_valid_and_complete(tables):
    value = json.loads(model.to_json(tables), parse_constant=lambda name: pytest.fail(name))
    assert {group["group"] for group in value["groups"]} == {table.group for table in tables}
    group = next(g for g in value["groups"] if len(g["methods"]) == 3)
    assert group["methods"][1]["parameters"]["eps"] == 0.01
    empty = next(g for g in value["groups"] if not g["methods"])
    assert empty["dense"] is None
    assert math.isnan(next(t for t in tables if not t.methods).dense)


def test_seconds_of_different_devices_are_not_averaged(root, tables, tmp_path):
    shutil.copytree(root / "digits", tmp_path / "digits")
    group = main_table(tables).group
    paths = (tmp_path / "digits" / "trials").iterdir()
    path = next(p for p in paths if pq.read_table(p)["group"][0].as_py() == group)
    table = pq.read_table(path)
    other = pa.array(["another"], pa.string())
    place = table.schema.get_field_index("cpu")
    pq.write_table(table.set_column(place, table.schema.field("cpu"), other), path)
    mixed = next(t for t in model.load([Store(tmp_path, "digits")]) if t.group == group)
    assert {row.seconds_train for row in mixed.methods} == {None}
    assert "different devices" in render([mixed], 80)
    assert {row.seconds_train for row in main_table(tables).methods}.isdisjoint({None})


def test_a_name_a_root_or_a_folder(root):
    folder = root / "digits"
    for where in (("digits", str(root)), (str(root), "results"), (str(folder), "results")):
        (store,) = stores(*where)
        assert (store.place.uri, store.name) == (str(folder), "digits")
    with pytest.raises(UserError, match=r"no results for 'nothing' below .*: run `neqbench run"):
        stores("nothing", str(root))
    (root / "empty" / "trials").mkdir(parents=True)
    with pytest.raises(UserError, match="no trial has been started yet"):
        model.load([Store(root, "empty")])
