"""What the report says of what was removed for real, on made-up rows whose figures are known."""

import csv
import io
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from made_up import DEVICE, keep, removal, report_of, row, sizes, trials
from rich.console import Console
from scipy import stats

from harness.report.figures import pictures
from harness.report.forms import FORMS, to_csv
from harness.report.page import page
from harness.report.pruned_parts import Removed
from harness.report.removed_view import removed
from harness.report.sections import sections
from harness.report.terminal import print_report, print_table

STUCK = json.dumps([{"layer": "layer1.0.conv2", "neurons": 3, "reason": "it is an output"}])
LATENCIES = (0.60, 0.66, 0.63)


@pytest.fixture
def kept(tmp_path):
    """The report of a baseline and of gradual pruning, with these rows of `removals` by seed."""

    def report(removals, method="gradual", left=100):
        found = trials(f"baseline,{method}", f"0-{len(removals) - 1}")
        for (name, seed), spec in found.items():
            pruned = name != "baseline"
            keep(
                spec,
                tmp_path,
                0.9 + seed / 100,
                measures=sizes(left) if pruned else {},
                layers={("conv1", "neurons"): 8, ("conv1", "neurons_left"): 6} if pruned else {},
                removal=removals[seed] if pruned else None,
            )
        return report_of(tmp_path)

    return report


def words(report, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_report(sections(report), console)
    return console.file.getvalue()


def said(report):
    return " ".join(words(report).split())


def test_figures_by_hand(kept):
    rows = [
        removal(300, LATENCIES[0], stuck=STUCK, difference=1e-6),
        removal(320, LATENCIES[1], difference=4e-6, neurons_dead=13),
        removal(340, LATENCIES[2], stuck=STUCK, difference_float64=7e-15),
    ]
    report = kept(rows)
    found = row(report, "gradual").removed
    assert found.removed_n == found.latency_n == 3
    assert found.removed_parameters_share == pytest.approx(0.32)
    assert found.removed_forward_share == pytest.approx(0.32)
    assert found.removed_file_share == pytest.approx((4 * 320 + 400) / 4400)
    assert (found.removed_difference, found.removed_difference_float64) == (4e-6, 7e-15)
    assert (found.neurons_dead, found.neurons_removed, found.neurons_stuck) == (11, 10, 2)
    (stuck,) = found.stuck
    assert asdict(stuck) == {
        "layer": "layer1.0.conv2",
        "neurons": 2.0,
        "reason": "it is an output",
        "seeds": 2,
    }
    for name, factor in (("latency_batch", 1.0), ("latency_one", 1.1)):
        logs = np.log(np.multiply(LATENCIES, factor))
        low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
        assert getattr(found, name) == pytest.approx(math.exp(logs.mean()))
        assert getattr(found, f"{name}_low") == pytest.approx(math.exp(low))
        assert getattr(found, f"{name}_high") == pytest.approx(math.exp(high))
        assert getattr(found, f"{name}_verdict") == "less"
    assert (found.latency_batch_size, found.latency_device) == (50, DEVICE)
    assert row(report, "baseline").removed == Removed()


def test_of_a_single_seed_the_quartiles_of_its_pairs(kept):
    found = row(kept([removal(300, 0.6)]), "gradual").removed
    assert (found.latency_batch_low, found.latency_batch_high) == pytest.approx((0.54, 0.72))
    assert (found.latency_one_low, found.latency_one_high) == pytest.approx((0.594, 0.792))
    assert found.latency_batch_verdict is found.latency_one_verdict is None


BUSY = [
    ({"trials_on_device": 2}, "trials shared a device"),
    ({"other_load": 1.5}, "other processes kept 1.5 CPUs busy"),
    ({"device": "another CPU"}, "it was measured on different devices"),
]


@pytest.mark.parametrize("values, why", BUSY)
def test_a_latency_that_is_no_measurement_is_withheld(kept, values, why):
    report = kept([removal(300, 0.6), removal(300, 0.6, **values), removal(300, 0.6)])
    found = row(report, "gradual").removed
    assert found.latency_batch is found.latency_one is found.latency_batch_verdict is None
    assert found.latency_withheld.startswith(why)
    assert found.removed_parameters_share == pytest.approx(0.3)
    text = said(report)
    assert f"† {why[0].upper()}{why[1:]}" in text
    assert f"whose time was not measured: {why}" in text
    assert "of the dense one's time" not in text
    assert not any(picture.name.endswith("-latency") for picture in pictures(report))


def test_the_first_sentences(kept):
    text = said(kept([removal(300, ratio, stuck=STUCK) for ratio in LATENCIES]))
    logs = np.log(LATENCIES)
    low, high = np.exp(stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs)))
    assert (
        "Removed for real, it has 30.0 % of the parameters and 30.0 % of the forward's FLOPs, and "
        f"a forward takes × 0.63 of the dense one's time at batch 50 ({low:.2f} to {high:.2f}), × "
        "0.69 at batch 1; outputs agree to 2e-6. 3 dead neurons can't be removed: it is an output."
    ) in text
    assert "single zeros are computed like any other number, only" not in text


