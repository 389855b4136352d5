"""Suites side by side: whose modules are imported, and what of them is part of a key."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.run.trials import specs
from harness.seeds import seed_globals
from harness.suite import files, parts

SUITE = """
title = "Mine"
seeds = [0]
model = {{ build = "{model}", input = [1, 16, 16] }}
data = {{ load = "suites.digits.data:load", validation_size = 2 }}
recipe = {{ epochs = 1, batch_size = 4, precision = "float32", optimizer = {{ name = "SGD" }} }}
methods = {{ baseline = {{}} }}
"""
BODY = """
import torch

WIDTH = 4


def net():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, WIDTH))
"""


def suite(folder, model="parts:model", **modules):
    folder.mkdir(exist_ok=True)
    (folder / "suite.toml").write_text(SUITE.format(model=model))
    for name, text in modules.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return folder


def key(folder):
    (spec,) = specs(str(folder))
    return spec.key


@pytest.mark.parametrize(
    "imported",
    [
        "from nets.body import net as model",
        "from nets import body\n\nmodel = body.net",
        "def model():\n    import nets.body\n\n    return nets.body.net()",
        "from between import model",
    ],
)
def test_code_below_the_suite_s_folder_is_part_of_the_key(tmp_path, imported):
    between = "from nets.body import net\n\n\ndef model():\n    return net()\n"
    folder = suite(tmp_path / "mine", parts=imported, between=between, nets__body=BODY)
    model = parts.build_model("parts:model", folder, {})
    assert model[1].out_features == 4
    before = key(folder)
    (folder / "nets" / "unused.py").write_text("x = 1")
    assert key(folder) == before
    (folder / "nets" / "body.py").write_text(BODY.replace("WIDTH = 4", "WIDTH = 32"))
    assert key(folder) != before


def test_relative_imports_and_packages_are_followed(tmp_path):
    folder = suite(
        tmp_path / "mine",
        model="nets.body:net",
        nets__body="from . import size\n" + BODY.replace("4", "size.WIDTH"),
        nets__size="WIDTH = 7",
    )
    (folder / "nets" / "__init__.py").write_text("DEPTH = 1")
    assert parts.build_model("nets.body:net", folder, {})[1].out_features == 7
    keys = [key(folder)]
    for name in ("size", "__init__", "body"):
        path = folder / "nets" / f"{name}.py"
        path.write_text(path.read_text() + "\nMORE = 1\n")
        keys.append(key(folder))
    assert len(set(keys)) == 4


def test_what_is_installed_below_the_folder_is_not_the_user_s(tmp_path, monkeypatch):
    """A project's root is often both, the suite's folder and that of its environment."""
    folder = suite(tmp_path / "mine", parts="import vendored\n\nmodel = vendored.net")
    installed = folder / ".venv" / "lib" / "site-packages" / "vendored.py"
    installed.parent.mkdir(parents=True)
    installed.write_text(BODY)
    monkeypatch.syspath_prepend(str(installed.parent))
    before = key(folder)
    installed.write_text(BODY + "\nMORE = 1\n")
    assert key(folder) == before
    parts.build_model("parts:model", folder, {})
    vendored = sys.modules["vendored"]
    other = suite(tmp_path / "other", parts="import vendored\n\nmodel = vendored.net")
    parts.build_model("parts:model", other, {})
    assert sys.modules["vendored"] is vendored


def test_two_suites_may_have_a_neighbour_of_the_same_name(tmp_path):
    part = "import helper\n\n\ndef model():\n    import late\n\n    return helper.X, late.X\n"
    folders = [
        suite(tmp_path / f"s{x}", parts=part, helper=f"X = {x}", late=f"X = {10 * x}")
        for x in (1, 2)
    ]
    for turn in (0, 1, 0):
        found = parts.build_part("parts:model", folders[turn], {})
        assert found == (turn + 1, 10 * (turn + 1))
    assert "helper" in sys.modules  # of the one that came last, as code that runs later needs it


def test_suites_that_extend_each_other_in_a_circle(tmp_path):
    for mine, other in (("a", "b"), ("b", "a")):
        (tmp_path / mine).mkdir()
        text = f'extends = "../{other}/suite.toml"\ntitle = "{mine}"\n'
        (tmp_path / mine / "suite.toml").write_text(text)
    with pytest.raises(UserError, match=r"a/suite.toml: extends: it extends itself, by way of"):
        files.load_suite(str(tmp_path / "a"))


@pytest.mark.slow
def test_a_folder_called_suites_hides_none(tmp_path):
    """As where a user keeps suites of their own: `python -m harness` finds that folder first."""
    (tmp_path / "suites" / "mine").mkdir(parents=True)
    (tmp_path / "suites" / "__init__.py").write_text("raise ImportError('not ours')")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "harness", "plan", "digits", "--format", "json"]
    for more in ({}, {"PYTHONPATH": f".:{root}"}):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('"trial"') == 15


def test_a_module_that_seeds_when_it_is_imported_leaves_the_streams_alone(tmp_path):
    text = "import random, numpy, torch\ntorch.manual_seed(0); random.seed(0); numpy.random.seed(0)"
    (tmp_path / "parts.py").write_text(f"{text}\n\n\ndef model():\n    return torch.rand(2)\n")
    seed_globals(7, "initialisation")
    expected = torch.rand(2)
    seed_globals(7, "initialisation")
    assert torch.equal(parts.build_part("parts:model", tmp_path, {}), expected)
