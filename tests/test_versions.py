"""Ranges, the pins that are tested, and what becomes of fvcore on a torch without torch.jit."""

import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch import nn

from harness.errors import UserError
from harness.flops.costs import count_costs

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name):
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(package): Version(version) for package, version in pairs}


REQUIREMENTS = [
    requirement
    for texts in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, texts)
    if requirement.name != PROJECT["name"]
]


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda requirement: requirement.name)
def test_oldest_is_the_lower_bound_and_the_pin_is_in_the_range(requirement):
    (bound,) = [each for each in requirement.specifier if each.operator == ">="]
    name = canonicalize_name(requirement.name)
    assert pins("constraints-oldest.txt")[name] == Version(bound.version)
    assert pins("constraints.txt")[name] in requirement.specifier


@pytest.fixture
def unloaded(monkeypatch):
    """fvcore is not imported yet."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "fvcore"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("lack", ["_get_trace_graph", "script"])
def test_without_torch_jit_one_line_says_why_nothing_is_counted(monkeypatch, lack):
    monkeypatch.delattr(torch.jit, lack)
    with pytest.raises(UserError, match=r"FLOPs can't be counted: .*torch\.jit") as error:
        count_costs(nn.Sequential(nn.Linear(3, 2)), (3,))
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("unloaded")
def test_without_fvcore_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    with pytest.raises(UserError, match=r"fvcore.*is not installed; pip install fvcore"):
        count_costs(nn.Sequential(nn.Linear(3, 2)), (3,))


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fvcore":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
