"""What the report says of what was removed for real, on made-up rows whose figures are known."""

import csv
import io
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from made_up import DEVICE, keep, removal, report_of, row, said, sizes, trials, untraced, words
from rich.console import Console
from scipy import stats

from harness.report.figures import pictures
from harness.report.forms import FORMS, to_csv
from harness.report.page import page
from harness.report.pruned_parts import Removed
from harness.report.removed_view import removed
from harness.report.sections import sections
from harness.report.terminal import print_table

STUCK = json.dumps([{"layer": "layer1.0.conv2", "neurons": 3, "reason": "it is an output"}])
LATENCIES = (0.60, 0.66, 0.63)


@pytest.fixture
def kept(tmp_path):
    """The report of a baseline and of gradual pruning, with these rows of `removals` by seed."""

    def report(removals, method="gradual", left=100, effective=40):
        found = trials(f"baseline,{method}", f"0-{len(removals) - 1}")
        for (name, seed), spec in found.items():
            pruned = name != "baseline"
            keep(
                spec,
                tmp_path,
                0.9 + seed / 100,
                measures=sizes(left, effective=effective) if pruned else {},
                layers={("conv1", "neurons"): 8, ("conv1", "neurons_left"): 6} if pruned else {},
                removal=removals[seed] if pruned else None,
            )
        return report_of(tmp_path)

    return report


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
        "reason_seeds": 2,
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


@pytest.mark.slow
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
        "Removed for real, it has on average 30.0 % of the parameters and 30.0 % of the forward's "
        f"FLOPs (n = 3), and a forward takes × 0.63 of the dense one's time at batch 50 ({low:.2f} "
        f"to {high:.2f}), × 0.69 at batch 1; outputs agree to 2e-6. On average 3 dead neurons "
        "can't be removed: it is an output."
    ) in text
    assert "single zeros are computed like any other number, only" not in text
    assert "less time on this device" not in text


SPEEDS = [
    ((0.98, 1.1, 1.05), "no"),
    ((1.05, 1.06, 1.07), "no"),
    ((0.98, 0.981, 0.982), "hardly"),
    ((0.5, 0.7), "not clearly"),  # two seeds: the interval is wide
    ((0.5, 0.6, 1.4), "not clearly"),
]


@pytest.mark.slow
@pytest.mark.parametrize("latencies, how", SPEEDS)
def test_fewer_flops_and_time(kept, latencies, how):
    text = said(kept([removal(300, ratio) for ratio in latencies]))
    assert f"Fewer FLOPs are {how} less time on this device." in text


ZEROS = "single zeros are computed like any other number, only whole neurons go"
DEAD = "dead neurons stay"
WHY = [  # FLOPs of the rows and columns that still hold a weight, of 100
    (99, "[]", ZEROS),
    (97, STUCK, ZEROS),
    (40, STUCK, DEAD),
    (93, STUCK, f"{ZEROS}; and {DEAD}"),
]


@pytest.mark.slow
@pytest.mark.parametrize("effective, stuck, why", WHY)
def test_why_fewer_parameters_are_as_many_flops(kept, effective, stuck, why):
    text = said(kept([removal(990, 1.0, stuck=stuck)] * 3, effective=effective))
    assert f"Fewer parameters are hardly fewer FLOPs here: {why}." in text
    assert "less time on this device" not in text


def test_with_most_parameters_left_there_is_nothing_to_explain(kept):
    text = said(kept([removal(990, 1.0)] * 3, left=950, effective=99))
    assert "hardly fewer FLOPs" not in text
    assert "less time on this device" not in text


def test_nothing_to_remove(kept):
    nothing = removal(1000, 1.0, reason="nothing is dead", neurons_removed=0)
    report = kept([nothing] * 2, effective=100)
    found = row(report, "gradual").removed
    assert (found.removed_parameters_share, found.latency_batch) == (1.0, 1.0)
    text = said(report)
    assert "gradual: nothing was removed: nothing is dead." in text
    assert "Nothing of it can be removed: nothing is dead. Fewer parameters are hardly" in text


def test_a_model_that_can_not_be_traced(kept):
    report = kept([untraced(40, 1.0), untraced(30, 1.0)])
    found = row(report, "gradual").removed
    assert (found.removed_n, found.removed_nothing_n) == (2, 2)
    assert (found.removed_parameters_share, found.removed_difference) == (1.0, None)
    text = said(report)
    why = "torch-pruning can't trace the model: no graph."
    assert f"gradual: nothing was removed: {why}" in text
    assert f"Nothing of it can be removed: {why}" in text
    assert text.count(why) == 2


