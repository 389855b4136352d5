"""What the report says of methods that prune, on rows that are made up so that shares are round."""

import csv
import io
import json
import re
from dataclasses import asdict, replace

import made_up
import pytest
from rich.console import Console
from trials import render, row_of, toy

from harness.report.figures import _sparsity, pictures
from harness.report.forms import FORMS, to_csv
from harness.report.method_row import Pruned
from harness.report.model import load_report
from harness.report.pruning_view import pruned
from harness.report.sections import sections
from harness.report.style import GroupLabel
from harness.report.terminal import print_table
from harness.storage.schema import EpochRecord
from harness.storage.store import Store

SEEDS = (0, 1, 2)
SAMPLES, EPOCHS = 10, 2
DENSE = {"forward": 100, "dense": 200, "executed": 200, "overhead": 0}  # FLOPs of one sample
PRUNER = {  # by measure: of the whole model, of each seed after the last epoch
    "parameters": (1000, 1000, 1000),
    "parameters_left": (96, 98, 100),
    "neurons": (100, 100, 100),
    "neurons_left": (60, 61, 62),
    "forward_flops_effective": (40, 45, 50),
    "forward_flops_nonzero": (10, 12, 14),
    "psp_entropy": (0.5, 0.6, 0.7),
    "threshold": (0.1, 0.1, 0.1),
}
NARROW = PRUNER | {
    "parameters": (300, 300, 300),
    "parameters_left": (300, 300, 300),
    "neurons": (40, 40, 40),
    "neurons_left": (40, 40, 40),
    "forward_flops_effective": (25, 25, 25),
}
METRIC = {
    "baseline": (0.90, 0.91, 0.92),
    "freezer": (0.90, 0.91, 0.92),
    "pruner": (0.899, 0.9092, 0.9188),
    "narrow": (0.80, 0.79, 0.82),
}
BASELINE = ("baseline", DENSE, {})
FREEZER = ("freezer", DENSE | {"executed": 150, "overhead": 10}, {})
OWN = ("pruner", DENSE | {"overhead": 12}, PRUNER)
SMALLER = ("narrow", {"forward": 25, "dense": 50, "executed": 50, "overhead": 0}, NARROW)


@pytest.fixture
def suite(toys):
    """With a second method that says how large it is, which trains a narrower model."""
    path = toys / "suite.toml"
    more = '[methods.narrow]\nbuild = "pruner:Pruner"\narguments = { share = 0.5, at = 2 }\n'
    path.write_text(f"{path.read_text()}\n{more}model_arguments = {{ width = 4 }}\n")
    return toys


@pytest.fixture
def reported(suite, tmp_path):
    """The report of these methods, of which what they record is as made up."""

    def report(*methods):
        for name, flops, measures in methods:
            for seed in SEEDS:
                spec = toy(suite, name, f"recipe.epochs={EPOCHS}", seed=seed)
                mine = {measure: values[seed] for measure, values in measures.items()}
                keep(spec, tmp_path / "results", METRIC[name][seed], flops, mine)
        return load_report([Store(tmp_path / "results", "toys")])

    return report


def keep(spec, root, metric, flops, measures):
    """The tables of one trial; what is recorded before the last epoch is another number."""
    recorded = [
        {"epoch": epoch, "layer": layer, "name": name, "value": value if epoch else 12345.0}
        for epoch in range(EPOCHS)
        for name, value in measures.items()
        for layer in (None, "conv1")
    ]
    trial = made_up.done(spec, EPOCHS, len(recorded))
    tables = {"trials": [trial], "epochs": [], "layers": [], "measures": recorded}
    for epoch in range(EPOCHS):
        record = EpochRecord.of(
            {
                "epoch": epoch,
                "samples": SAMPLES,
                "lr": 0.1,
                "test_metric": metric,
                "frozen_neurons": 0,
                "total_neurons": 100,
                "forward_flops": SAMPLES * flops["forward"],
                "backward_flops_dense": SAMPLES * flops["dense"],
                "backward_flops_paper": SAMPLES * flops["dense"],
                "backward_flops_required": SAMPLES * flops["executed"],
                "backward_flops_executed": SAMPLES * flops["executed"],
                "overhead_flops": SAMPLES * flops["overhead"],
                "seconds_train": 1.0,
                "seconds_equilibrium": 0.0,
                "effective_parameters": measures.get("parameters_left"),
            }
        )
        tables["epochs"].append(record.row())
    made_up.write(spec, root, tables)


def only(report):
    (table,) = report.groups
    return table


def shown(report, title):
    """That table of the only section; None where it has none."""
    (section,) = sections(report)
    return next((table for table in section.tables if table.title == title), None)


def labels(table):
    return [row[0].text for row in table.rows]


