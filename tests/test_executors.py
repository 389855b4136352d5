import os
import shutil
import signal
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import ray
from trials import WIDE, assert_same_results, keep_tuning, small

from harness.errors import UserError
from harness.run.events import Started
from harness.run.executors import Inline, Ray
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite import files

pytestmark = [
    # Ray's own: sockets and files that it leaves to the interpreter's exit.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

# Data that say which process reads them, and a model that breaks for one seed.
PARTS = """
import os
from pathlib import Path

import torch
from harness.suite import files, parts
from harness.seeds import derive
from suites.resnet import resnet8

HERE = Path(__file__).parent

def load(options):
    (HERE / "pid").write_text(str(os.getpid()))
    suite, folder = files.load_suite("digits")
    return parts.load_part("data:load", folder)(options)

class Breaking(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = resnet8()
        self.broken = torch.initial_seed() == derive(1, "initialisation")
        self.batches = 0

    def forward(self, x):
        self.batches += self.training and torch.is_grad_enabled()
        if self.broken and self.batches > 12:
            raise RuntimeError("a bug of the user's")
        return self.inner(x)
"""


@pytest.fixture
def remains_of_a_cluster():
    """Ray's own folder says that a cluster is running which is long gone."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        (Path(folder) / "ray").mkdir()
        (Path(folder) / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
        yield


@pytest.fixture
def own_suite(tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(files.shipped_suites()["digits"].parent, folder)
    (folder / "data.py").unlink()
    (folder / "parts.py").write_text(PARTS)
    text = (folder / "suite.toml").read_text()
    text = text.replace("data:load", "parts:load").replace('["fc"]', '["inner.fc"]')
    text = text.replace("suites.resnet:resnet8", "parts:Breaking")
    (folder / "suite.toml").write_text(text)
    return folder


def records(events, spec):
    mine = [event for owner, event in events if owner == spec]
    assert mine[-1] is None
    return [event for event in mine if isinstance(event, EpochRecord)]


@pytest.mark.slow
def test_inline_and_ray_give_the_same_bits_and_can_be_read_meanwhile(
    tmp_path, remains_of_a_cluster, monkeypatch
):
    """It starts a Ray of its own; the others join one that lasts."""
    methods = ("neq", "random")
    specs = [small(method, "recipe.epochs=4", *WIDE) for method in methods]
    for root in ("inline", "ray"):
        keep_tuning(specs[0], tmp_path / root)
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # other tests' trials are no neighbours there
    list(Inline().run(specs, str(tmp_path / "inline")))
    lengths, events = [], []
    for spec, event in Ray().run(specs, str(tmp_path / "ray")):
        events.append((spec, event))
        if isinstance(event, EpochRecord):
            lengths.append(len(pd.read_parquet(tmp_path / "ray" / "digits" / "epochs")))
    assert lengths[-1] == 4 * len(specs)
    assert len(set(lengths)) > 2
    for spec in specs:
        assert [record.epoch for record in records(events, spec)] == [0, 1, 2, 3]
        assert_same_results(spec, tmp_path / "inline", tmp_path / "ray")
    shared = pd.read_parquet(tmp_path / "ray" / "digits" / "trials")["trials_on_device"]
    assert (shared == min(os.cpu_count(), len(specs))).all()


def test_a_killed_worker_comes_back_from_its_checkpoint(tmp_path, own_suite, shared_ray):
    spec = small("neq", suite=str(own_suite))
    for root in ("through", "ray"):
        keep_tuning(spec, tmp_path / root)
    list(Inline().run([spec], str(tmp_path / "through")))
    events, killed = [], False
    for owner, event in Ray().run([spec], str(tmp_path / "ray")):
        events.append((owner, event))
        if isinstance(event, EpochRecord) and event.epoch == 1 and not killed:
            worker = int((own_suite / "pid").read_text())
            assert worker != os.getpid()
            os.kill(worker, signal.SIGKILL)
            killed = True
    assert [record.epoch for record in records(events, spec)] == list(range(5))
    assert_same_results(spec, tmp_path / "through", tmp_path / "ray")
    row = Store(tmp_path / "ray", "own").trial(spec.key)
    assert (row["state"], row["attempts"]) == ("done", 2)


@pytest.mark.slow
def test_a_second_attempt_that_fails_sooner_is_heard(tmp_path, own_suite, shared_ray):
    spec = small("neq", suite=str(own_suite))
    events = []
    for owner, event in Ray().run([spec], str(tmp_path)):
        events.append((owner, event))
        if isinstance(event, EpochRecord) and event.epoch == 1:
            (own_suite / "parts.py").write_text("raise RuntimeError('changed meanwhile')")
            os.kill(int((own_suite / "pid").read_text()), signal.SIGKILL)
    assert [record.epoch for record in records(events, spec)] == [0, 1]
    (failure,) = [event for _, event in events if isinstance(event, Failure)]
    assert "changed meanwhile" in failure.reason
    assert Store(tmp_path, "own").trial(spec.key)["state"] == "failed"


@pytest.mark.slow
def test_a_worker_that_always_dies_is_a_failure_in_the_end(tmp_path, own_suite, shared_ray):
    spec = small("baseline", suite=str(own_suite))
    (own_suite / "parts.py").write_text("import os\nos._exit(1)")
    events = [event for _, event in Ray().run([spec], str(tmp_path))]
    assert [type(event) for event in events] == [Started, Failure, type(None)]
    assert events[1].reason.startswith(
        "its workers died 4 times (WorkerCrashedError); they had used"
    )
    assert Store(tmp_path, "own").trial(spec.key)["reason"] == events[1].reason


@pytest.mark.slow
@pytest.mark.parametrize("executor", [Inline, Ray])
def test_a_trial_that_raises_does_not_stop_the_others(tmp_path, own_suite, executor, shared_ray):
    specs = [small("neq", seed=seed, suite=str(own_suite)) for seed in (0, 1, 2)]
    events = list(executor().run(specs, str(tmp_path)))
    (failure,) = [event for _, event in events if isinstance(event, Failure)]
    assert failure.reason == "RuntimeError: a bug of the user's"
    store = Store(tmp_path, "own")
    rows = [store.trial(spec.key) for spec in specs]
    assert [row["state"] for row in rows] == ["done", "failed", "done"]
    assert "parts.py" in rows[1]["traceback"]
    assert rows[1]["epochs_done"] == 2
    assert [len(records(events, spec)) for spec in specs] == [5, 2, 5]


def test_more_than_the_machine_has(tmp_path, shared_ray):
    with pytest.raises(UserError, match="asks for 4096 CPUs and 0 GPUs, more than any node"):
        list(Ray().run([small("baseline", "resources.cpus=4096")], str(tmp_path)))
    for executor in (Inline(), Ray()):
        with pytest.raises(UserError, match=r"asks for 2\.0 and .* has none"):
            list(executor.run([small("baseline", "resources.gpus=2")], str(tmp_path)))
    with pytest.raises(UserError, match=r"no Ray cluster answers at 127\.0\.0\.1:9"):
        list(Ray("127.0.0.1:9").run([small("baseline")], str(tmp_path)))
    assert not any(Path(tmp_path).glob("*/trials/*"))


def test_a_task_that_has_said_its_last_is_left_to_end(tmp_path, shared_ray, monkeypatch):
    """Ray aborts the whole driver where it cancels a task that is just ending."""
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "leases").write_text("no folder")
    cancelled = []
    monkeypatch.setattr(ray, "cancel", lambda stream, **_: cancelled.append(stream))
    with pytest.raises(UserError, match=r"leases/.* can't be written: .*; mend that"):
        list(Ray().run([small("baseline")], str(tmp_path)))
    assert not cancelled
