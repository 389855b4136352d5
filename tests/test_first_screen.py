"""What a stranger sees first: help with examples, suites in a line each, answers before notes."""

import json
import re
from dataclasses import replace
from io import StringIO

import pytest
import typer
from doc_commands import check, commands
from rich.console import Console

from harness.cli import app
from harness.commands.doctor_machine import Finding
from harness.commands.examples import BEGIN, EXAMPLES
from harness.report import forms
from harness.report.model import load_report
from harness.report.page import page
from harness.report.tables import Cell, Column, Table
from harness.report.terminal import print_table
from harness.storage.store import find_stores
from harness.suite.files import load_experiments, shipped_suites

VERBS = list(typer.main.get_command(app).commands)


@pytest.fixture(scope="module")
def report(mixed_results):
    """Of the group with all three methods."""
    found = load_report(find_stores("digits", str(mixed_results)))
    return replace(found, groups=[table for table in found.groups if len(table.methods) == 3])


@pytest.mark.parametrize("columns", [80, 160])
def test_help_begins_with_where_to_begin(neqbench, columns):
    text = neqbench("--help", columns=columns).stdout
    listed = re.findall(r"^  ([a-z]+)  +(\S.*\.)$", text, re.MULTILINE)
    assert [verb for verb, _ in listed] == VERBS
    assert not [said for _, said in listed if said.endswith("...")]
    assert text.endswith("\n".join(f"  {line}" for line in BEGIN) + "\n")
    assert max(map(len, text.splitlines())) <= columns
    assert neqbench(columns=columns).stdout == text


@pytest.mark.parametrize("columns", [80, 160])
@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_s_help_ends_with_examples(neqbench, verb, columns):
    text = neqbench(verb, "--help", columns=columns).stdout
    assert text.endswith("\n".join(["Examples:", *(f"  {line}" for line in EXAMPLES[verb])]) + "\n")
    assert max(map(len, text.splitlines())) <= columns
    assert all(line.startswith(f"neqbench {verb}") for line in EXAMPLES[verb])


@pytest.mark.parametrize("line", [*BEGIN, *(line for lines in EXAMPLES.values() for line in lines)])
def test_examples_are_commands(line):
    (words,) = commands(re.sub(r" > \S+$", "", line))
    check(words)


