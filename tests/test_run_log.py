"""`neqbench run --log`: each committed epoch is in the log once, whoever was killed meanwhile."""

import signal
import subprocess
import sys
from contextlib import suppress
from threading import Event

import pandas as pd
import psutil
import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trials import PATIENCE, SMALL, small, wait_for

from harness.errors import UserError
from harness.run.events import Elsewhere, Held, Started
from harness.run.logs import AGAIN, COLUMNS, Logs, check_places
from harness.storage.schema import EpochRecord
from harness.storage.store import Store
from neq.integrations.loggers import Logger

pytestmark = [  # of the packages, about each other
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning")
]
SETTINGS = [word for setting in SMALL for word in ("--set", setting)]
RUN = ["run", "digits", *SETTINGS, "--methods", "baseline,neq", "--seeds", "0", "--no-replay"]


def places(folder):
    # No database: MLflow takes seconds to make one, of which a killed driver leaves a part.
    uris = f"tensorboard:{folder}/board", f"mlflow:{folder}/runs"
    return [word for uri in uris for word in ("--log", uri)]


def killed(words, ready):
    """A run whose driver is killed, with all that it has started, as soon as it is `ready`."""
    command = [sys.executable, "-m", "harness", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: process.poll() is not None or ready())
    assert process.poll() is None
    children = psutil.Process(process.pid).children(recursive=True)
    for each in (process, *children):
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait()


def in_board(folder, name):
    """By method: [(epoch, value)]."""
    found = {}
    for run in (folder / "board" / "digits").iterdir():
        seen = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
        found[run.name.partition("-")[0]] = [(e.step, e.value) for e in seen.Scalars(name)]
    return found


def in_mlflow(folder, name):
    client = MlflowClient(tracking_uri=f"{folder}/runs")
    experiment = client.get_experiment_by_name("neqbench-digits").experiment_id
    return {
        run.data.params["method"]: [
            (m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)
        ]
        for run in client.search_runs([experiment])
    }


def assert_logged(folder, root):
    """Each value of the published tables is there once, and nothing else."""
    epochs = pd.read_parquet(root / "digits" / "epochs")
    layers = pd.read_parquet(root / "digits" / "layers")
    epochs["frozen"] = epochs["frozen_neurons"] / epochs["total_neurons"]
    names = COLUMNS | {"frozen": "frozen"}
    for read in (in_board, in_mlflow):
        for name, column in names.items():
            for method, rows in epochs.groupby("method"):
                expected = zip(rows["epoch"], rows[column], strict=True)
                wanted = [(epoch, pytest.approx(value, rel=1e-6)) for epoch, value in expected]
                assert sorted(read(folder, name)[method]) == wanted
                assert len(wanted) == 5
        rows = layers[(layers["method"] == "neq") & (layers["layer"] == "fc")]
        shares = list(zip(rows["epoch"], rows["frozen"] / rows["neurons"], strict=True))
        assert sorted(read(folder, "frozen_by_layer/fc")["neq"]) == shares
    assert layers["frozen"].any()


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inline", "ray"])
def test_a_killed_driver_neither_doubles_nor_loses_an_epoch(executor, tmp_path, neqbench):
    root, log = tmp_path / "results", places(tmp_path)
    words = [*RUN, "--executor", executor, "--results", root, *log]
    rows = root / "digits" / "epochs"
    killed(words, lambda: sum(len(pd.read_parquet(p)) for p in rows.glob("[!.]*.parquet")) > 3)
    before = [len(course) for course in in_board(tmp_path, "metric").values()]
    assert 0 < sum(before) < 10
    for _ in range(2):  # and once more, where all is done
        done = neqbench(*RUN, "--executor", "inline", "--results", root, *log)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stdout
    assert_logged(tmp_path, root)


@pytest.mark.slow
def test_what_is_done_already_is_logged_afterwards(tmp_path, neqbench):
    root = tmp_path / "results"
    words = [*RUN, "--executor", "inline", "--results", root]
    assert neqbench(*words).returncode == 0
    assert neqbench(*words, *places(tmp_path)).returncode == 0
    assert_logged(tmp_path, root)


@pytest.mark.slow
def test_a_server_that_does_not_answer_costs_one_warning(tmp_path, neqbench):
    words = [*RUN, "--executor", "inline", "--results", tmp_path / "results"]
    done = neqbench(*words, "--log", "mlflow:http://127.0.0.1:9", *places(tmp_path))
    assert done.returncode == 0
    assert done.stdout.count("warning:") == 1
    (line,) = [line for line in done.stdout.splitlines() if "warning:" in line]
    assert "mlflow:http://127.0.0.1:9 can't be written to" in line
    assert line.endswith(AGAIN)
    assert_logged(tmp_path, tmp_path / "results")