def test_what_is_so_in_one_seed_is_not_said_of_all(kept):
    report = kept([untraced(40, None), removal(300, 0.6), removal(320, 0.6)])
    found = row(report, "gradual").removed
    assert (found.removed_n, found.removed_nothing_n) == (3, 1)
    assert found.removed_parameters_share == pytest.approx((1 + 0.3 + 0.32) / 3)
    assert (found.latency_n, found.latency_batch) == (2, pytest.approx(0.6))
    text, why = said(report), "torch-pruning can't trace the model: no graph."
    assert "Nothing of it can be removed" not in text
    assert "it has on average 54.0 % of the parameters" in text
    assert f"Nothing was removed in 1 of 3 seeds: {why}" in text
    assert f"gradual: nothing was removed in 1 of 3 seeds: {why}" in text
    assert "gradual: latency of 2 of 3 seeds." in text
    nothing = removal(1000, 1.0, reason="nothing is dead", neurons_removed=0)
    report = kept([untraced(40, 1.0), nothing, nothing])
    reasons = "torch-pruning can't trace the model: no graph (1 seed); nothing is dead (2 seeds)"
    assert row(report, "gradual").removed.removed_reason == reasons
    assert f"Nothing of it can be removed: {reasons}." in said(report)


def test_reasons_that_differ_in_an_amount_are_one(kept):
    def stuck(layer, amount, neurons):
        reason = f"outputs would differ by {amount} without it"
        return json.dumps([{"layer": layer, "neurons": neurons, "reason": reason}])

    rows = [stuck("conv1", "1.0e-03", 3), stuck("conv1", "2.4e+01", 2), stuck("conv2", "inf", 1)]
    report = kept([removal(300, 0.6, stuck=one) for one in rows] + [removal(300, 0.6)])
    found = [
        (each.layer, each.neurons, each.seeds) for each in row(report, "gradual").removed.stuck
    ]
    assert found == [("conv1", 1.25, 2), ("conv2", 0.25, 1)]
    assert {each.reason_seeds for each in row(report, "gradual").removed.stuck} == {3}
    text, why = said(report), "outputs would differ without it"
    assert f"Can't be removed, {why}: gradual 1.5 (conv1, conv2; in 3 of 4 seeds)." in text
    assert f"On average 1.5 dead neurons can't be removed, in 3 of 4 seeds: {why}." in text


def test_most_of_what_stays(kept):
    stuck = [{"layer": "conv1", "neurons": 2, "reason": "one reason"}]
    stuck += [{"layer": "conv2", "neurons": 3, "reason": "another"}]
    text = said(kept([removal(300, 0.6, stuck=json.dumps(stuck))]))
    assert "5 dead neurons can't be removed; most of them: another." in text
    none = "none of the dead neurons can be removed"
    whole = removal(1000, 1.0, reason=none, neurons_removed=0, stuck=STUCK)
    text = said(kept([whole]))
    assert f"Nothing of it can be removed: {none}. Fewer parameters are hardly" in text
    assert "3 dead neurons stay: it is an output." in text


@pytest.mark.slow
def test_without_any_latency_it_is_said_why(kept):
    report = kept([removal(300, None)] * 2)
    text, why = said(report), "latency was not measured: trained on another kind of machine"
    assert row(report, "gradual").removed.latency_n is None
    assert f"of the forward's FLOPs (n = 2); {why}; outputs agree to 2e-6." in text
    assert f"gradual: {why}." in text
    assert why not in said(kept([removal(300, 0.6)] * 2))


def test_a_difference_without_bound_is_told(kept):
    assert "differ by inf at the most" in said(kept([removal(300, 0.6, difference=math.inf)]))


def test_what_a_trial_lacks_is_said(kept):
    report = kept([removal(300, 0.6), None, removal(320, 0.7)])
    found = row(report, "gradual").removed
    assert (found.removed_n, found.removed_parameters_share) == (2, pytest.approx(0.31))
    assert (
        "gradual: of some trials it is not known what can be removed; run the suite again: it says "
        "why (removal needs `pip install 'neqbench[pruning]'`)."
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
    assert of_json["stuck"][4] == {
        **{"layer": "layer4", "neurons": 1, "reason": "why", "seeds": 3},
        "reason_seeds": 3,
    }
    assert "Can't be removed, why: gradual 5 (layer0, layer1, layer2 and 2 more)." in said(whole)


@pytest.mark.slow
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


@pytest.mark.slow
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