def figures(report):
    return {picture.name.rpartition("-")[2]: picture for picture in pictures(report)}


def marks(picture):
    """By label, where the marks of a figure with bars stand: (x, y)."""
    (axis,) = picture.figure.axes
    handles, names = axis.get_legend_handles_labels()
    points = [handle[0].get_xydata()[0].tolist() for handle in handles]
    return dict(zip(names, points, strict=True))


def test_shares_by_hand(reported):
    """Of a plain step of 100 + 200 FLOPs the pruner takes 100 + 200 + 12, the narrow one 25 + 50;
    the latter's 300 parameters and 40 neurons are of the 1000 and 100 that the pruner has told.
    """
    report = reported(BASELINE, FREEZER, OWN, SMALLER)
    found = {row.method: asdict(row.pruned) for row in only(report).methods}
    assert found["pruner"] == pytest.approx(
        {
            "parameters_left_share": 0.098,
            "neurons_left_share": 0.61,
            "forward_effective_share": 0.45,
            "psp_entropy": 0.6,
            "training_cost": 1.04,
        }
    )
    assert list(found["narrow"].values()) == pytest.approx([0.3, 0.4, 0.25, 0.6, 0.25])
    assert found["baseline"] == found["freezer"] == asdict(Pruned())
    of_json = json.loads(report.to_json())["groups"][0]["methods"]
    of_csv = list(csv.DictReader(io.StringIO(to_csv(report))))
    for json_row, csv_row in zip(of_json, of_csv, strict=True):
        for key, value in found[json_row["method"]].items():
            assert json_row[key] == value
            assert csv_row[key] == ("" if value is None else str(value))
    assert {m["name"] for m in of_json[3]["measures"]} == set(PRUNER)  # JSON keeps them all


def test_freezing_and_pruning_stand_apart(reported):
    report = reported(BASELINE, FREEZER, OWN, SMALLER)
    assert row_of(only(report), "freezer").savings.saved == pytest.approx(0.2)
    assert labels(shown(report, "Pruned")) == ["narrow", "pruner"]
    assert "never ranked with those that freeze" in " ".join(shown(report, "Pruned").notes)
    drawn = figures(report)
    assert set(marks(drawn["tradeoff"])) == {"baseline", "freezer"}
    found = marks(drawn["sparsity"])
    assert found == {
        "narrow": pytest.approx([30, 100 * (0.80 + 0.79 + 0.82) / 3]),
        "pruner": pytest.approx([9.8, 90.9]),
    }
    axis = drawn["sparsity"].figure.axes[0]
    assert axis.get_xscale() == "log"
    levels = [line.get_ydata()[0] for line in axis.lines if len(line.get_ydata()) == 2]
    assert levels == pytest.approx([91.0, 90.5])
    assert drawn["sparsity"].caption.endswith("less the margin of 0.5 points.")
    assert {"seconds", "epochs"} <= set(drawn)


