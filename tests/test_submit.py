"""A suite as a job on a Ray that was started by hand, with a token."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import free_ports, running_ray
from trials import PATIENCE, SMALL, assert_same_results, keep_tuning, run, small, wait_for

from harness.commands import submit
from harness.storage import provenance
from harness.suite import files

BIN = Path(sys.executable).parent
SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


@pytest.fixture(scope="module")
def head():
    """(address of the dashboard, environment that may talk to it)."""
    (dashboard,) = free_ports(1)
    given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    environment = (
        os.environ
        | given
        | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
    )
    words = f"--dashboard-host 127.0.0.1 --dashboard-port {dashboard}".split()
    with (
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder,
        running_ray(folder, environment, *words),
    ):
        address = f"http://127.0.0.1:{dashboard}"
        listing = [BIN / "ray", "job", "list", "--address", address]
        wait_for(
            lambda: not subprocess.run(listing, env=environment, capture_output=True).returncode
        )
        yield address, environment


def neqbench(environment, *words, cwd):
    return subprocess.run(
        [BIN / "neqbench", *map(str, words)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.slow
def test_a_submitted_suite_ends_with_the_local_report(tmp_path, head):
    address, environment = head
    longer = "recipe.epochs=20"  # it still runs when it is submitted again
    specs = [small("baseline", longer), small("neq", longer)]
    remote = tmp_path / "remote"
    keep_tuning(specs[0], remote)
    choice = ["digits", *SETTINGS, "--set", longer, "--methods", "baseline,neq", "--seeds", "0"]
    words = ["submit", *choice, "--address", address, "--results", remote]
    first = neqbench(environment, *words, cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    name = re.match(r"(neqbench-digits-\w{8}-1) is submitted\n", first.stdout)[1]
    again = neqbench(environment, *words, cwd=tmp_path)
    assert again.stdout.startswith(f"{name} is running already")
    status = ["status", "digits", "--results", remote]
    wait_for(lambda: (remote / "digits" / "plans").is_dir())
    followed = neqbench(environment, *status, "--watch", cwd=tmp_path)
    assert followed.returncode == 0
    assert "2 done" in followed.stdout
    for spec in specs:
        run(spec, tmp_path / "local")
        assert_same_results(spec, tmp_path / "local", remote)
    trials = pd.read_parquet(remote / "digits" / "trials")
    assert set(trials["git_sha"]) == {provenance.provenance(False)["git_sha"]}
    logs = [first, again, followed]
    assert not any(environment["RAY_AUTH_TOKEN"] in one.stdout + one.stderr for one in logs)
    assert not any(
        environment["RAY_AUTH_TOKEN"].encode() in path.read_bytes()
        for path in remote.rglob("*")
        if path.is_file()
    )


@pytest.mark.slow
def test_without_the_token_nobody_is_let_in(tmp_path, head):
    address, environment = head
    wrong = environment | {"RAY_AUTH_TOKEN": "0" * 64}
    words = ["submit", "digits", "--address", address, "--results", tmp_path]
    done = neqbench(wrong, *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no Ray dashboard answers as it should" in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert done.stderr.count("\n") == 1


def test_what_can_not_be_submitted(tmp_path, neqbench):
    words = ["submit", "digits", "--address", "http://127.0.0.1:9", "--results"]
    nobody = neqbench(*words, tmp_path)
    assert "no Ray dashboard answers as it should at http://127.0.0.1:9" in nobody.stderr
    data = neqbench("submit", "cifar10", *words[2:], tmp_path)
    assert "--set data.root=data/cifar10: every node of the cluster must see it" in data.stderr
    seeds = neqbench(*words, tmp_path, "--seeds", "many")
    assert "--seeds 'many'" in seeds.stderr
    keys = neqbench(*words, "s3://KEY:SECRET@bucket/x")
    plain = neqbench("submit", "digits", "--address", "127.0.0.1:9", "--results", tmp_path)
    assert "such as http://head:8265" in plain.stderr
    assert "SECRET" not in keys.stderr
    here = neqbench(*words, "results")
    assert "--results=results: every node of the cluster must see it" in here.stderr
    log = neqbench(*words, tmp_path, "--log", "tensorboard:runs")
    assert "--log tensorboard=runs: every node of the cluster must see it" in log.stderr
    log = neqbench(*words, tmp_path, "--log", "mlflow:http://me:SECRET@host")
    assert "set user and password on the cluster" in log.stderr
    other = neqbench(*words, "hdfs://x/y")
    assert "results lie in a folder" in other.stderr
    wrong = neqbench("submit", "digitz", *words[2:], tmp_path)
    assert "did you mean 'digits'" in wrong.stderr
    key = neqbench(*words, tmp_path, "--set", "recipe.epoch=3")
    assert "recipe.epoch: unknown key" in key.stderr
    assert {r.returncode for r in (nobody, data, seeds, keys, plain, here, other, wrong, key)} == {
        2
    }


@pytest.mark.slow
def test_what_is_sent(tmp_path):
    """Code and suite; no data, results, caches or history. It runs, and is the same trial."""
    own = tmp_path / "mine"
    shutil.copytree(files.shipped_suites()["digits"].parent, own)
    for name in ("data", "results", ".git", "__pycache__"):
        (own / name).mkdir(exist_ok=True)
        (own / name / "large").write_bytes(b"x")
    staging = tmp_path / "staging"
    staging.mkdir()
    where = submit._stage(staging, str(own), own)
    sent = [str(path.relative_to(staging)) for path in staging.rglob("*") if path.is_file()]
    assert "harness/cli.py" in sent
    assert "suites/cifar10/suite.toml" in sent
    assert {path.partition("/")[0] for path in sent} == {"harness", "neq", "suites", "own"}
    assert not [path for path in sent if path.endswith((".pyc", "large"))]
    # Text that somebody wrote, and no more of it than there is.
    assert {Path(path).suffix for path in sent} <= {".py", ".toml", ".md", ".html", ".typed"}
    assert max((staging / path).stat().st_size for path in sent) < 2**16
    words = ["-m", "harness", "plan", where, "--methods", "neq", "--seeds", "0", *SETTINGS]
    words += ["--set", "model.build=suites.resnet:resnet8", "--set", "model.arguments={}"]
    words += ["--format", "json"]
    done = subprocess.run(
        [sys.executable, *words], cwd=staging, capture_output=True, text=True, check=True
    )
    (trial,) = json.loads(done.stdout)
    assert trial["trial"] == small("neq", suite=str(own)).key
