"""`neqbench status`, and `neqbench doctor` for this machine."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trials import PATIENCE, SMALL, ask, heed_ctrl_c, run, small

from harness.commands import doctor_machine, status
from harness.run.trials import specs
from harness.storage import leases
from harness.storage.requests import Request, keep_request
from harness.storage.store import Store

SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture
def results(tmp_path):
    """One trial done, one broken off, one failed, three that were planned."""
    run(small("baseline"), tmp_path)
    run(small("neq"), tmp_path, epochs=2)
    bad = small("neq", "recipe.optimizer.lr=1e30")
    run(bad, tmp_path)
    trials = specs("digits", SMALL, "baseline,neq,random", "0-1")
    store = Store(tmp_path, "digits")
    ask(store, trials)
    return tmp_path


def read(neqbench, root):
    found = json.loads(neqbench("status", "--results", root, "--format", "json").stdout)
    return {group["group"]: group for group in found["groups"]}


@pytest.mark.slow
def test_every_trial_has_its_state(results, neqbench):
    groups = read(neqbench, results)
    main = groups[small("neq").group]
    assert main["suite"] == "digits"
    assert main["counts"] == {"done": 1, "running": 0, "to do": 4, "interrupted": 1, "failed": 0}
    states = {(t["method"], t["seed"]): t for t in main["trials"]}
    assert states["baseline", 0]["state"] == "done"
    neq = states["neq", 0]
    assert (neq["state"], neq["epochs_done"], neq["epochs"]) == ("interrupted", 2, 5)
    assert states["random", 1]["state"] == "to do"
    (failed,) = groups[small("neq", "recipe.optimizer.lr=1e30").group]["trials"]
    assert failed["state"] == "failed"
    assert "training loss became" in failed["reason"]
    text = neqbench("status", "digits", "--results", results).stdout
    assert "1 done, 4 to do, 1 interrupted" in text
    assert "failed: neq seed 0: the training loss became" in text
    assert "2/5" in text


@pytest.mark.slow
def test_suites_are_kept_apart(tmp_path, neqbench):
    run(small("baseline"), tmp_path)
    (tmp_path / "other" / "plans").mkdir(parents=True)
    store = Store(tmp_path, "other")
    keep_request(store.location, Request(group="a group", trials=[("a key", "neq", 0)]))
    found = json.loads(neqbench("status", "--results", tmp_path, "--format", "json").stdout)
    counted = [(g["suite"], g["counts"]["done"], g["counts"]["to do"]) for g in found["groups"]]
    assert counted == [("digits", 1, 0), ("other", 0, 1)]


@pytest.mark.slow
def test_a_running_trial_has_a_heartbeat(results, neqbench):
    store, spec = Store(results, "digits"), small("neq")
    with leases.Lease.acquire(store.location, spec.key, leases.Claim("me", None)):
        groups = read(neqbench, results)
    (trial,) = [t for t in groups[spec.group]["trials"] if t["method"] == "neq" and t["seed"] == 0]
    assert trial["state"] == "running"
    assert 0 <= trial["heartbeat_age"] < 20
    assert read(neqbench, results)[spec.group]["counts"]["running"] == 0


@pytest.mark.slow
def test_watching_ends_when_nothing_is_left(tmp_path, neqbench):
    words = [sys.executable, "-m", "harness", "run", "digits", *SETTINGS, "--executor", "inline"]
    words += ["--results", str(tmp_path), "--methods", "neq", "--seeds", "0-1", "--no-replay"]
    with subprocess.Popen(words, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL):
        watched = neqbench("status", "--results", tmp_path, "--watch")
    assert watched.returncode == 0
    assert "2 done" in watched.stdout


@pytest.mark.slow
def test_what_is_done_is_read_once(results, monkeypatch):
    reader = status.Reader(lambda: [Store(results, "digits")])
    first = reader.read()
    opened = []
    table = Store._table
    monkeypatch.setattr(
        Store,
        "_table",
        lambda self, kind, key, *c: opened.append(key) or table(self, kind, key, *c),
    )
    assert [group.counts for group in reader.read()] == [group.counts for group in first]
    assert opened
    assert small("baseline").key not in opened


@pytest.mark.slow
def test_nothing_is_imported_that_takes_long(results):
    code = f"""
import sys
sys.argv = ["neqbench", "status", "--results", {str(results)!r}]
from harness.cli import main
try:
    main()
finally:
    assert not {{"torch", "pandas", "ray"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_this_machine(tmp_path, neqbench, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done = neqbench("doctor", "--results", tmp_path / "new")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert f"torch {torch.__version__}" in lines[0]
    assert lines[1] == "ok    torch and torchvision: belong together"
    whats = [line[6:].partition(":")[0] for line in lines]
    assert {"results", "space for results", "space for Ray", "Ray"} <= set(whats)
    assert any("neqbench prepare cifar10" in line for line in lines)
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_a_machine(tmp_path, neqbench, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor_machine, "SPACE", 10**18)
    requires = doctor_machine.metadata.requires
    newer = {"torchvision": ["numpy", "torch (==2.99.0)"]}
    monkeypatch.setattr(
        doctor_machine.metadata, "requires", lambda name: newer.get(name) or requires(name)
    )
    words = ["doctor", "--results", tmp_path / "file", "--address", "127.0.0.1:9"]
    done = neqbench(*words)
    assert done.returncode == 1
    wrong = {
        line[6:].partition(":")[0]: line for line in done.stdout.splitlines() if line[:5] == "wrong"
    }
    assert set(wrong) == {"torch and torchvision", "Ray", "results"}
    assert "pip install torch==2.99.0" in wrong["torch and torchvision"]
    assert "no Ray cluster answers at 127.0.0.1:9" in wrong["Ray"]
    assert "choose another place with --results" in wrong["results"]
    assert "make room" in done.stdout


def test_a_secret_is_never_shown(tmp_path, neqbench, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "s3cr3t" * 8)
    done = neqbench("doctor", "--results", tmp_path)
    assert "authentication: token, a token is there" in done.stdout
    assert "s3cr3t" not in done.stdout + done.stderr


@pytest.mark.slow
def test_watching_is_ended_by_ctrl_c(results):
    words = [sys.executable, "-m", "harness", "status", "--results", str(results), "--watch"]
    shown, terminal = pty.openpty()
    with subprocess.Popen(words, preexec_fn=heed_ctrl_c, stdout=terminal) as process:
        os.close(terminal)  # else nothing ends when the process does
        text = b""
        while b"interrupted" not in text:
            assert select.select([shown], [], [], PATIENCE)[0]
            text += os.read(shown, 4096)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=PATIENCE) == 130
    os.close(shown)
