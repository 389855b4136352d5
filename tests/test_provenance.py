"""Which code computed what: commits, versions, and several of them in one trial."""

import subprocess

import pandas as pd
import pytest
from trials import run, small

from harness.report.model import load_report
from harness.storage import provenance
from harness.storage.store import Store
from harness.train import trial

ONE, TWO, THREE = ("1" * 40, "2" * 40 + "+", "3" * 40)


@pytest.mark.slow
def test_the_commits_are_those_that_computed_epochs(tmp_path, monkeypatch):
    spec = small("baseline")
    for code, epochs in ((ONE, 2), (TWO, 4), (ONE, None), (THREE, None)):
        monkeypatch.setattr(trial, "code", lambda code=code: code)
        run(spec, tmp_path, epochs=epochs)
    rows = pd.read_parquet(tmp_path / "digits" / "epochs")
    assert rows["code"].tolist() == [ONE, ONE, TWO, TWO, ONE]
    row = Store(tmp_path, "digits").trial(spec.key)
    assert row["git_sha"] == f"{ONE}; {TWO[:-1]}"  # the fourth attempt has computed nothing
    assert (row["git_dirty"], row["attempts"]) == (True, 4)
    (table,) = load_report([Store(tmp_path, "digits")]).groups
    assert "Code: 1111111; 2222222 with uncommitted changes." in table.notes


def test_a_version_stands_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "code", lambda: "0.1.0rc1")
    spec = small("baseline", "recipe.epochs=1")
    run(spec, tmp_path)
    row = Store(tmp_path, "digits").trial(spec.key)
    assert (row["git_sha"], row["git_dirty"]) == ("0.1.0rc1", None)
    (table,) = load_report([Store(tmp_path, "digits")]).groups
    assert "Code: 0.1.0rc1." in table.notes


@pytest.fixture
def somebody_s(tmp_path, monkeypatch):
    """A repository with one commit, and neqbench's files in its environment, untracked."""

    def git(*words):
        words = ("-c", "user.name=x", "-c", "user.email=x@x", *words)
        done = subprocess.run(("git", *words), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    monkeypatch.delenv("NEQBENCH_CODE", raising=False)
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "theirs")
    file = tmp_path / "venv" / "site-packages" / "harness" / "storage" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(file))
    return git


def test_installed_in_somebody_s_repository(somebody_s):
    version = {"git_sha": provenance._version("neqbench"), "git_dirty": None}
    assert version["git_sha"]
    assert provenance._code() == version
    somebody_s("add", "--all")  # as part of their code it has their commit
    somebody_s("commit", "-q", "-m", "vendored")
    assert provenance._code() == {"git_sha": somebody_s("rev-parse", "HEAD"), "git_dirty": False}


def test_what_is_a_commit():
    assert provenance.is_commit("1234abc+")
    assert not provenance.is_commit(provenance._version("neqbench"))
