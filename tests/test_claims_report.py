"""What the report says of gradual beside one-shot pruning, on made-up rows; against scipy."""

import csv
import io
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from made_up import keep, report_of, row, said, sizes, trials
from rich.console import Console
from scipy import stats

from harness.report.beside import beside_one_shot
from harness.report.figures import pictures
from harness.report.forms import FORMS, to_csv
from harness.report.page import page
from harness.report.pruned_parts import BesideOneShot, LayerEntropy, StuckRow
from harness.report.sections import sections
from harness.report.terminal import print_report

METRIC = {
    "baseline": (0.930, 0.932, 0.934),
    "one-shot": (0.900, 0.904, 0.902),
    "gradual": (0.910, 0.915, 0.911),
    "random-pruning": (0.800, 0.810, 0.790),
    "smaller": (0.850, 0.856, 0.853),
}
SHARP = {
    "baseline": (40.0, 42.0, 41.0),
    "one-shot": (20.0, 22.0, 21.0),
    "gradual": (30.0, 35.0, 30.0),
    "random-pruning": (10.0, 11.0, 12.0),
    "smaller": (60.0, 63.0, 66.0),
}
ENTROPY = {"one-shot": (2.0, 2.1, 2.2), "gradual": (2.1, 2.0, 2.4)}
PROBE = {"one-shot": (0.80, 0.81, 0.82), "gradual": (0.78, 0.79, 0.80)}
GAP = {"one-shot": (0.05, 0.06, 0.07), "gradual": (0.03, 0.05, 0.06)}
TITLES = [
    "One-shot against gradual",
    "One-shot against gradual: minima",
    "One-shot against gradual: features",
    "One-shot against gradual: entropy by layer",
]


def minimum(method, seed, sharp, gap):
    """What a suite with [sharpness] and [probe] lets each trial record."""
    value = sharp[method][seed]
    return {
        "sharpness": [None if value is None else value / 2, value],
        "sharpness_low": (value or 15) - 1,
        "sharpness_high": (value or 15) + 1,
        "train_metric": 0.95,
        "generalisation_gap": gap.get(method, (0.1, 0.1, 0.1))[seed],
        "probe_metric": PROBE.get(method, (0.7, 0.7, 0.7))[seed],
    }


@pytest.fixture
def kept(tmp_path):
    """The report of these methods, with so many seeds each."""

    def report(
        methods=METRIC,
        *settings,
        seeds=3,
        asked=True,
        sharp=SHARP,
        gap=GAP,
        entropy=ENTROPY,
        overhead=0,
        **left,
    ):
        found = trials(",".join(methods), f"0-{seeds - 1}", *settings)
        for (name, seed), spec in found.items():
            measures, layers = minimum(name, seed, sharp, gap) if asked else {}, {}
            if name != "baseline":
                bits = entropy.get(name, (1.5, 1.5, 1.5))[seed]
                measures |= sizes(left.get(name.replace("-", "_"), 100)) | {"psp_entropy": bits}
                layers = {(n, "psp_entropy"): bits and bits + 1 for n in ("conv1", "fc")}
            flops = {"overhead": overhead if name == "gradual" else 0}
            value = METRIC.get(name, METRIC["one-shot"])[seed]
            keep(spec, tmp_path, value, measures=measures, layers=layers, **flops)
        return report_of(tmp_path)

    return report


def titles(report):
    (section,) = sections(report)
    return [table.title for table in section.tables]


def shown(report, title):
    (section,) = sections(report)
    return next(table for table in section.tables if table.title == title)


def paired(mine, theirs):
    low, high = stats.ttest_rel(mine, theirs).confidence_interval()
    return np.mean(mine) - np.mean(theirs), low, high


def of(row_, name):
    return [getattr(row_.beside, f"{name}{end}") for end in ("", "_low", "_high")]


def test_intervals_are_scipy_s_and_verdicts_theirs(kept):
    report = kept()
    found = row(report, "gradual")
    for name, values in (("metric", METRIC), ("entropy", ENTROPY), ("probe", PROBE), ("gap", GAP)):
        expected = paired(values["gradual"], values["one-shot"])
        assert of(found, f"{name}_more") == pytest.approx(expected)
        assert getattr(found.beside, f"{name}_more_n") == 3
    logs = paired(np.log(SHARP["gradual"]), np.log(SHARP["one-shot"]))
    assert of(found, "sharpness_ratio") == pytest.approx(np.exp(logs))
    assert found.minima.sharpness == pytest.approx(stats.gmean(SHARP["gradual"]))
    assert found.beside.one_shot == "one-shot"
    assert (found.beside.one_shot_cost, found.beside.one_shot_size) == (1.0, None)
    assert (found.beside.more_accurate, found.beside.narrower) == ("yes", "yes")
    assert (found.beside.less_specific, found.beside.better_generalising) == ("unclear", "unclear")
    assert found.beside.better_transferring == "no"
    other = row(report, "smaller").beside
    assert other.sharpness_ratio == pytest.approx(3.0, rel=1e-3)
    assert other.narrower is other.more_accurate is None
    assert row(report, "baseline").beside.metric_more == pytest.approx(0.03)
    assert row(report, "one-shot").beside == BesideOneShot()


