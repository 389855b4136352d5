"""Real processes that are killed, held up and starved; the same command finishes."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import faults
import pandas as pd
import pytest
from trials import (
    NARROW,
    PATIENCE,
    SMALL,
    assert_same_results,
    heed_ctrl_c,
    keep_tuning,
    results,
    run,
    same,
    small,
    wait_for,
)

from harness.run.executors import Inline, Ray
from harness.storage import leases
from harness.storage.schema import Failure
from harness.storage.store import Store
from harness.suite import files

HERE = Path(__file__).parents[1]
pytestmark = [
    # Ray's own: sockets and files that it leaves to the interpreter's exit.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def command(root, *more):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    words = ["run", "digits", *settings, "--no-replay", "--results", str(root), *more]
    return [sys.executable, "-m", "harness", *words]


def start(*words, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(*words), cwd=HERE, preexec_fn=heed_ctrl_c, **pipes, **options)


def as_users_have_it():
    """The environment without what the tests say of Ray: with its own authentication."""
    return {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}


def epochs(root):
    folder = Path(root) / "digits" / "epochs"
    return sum(len(faults.read(path)) for path in folder.glob("[!.]*.parquet"))


@pytest.mark.slow
def test_a_short_campaign(tmp_path, monkeypatch):
    """Workers, nodes and drivers die; `make faults` is the long one."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setattr(faults, "METHODS", "neq")
    found = faults.campaign(tmp_path, 0, 3, random.Random(3), epochs=6, settings=NARROW)
    assert found.wrong == []
    assert found.struck.total() > 0


@pytest.mark.slow
def test_the_campaign_sees_what_it_looks_for(tmp_path):
    """A row computed twice, a row lost, a difference in the last bit."""
    specs = [small("neq"), small("random")]
    for root in ("quiet", "disturbed"):
        for spec in specs:
            run(spec, tmp_path / root)
    quiet, disturbed = tmp_path / "quiet", tmp_path / "disturbed"
    assert faults.differences(quiet, disturbed) == []
    watching = faults.Campaign(disturbed, [], random.Random(0))
    watching._watch()
    path = disturbed / "digits" / "epochs" / f"{specs[0].key}.parquet"
    rows = pd.read_parquet(path)
    rows.assign(seconds_train=rows["seconds_train"] + [0, 0, 1, 0, 0]).to_parquet(path)
    watching._watch()
    assert "computed again" in watching.wrong.pop()
    assert faults.differences(quiet, disturbed) == []  # seconds are measured
    loss = rows["test_loss"].copy()
    loss[2] = math.nextafter(loss[2], 9)
    rows.assign(test_loss=loss).to_parquet(path)
    assert faults.differences(quiet, disturbed) == ["epochs differ in ['test_loss']"]
    rows[:4].to_parquet(path)
    watching._watch()
    assert "computed again" in watching.wrong.pop()


@pytest.mark.slow
def test_two_drivers_share_a_suite(tmp_path):
    choice = ["--executor", "inline", "--methods", "baseline,neq,random", "--seeds", "0-1"]
    specs = [small(m, seed=s) for s in (0, 1) for m in ("baseline", "neq", "random")]
    keep_tuning(specs[0], tmp_path / "both")
    both = [start(tmp_path / "both", *choice) for _ in range(2)]
    texts = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    own = [text.count("5 epochs, metric") for text in texts]
    assert sum(own) == 6  # each trial was done once
    assert min(own) > 0  # by one or the other
    for spec in specs:
        run(spec, tmp_path / "alone")
        assert_same_results(spec, tmp_path / "alone", tmp_path / "both")
        assert Store(tmp_path / "both", "digits").trial(spec.key)["attempts"] == 1
    tables = [text[text.index("digits: Handwritten") :] for text in texts]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_its_trials_to_another(tmp_path):
    """The second one waits for what the first one has, and takes over when it dies."""
    choice = ["--executor", "inline", "--methods", "neq", "--seeds", "0"]
    more = ["--set", "recipe.epochs=40"]
    first = start(tmp_path, *choice, *more)
    wait_for(lambda: epochs(tmp_path) > 2)
    first.send_signal(signal.SIGSTOP)  # however long the second one takes to start
    second = start(tmp_path, *choice, *more)
    line = second.stdout.readline()
    assert line == "waits   digits neq seed 0: another run has it\n"
    first.kill()
    first.communicate()
    text, _ = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0
    assert "done    digits neq seed 0: 40 epochs" in text
    assert pd.read_parquet(tmp_path / "digits/trials")["attempts"].tolist() == [2]


