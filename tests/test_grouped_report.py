"""What the report says of groups at equilibrium, on made-up rows and on real trials."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from trials import run, small

from harness.report.figures import pictures
from harness.report.forms import FORMS
from harness.report.grouped import grouped, groups_answer, groups_table
from harness.report.model import load_report
from harness.report.sections import sections
from harness.storage.frames import stores_named

NEQ = {"kind": "neq", "eps": 1e-3, "mu": 0.5, "recursion": "paper", "gradient": "exact"}
GROUP = NEQ | {"kind": "neq-group", "groups": "layers"}
SAVED = {"neq": (0.20, 0.22, 0.21), "neq-group": (0.40, 0.45, 0.38), "other": (0.1, 0.1, 0.1)}

pytestmark = pytest.mark.slow


def trials(group=GROUP, **saved):
    parameters = {"neq": NEQ, "neq-group": group, "other": NEQ | {"eps": 1e-2}}
    rows = [
        {"trial": f"{m}{seed}", "label": m, "seed": seed, "saved": share, "value": 0.9 + share / 10}
        | {"parameters": json.dumps(parameters[m])}
        for m, shares in (SAVED | saved).items()
        for seed, share in enumerate(shares)
    ]
    return pd.DataFrame(rows)


def measures(by_group=(0.1, 0.2, 0.3)):
    """Over three epochs each: of the mask of the second, none of the third, and one never used."""
    rows = [
        {"trial": f"neq-group{seed}", "epoch": epoch, "name": name, "layer": None, "value": value}
        for seed, share in enumerate(by_group)
        for name, last in (("still_by_group_alone", share), ("still_by_neuron_alone", share / 2))
        for epoch, value in enumerate((3 * last, 0.0, 0.9))
    ]
    return pd.DataFrame(rows)


def test_against_the_single_neurons_of_the_same_parameters():
    (row,) = grouped(trials(), measures())
    assert (row.label, row.single) == ("neq-group", "neq")
    more = np.subtract(SAVED["neq-group"], SAVED["neq"])
    low, high = stats.t.interval(0.95, 2, more.mean(), stats.sem(more))
    assert row.saved_more.paired
    assert row.saved_more.mean == pytest.approx(more.mean())
    assert (row.saved_more.low, row.saved_more.high) == pytest.approx((low, high))
    assert row.metric_more.mean == pytest.approx(more.mean() / 10)
    assert row.by_group.mean == pytest.approx(0.2)
    assert row.by_neuron.mean == pytest.approx(0.1)
    assert row.by_group.high == pytest.approx(0.2 + stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))


@pytest.mark.parametrize(
    "saved, value, found, end",
    [
        ((0.40, 0.45, 0.38), 0.0, "20.0 points more", "and lose no more than 0.5 points by it."),
        ((0.40, 0.45, 0.38), -0.1, "20.0 points more", "and lose more than 0.5 points by it."),
        ((0.10, 0.11, 0.10), 0.0, "10.7 points less", "Groups save less than single neurons."),
        ((0.10, 0.45, 0.20), 0.0, "4.0 points more", "is not clear from this."),
        ((0.40,), 0.0, "20.0 points more", "is not clear from this."),
    ],
)
def test_the_answer_in_words(saved, value, found, end):
    done = trials(**{"neq-group": saved})
    done.loc[done["label"] == "neq-group", "value"] += value
    rows = grouped(done, measures()[: 6 * len(saved)])
    (answer,) = groups_answer(rows, "accuracy", 0.5)
    start = "neq-group beside neq, which freezes single neurons by the same parameters: "
    assert answer.startswith(start + found)
    assert f"(n = {len(saved)})." in answer
    assert answer.endswith(end)


def test_many_methods_are_for_the_table():
    rows = grouped(trials(), measures())
    assert groups_answer(rows * 4, "accuracy", 0.5) == []


def test_nothing_to_compare_with_is_said():
    rows = grouped(trials(GROUP | {"eps": 5e-3}), measures())
    assert rows[0].single is rows[0].saved_more is None
    assert groups_answer(rows, "accuracy", 0.5) == []
    table = groups_table(rows, "accuracy")
    assert table.notes[0].endswith("by the same parameters: there is no Δ.")
    assert [cell.text for cell in table.rows[0]][-4:] == ["–"] * 4


def test_without_methods_that_decide_by_groups_there_is_nothing():
    assert grouped(trials(), measures().iloc[:0]) == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    groups = ["methods.neq-group.eps=0.01", "methods.neq-cka={eps=0.02}"]
    for seed in (0, 1):
        for method in ("baseline", "neq", "neq-group", "neq-cka"):
            run(small(method, *groups, seed=seed), root)
    return load_report(stores_named([str(root / "digits")], str(root)))


def test_in_every_form(report):
    (section,) = sections(report)
    assert any("which freezes single neurons" in answer for answer in section.answers)
    shown = [table.title for table in section.tables]
    assert "Groups beside single neurons" in shown
    assert shown.count("Recorded by the methods") == 1  # the CKA of layers
    for name, form in FORMS.items():
        text = form(report)
        assert ("by_group" in text) if name == "json" else ("neq-group" in text)


def test_figures_of_layers_that_stand_still_and_of_cka(report):
    (table,) = report.groups
    drawn = {picture.name.rpartition("-")[2]: picture for picture in pictures(report)}
    (axis,) = drawn["still"].figure.axes
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    layers = report.results.layers.merge(report.done[table.group][["trial", "label"]], on="trial")
    for label in ("neq", "neq-group", "neq-cka"):
        mine = layers[layers["label"] == label]
        expected = [(rows["frozen"] == rows["neurons"]).mean() for _, rows in mine.groupby("epoch")]
        assert lines[label] == pytest.approx(expected)
    (axis,) = drawn["cka"].figure.axes
    kappa = report.results.measures.query("name == 'cka'")
    first = kappa[kappa["trial"] == kappa["trial"].iloc[0]].dropna(subset="value")
    assert axis.lines[0].get_ydata() == pytest.approx(
        [1 - rows["value"].median() for _, rows in first.groupby("epoch")]
    )