def test_each_claim_has_a_table_with_its_verdict_in_words(kept):
    report = kept()
    assert [title for title in titles(report) if title in TITLES] == TITLES
    accuracy, minima, features, layers = (shown(report, title) for title in TITLES)
    assert [line[0].text for line in minima.rows] == [
        "baseline", "one-shot", "gradual", "random-pruning", "smaller",
    ]  # fmt: skip
    mean, low, high = (100 * value for value in paired(METRIC["gradual"], METRIC["one-shot"]))
    assert accuracy.notes[0] == (
        "gradual beside one-shot, more accurate as arXiv 2004.14765 has it: yes. "
        f"{mean:+.2f} points [{low:+.2f}, {high:+.2f}] (n = 3), at equal sparsity and equal "
        "training FLOPs (× 1.00)."
    )
    assert minima.notes[0].startswith(
        "gradual beside one-shot, narrower minima as arXiv 2004.14765 has it: yes. Sharpness × 1.5"
    )
    assert minima.notes[0].endswith(" So is it with smaller, a control.")
    assert "features that transfer better as arXiv 2004.14765 has it: no." in features.notes[1]
    assert "of 2 layers gradual pruning's is higher in 2, in 0 with an" in layers.notes[0]
    text = said(report, 160)
    assert (
        "gradual beside one-shot at equal sparsity and equal training FLOPs (× 1.00), as arXiv "
        "2004.14765 has it (n = 3): more accurate: yes ("
    ) in text
    assert "; features that transfer better: no (probe −2.00 points [−2.00, −2.00])." in text
    (answer,) = [t for t in sections(report)[0].answers if "narrower minima: yes (sharpness" in t]
    assert "), and so with smaller, a control; a smaller generalisation gap" in answer
    assert answer.count("a control") == 1
    assert all(
        "not corrected for their number either" in " ".join(t.notes) for t in (minima, features)
    )


def test_entropies_by_layer(kept):
    (table,) = kept().groups
    assert [each.layer for each in table.entropies] == ["conv1", "fc"]
    first = table.entropies[0]
    mean, low, high = paired(ENTROPY["gradual"], ENTROPY["one-shot"])
    assert (first.more, first.more_low, first.more_high) == pytest.approx((mean, low, high))
    assert first.bits_one_shot == pytest.approx(3.1)
    assert first.bits == pytest.approx(3.1 + mean)


def test_means_of_layers_are_of_the_seeds_that_are_compared(kept):
    (table,) = kept(entropy=ENTROPY | {"gradual": (None, 2.0, 2.4)}).groups
    (first, _) = table.entropies
    assert (first.n, first.bits, first.bits_one_shot) == (2, 3.2, pytest.approx(3.15))
    assert first.more == pytest.approx(first.bits - first.bits_one_shot)


def test_a_sharpness_that_was_not_found_is_left_out_and_said(kept):
    sharp = SHARP | {"one-shot": (20.0, None, 21.0)}
    report = kept(sharp=sharp)
    one_shot, gradual = row(report, "one-shot"), row(report, "gradual").beside
    assert (one_shot.minima.sharpness_n, one_shot.minima.sharpness_unknown) == (2, 1)
    assert one_shot.minima.sharpness == pytest.approx(stats.gmean([20, 21]))
    assert (one_shot.minima.sharpness_from, one_shot.minima.sharpness_to) == (14, 22)
    logs = paired(np.log([30.0, 30.0]), np.log([20.0, 21.0]))
    assert of(row(report, "gradual"), "sharpness_ratio") == pytest.approx(np.exp(logs))
    assert (gradual.sharpness_ratio_n, gradual.narrower) == (2, "unclear")
    text = said(report, 160)
    assert "one-shot, 1 of 3 seeds: the power iteration did not converge, or found" in text
    assert "(n = 2, too few for a verdict)" in text
    (axis,) = next(p for p in pictures(report) if p.name.endswith("-sharpness")).figure.axes
    (line,) = [each for each in axis.lines if each.get_label() == "one-shot"]
    assert line.get_ydata() == pytest.approx([stats.gmean([10, 10.5]), stats.gmean([20, 21])])


