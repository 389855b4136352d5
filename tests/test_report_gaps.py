"""What the report says of results that are partial, failed, odd or mixed."""

import json
import math
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trials import SMALL, altered, ask, render, row_of, run, small

from harness.report import model
from harness.run.trials import specs
from harness.storage.frames import stores_named
from harness.storage.store import Store


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Baseline, neq and random over four seeds each, and what was asked for."""
    root = tmp_path_factory.mktemp("four")
    trials = specs("digits", [*SMALL, "recipe.epochs=2"], "baseline,neq,random", "0-3")
    for spec in trials:
        run(spec, root)
    ask(Store(root, "digits"), trials)
    return root


def copied(root, tmp_path):
    shutil.copytree(root / "digits", tmp_path / "digits")
    return tmp_path


def key(method, seed=0):
    return small(method, "recipe.epochs=2", seed=seed).key


def only(root):
    (table,) = model.load_report([Store(root, "digits")]).groups
    return table


@pytest.mark.slow
def test_a_verdict_by_the_suites_margin(four, tmp_path):
    root = copied(four, tmp_path)
    for seed in range(4):
        altered(root, key("baseline", seed), "epochs", "test_metric", 0.9 + seed / 1000)
        altered(root, key("neq", seed), "epochs", "test_metric", 0.898 + seed / 1000 + seed % 2e-4)
        altered(root, key("random", seed), "epochs", "test_metric", 0.8 + seed / 100)
    table = only(root)
    assert (table.margin, row_of(table, "neq").quality.verdict) == (0.5, "keeps")
    assert row_of(table, "random").quality.verdict == "loses"
    text = " ".join(render([table], 80).split())
    assert "neq keeps the baseline's accuracy to within 0.5 points" in text
    assert "A small sample: intervals rest on 4 seeds (3 degrees of freedom)." in table.notes
    strict = specs(
        "digits", [*SMALL, "recipe.epochs=2", "margin=0.1"], "baseline,neq,random", "0-3"
    )
    ask(Store(root, "digits"), strict)
    table = only(root)
    assert (table.margin, row_of(table, "neq").quality.verdict) == (0.1, "loses")


def test_what_failed_is_no_part_of_a_mean_and_forbids_a_verdict(four, tmp_path):
    root = copied(four, tmp_path)
    altered(root, key("neq", 3), "trials", "state", "failed")
    altered(root, key("neq", 3), "trials", "reason", "out of memory")
    altered(root, key("random", 1), "epochs", "test_metric", math.nan)
    table = only(root)
    neq, random = row_of(table, "neq"), row_of(table, "random")
    assert (neq.n, neq.failed, neq.quality.verdict) == (3, 1, None)
    assert (random.n, random.failed, random.seeds) == (3, 1, [0, 2, 3])
    assert table.failed == [
        "random seed 1: its metric is no finite number",
        "neq seed 3: out of memory",
    ]
    text = render([table], 80)
    assert "none: 1 failed" in text
    assert "3 of 4" in text


def test_a_method_of_which_nothing_is_finished_is_still_listed(four, tmp_path):
    root = copied(four, tmp_path)
    run(small("neq", "recipe.epochs=2", "methods.neq.eps=0.5"), root)
    lost = small("neq", "recipe.epochs=2", "methods.neq.eps=0.5").key
    altered(root, lost, "trials", "state", "failed")
    rows = {row.label: (row.n, row.failed) for row in only(root).methods}
    assert rows == {
        "baseline": (4, 0),
        "neq eps=0.01": (4, 0),
        "neq eps=0.5": (0, 1),
        "random": (4, 0),
    }
    for seed in range(4):
        altered(root, key("baseline", seed), "trials", "state", "failed")
    assert "No baseline is finished: there is nothing to compare with." in only(root).notes


def test_what_was_asked_for_and_not_begun_is_said(four, tmp_path):
    root = copied(four, tmp_path)
    for seed in (1, 2, 3):
        for kind in ("trials", "epochs", "layers"):
            (root / "digits" / kind / f"{key('random', seed)}.parquet").unlink()
    assert only(root).missing == ["random: seeds 1-3"]
    for seed in range(4):
        (root / "digits" / "trials" / f"{key('baseline', seed)}.parquet").unlink()
    table = only(root)
    assert "baseline: seeds 0-3" in table.missing
    assert "No baseline is finished: there is nothing to compare with." in table.notes
    assert {row.quality.verdict for row in table.methods} == {None}
    assert "no baseline to compare with" in render([table], 200)


def test_code_versions_and_noise_are_said(four, tmp_path):
    root = copied(four, tmp_path)
    altered(root, key("neq", 0), "trials", "git_sha", "abcdef0123")
    altered(root, key("neq", 0), "trials", "git_dirty", True)
    altered(root, key("neq", 1), "trials", "versions", '{"torch": "1.0"}')
    notes = only(root).notes
    (code,) = [note for note in notes if note.startswith("Code")]
    assert "abcdef0 with uncommitted changes (1)" in code
    assert "(11)" in code
    assert any("torch 1.0 | " in note for note in notes)
    noisy = tmp_path / "noise"
    (spec,) = specs("digits", [*SMALL, "recipe.epochs=1"], "neq", "0", synthetic=True)
    run(spec, noisy)
    assert "Trained on noise: the metric means nothing." in only(noisy).notes
    assert len(model.load_report(stores_named([str(root), str(noisy)], "results")).groups) == 2


def test_time_has_a_verdict_only_where_nobody_shared(four, tmp_path):
    root = copied(four, tmp_path)
    for seed in range(4):
        altered(root, key("baseline", seed), "epochs", "seconds_train", 10.0 + seed)
        altered(root, key("neq", seed), "epochs", "seconds_train", 8.0 + 0.8 * seed)
        for method in ("baseline", "neq"):
            altered(root, key(method, seed), "epochs", "seconds_equilibrium", 0.0)
            altered(root, key(method, seed), "epochs", "energy_joules", 5.0 + 5 * (method == "neq"))
    neq = row_of(only(root), "neq")
    assert neq.measured.seconds_ratio == pytest.approx(0.8)
    assert neq.measured.seconds_verdict == "less"
    assert (neq.measured.energy_joules, neq.measured.energy_ratio) == (20.0, pytest.approx(2.0))
    assert neq.measured.memory_bytes is None
    assert "It takes less time (× 0.80, 0.80 to 0.80)." in " ".join(
        render([only(root)], 80).split()
    )
    altered(root, key("random", 0), "trials", "trials_on_device", 2)
    table = only(root)
    assert row_of(table, "neq").measured.seconds_verdict is None
    assert "no measurement" in render([table], 80)


def test_a_shorter_baseline_spends_all_flops_of_the_method(four, tmp_path):
    """By hand: (forward 3 + executed 2.5 + deciding 0.2) of (forward 3 + dense 6) is 0.63; of two
    epochs that pays for one. Of the backward alone it would be 0.45, and pay for none.
    """
    root = copied(four, tmp_path)
    for seed in range(4):
        for method, executed, overhead in (("baseline", 6000, 0), ("neq", 2500, 200)):
            altered(root, key(method, seed), "epochs", "forward_flops", 3000)
            altered(root, key(method, seed), "epochs", "backward_flops_dense", 6000)
            altered(root, key(method, seed), "epochs", "backward_flops_executed", executed)
            altered(root, key(method, seed), "epochs", "overhead_flops", overhead)
    table = only(root)
    found = row_of(table, "neq").shorter_baseline
    assert found.spent_share == pytest.approx(5.7 / 9)
    assert found.stopped_epochs == 1
    assert "63.3" in render([table], 160)
    altered(root, key("neq", 0), "epochs", "overhead_flops", 13400)  # with it they spend as much
    found = row_of(only(root), "neq").shorter_baseline
    assert (found.spent_share, found.stopped_epochs) == (pytest.approx(1.0), None)


def last_altered(root, trial, column, value):
    """In the row of the last epoch alone."""
    path = root / "digits" / "epochs" / f"{trial}.parquet"
    table = pq.read_table(path)
    values = [*table[column].to_pylist()[:-1], value]
    place, field = table.schema.get_field_index(column), table.schema.field(column)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), path)


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_metric_that_is_none_in_the_last_epoch_is_a_failure(four, tmp_path, value):
    root = copied(four, tmp_path)
    last_altered(root, key("neq", 2), "test_metric", value)
    table = only(root)
    assert table.failed == ["neq seed 2: its metric is no finite number"]
    assert (row_of(table, "neq").n, row_of(table, "neq").withheld) == (3, "1 failed")
    for row in table.methods:
        assert row.quality.difference is None or math.isfinite(row.quality.difference)


@pytest.mark.slow
def test_what_is_not_finite_on_the_way_is_left_out(four, tmp_path, neqbench):
    """In the middle of training, and of clocks and counters."""
    root = copied(four, tmp_path)
    for seed in range(4):
        path = root / "digits" / "epochs" / f"{key('baseline', seed)}.parquet"
        table = pq.read_table(path)
        values = pa.array([math.nan, table["test_metric"][1].as_py()], pa.float64())
        place = table.schema.get_field_index("test_metric")
        pq.write_table(table.set_column(place, "test_metric", values), path)
    altered(root, key("neq", 0), "epochs", "seconds_train", math.inf)
    altered(root, key("neq", 0), "trials", "git_sha", None)
    altered(root, key("neq", 0), "trials", "git_dirty", None)
    for form in ("rich", "html", "md", "latex", "csv", "json"):
        result = neqbench("report", "digits", "--results", root, "--format", form)
        assert result.returncode == 0, form
        assert not re.search(r"\bnan\b", result.stdout)
    assert row_of(only(root), "neq").measured.seconds_train is None
    assert any("unknown" in line for line in only(root).commits)


def test_a_trial_with_some_of_its_epochs_is_not_finished(four, tmp_path):
    root = copied(four, tmp_path)
    path = root / "digits" / "epochs" / f"{key('neq', 1)}.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 1), path)
    assert row_of(only(root), "neq").n == 3
    assert "neq seed 1: its rows of epochs are not whole" in only(root).unfinished[0]
    pq.write_table(pa.concat_tables([table, table.slice(1, 1)]), path)
    assert row_of(only(root), "neq").n == 3


def test_a_failed_baseline_withholds_verdicts(four, tmp_path):
    root = copied(four, tmp_path)
    altered(root, key("baseline", 3), "trials", "state", "failed")
    neq = row_of(only(root), "neq")
    assert (neq.quality.difference_n, neq.quality.verdict, neq.withheld) == (
        3,
        None,
        "a baseline failed",
    )
    assert "none: a baseline failed" in render([only(root)], 120)
    assert only(root).failed == ["baseline seed 3: no reason is known"]


def test_what_was_not_counted_is_not_saved(four, tmp_path):
    root = copied(four, tmp_path)
    for seed in range(4):
        altered(root, key("neq", seed), "epochs", "backward_flops_executed", None)
    table = only(root)
    assert math.isnan(row_of(table, "neq").savings.saved)
    assert all(
        math.isnan(p.share) for phase in table.phases for p in phase.methods if p.label == "neq"
    )
    text = render([table], 80)
    assert "nan" not in text
    assert "It executes" not in text


def test_threads_make_another_device(four, tmp_path):
    root = copied(four, tmp_path)
    for seed in range(4):
        altered(root, key("neq", seed), "trials", "threads", 4)
    assert row_of(only(root), "neq").measured.seconds_ratio is None
    assert "with other threads" in render([only(root)], 80)


@pytest.mark.slow
def test_noise_has_no_verdict(tmp_path):
    trials = specs("digits", [*SMALL, "recipe.epochs=1"], "baseline,neq", "0-2", synthetic=True)
    for spec in trials:
        run(spec, tmp_path)
    table = only(tmp_path)
    assert (row_of(table, "neq").quality.verdict, row_of(table, "neq").withheld) == (None, "noise")
    assert "neq keeps" not in render([table], 80)


def test_rows_that_make_no_sense_are_one_line(four, tmp_path, neqbench):
    for column, value in (("state", "dreaming"), ("metric", None), ("versions", "[")):
        root = copied(four, tmp_path / column)
        altered(root, key("neq", 0), "trials", column, value)
        result = neqbench("report", "digits", "--results", root)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "is not as a run writes it; delete it" in result.stderr
    root = copied(four, tmp_path / "plans")
    (path,) = (root / "digits" / "plans").iterdir()
    for change in ({"margin": -1}, {"published": {"tables": 1}}, {"margin": "much"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        result = neqbench("report", "digits", "--results", root)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1)
        assert "is damaged, or of a newer neqbench" in result.stderr


def test_a_group_that_is_not_begun_is_said(four, tmp_path, neqbench):
    root = copied(four, tmp_path)
    later = specs("digits", [*SMALL, "recipe.epochs=9"], "baseline,neq", "0-2")
    ask(Store(root, "digits"), later)
    report = model.load_report([Store(root, "digits")])
    assert [g.missing for g in report.not_begun] == [["baseline: seeds 0-2", "neq: seeds 0-2"]]
    assert "Not begun: neq: seeds 0-2" in neqbench("report", "digits", "--results", root).stdout
