"""The forms of the report, and its figures."""

import csv
import io
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy
import pandas as pd
import pytest
from PIL import Image
from trials import percent, small

from harness.report import compare, forms, model
from harness.report.figures import pictures
from harness.report.layers import _mixed
from harness.report.method_row import MethodRow, json_keys
from harness.report.page import page
from harness.report.phases import Phase, PhaseRow
from harness.report.published import PaperComparison
from harness.report.sections import sections
from harness.storage.schema import QUANTILES
from harness.storage.store import find_stores


@pytest.fixture(scope="module")
def root(mixed_results):
    return mixed_results


@pytest.fixture(scope="module")
def report(root):
    return model.load_report(find_stores("digits", str(root)))


def main_table(report):
    return next(table for table in report.groups if len(table.methods) == 3)


FORMS = ["html", "md", "latex", "csv", "json"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_shows_the_same_figures(form, root, report, neqbench):
    text = neqbench("report", "digits", "--results", root, "--format", form).stdout
    for row in main_table(report).methods:
        if form in ("csv", "json"):
            assert repr(row.quality.metric_mean) in text
            assert repr(row.savings.saved) in text
        else:
            assert f"{100 * row.quality.metric_mean:.2f}" in text
            assert percent(row.savings.saved) in text.replace("$-$", "−")
    if form != "csv":
        assert "random seed 2: 2 of 5 epochs" in text
        assert "the training loss became" in text


def test_csv_has_the_keys_of_the_json(report):
    rows = list(csv.DictReader(io.StringIO(forms.to_csv(report))))
    methods = [row for table in report.groups for row in table.methods]
    assert [row["method"] for row in rows] == [row.method for row in methods]
    keys = set(methods[0].to_json()) - {"parameters"}
    assert keys <= set(rows[0])
    assert {row["eps"] for row in rows if row["method"] == "neq"} == {"0.01"}
    assert rows[0]["difference"] == ""
    seconds = [float(row["seconds_train"] or "nan") for row in rows]
    known = [
        numpy.nan if row.measured.seconds_train is None else row.measured.seconds_train
        for row in methods
    ]
    assert seconds == pytest.approx(known, nan_ok=True)


class Page(HTMLParser):
    """Collects what matters of a page; complains about tags that don't match."""

    VOID = frozenset({"meta", "link", "br", "path", "use", "rect", "stop"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values[k] for k in ("href", "src", "xlink:href") if k in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.slow
def test_the_page_is_whole_and_needs_nothing_else(report, neqbench, root):
    text = neqbench("report", "digits", "--results", root, "--format", "html").stdout
    page = Page()
    page.feed(text)
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    inside = {f"#{name}" for name in page.ids}
    assert all(link in inside or link.startswith("data:") for link in page.links)
    assert not re.search(r"url\((?!#|data:)", text)
    assert {f"#{name}" for name in re.findall(r"url\(#([^)]*)\)", text)} <= inside
    tables = sum(len(section.tables) for section in sections(report))
    assert page.tags.count("table") == tables
    assert page.tags.count("figure") == len(list(pictures(report)))


def test_names_are_shown_and_not_run(report):
    table = replace(main_table(report), title="<script>alert(1)</script> & 50 %_$|")
    odd = replace(report, groups=[table])
    assert "&lt;script&gt;alert(1)" in page(odd, [])
    assert r"$<$script$>$alert(1)$<$/script$>$ \& 50 \%\_\$$|$" in forms.to_latex(odd)
    assert r"\<script>alert(1)\</script> & 50 %\_$\|" in forms.to_markdown(odd)


def test_latex_tables_are_balanced(report):
    text = forms.to_latex(report)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") > 0
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    parts = text.split(r"\begin{tabular}{")[1:]
    assert len(parts) == sum(len(section.tables) for section in sections(report))
    for part in parts:
        rows = [line.split(" & ") for line in part.splitlines() if line.endswith(r" \\")]
        assert {len(row) for row in rows} == {len(part.partition("}")[0])}


def test_markdown_tables_have_as_many_cells_as_heads(report):
    lines = [li for li in forms.to_markdown(report).splitlines() if li.startswith("|")]
    counts = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert lines
    wanted = [(len(t.columns) + 1, len(t.rows) + 2) for s in sections(report) for t in s.tables]
    assert counts == [count for count, rows in wanted for _ in range(rows)]


@pytest.mark.slow
def test_figures_show_what_is_stored(root, report, tmp_path, neqbench):
    found = {picture.name.rpartition("-")[2]: picture for picture in pictures(report)}
    assert set(found) == {"epochs", "tradeoff", "seconds", "frozen", "distributions"}
    table = main_table(report)
    epochs = pd.read_parquet(root / "digits" / "epochs")
    mine = epochs[(epochs["group"] == table.group) & (epochs["method"] == "neq")]
    mine = mine.groupby("epoch")[["frozen_neurons", "total_neurons", "test_metric"]].mean()
    of_main = [p for p in pictures(report) if p.group == table.group]
    courses = next(p for p in of_main if p.name.endswith("-epochs")).figure.axes
    (line,) = [li for li in courses[0].lines if li.get_label() == "neq"]
    updated = 1 - mine["frozen_neurons"] / mine["total_neurons"]
    assert line.get_ydata() == pytest.approx(updated.to_numpy())
    (line,) = [li for li in courses[2].lines if li.get_label() == "neq"]
    assert line.get_ydata() == pytest.approx(mine["test_metric"].to_numpy())
    layers = pd.read_parquet(root / "digits" / "layers")
    layers = layers[(layers["trial"] == small("neq").key)]
    frozen = next(p for p in of_main if p.name.endswith("-frozen")).figure.axes[0]
    shown = frozen.images[0].get_array()
    assert shown.shape == (layers["layer"].nunique(), 5)
    assert float(shown.sum()) == pytest.approx((layers["frozen"] / layers["neurons"]).sum())
    written = neqbench(
        "report", "digits", "--results", root, "--figures", tmp_path / "figures"
    ).stderr.split()
    assert len(written) == len(list(pictures(report)))
    for path in written:
        with Image.open(path) as image:
            assert min(image.size) > 300


def test_a_distribution_over_layers_weighs_them_by_their_neurons():
    """Against all neurons' own values, of two layers with uniform ones."""
    rows = pd.DataFrame({"epoch": [0, 0], "neurons": [300, 100]})
    draw = numpy.random.default_rng(0)
    layers = [draw.uniform(0, 1, 300_000), draw.uniform(2, 3, 100_000)]
    quantiles = numpy.array([numpy.quantile(layer, QUANTILES) for layer in layers])
    at = [0.05, 0.25, 0.5, 0.9]
    found = _mixed(rows, quantiles, 0, at)
    assert found == pytest.approx(numpy.quantile(numpy.concatenate(layers), at), abs=0.03)


RECORDS = [model.GroupTable, model.NotBegun, Phase, PhaseRow, PaperComparison]


@pytest.mark.parametrize(
    "record",
    [*RECORDS, MethodRow, compare.RunComparison, compare.Compared, compare.Change],
)
def test_the_keys_are_those_of_the_documentation(record):
    """results/README.md is what users rely on."""
    text = (Path(__file__).parents[1] / "results" / "README.md").read_text()
    text = text[text.index("## The report's JSON") :]
    keys = json_keys() if record is MethodRow else [field.name for field in fields(record)]
    assert not [key for key in keys if f"`{key}`" not in text]