def test_a_sharpness_that_is_not_above_zero_has_no_ratio(kept):
    report = kept(sharp=SHARP | {"one-shot": (20.0, -0.5, 21.0)})
    one_shot, gradual = row(report, "one-shot"), row(report, "gradual").beside
    assert (one_shot.minima.sharpness_n, one_shot.minima.sharpness_unknown) == (2, 1)
    assert one_shot.minima.sharpness == pytest.approx(stats.gmean([20, 21]))
    assert gradual.sharpness_ratio_n == 2
    why = "one-shot, 1 of 3 seeds: the power iteration did not converge, or found"
    assert why in said(report, 160)


def test_a_small_sharpness_keeps_its_digits(kept):
    report = kept(sharp=SHARP | {"one-shot": (0.00123,) * 3, "smaller": (12345.0,) * 3})
    by_method = {line[0].text: line[2].text for line in shown(report, TITLES[1]).rows}
    assert (by_method["one-shot"], by_method["smaller"]) == ("0.00123", "12,345")
    assert by_method["baseline"] == "41.0"


GAPS = [((0.01, 0.02, 0.03), "yes"), ((0.11, 0.12, 0.13), "no")]


@pytest.mark.parametrize("gradual, verdict", GAPS)
def test_a_smaller_gap_is_the_paper_s_side(kept, gradual, verdict):
    gap = {"gradual": gradual, "smaller": (0.02, 0.03, 0.041), "random-pruning": (0.0, 0.05, 0.09)}
    report = kept(gap=GAP | gap)
    assert row(report, "gradual").beside.better_generalising == verdict
    (sentence,) = [t for t in shown(report, TITLES[1]).notes if "smaller generalisation gap" in t]
    assert f"as arXiv 2004.14765 has it: {verdict}." in sentence
    assert sentence.endswith("So is it with smaller, a control.") == (verdict == "yes")


def test_a_control_of_another_size_is_not_named(kept):
    report = kept(smaller=300)
    found = row(report, "smaller").beside
    assert found.one_shot_size == "parameters left 30.0 % | 10.0 %"
    assert found.sharpness_ratio == pytest.approx(3.0, rel=1e-3)
    assert row(report, "gradual").beside.narrower == "yes"
    assert row(report, "baseline").beside.one_shot_size is None
    text = said(report, 160)
    assert "a control" not in text
    note = "Of another size than one-shot pruning, which Δ compares, too: smaller, parameters left"
    assert text.count(f"{note} 30.0 % | 10.0 %.") == 3


@pytest.mark.slow
@pytest.mark.parametrize("overhead, told", [(1.5, "yes"), (15, "× 1.05"), (30, "× 1.10")])
def test_other_training_flops_have_no_verdict(kept, overhead, told):
    report = kept(overhead=overhead)
    found = row(report, "gradual").beside
    assert found.one_shot_cost == pytest.approx(1 + overhead / 300)
    assert found.metric_more is not None
    verdicts = {found.more_accurate, found.narrower, found.better_transferring}
    assert verdicts == ({"yes", "no"} if told == "yes" else {None})
    text = said(report, 160)
    assert ("more accurate: yes (" in text) == (told == "yes")
    why = f"no verdict, training FLOPs differ ({told})"
    for start in ("more accurate", "narrower minima", "features that transfer better"):
        assert (f"{start} as arXiv 2004.14765 has it: {why}." in text) == (told != "yes")
        assert (f"{start}: {why} (" in text) == (told != "yes")


def test_several_one_shots_of_a_sparsity_are_refused_in_words(kept):
    early = "methods.early={kind='one-shot', sparsity=0.9, at=0.1}"
    methods = ["baseline", "one-shot", "early", "gradual", "random-pruning"]
    report = kept(methods, early, sharp=SHARP | {"early": (20.0, 21.0, 22.0)})
    found = row(report, "gradual").beside
    assert found.metric_more is found.one_shot is found.more_accurate is None
    assert row(report, "random-pruning").beside.metric_more is None
    assert shown(report, TITLES[0]).notes[0] == (
        "gradual is not compared with one-shot pruning: early and one-shot are both of that "
        "sparsity: run one of them, named by --methods, into results of its own."
    )


UNLIKE = [
    (["methods.gradual.sparsity=0.95"], {}, "sparsity 0.95 | 0.9"),
    (["methods.gradual.units='neurons'"], {}, "units neurons | weights"),
    ([], {"gradual": 140}, "parameters left 14.0 % | 10.0 %"),
]