@pytest.fixture
def little_disk(tmp_path):
    """A file system of 16 MiB."""
    folder = tmp_path / "little"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_full_disk(tmp_path, little_disk, executor, shared_ray):
    choice = ["--executor", executor, "--methods", "neq", "--seeds", "0"]
    spec = small("neq", "recipe.epochs=12")
    keep_tuning(spec, little_disk)
    process = start(little_disk, *choice, "--set", "recipe.epochs=12")
    wait_for(lambda: epochs(little_disk) > 1)
    ballast = little_disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    text, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2, text + error
    assert error.count("\n") == 1
    assert "No space left on device; mend that and run the same command again" in error
    assert "failed" not in text
    done = epochs(little_disk)
    assert 0 < done < 12
    ballast.unlink()
    again = start(little_disk, *choice, "--set", "recipe.epochs=12")
    text, error = again.communicate(timeout=PATIENCE)
    assert (again.returncode, error) == (0, "")
    run(spec, tmp_path / "enough")
    assert_same_results(spec, tmp_path / "enough", little_disk)


@pytest.mark.slow
def test_ctrl_c_stops_the_workers_and_says_how_to_go_on(tmp_path, shared_ray):
    more = ["--methods", "neq,random", "--seeds", "0", "--set", "recipe.epochs=200"]
    process = start(tmp_path, *more)
    wait_for(lambda: epochs(tmp_path) > 2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert error.startswith("interrupted; go on with: neqbench run digits --set data.train_size")
    assert error.count("\n") == 1
    spot = Store(tmp_path, "digits").location
    for key in spot.names("leases"):
        beat = leases.latest(spot, key)
        assert beat.released
        wait_for(lambda beat=beat: leases.born(beat.pid) != beat.born)
    done = epochs(tmp_path)
    time.sleep(1)
    assert epochs(tmp_path) == done


HANG = """
import time
import torch
from harness.suite import files, parts
from suites.resnet import resnet8

def load(options):
    suite, folder = files.load_suite("digits")
    return parts.load_part("data:load", folder)(options)

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.batches = resnet8(), 0

    def forward(self, x):
        self.batches += self.training and torch.is_grad_enabled()
        if self.batches > 12:
            TROUBLE
        return self.inner(x)
"""


@pytest.fixture
def troubled(tmp_path):
    def make(trouble):
        folder = tmp_path / "own"
        shutil.copytree(files.shipped_suites()["digits"].parent, folder)
        (folder / "data.py").unlink()
        (folder / "parts.py").write_text(HANG.replace("TROUBLE", trouble))
        text = (folder / "suite.toml").read_text()
        text = text.replace("data:load", "parts:load").replace('["fc"]', '["inner.fc"]')
        (folder / "suite.toml").write_text(text.replace("suites.resnet:resnet8", "parts:Model"))
        return str(folder)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("executor", [Inline, Ray])
@pytest.mark.parametrize("trouble", ["time.sleep(600)", "STOP"])
def test_a_trial_that_hangs(tmp_path, troubled, executor, trouble, shared_ray):
    """Under Ray even one that hears nothing any more."""
    if trouble == "STOP":
        if executor is Inline:
            pytest.skip("this process is the trial's")
        trouble = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
    spec = small("neq", "resources.time_limit=12", suite=troubled(trouble))
    keep_tuning(spec, tmp_path)
    events = [event for _, event in executor().run([spec], str(tmp_path))]
    assert isinstance(events[-2], Failure)
    assert "longer than resources.time_limit, 12 s" in events[-2].reason
    row = Store(tmp_path, "own").trial(spec.key)
    assert (row["state"], row["epochs_done"]) == ("failed", 2)
    beat = leases.latest(Store(tmp_path, "own").location, spec.key)
    assert beat.released


@pytest.mark.slow
def test_memory_that_the_machine_does_not_have(tmp_path, troubled):
    spec = small("neq", suite=troubled("torch.empty(2**55, dtype=torch.uint8)"))
    events = [event for _, event in Inline().run([spec], str(tmp_path))]
    assert "the machine's memory is full: this process had used" in events[-2].reason
    assert "lower recipe.forward_batch" in events[-2].reason


OOM = """
import sys
sys.path.insert(0, "tests")
from harness.run.executors import Ray
from trials import small
events = [event for _, event in Ray().run([small("neq", suite=sys.argv[1])], sys.argv[2])]
print(events[-2].reason)
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_for_its_memory(tmp_path, troubled):
    """Ray's own watch over memory, set so low that it strikes at once."""
    low = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "100"}
    words = [sys.executable, "-c", OOM, troubled("time.sleep(600)"), str(tmp_path)]
    done = subprocess.run(
        words,
        cwd=HERE,
        env=as_users_have_it() | low,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    said = r"died 4 times \(the machine's memory is full: [\d.]+ of [\d.]+ GiB, [\d.]+ GB by this"
    assert re.search(said, done.stdout), done.stdout + done.stderr
    assert "lower recipe.forward_batch" in done.stdout
    (row,) = pd.read_parquet(tmp_path / "own" / "trials").to_dict("records")
    assert row["state"] == "failed"


HEAD = """
import sys
sys.path.insert(0, "tests")
import ray, psutil
from harness.run import ray_cluster
from harness.errors import UserError
from harness.run.executors import Ray
from harness.storage.schema import EpochRecord
from trials import small
ray_cluster.KNOCK, ray_cluster.GONE = 1, 3
killed = False
try:
    for _, event in Ray().run([small("neq", "recipe.epochs=2000")], sys.argv[1]):
        if isinstance(event, EpochRecord) and not killed:
            killed = True
            for child in psutil.Process().children(recursive=True):
                if sys.argv[2] in child.name():
                    child.kill()
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_head_that_is_lost(tmp_path, process):
    # Ray itself would take 15 seconds to find that a node is dead.
    quick = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "2"}
    done = subprocess.run(
        [sys.executable, "-c", HEAD, str(tmp_path), process],
        cwd=HERE,
        env=as_users_have_it() | quick,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert "the Ray head at " in done.stdout, done.stderr
    assert "run the same command" in done.stdout
    assert done.returncode == 0
    spec = small("neq", "recipe.epochs=2000")
    assert Store(tmp_path, "digits").load_checkpoint(spec.key)


@pytest.mark.slow
def test_results_in_a_bucket_are_those_on_disk(tmp_path, bucket, neqbench, monkeypatch):
    """Under a Ray of its own: its workers have this environment, with the keys of the bucket."""
    monkeypatch.delenv("RAY_AUTH_MODE")
    specs = [small("neq"), small("random")]
    root = f"{bucket}/some/results"
    for place in (root, tmp_path):
        keep_tuning(specs[0], place)
    choice = ["--methods", "neq,random", "--seeds", "0"]
    remote = start(root, *choice)  # under Ray
    text, error = remote.communicate(timeout=PATIENCE)
    assert remote.returncode == 0, error
    for spec in specs:
        run(spec, tmp_path)
        one, two = (Store(r, "digits").load_checkpoint(spec.key) for r in (root, tmp_path))
        for state in (one, two):
            del state["rows"]
        assert same(one, two)
        _, *tables = results(spec, tmp_path)
        for kind, table in zip(("epochs", "layers"), tables, strict=True):
            rows = Store(root, "digits")._table(kind, spec.key).select(table.column_names)
            assert rows.equals(table)
    report = neqbench("report", "digits", "--results", root)
    assert report.returncode == 0
    assert report.stdout in text
    found = json.loads(neqbench("status", "--results", root, "--format", "json").stdout)
    assert found["groups"][0]["counts"]["done"] == 2
    again = start(root, *choice)
    assert again.communicate(timeout=PATIENCE)[0] == report.stdout  # nothing is computed twice