@pytest.mark.parametrize(
    "arguments, ends",
    [
        (["rnu"], "Did you mean 'run'? (see neqbench --help)"),
        (["--bogus"], "(see neqbench --help)"),
        (["run", "digits", "--seed", "0"], "--seeds, --set) (see neqbench run --help)"),
        (["status", "digits", "more"], "(see neqbench status --help)"),
        (["report", "digits", "--format", "xml"], "'json'. (see neqbench report --help)"),
    ],
)
def test_what_is_mistyped_names_the_help_that_helps(neqbench, arguments, ends):
    done = neqbench(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith(f"{ends}\n")
    assert "Value error" not in done.stderr


@pytest.mark.parametrize("columns", [80, 160])
def test_suites_are_a_line_each_and_what_runs_anywhere_comes_first(neqbench, columns):
    lines = neqbench("suites", columns=columns).stdout.splitlines()
    row = re.compile(r"^([a-z0-9-]+)  +(\S.*?)  +(\d+) × (\d+)$")
    rows = [match for line in lines if (match := row.match(line))]
    names = [match[1] for match in rows]
    assert sorted(names) == sorted(shipped_suites())
    assert names[0] == "digits"
    assert names.index("segmentation-digits") < names.index("mnist-lenet5")
    assert names.index("mnist-lenet5") < names.index("cifar10") < names.index("cifar10-adam")
    assert len(lines) - len(rows) <= 5
    assert max(map(len, lines)) <= columns
    if columns == 160:
        assert not [match[2] for match in rows if match[2].endswith("…")]


@pytest.mark.parametrize("name", ["digits", "digits-eps", "digits-optimizers"])
def test_the_trials_of_a_suite_are_those_that_a_run_would_do(neqbench, tmp_path, name):
    planned = neqbench("plan", name, "--results", tmp_path, "--format", "json")
    text = neqbench("suites").stdout
    assert re.search(rf"^{name} .* {len(json.loads(planned.stdout))} × 30$", text, re.MULTILINE)


def test_one_suite_is_shown_with_all_its_methods(neqbench):
    text = neqbench("suites", "digits").stdout
    (suite,), _ = load_experiments("digits")
    rows = dict(re.findall(r"^ ([a-z_-]+) +(.*?) *$", text, re.MULTILINE))
    assert set(suite.methods) < set(rows)
    assert {name for name in suite.methods if rows[name].startswith("yes")} == {
        *suite.default_methods
    }
    assert rows["neq-group"] == "eps 0.01"
    (told,) = json.loads(neqbench("suites", "digits", "--format", "json").stdout)
    assert told["name"] == "digits"
    assert "did you mean 'digits'" in neqbench("suites", "digitz").stderr


@pytest.mark.slow
def test_the_first_screen_of_a_report_has_the_answers(report, neqbench, mixed_results):
    everything = neqbench("report", "digits", "--results", mixed_results).stdout
    (group,) = (table.group for table in report.groups)
    text = everything[everything.index(f"group {group}\n") :]
    ordered = [
        r"^neq keeps|^neq may|^neq loses|^neq has no verdict",
        "^Accuracy$",
        "^Savings$",
        "^random  ",
        r"^Mean ± standard deviation",
        r"^FLOPs: executed by",
        r"^SGD lr ",
        r"^neq: gradient exact",
        r"^Unfinished: ",
    ]
    at = 0
    for pattern in ordered:
        found = re.compile(pattern, re.MULTILINE).search(text, at)
        assert found, pattern
        at = found.start()
    seen = "\n".join(text.splitlines()[:24])
    savings = seen[seen.index("\nSavings\n") :]
    assert re.search(r"^random  ", savings, re.MULTILINE)  # its last row


def test_markdown_has_the_details_after_the_tables(report):
    text = forms.to_markdown(report)
    assert text.index("5 epochs · ") < text.index("### Savings") < text.index("- SGD lr ")


@pytest.mark.parametrize("suites", [["digits"], ["digits", "mnist & more"]])
def test_the_page_says_whose_it_is(report, suites):
    (table,) = report.groups
    several = [replace(table, suite=suite, group=suite) for suite in suites]
    text = page(replace(report, groups=several), [])
    named = f"neqbench: {', '.join(suites)}".replace("&", "&amp;")
    assert f"<title>{named}</title>" in text
    assert f"<h1>{named}</h1>" in text


@pytest.mark.parametrize(
    "wrong, says",
    [("", "Nothing is wrong here."), ("no room; make some", "1 finding wrong: mend that first.")],
)
def test_doctor_ends_with_what_it_comes_to(neqbench, monkeypatch, wrong, says):
    found = [Finding("versions", found="all"), Finding("space", wrong), Finding("data", note=True)]
    monkeypatch.setattr("harness.commands.doctor_machine.examine_machine", lambda *_: iter(found))
    done = neqbench("doctor")
    assert done.returncode == bool(wrong)
    assert done.stdout.splitlines()[-1].startswith(says)
    assert done.stdout.count("\n") == len(found) + 1


def test_speed_answers_before_its_tables(neqbench):
    words = ["--model", "suites.resnet:resnet8", "--input", "1x16x16", "--batch", "2"]
    text = neqbench("speed", *words, "--seconds", "0", "--frozen", "1").stdout
    assert text.index("Whole layers at random: it ") < text.index("Floor: ")
    assert text.index("Floor: ") < text.index("\nneurons at random")
    assert text.index("whole layers at random") < text.index("Over the dense model: ")


def test_a_table_that_is_too_wide_is_not_cut():
    shown = Console(file=StringIO(), width=40)
    columns = [Column("method", text=True), *(Column(f"number {n}") for n in range(6))]
    cells = [Cell("neq"), *(Cell(f"12345{n}.1 †") for n in range(6))]
    print_table(Table(title="Wide", columns=columns, rows=[cells], notes=[]), shown)
    printed = shown.file.getvalue()
    assert all(cell.text in printed for cell in cells)
    assert all(column.title in printed for column in columns)