@pytest.mark.slow
@pytest.mark.parametrize("settings, left, why", UNLIKE)
def test_other_sparsities_are_refused_in_words(kept, settings, left, why):
    report = kept(METRIC, *settings, **left)
    found = row(report, "gradual").beside
    assert (found.one_shot, found.one_shot_unlike) == ("one-shot", f"not of equal sparsity ({why})")
    assert found.metric_more is found.more_accurate is found.narrower is None
    assert row(report, "random-pruning").beside.metric_more is not None  # of one-shot's sparsity
    text = said(report, 160)
    assert f"gradual is not compared with one-shot: not of equal sparsity ({why})." in text
    assert "gradual beside one-shot" not in text
    assert report.groups[0].entropies == []


def test_two_seeds_are_too_few(kept):
    found = row(kept(seeds=2), "gradual").beside
    assert (found.metric_more_n, found.more_accurate, found.narrower) == (2, "unclear", "unclear")


def test_of_noise_there_is_no_verdict(kept):
    report = kept()
    (table,) = report.groups
    rows = beside_one_shot(table.methods, report.done[table.group], noise=True)
    (found,) = [each.beside for each in rows if each.label == "gradual"]
    assert found.metric_more is not None
    assert found.more_accurate is found.narrower is None


@pytest.mark.parametrize("label", ["gradual", "one-shot"])
def test_where_a_trial_failed_there_is_no_verdict(kept, label):
    report = kept()
    (table,) = report.groups
    rows = [replace(each, failed=int(each.label == label)) for each in table.methods]
    rows = beside_one_shot(rows, report.done[table.group], noise=False)
    (found,) = [each.beside for each in rows if each.label == "gradual"]
    assert found.metric_more is not None
    assert found.more_accurate is found.narrower is None


def test_the_figure_of_entropy(kept):
    (axis,) = next(p for p in pictures(kept()) if p.name.endswith("-entropy")).figure.axes
    (line,) = [each for each in axis.lines if each.get_label() == "gradual"]
    assert line.get_xydata()[-1].tolist() == pytest.approx([1, np.mean(ENTROPY["gradual"])])


def test_there_must_be_both(kept):
    report = kept(["baseline", "gradual", "random-pruning"])
    assert not any(title in TITLES for title in titles(report))
    assert {each.beside for each in report.groups[0].methods} == {BesideOneShot()}
    of_model = {
        line[1].text
        for line in shown(report, "Recorded by the methods").rows
        if line[2].text == "model"
    }
    assert {"sharpness", "generalisation_gap", "probe_metric"} <= of_model  # no other table has it


def test_what_was_not_recorded_has_no_table(kept):
    report = kept(asked=False)
    assert [title for title in titles(report) if title in TITLES] == [
        "One-shot against gradual",
        "One-shot against gradual: features",
        "One-shot against gradual: entropy by layer",
    ]
    assert row(report, "gradual").minima.sharpness_n is None
    assert not any(picture.name.endswith("-sharpness") for picture in pictures(report))


def test_what_these_tables_show_another_does_not(kept):
    recorded = shown(kept(), "Recorded by the methods")
    assert {line[2].text for line in recorded.rows} == {"2 layers"}


@pytest.mark.parametrize("width", [80, 160])
def test_it_fits_a_terminal(kept, width):
    (section,) = sections(kept(["baseline", "one-shot", "gradual"]))
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_report([section], console)
    lines = console.file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    at = lines.index(TITLES[1])
    assert ("eigenvalue in" in lines[at + 1]) == (width == 160)


def test_every_form_shows_it(kept):
    report = kept()
    found = row(report, "gradual").beside
    for form, render in FORMS.items():
        text = render(report)
        if form in ("csv", "json"):
            assert repr(found.sharpness_ratio_low) in text
        else:
            assert f"{found.sharpness_ratio:.2f}" in text
            assert "narrower minima as arXiv 2004.14765 has it: yes." in text
    assert "narrower minima as arXiv 2004.14765 has it: yes." in page(report, [])
    (line,) = [r for r in csv.DictReader(io.StringIO(to_csv(report))) if r["method"] == "gradual"]
    assert (line["more_accurate"], line["better_transferring"]) == ("yes", "no")
    (group,) = json.loads(report.to_json())["groups"]
    assert [each["layer"] for each in group["entropies"]] == ["conv1", "fc"]


@pytest.mark.parametrize("record", [LayerEntropy, StuckRow])
def test_the_keys_are_those_of_the_documentation(record):
    text = (Path(__file__).parents[1] / "results" / "README.md").read_text()
    text = text[text.index("## The report's JSON") :]
    assert not [each.name for each in fields(record) if f"`{each.name}`" not in text]