def test_why_it_is_no_faster(kept):
    zeros = "Fewer parameters are hardly fewer FLOPs here: single zeros are computed like any"
    assert zeros in said(kept([removal(990, 1.0)] * 3))
    slow = "Fewer FLOPs are no less time on this device."
    text = said(kept([removal(300, ratio) for ratio in (0.98, 1.1, 1.05)]))
    assert slow in text
    assert zeros not in text
    assert zeros not in said(kept([removal(990, 1.0, stuck=STUCK)] * 3))  # that is the reason
    text = said(kept([removal(990, 1.0)] * 3, left=950))  # of which hardly any were pruned
    assert zeros not in text
    assert slow not in text


def test_nothing_to_remove(kept):
    report = kept([removal(1000, 1.0, reason="nothing is dead", neurons_removed=0)] * 2)
    found = row(report, "gradual").removed
    assert (found.removed_parameters_share, found.latency_batch) == (1.0, 1.0)
    text = said(report)
    assert "gradual: nothing was removed: nothing is dead." in text
    assert "Nothing of it can be removed: nothing is dead. Fewer parameters are hardly" in text


def test_what_is_null_is_not_known(kept):
    """As of a model that could not be looked at: other seeds have their latency."""
    unknown = dict.fromkeys(("parameters", "forward_flops", "file_bytes", "neurons_dead"))
    unknown |= dict.fromkeys(("difference", "difference_float64", "neurons_removed"))
    lost = removal(1000, None, reason="torch-pruning can't trace it", stuck=None) | unknown
    report = kept([lost, removal(300, 0.6)])
    found = row(report, "gradual").removed
    assert (found.removed_n, found.removed_parameters_share) == (2, None)
    assert (found.latency_n, found.latency_batch) == (1, pytest.approx(0.6))
    text = said(report)
    assert "Nothing of it can be removed: torch-pruning can't trace it" in text
    assert "gradual: latency of 1 of 2 seeds." in text


def test_what_a_trial_lacks_is_said(kept):
    report = kept([removal(300, 0.6), None, removal(320, 0.7)])
    found = row(report, "gradual").removed
    assert (found.removed_n, found.removed_parameters_share) == (2, pytest.approx(0.31))
    assert (
        "gradual: of some trials it is not known what can be removed; run the suite again with "
        "`pip install 'neqbench[pruning]'`."
    ) in said(report)


def test_results_without_removals_say_nothing_of_it(kept):
    report = kept([None] * 3)
    assert row(report, "gradual").removed == Removed()
    (section,) = sections(report)
    assert {table.title for table in section.tables}.isdisjoint({"Removed", "One-shot"})
    text = said(report)
    assert "emoved" not in text.replace("if the others were removed", "")


