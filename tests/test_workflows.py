"""The workflow files ask for what exists."""

import re
from pathlib import Path

import pytest
import yaml
from doc_commands import TARGETS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def workflow(path):
    return yaml.load(path.read_text(), yaml.BaseLoader)  # elsewhere `on` is a truth value


def commands(job):
    """What a job runs, once for each entry of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    entries = [*matrix.get("include", [])]
    entries += [{name: value} for name, values in matrix.items() for value in values]
    for step in job["steps"]:
        names = re.findall(r"\$\{\{ matrix\.(\w+) \}\}", step.get("run", ""))
        for entry in [e for e in entries if names and names[0] in e] or [{}] * ("run" in step):
            yield re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda m, e=entry: e[m[1]], step["run"])


def test_there_are_workflows():
    assert [path.stem for path in WORKFLOWS] == ["checks", "tests", "versions"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_targets_exist(path):
    asked = [run.split() for job in workflow(path)["jobs"].values() for run in commands(job)]
    assert asked
    for program, target in asked:
        assert program == "make"
        assert target in TARGETS


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_nothing_may_be_written_and_actions_are_pinned(path):
    read = workflow(path)
    assert read["permissions"] == {"contents": "read"}
    assert "secrets." not in path.read_text()
    for job in read["jobs"].values():
        assert "permissions" not in job
        for step in job["steps"]:
            assert re.fullmatch(r"actions/[a-z-]+@v\d+", step.get("uses", "actions/none@v0"))


def test_every_supported_python_is_tested():
    asked = workflow(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]["test"]
    pyproject = (ROOT / "pyproject.toml").read_text()
    supported = re.findall(r'"Programming Language :: Python :: (\d\.\d+)"', pyproject)
    assert asked["strategy"]["matrix"]["python"] == supported