class Memory:
    """A place that keeps what is written; `fails` is called before each write."""

    held = ()

    def __init__(self, fails=lambda: None):
        self.written, self.closed, self.fails = [], 0, fails

    def read(self):
        return iter(self.held)

    def write(self, epoch, values):
        self.fails()
        self.written.append(epoch)

    def close(self):
        self.closed += 1


@pytest.fixture
def logs(tmp_path, monkeypatch):
    """Logs of one trial of six epochs to a place in memory; what the user is told."""
    spec, store, told = small("baseline"), Store(tmp_path, "digits"), []
    flops = {f"backward_flops_{name}": 1 for name in ("executed", "required", "dense")}
    row = dict.fromkeys(COLUMNS.values(), 0.5) | flops | {"frozen_neurons": 1, "total_neurons": 2}
    monkeypatch.setattr(store, "epochs", lambda key: [row | {"epoch": n} for n in range(6)])
    monkeypatch.setattr(Logs, "_layers", lambda *_: {})

    def make(place):
        def opened(where, name, config, *, project, warn):
            return Logger(where, lambda: place, warn)

        monkeypatch.setattr("harness.run.logs.open_logger", opened)
        return Logs(["here"], store, told.append), spec, told

    return make


def hanging():
    """What tells that it has begun, what ends it, and what hangs until then."""
    begun, never = Event(), Event()

    def hang():
        begun.set()
        never.wait(PATIENCE)

    return begun, never, hang


def record(epoch):
    fields = EpochRecord.__dataclass_fields__
    return EpochRecord(**dict.fromkeys(fields, 0) | {"epoch": epoch})


def test_a_place_that_hangs_is_not_waited_for(logs, monkeypatch):
    begun, never, hang = hanging()
    made, spec, told = logs(Memory(hang))
    monkeypatch.setattr("harness.run.logs.PATIENCE", 0.0)
    with made:
        made.fill(spec)
        begun.wait(PATIENCE)
    assert told == [f"the log is not complete: here takes long; {AGAIN}"]
    never.set()


def test_a_run_that_is_broken_off_does_not_wait(logs, monkeypatch):
    begun, never, hang = hanging()
    made, spec, told = logs(Memory(hang))
    monkeypatch.setattr("harness.run.logs.HASTE", 0.0)

    def broken_off():
        with made:
            made.fill(spec)
            begun.wait(PATIENCE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_off()
    assert not told
    never.set()


def test_a_place_that_fails_once_has_everything_in_the_end(logs):
    errors = [ConnectionError("reset")]

    def fails():
        if len(place.written) == 2 and errors:
            raise errors.pop()

    place = Memory(fails)
    made, spec, told = logs(place)
    with made:
        made.follow(spec, record(5))
        made.follow(spec, None)
        place.held = [("metric", 0, 0.5)]
    assert [*dict.fromkeys(place.written)] == [0, 1, 2, 3, 4, 5]
    assert told == [f"here can't be written to (ConnectionError: reset); {AGAIN}"]
    assert place.closed == 1


@pytest.mark.parametrize("event", [Held(), Elsewhere()])
def test_a_trial_of_another_run_is_left_to_that(logs, event):
    place = Memory()
    made, spec, _ = logs(place)
    with made:
        made.follow(spec, Started())
        made.follow(spec, event)
        made.follow(spec, None)
    assert not place.written


def test_other_numbers_are_told_once(logs):
    place = Memory()
    place.held = [("loss/train", epoch, 0.7) for epoch in range(3)]
    made, spec, told = logs(place)
    with made:
        for epoch in range(6):
            made.follow(spec, record(epoch))
    (text,) = told
    assert text.startswith("here holds other numbers of digits/baseline seed 0 ")


@pytest.mark.slow
def test_two_drivers_write_each_epoch_once(tmp_path):
    """One of them meets a trial that the other has, and goes on when that is done."""
    root, log = tmp_path / "results", places(tmp_path)
    words = map(str, [*RUN, "--executor", "inline", "--results", root, *log])
    command = [sys.executable, "-m", "harness", *words]
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(PATIENCE) for process in started] == [0, 0]
    assert_logged(tmp_path, root)


@pytest.mark.parametrize(
    "place, message",
    [
        (
            "tensorboard",
            "'tensorboard' is no place to log to: write tensorboard:FOLDER",
        ),
        ("files:x", "'files:x' is no place to log to"),
        ("tensorboard:/proc/nothing", "'tensorboard:/proc/nothing' can't be written"),
        ("tensorboard:s3://bucket/x", "tensorboard:s3://bucket/x: name a folder"),
    ],
)
def test_wrong_places_are_told_before_the_first_trial(place, message, tmp_path, neqbench):
    done = neqbench(*RUN, "--results", tmp_path / "results", "--log", place)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --log: {message}")
    assert not (tmp_path / "results").exists()


def test_a_package_that_is_missing_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "neq.integrations.to_wandb", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--log: wandb is not installed: pip install 'neqbench"):
        check_places(["wandb"])
