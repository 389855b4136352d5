"""The kit for GPUs, on the CPU: what it runs, ends, keeps and tells."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gpu_children
import gpu_kit
import pandas as pd
import pytest
from gpu_children import HERE
from gpu_kit import GPU, TOY, Kit, Plan, run
from trials import heed_ctrl_c, wait_for

from harness.suite.parts import build_model

MACHINE = {
    "device": "NVIDIA X1",
    "driver": "1",
    "cuda": "13.0",
    "cudnn": 9,
    "cpu": "a CPU",
    "code": "1234567",
    "uncommitted": False,
    "versions": {"python": "3.12", "torch": "2.11.0"},
    "date": "2026-01-01T00:00:00+00:00",
}
# In neqbench's place: says what it was asked for, once for each time that it was asked.
SPEED = """
import sys, time, json
from pathlib import Path
with Path(sys.argv[1]).open("a") as asked:
    print(sys.argv[3], file=asked)
if sys.argv[3] == "slow":
    time.sleep(600)
if sys.argv[3] == "bad":
    print("{half a line")
    sys.exit("error: this model does not run")
print("a warning", file=sys.stderr)
row = {"granularity": "layer", "gradient": "exact", "frozen": 0.5, "backward_ratio": 0.4375}
print(json.dumps({"device": "X1", "rows": [row]}))
"""


@pytest.fixture
def kit(tmp_path, monkeypatch):
    """Makes a Kit with tests and tables of our own, and `asked`: the tables that were taken."""
    (tmp_path / "speed.py").write_text(SPEED)
    fake = [sys.executable, str(tmp_path / "speed.py"), str(tmp_path / "asked")]
    monkeypatch.setattr(gpu_kit, "HARNESS", fake)
    monkeypatch.setattr(gpu_kit, "LEAST", 0.0)
    monkeypatch.setattr(gpu_kit, "GRACE", 1.0)
    monkeypatch.setattr(gpu_children, "GRACE", 1.0)
    (tmp_path / "asked").touch()

    def make(test="assert True", tables=("good",), seconds=60.0, machine=MACHINE, **limits):
        (tmp_path / "test_it.py").write_text(f"import time\ndef test_it():\n    {test}\n")
        words = {name: (name,) for name in tables}
        plan = Plan((str(tmp_path / "test_it.py"),), words, "cifar10", (), reserve=0.0, **limits)
        results = tmp_path / "results"
        deadline = time.monotonic() + seconds
        made = Kit(plan, results, results / "evidence" / "nvidia-x1", machine, deadline)
        made.asked = lambda: (tmp_path / "asked").read_text().split()
        return made

    return make


def everything(kit):
    return run(kit, gpu_kit.PARTS, None, 1)


def test_parts_leave_their_files_and_lines(kit, capsys):
    made = kit(tables=("good", "bad", "other"))
    assert everything(made) == 1
    told = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[:-1]]
    names = ["tests", "speed-good", "speed-bad", "speed-other", "cifar10"]
    states = ["done", "done", "failed", "done", "left"]
    assert told == list(map(list, zip(names, states, strict=True)))
    table = json.loads((made.place / "speed-good.json").read_text())
    assert table["rows"][0]["backward_ratio"] == 0.4375
    assert not (made.place / "speed-bad.json").exists()
    assert "1 passed" in (made.place / "tests.txt").read_text()
    assert json.loads((made.place / "versions.json").read_text()) == MACHINE
    parts = json.loads((made.place / "parts.json").read_text())
    assert "this model does not run" in parts["speed-bad"]["reason"]
    assert "--data" in parts["cifar10"]["reason"]
    page = (made.place / "summary.md").read_text()
    assert "# NVIDIA X1" in page
    assert "| layer | exact | 0.50 | 0.44 |" in page
    assert "this model does not run" in page


def test_what_overruns_is_ended_and_the_others_go_on(kit):
    made = kit(tables=("slow", "good"), table_limit=1.0)
    start = time.monotonic()
    assert everything(made) == 0
    assert time.monotonic() - start < 300
    assert made.outcomes["speed-slow"].state == "stopped"
    assert "1 s" in made.outcomes["speed-slow"].reason
    assert made.outcomes["speed-good"].state == "done"
    assert not list(made.place.glob(".*"))


@pytest.mark.slow
def test_a_failed_test_fails_the_call_and_so_does_one_that_hangs(kit):
    assert everything(kit("assert False")) == 1
    assert everything(made := kit("time.sleep(600)", tests_limit=2.0)) == 1
    assert made.outcomes["tests"].state == "stopped"
    assert everything(kit()) == 0


def test_with_no_time_left_nothing_is_begun(kit, monkeypatch):
    monkeypatch.setattr(gpu_kit, "LEAST", 20.0)
    made = kit(seconds=15.0)
    made.table("good")
    assert made.outcomes["speed-good"].state == "left out"
    assert made.asked() == []


@pytest.mark.slow
def test_the_next_call_keeps_what_is_there_for_the_same_code_and_machine(kit, capsys):
    everything(kit(tables=("good", "bad")))
    capsys.readouterr()
    made = kit(tables=("good", "bad"))
    everything(made)
    assert made.asked() == ["good", "bad", "bad"]  # what has failed is tried again
    told = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    assert told[:2] == [["tests", "kept"], ["speed-good", "kept"]]
    assert made.outcomes["speed-good"].state == "done"
    newer = MACHINE | {"versions": {"python": "3.12", "torch": "2.12.0"}}
    everything(made := kit(machine=newer))
    assert made.asked() == ["good", "bad", "bad", "good"]
    everything(made := kit(machine=newer))
    (made.place / "speed-good.json").unlink()
    everything(made)
    assert made.asked()[4:] == ["good"]


def kit_command(tmp_path, *words):
    return [sys.executable, "tests/gpu_kit.py", "--results", str(tmp_path), "--toy", *words]


@pytest.mark.slow
def test_trials_are_broken_off_whole_and_gone_on_with(tmp_path, neqbench):
    words = kit_command(tmp_path, "--parts", "trials", "--minutes", "15")
    first = subprocess.Popen(words, cwd=HERE, stdout=subprocess.DEVNULL, preexec_fn=heed_ctrl_c)
    wait_for(lambda: list((tmp_path / "digits" / "epochs").glob("[!.]*.parquet")))
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 130
    place = tmp_path / "evidence" / "toy"
    before = set(pd.read_parquet(place / "digits" / "epochs")["seconds_train"])
    page = (place / "summary.md").read_text()
    assert f"| baseline | 0 | {len(before)} of 6 |" in page
    shown = neqbench("report", place)
    assert shown.returncode == 0
    assert "Not begun: neq" in shown.stdout or "Unfinished: neq" in shown.stdout
    again = subprocess.run(words, cwd=HERE, capture_output=True, text=True, check=True)
    assert "digits                 done" in again.stdout
    rows = pd.read_parquet(place / "digits" / "epochs")
    assert len(rows) == 12
    assert before <= set(rows["seconds_train"])  # those epochs were not computed again
    assert not {p.name for p in (place / "digits").iterdir()} & set(gpu_kit.STAYS)
    assert set(pd.read_parquet(place / "digits" / "trials")["state"]) == {"done"}
    assert "| baseline | 0 | 6 of 6 |" in (place / "summary.md").read_text()


@pytest.mark.parametrize(
    "words, error",
    [
        ([], "no CUDA device"),
        (["--toy", "--parts", "all"], "--parts all"),
        (["--toy", "--minutes", "0"], "--minutes"),
        (["--toy", "--data", "nowhere"], "nowhere: there is no such folder"),
    ],
)
def test_wrong_input_is_told_in_a_line(words, error, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_kit, "machine_here", lambda: MACHINE | {"device": None})
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert gpu_kit.main([*words, "--results", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert error in said.err
    assert said.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_models_of_the_tables_are_built_without_weights():
    for words in GPU.tables.values():
        model = build_model(words[words.index("--model") + 1], HERE, {})
        assert sum(p.numel() for p in model.parameters()) > 400_000


@pytest.mark.slow
def test_the_machine_is_asked_in_a_process_of_its_own():
    found = gpu_kit.machine_here()
    assert set(MACHINE) <= set(found)
    assert found["versions"]["torch"].startswith("2.")
    assert replace(TOY).needs_data is False
