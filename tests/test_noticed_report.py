"""What the report notices in stored rows: seeds that are one run, other work, fixed layers."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_up import SUITE, keep, report_of, row, said, trials

from harness.report.compare import compare
from harness.storage.store import Store

LOST = {0: 0.0, 1: 0.002, 2: -0.001, 3: 0.001}


def store(root, method, seeds, *, losses=None, fixed=None, metrics=None, **flops):
    """Finished trials of a method; `losses`: of its seeds, in every epoch (default: all differ)."""
    found = trials(method, ",".join(map(str, seeds)))
    for place, ((_, seed), spec) in enumerate(found.items()):
        keep(spec, root, (metrics or {}).get(seed, 0.9 + LOST[seed]), **flops)
        path = root / SUITE / "epochs" / f"{spec.key}.parquet"
        table = pq.read_table(path)
        loss = (losses or [1.0 + seed for seed in seeds])[place]
        columns = {"train_loss": loss, "test_loss": loss, "fixed_neurons": fixed}
        for name, value in columns.items():
            at = table.schema.get_field_index(name)
            field = table.schema.field(name)
            values = [value] * len(table)
            table = table.set_column(at, field, pa.array(values, field.type))
        pq.write_table(table, path)


def test_seeds_that_are_one_run_count_once(tmp_path):
    store(tmp_path, "baseline", range(3))
    store(tmp_path, "lobster", range(3), losses=[0.25] * 3, metrics=dict.fromkeys(range(3), 0.9))
    report = report_of(tmp_path)
    mine = row(report, "lobster")
    assert (mine.n, mine.seeds) == (1, [0])
    quality = mine.quality
    assert (quality.verdict, quality.metric_low, quality.difference_low) == (None, None, None)
    assert quality.difference_n == 1
    assert mine.withheld == "seeds 0-2 gave the same numbers"
    text = said(report, 200)
    assert (
        "lobster: seeds 0-2 gave the same numbers, to the last bit in every epoch: they are one "
        "run, not 3, and count so; no interval."
    ) in text
    assert "none: seeds 0-2 gave the same numbers" in text
    assert row(report, "baseline").n == 3


def test_a_baseline_whose_seeds_are_one_run_gives_no_verdict(tmp_path):
    store(tmp_path, "baseline", range(3), losses=[0.25] * 3)
    store(tmp_path, "lobster", range(3))
    mine = row(report_of(tmp_path), "lobster")
    assert (mine.n, mine.quality.verdict) == (3, None)
    assert mine.withheld == "the baseline's seeds 0-2 gave the same numbers"


def test_of_some_seeds_the_others_count(tmp_path):
    store(tmp_path, "baseline", range(4))
    store(tmp_path, "lobster", range(4), losses=[0.25, 0.5, 0.25, 0.75])
    report = report_of(tmp_path)
    mine = row(report, "lobster")
    assert (mine.n, mine.seeds, mine.quality.difference_n) == (3, [0, 1, 3], 3)
    assert mine.quality.verdict == "keeps"
    assert mine.withheld is None
    assert "lobster: seeds 0, 2 gave the same numbers" in said(report, 200)
    assert "they are 3 runs in all, not 4, and count so." in said(report, 200)


@pytest.mark.parametrize("losses", [None, [None] * 3])
def test_equal_metrics_alone_are_no_sign(tmp_path, losses):
    """A small test set; and rows without losses."""
    whole = dict.fromkeys(range(3), 1.0)
    store(tmp_path, "baseline", range(3), losses=losses, metrics=whole)
    store(tmp_path, "lobster", range(3), losses=losses, metrics=whole)
    report = report_of(tmp_path)
    assert row(report, "lobster").quality.verdict == "keeps"
    assert "same numbers" not in said(report)


def test_two_methods_may_be_alike(tmp_path):
    """Where nothing froze, for one."""
    store(tmp_path, "baseline", range(3))
    store(tmp_path, "lobster", range(3))
    report = report_of(tmp_path)
    assert row(report, "lobster").quality.verdict == "keeps"
    assert "same numbers" not in said(report)


def test_compare_counts_a_run_once(tmp_path):
    for side, worse in (("a", 0.0), ("b", 0.02)):
        again = dict.fromkeys(range(3), 0.9 - worse)
        store(tmp_path / side, "baseline", range(3), losses=[0.5] * 3, metrics=again)
    a, b = ([Store(tmp_path / side, SUITE)] for side in "ab")
    found = compare(a, b, [])
    (change,) = [c for c in found.methods[0].changes if c.quantity == "metric"]
    assert (change.n, change.low, change.mark) == (1, None, "unclear")
    assert (found.methods[0].lacking, change.lacking) == ([], [])
    assert [one.seed for one in found.trials] == [0, 1, 2]


def test_dense_flops_that_differ_are_said(tmp_path):
    store(tmp_path, "baseline", [0], dense=12_100_000)
    store(tmp_path, "baseline", [1], dense=204_500_000)
    store(tmp_path, "lobster", range(2), dense=12_100_000)
    text = said(report_of(tmp_path), 300)
    assert (
        "Dense FLOPs differ between trials of the same model, from 12.10 MFLOPs (baseline seed 0) "
        "to 204.50 MFLOPs (baseline seed 1)"
    ) in text


def test_dense_flops_of_another_model_may_differ(tmp_path):
    store(tmp_path, "baseline", range(2))
    store(tmp_path, "smaller", range(2), dense=50, forward=25)
    assert "Dense FLOPs differ" not in said(report_of(tmp_path))
    store(tmp_path, "smaller", [2], dense=60, forward=25)
    (label,) = [r.label for r in report_of(tmp_path).groups[0].methods if r.method == "smaller"]
    text = said(report_of(tmp_path), 300)
    assert f"Dense FLOPs differ between trials of {label}, from 50.00 FLOPs" in text


def test_fixed_neurons_are_said(tmp_path):
    store(tmp_path, "baseline", range(2), fixed=16)
    store(tmp_path, "lobster", range(2), fixed=16)
    report = report_of(tmp_path)
    assert "never counted as frozen: 16 of 100 neurons." in said(report, 200)
    assert row(report, "lobster").savings.fixed == pytest.approx(0.16)
    (group,) = json.loads(report.to_json())["groups"]
    assert [method["fixed"] for method in group["methods"]] == [0.16, 0.16]
    store(tmp_path, "smaller", range(2), fixed=0)
    text = said(report_of(tmp_path), 200)
    assert "16 of 100 neurons (baseline, lobster)" in text


@pytest.mark.parametrize(("fixed", "known"), [(0, 0.0), (None, None)])
def test_nothing_is_said_where_none_is_fixed_or_known(tmp_path, fixed, known):
    store(tmp_path, "baseline", range(2), fixed=fixed)
    report = report_of(tmp_path)
    assert row(report, "baseline").savings.fixed == known
    assert "requires_grad" not in said(report)


@pytest.mark.parametrize("method", ["smaller", "lobster"])
def test_shares_of_no_flops_are_none(tmp_path, method):
    """As where every layer is fixed, or left out."""
    for name in ("baseline", method):
        store(tmp_path, name, range(2), dense=0, executed=0, overhead=0)
    report = report_of(tmp_path)
    plain = row(report, "baseline").savings
    assert (plain.saved, plain.saved_required, plain.executed_share) == (0, 0, 0)
    assert (plain.required_share, plain.overhead_share) == (0, 0)
    shown = {r.label: (r.saved, r.share) for r in report.groups[0].phases[0].methods}
    assert shown["baseline"] == (0, 0)
    assert "baseline" in said(report)