def test_sparsities_of_one_method_make_one_line(reported):
    (table,) = reported(BASELINE, OWN).groups
    plain, row = table.methods
    rows = [
        replace(
            row,
            label=f"gradual sparsity={sparsity}",
            pruned=replace(row.pruned, parameters_left_share=1 - sparsity),
        )
        for sparsity in (0.9, 0.5, 0.8)
    ]
    changed = replace(table, methods=[plain, *rows, row])
    axis = _sparsity(changed, GroupLabel("group", "name", "suite")).figure.axes[0]
    assert axis.get_legend_handles_labels()[1] == ["gradual", "pruner"]
    joined = [list(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 3]
    assert joined == [pytest.approx([10, 20, 50])]


def test_figures_of_one_kind_alone(reported):
    assert "sparsity" not in figures(reported(BASELINE, FREEZER))


def test_a_baseline_beside_pruners_is_no_tradeoff(reported):
    drawn = figures(reported(BASELINE, OWN))
    assert "tradeoff" not in drawn
    assert set(marks(drawn["sparsity"])) == {"pruner"}


def test_nothing_is_said_of_pruning_where_nobody_prunes(reported):
    report = reported(BASELINE, FREEZER)
    assert shown(report, "Pruned") is None
    assert shown(report, "Recorded by the methods") is None
    assert "prun" not in render([only(report)], 160)


def test_the_answer(reported):
    text = " ".join(render([only(reported(BASELINE, FREEZER, OWN))], 80).split())
    assert (
        "pruner keeps the baseline's accuracy to within 0.5 points (−0.10 points, between −0.15 "
        "and −0.05; n = 3). It leaves 9.8 % of the parameters and 61.0 % of the neurons, for 1.04 "
        "times the FLOPs of plain training. It takes"
    ) in text
    assert "freezer keeps" in text
    assert text.count("It executes 20.0 % fewer backward FLOPs") == text.count("It leaves") == 1


def test_the_answer_says_what_is_known(reported):
    bare = {name: PRUNER[name] for name in ("parameters_left", "threshold")}
    report = reported(BASELINE, ("pruner", DENSE, bare))
    assert asdict(row_of(only(report), "pruner").pruned) == asdict(Pruned(training_cost=1.0))
    text = " ".join(render([only(report)], 80).split())
    assert "Its training takes 1.00 times the FLOPs of plain training." in text
    assert "It leaves" not in text
    assert "no entropy" not in text  # it was not recorded
    assert "sparsity" not in figures(report)


def test_an_entropy_that_a_seed_does_not_know(reported):
    report = reported(BASELINE, (*OWN[:2], PRUNER | {"psp_entropy": (0.5, None, 0.7)}))
    assert row_of(only(report), "pruner").pruned.psp_entropy is None
    text = " ".join(render([only(report)], 160).split())
    assert "pruner: no entropy, since a class had no validation samples." in text
    recorded = shown(report, "Recorded by the methods")
    (row,) = [r for r in recorded.rows if (r[1].text, r[2].text) == ("psp_entropy", "model")]
    assert (row[3].value, row[4].value) == (2, pytest.approx(0.6))  # of the seeds that know it


def test_a_smaller_model_without_a_dense_one_to_hold_it_against(reported):
    report = reported(BASELINE, SMALLER)
    found = row_of(only(report), "narrow").pruned
    assert (found.parameters_left_share, found.neurons_left_share) == (None, None)
    assert found.forward_effective_share == pytest.approx(0.25)
    recorded = shown(report, "Recorded by the methods").rows
    of_model = {row[1].text for row in recorded if row[2].text == "model"}
    assert {"parameters_left", "neurons_left"} < of_model  # the numbers that no share tells


def test_without_a_baseline_shares_are_of_the_model_itself(reported):
    table = only(reported(OWN, SMALLER))
    narrow, pruner = table.methods
    assert list(asdict(narrow.pruned).values()) == pytest.approx([1, 1, 1, 0.6, 1])
    assert list(asdict(pruner.pruned).values()) == pytest.approx([0.098, 0.61, 0.45, 0.6, 1.04])


def test_each_counts_its_own_neurons(reported):
    """One that must keep the head counts none of its neurons."""
    headless = PRUNER | {"neurons": (90, 90, 90), "neurons_left": (90, 90, 90)}
    table = only(reported(BASELINE, OWN, ("freezer", DENSE, headless)))
    assert row_of(table, "freezer").pruned.neurons_left_share == 1
    assert row_of(table, "pruner").pruned.neurons_left_share == pytest.approx(0.61)


def test_what_one_table_shows_another_does_not(reported):
    recorded = shown(reported(BASELINE, OWN), "Recorded by the methods")
    of_model = {row[1].text for row in recorded.rows if row[2].text == "model"}
    assert of_model == {"threshold", "forward_flops_nonzero"}
    assert {row[1].text for row in recorded.rows if row[2].text == "1 layer"} == set(PRUNER)


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 110, 160])
def test_it_fits_a_terminal(reported, monkeypatch, width):
    """With a label of 17 letters, and a difference and its interval of two digits."""
    monkeypatch.setitem(METRIC, "pruner", (0.87, 0.64, 0.77))
    table = only(reported(BASELINE, OWN, SMALLER))
    long = {"pruner": "pruner share=0.25"}
    rows = [replace(row, label=long.get(row.label, row.label)) for row in table.methods]
    table = replace(table, methods=rows, phases=[])
    lines = terminal_lines(pruned(table), width)
    assert all(len(line) <= width for line in lines)
    heads = {word for line in lines[2:4] for word in line.split()}
    assert {"params", "neurons", "forward", "entropy", "cost", "Δ", "verdict"} <= heads
    assert ("accuracy" in heads) == (width > 80)
    found = next(line for line in lines if line.startswith("pruner share=0.25")).split()[2:]
    sizes, ends = ["9.8", "61.0", "45.0", "0.60", "1.04"], ["[−44.81,", "+14.81]"]
    if width == 80:
        assert found == [*sizes, "−15.00", "undecided"]
    else:
        assert found == ["3", *sizes, "76.00", "−15.00", *ends, "undecided"]


def terminal_lines(table, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_table(table, console)
    return console.file.getvalue().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_shows_it(reported, form):
    text = FORMS[form](reported(BASELINE, FREEZER, OWN))
    if form in ("csv", "json"):
        assert re.search(r"\b0\.098", text)
    else:
        assert "9.8 & 61.0 & 45.0" in text or "9.8 | 61.0 | 45.0" in text
