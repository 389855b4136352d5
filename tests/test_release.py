"""What is built and published: archives, the version, the citation, the hooks, the forms."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement

from harness.storage import schema
from harness.suite import config

HERE = Path(__file__).parents[1]
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
EXTRAS = PROJECT["optional-dependencies"]
PACKAGES = ("harness/", "neq/", "suites/")
# What building and running leave in a checkout.
STRAYS = (
    *("results/digits/trials/0.parquet", "build/lib/harness/old.py", "dist/old.whl"),
    *("neq/__pycache__/old.pyc", "tests/__pycache__/old.pyc"),
    *(".venv/lib/harness.py", "data/images.bin", "harness/notes.txt"),
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of this checkout as somebody has used it, and the names of the files that belong."""
    if not (HERE / ".git").exists():
        pytest.skip("only a git checkout says which files belong")
    words = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True).stdout
    names = {name for name in listed.split("\0") if name and (HERE / name).is_file()}
    names = {name for name in names if not name.startswith("results/evidence/")}
    root = tmp_path_factory.mktemp("checkout")
    for name in (*names, *STRAYS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("stray")
    for name in names:
        shutil.copy2(HERE / name, root / name)
    return root, names


@pytest.mark.slow
def test_archives_hold_what_belongs_and_nothing_else(checkout, tmp_path):
    root, names = checkout
    words = (sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, root)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == 0, done.stdout
    assert not re.findall(r"(?im)^.*warning\b.*$", done.stdout)
    with tarfile.open(tmp_path / f"neqbench-{VERSION}.tar.gz") as archive:
        files = {each.name.partition("/")[2] for each in archive.getmembers() if each.isfile()}
    made = {name for name in files if name.startswith("neqbench.egg-info/")}
    assert files - made - {"PKG-INFO", "setup.cfg"} == names
    with zipfile.ZipFile(tmp_path / f"neqbench-{VERSION}-py3-none-any.whl") as archive:
        files = set(archive.namelist())
        described = archive.read(f"neqbench-{VERSION}.dist-info/METADATA").decode()
    made = {name for name in files if name.startswith(f"neqbench-{VERSION}.dist-info/")}
    assert files - made == {name for name in names if name.startswith(PACKAGES)}
    assert f"neqbench-{VERSION}.dist-info/licenses/LICENSE" in made
    assert (HERE / "README.md").read_text().splitlines()[0] in described


def test_the_version_stands_in_one_place():
    assert metadata.version("neqbench") == VERSION  # else: make setup
    assert f"\n## {VERSION} " in (HERE / "CHANGELOG.md").read_text()
    pages = [HERE / "README.md", *(HERE / "docs").rglob("*.md"), *(HERE / "cluster").iterdir()]
    images = {
        tag for page in pages for tag in re.findall(r"/neqbench:(\d[\w.]*)", page.read_text())
    }
    assert images <= {VERSION}
    assert "version" not in yaml.safe_load((HERE / "CITATION.cff").read_text())


@pytest.mark.parametrize("program", [["neqbench"], [sys.executable, "-m", "harness"]])
def test_version_says_what_it_runs_on(program):
    name = shutil.which(program[0], path=Path(sys.executable).parent) or program[0]
    words = [name, *program[1:], "--version"]
    environment = os.environ | {"PYTHONPROFILEIMPORTTIME": "1", "NEQBENCH_CODE": ""}
    done = subprocess.run(words, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith(f"neqbench {VERSION}")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout
    assert head[:7] in first
    said = " ".join(others)
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    assert f"torch {metadata.version('torch')} built for {built}, torchvision" in said
    for package in ("ray", "fvcore", "numpy", "pyarrow"):
        assert f"{package} {metadata.version(package)}" in said
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "platform" in imported
    assert not imported & {"torch", "ray", "numpy", "pandas"}  # they take seconds


def test_commits_are_said_in_a_checkout_alone(monkeypatch, capsys):
    from harness.cli import app
    from harness.storage import provenance

    for given, first in (
        ("1" * 40, f"neqbench {VERSION}, commit 1111111"),
        ("1" * 40 + " dirty", f"neqbench {VERSION}, commit 1111111 with uncommitted changes"),
        (VERSION, f"neqbench {VERSION}"),
    ):
        monkeypatch.setenv("NEQBENCH_CODE", given)
        provenance.provenance.cache_clear()
        assert not app(["--version"], standalone_mode=False)
        assert capsys.readouterr().out.splitlines()[0] == first
    provenance.provenance.cache_clear()


def test_dev_brings_every_extra():
    brought = {extra for words in EXTRAS["dev"] for extra in Requirement(words).extras}
    assert brought == set(EXTRAS) - {"dev"}


def test_the_citation_is_whole():
    citation = yaml.safe_load((HERE / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    holder = re.search(r"Copyright \(c\) \d+ (.+)", (HERE / "LICENSE").read_text())[1]
    assert [author["name"].lower() for author in citation["authors"]] == [holder.lower()]
    changes = (HERE / "CHANGELOG.md").read_text()
    assert f"\n## {VERSION} – {citation['date-released']}\n" in changes
    assert (
        f"numerics {config.NUMERICS}, schema {schema.VERSION}"
        in changes.partition(f"\n## {VERSION}")[0]
    )
    (paper,) = citation["references"]
    assert paper["url"] in (HERE / "README.md").read_text()


def test_hooks_are_the_lint_that_ci_runs():
    hooks = yaml.safe_load((HERE / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    entries = [hook["entry"] for hook in hooks if ".venv" in hook["entry"]]
    recipe = re.search(r"^lint:.*\n((?:\t.*\n?)+)", (HERE / "Makefile").read_text(), re.MULTILINE)
    assert entries == recipe[1].replace("$(VENV)", ".venv").replace("\t", "").splitlines()


def test_forms_ask_for_what_is_there():
    forms = sorted((HERE / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 4
    for form in (*forms, HERE / ".github" / "pull_request_template.md"):
        for name in re.findall(r"\b(?:docs|harness)/[\w./-]+\.\w+", form.read_text()):
            assert (HERE / name).is_file(), f"{form.name}: there is no {name}"
    for form in forms:
        for field in yaml.safe_load(form.read_text()).get("body", []):
            asked = field["attributes"]
            assert field["type"] in ("markdown", "textarea")
            assert asked.get("label") or asked.get("value")
