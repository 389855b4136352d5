"""docs/ name every suite, key of its file and parameter of a method, with its default."""

import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest

from harness.suite import files
from harness.suite.config import (
    Data,
    Model,
    Probe,
    Published,
    PublishedValue,
    Recipe,
    Resources,
    Sharpness,
    Suite,
)
from harness.suite.method_specs import KINDS
from harness.suite.pruning_specs import PLATEAUS, SCHEDULE

DOCS = Path(__file__).parents[1] / "docs"
CELLS = re.compile(r"(?<!\\)\|")
NAME = re.compile(r"`(\w+)`")
PARTS = {
    **{"[model]": Model, "[data]": Data, "[recipe]": Recipe, "[resources]": Resources},
    **{"[sharpness]": Sharpness, "[probe]": Probe},
}
TABLES_OF_THE_SUITE = {"model", "data", "recipe", "resources", "sharpness", "probe"}
ELSEWHERE = TABLES_OF_THE_SUITE | {"methods", "published", "point"}  # the last is none of a file's


def tables(page):
    """(the heading above it, its cells by row) of each table of a page."""
    text = re.sub(r"^```.*?^```", "", (DOCS / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    heading, rows = "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in CELLS.split(line)[1:-1]])
        elif rows:
            yield heading, rows[0], rows[2:]
            rows = []
        if line.startswith("#"):
            heading = line.lstrip("# ")


def value(text):
    """What a cell begins with, as TOML has it; its first words where that is none."""
    literal = re.match(r"`([^`]*)`|([\d.e-]+)", text)
    if literal is None:
        return text.partition(",")[0]
    try:
        return tomllib.loads(f"x = {literal[1] or literal[2]}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def test_every_suite():
    named = re.findall(r"`([a-z0-9-]+)`", (DOCS / "data.md").read_text())
    assert files.shipped_suites().keys() <= set(named)


def test_every_key_of_a_suite_s_file():
    seen = defaultdict(dict)
    for heading, head, rows in tables("suite-file.md"):
        (part, *_) = re.findall(r"\[\w+\]", f"{head} {heading}") or [""]
        part = "value" if rows[0][0] == "`methods`" else part
        for row in rows:
            seen[part] |= dict.fromkeys(NAME.findall(row[0]), row[1:])
    assert seen[""].keys() == (Suite.model_fields.keys() - ELSEWHERE) | {"extends"}
    assert seen["[published]"].keys() == Published.model_fields.keys()
    assert seen["value"].keys() == PublishedValue.model_fields.keys()
    for part, model in {"": Suite, **PARTS}.items():
        for name, (default, *_) in seen[part].items():
            field = model.model_fields.get(name)
            if field is None or part == "[probe]" or name == "name":
                continue
            assert (default == "needed") == field.is_required(), name
            if default.startswith("`"):
                known = field.get_default(call_default_factory=True)
                assert value(default) == (list(known) if isinstance(known, tuple) else known), name
        if part:
            assert seen[part].keys() == model.model_fields.keys(), part


def test_every_parameter_of_every_method():
    rows, own, shared = {}, {}, defaultdict(list)
    for _, head, body in tables("methods.md"):
        for row in body:
            if head[0] == "parameter":
                shared[NAME.search(row[0])[1]].append(value(row[1]))
            else:
                kind = row[0].strip("`")
                rows[kind] = row[2]
                found = re.findall(r"`(\w+)` \(([^)]*)\)", row[2])
                own[kind] = {name: [value(default)] for name, default in found}
    shared["units"].append("weights")
    assert rows.keys() == KINDS.keys() - {"own"}
    for kind, row in rows.items():
        of_another = own["gradual"] if re.search("those of (`gradual`|shrinking)", row) else {}
        for name, field in KINDS[kind].model_fields.items():
            default = (PLATEAUS | SCHEDULE).get(name, field.default)
            wanted = "needed" if field.is_required() else default
            stated = own[kind].get(name) or shared[name] + of_another.get(name, [])
            assert name == "kind" or stated, f"{kind}: {name}"
            assert name == "kind" or wanted is None or wanted in stated, f"{kind}: {name}"


@pytest.mark.parametrize("page", ["suite-file.md", "methods.md", "sweeps.md"])
def test_what_they_show_of_a_file_can_stand_in_one(tmp_path, page):
    digits = files.shipped_suites()["digits"]
    (tmp_path / "suite.toml").write_text(digits.read_text())
    shown = re.findall(r"^```toml\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    assert shown
    for block in shown:
        (tmp_path / "shown.toml").write_text(f'extends = "suite.toml"\n{block}')
        files.load_experiments(str(tmp_path / "shown.toml"))