@pytest.fixture
def whole(kept):
    long = json.dumps([{"layer": f"layer{n}", "neurons": 1, "reason": "why"} for n in range(5)])
    return kept([removal(312, ratio, stuck=long) for ratio in LATENCIES])


def test_every_form_shows_it(whole):
    found = row(whole, "gradual").removed
    cells = [f"{found.latency_batch:.2f} [{found.latency_batch_low:.2f}, "]
    for form, render in FORMS.items():
        text = render(whole)
        if form in ("csv", "json"):
            assert repr(found.latency_batch) in text
            assert repr(found.removed_parameters_share) in text
        else:
            assert "31.2" in text
            assert cells[0] in text.replace("\\[", "[")
    assert cells[0] in page(whole, [])
    (line,) = [r for r in csv.DictReader(io.StringIO(to_csv(whole))) if r["method"] == "gradual"]
    assert line["stuck"] == "; ".join(f"layer{n}=1 (why)" for n in range(5))
    of_json = json.loads(whole.to_json())["groups"][0]["methods"][1]
    assert of_json["stuck"][4] == {"layer": "layer4", "neurons": 1, "reason": "why", "seeds": 3}
    assert "Can't be removed, why: gradual 5 (layer0, layer1, layer2 and 2 more)." in said(whole)


@pytest.mark.parametrize("width", [80, 160])
def test_it_fits_a_terminal(whole, width):
    lines = words(whole, width).splitlines()
    assert all(len(line) <= width for line in lines)
    at = lines.index("Removed")
    assert ("file" in lines[at + 1]) == (width == 160)
    assert lines[at + 4].split()[-1] == "5"
    assert lines[at + 4].count("[") == 2


def test_long_names_are_folded_and_nothing_is_cut(whole):
    (table,) = whole.groups
    long = [replace(each, label=f"{each.label} sparsity=0.95") for each in table.methods]
    console = Console(file=io.StringIO(), width=80, highlight=False)
    print_table(removed(replace(table, methods=long)), console)
    lines = console.file.getvalue().splitlines()
    found = next(line for line in lines if line.startswith("gradual "))
    assert (found.count("]"), found.split()[-1]) == (2, "5")
    assert all(len(line) <= 80 for line in lines)


def test_of_many_methods_what_removal_makes_of_them(tmp_path):
    """Where they are too many for whole sentences; of the baseline and controls there is none."""
    names = ["gradual", "one-shot", "serene", "lobster"]
    for spec in trials(",".join(["baseline", "lottery", *names]), "0").values():
        pruned = spec.method != "baseline"
        one = removal(300, 0.6) if pruned else None
        keep(spec, tmp_path, 0.9, measures=sizes(100) if pruned else {}, removal=one)
    (section,) = sections(report_of(tmp_path))
    own = [text for text in section.answers if "Removed for real" in text]
    assert sorted(text.partition(":")[0] for text in own) == sorted(names)
    assert all(": It leaves 10.0 % of the parameters. Removed for real" in text for text in own)


def drawn(report, kind):
    (picture,) = [p for p in pictures(report) if p.name.endswith(f"-{kind}")]
    return picture


def test_figures(whole):
    found = row(whole, "gradual")
    (axis,) = drawn(whole, "latency").figure.axes
    handles, labels = axis.get_legend_handles_labels()
    assert labels == ["gradual"]
    where = [found.removed.latency_batch, 100 * found.quality.metric_mean]
    assert handles[0][0].get_xydata()[0].tolist() == pytest.approx(where)
    spans = [sorted(line.get_xdata()) for line in axis.lines if len(set(line.get_ydata())) == 1]
    ends = [found.removed.latency_batch_low, found.removed.latency_batch_high]
    assert any(span == pytest.approx(ends) for span in spans if len(span) == 2)
    (axis,) = drawn(whole, "neurons").figure.axes
    assert axis.lines[0].get_ydata() == pytest.approx([6 / 8])
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["conv1"]
