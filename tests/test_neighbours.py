"""Who else is on the device: other runs' trials, and other processes."""

import json
import os
import subprocess
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from trials import SLOT, altered, keep_tuning, results, row_of, run, small, wait_for

from harness.report.model import load_report
from harness.run.attempt import attempt
from harness.storage.leases import born
from harness.storage.schema import EpochRecord
from harness.storage.store import Store
from harness.train import neighbours
from harness.train.neighbours import Neighbours

CPU = torch.device("cpu")
BUSY = "import time\nend = time.time() + 60\nwhile time.time() < end: pass"


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """As on a machine where nothing else is registered."""
    monkeypatch.setattr(neighbours.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()


def busy_seconds():
    """From /proc/stat: all but idle and waiting, in ticks; guests are in user's time."""
    with open("/proc/stat") as file:  # noqa: PTH123
        user, nice, system, _, _, irq, soft, steal, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def registered(tmp_path):
    return sorted(path.name for path in (tmp_path / "tmp" / neighbours.FOLDER / "cpu").iterdir())


def test_trials_see_each_other_while_they_live(tmp_path):
    with Neighbours(CPU, "one").registered() as one:
        assert one.trials() == 1
        with Neighbours(CPU, "one").registered():  # another worker of the same trial
            assert one.trials() == 1
        with Neighbours(CPU, "one").registered(), Neighbours(CPU, "two").registered() as two:
            assert one.trials() == two.trials() == 2
    assert registered(tmp_path) == []


@pytest.mark.slow
def test_a_killed_trial_is_no_neighbour(tmp_path):
    code = (
        "import sys, tempfile, time, torch\n"
        "from harness.train import neighbours\n"
        f"neighbours.FOLDER = {neighbours.FOLDER!r}\n"
        f"tempfile.tempdir = {str(tmp_path / 'tmp')!r}\n"
        "with neighbours.Neighbours(torch.device('cpu'), 'other').registered():\n"
        "    print('here', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    with Neighbours(CPU, "mine").registered() as mine:
        assert mine.trials() == 2
        process.kill()
        process.wait()
        process.stdout.close()
        assert mine.trials() == 1
        assert [name.split(".")[0] for name in registered(tmp_path)] == ["mine"]
        # A later process with the number of a dead one, and one of another process table.
        folder = tmp_path / "tmp" / neighbours.FOLDER / "cpu"
        place = registered(tmp_path)[0].split(".")[3]
        (folder / f"late.{os.getpid()}.{born(os.getpid()) - 1}.{place}").touch()
        (folder / f"far.{os.getpid()}.{born(os.getpid())}.elsewhere").touch()
        (folder / "nonsense").touch()
        assert mine.trials() == 1
        assert len(registered(tmp_path)) == 3


@pytest.mark.slow
def test_two_runs_at_once_are_recorded_as_sharing(tmp_path):
    """Each alone in its slot: only the registry can tell."""
    spec, other = small("baseline"), small("baseline", seed=1)
    for root in ("a", "b"):
        keep_tuning(spec, tmp_path / root)
    first = attempt(spec, str(tmp_path / "a"), SLOT)
    assert isinstance([next(first) for _ in range(2)][1], EpochRecord)
    list(attempt(other, str(tmp_path / "b"), SLOT))
    first.close()
    run(small("baseline", seed=2), tmp_path / "c")
    for seed, root, trials in ((1, "b", 2), (2, "c", 1)):
        key = small("baseline", seed=seed).key
        assert Store(tmp_path / root, "digits").trial(key)["trials_on_device"] == trials


def test_what_other_processes_do_is_measured(monkeypatch):
    monkeypatch.setattr(neighbours, "_busy_seconds", busy_seconds)
    start = "from subprocess import *\nimport sys\n"
    start += "print(Popen([sys.executable, '-c', sys.argv[1]], stdout=DEVNULL).pid)"
    started = subprocess.check_output([sys.executable, "-c", start, BUSY], text=True)
    other = psutil.Process(int(started))  # whose parent is gone: it is not this trial's
    try:
        with Neighbours(CPU, "mine").registered() as mine:
            mine.begin()
            began = time.monotonic()
            works_for_a_second(other)
            assert mine.load() * (time.monotonic() - began) > 0.9
    finally:
        other.kill()


def works_for_a_second(process):
    since = sum(process.cpu_times()[:2])
    wait_for(lambda: sum(process.cpu_times()[:2]) - since >= 1)


def test_what_a_trial_has_started_is_its_own():
    before = neighbours._cpu_seconds(os.getpid())
    child = subprocess.Popen([sys.executable, "-c", BUSY])  # as a loader of images is
    try:
        works_for_a_second(psutil.Process(child.pid))
        assert neighbours._cpu_seconds(os.getpid()) > before + 0.9
    finally:
        child.kill()
        child.wait()
    assert neighbours._cpu_seconds(os.getpid()) > before + 0.9  # and still when it has ended


def test_own_work_is_no_load(monkeypatch):
    own = [100.0]
    monkeypatch.setattr(neighbours, "_busy_seconds", lambda: 2 * own[0])
    monkeypatch.setattr(neighbours, "_cpu_seconds", lambda pid: own[0])
    clock = [0.0]
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: clock[0])
    with Neighbours(CPU, "mine").registered() as mine:
        mine.begin()
        own[0], clock[0] = 103.0, 2.0  # 3 of 6 busy seconds in 2 seconds were its own
        assert mine.load() == 1.5
        own[0], clock[0] = 103.0, 6.0
        assert mine.load() == 0.5


@pytest.mark.slow
def test_no_time_verdict_above_the_bound(tmp_path):
    for method in ("baseline", "neq"):
        for seed in range(3):
            run(small(method, seed=seed), tmp_path)
            key = small(method, seed=seed).key
            altered(tmp_path, key, "epochs", "seconds_train", 1.0 - 0.5 * (method == "neq"))
            altered(tmp_path, key, "epochs", "other_load", 0.4)
    (table,) = load_report([Store(tmp_path, "digits")]).groups
    assert table.timing_withheld is None
    assert row_of(table, "neq").measured.seconds_verdict == "less"
    altered(tmp_path, small("neq").key, "epochs", "other_load", 1.26)
    (table,) = load_report([Store(tmp_path, "digits")]).groups
    assert table.timing_withheld == "other processes kept 1.3 CPUs busy (0.5 at most)"
    assert not table.timing_shared
    assert row_of(table, "neq").measured.seconds_verdict is None
    assert results(small("neq"), tmp_path)[1].num_rows == 5


@pytest.mark.slow
def test_no_time_verdict_where_trials_compile(tmp_path):
    for seed in range(2):
        run(small("baseline", seed=seed), tmp_path)
        key = small("baseline", seed=seed).key
        altered(tmp_path, key, "epochs", "other_load", 0.0)
        experiment = json.loads(Store(tmp_path, "digits").trial(key)["experiment"])
        experiment["recipe"]["compile"] = True
        altered(tmp_path, key, "trials", "experiment", json.dumps(experiment))
    (table,) = load_report([Store(tmp_path, "digits")]).groups
    assert table.timing_withheld == "the seconds of trials include compiling"
    assert not table.timing_shared


@pytest.mark.slow
def test_a_process_on_the_gpu_for_an_epoch_is_too_many(tmp_path):
    for seed in range(3):
        spec = small("baseline", seed=seed)
        run(spec, tmp_path)
        altered(tmp_path, spec.key, "epochs", "other_load", 0.0)
        altered(tmp_path, spec.key, "trials", "gpu", "H100")
    (table,) = load_report([Store(tmp_path, "digits")]).groups
    assert table.timing_withheld is None
    path = tmp_path / "digits" / "epochs" / f"{spec.key}.parquet"
    rows = pq.read_table(path)
    loads = pa.array([0.0, 0.0, 1.0, 0.0, 0.0])
    pq.write_table(
        rows.set_column(rows.column_names.index("other_load"), "other_load", loads), path
    )
    (table,) = load_report([Store(tmp_path, "digits")]).groups
    assert table.timing_withheld == "1 other process had memory on the GPU"


class Nvml:
    """NVML with so many processes on the GPU."""

    def __init__(self, count):
        self.count = count

    def nvmlInit(self):  # noqa: N802
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == "GPU-1"
        return uuid

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        return [type("P", (), {"pid": 4000 + number}) for number in range(self.count)]


def test_other_processes_on_a_gpu_are_counted(monkeypatch):
    monkeypatch.setattr(neighbours, "_device_name", lambda device: "GPU-1")
    gpu = torch.device("cuda")
    with Neighbours(gpu, "mine").registered() as mine:
        for before, after, load in ((1, 1, 0.0), (1, 3, 2.0), (3, 1, 2.0), (0, 0, 0.0)):
            monkeypatch.setitem(sys.modules, "pynvml", Nvml(before))
            mine.begin()
            monkeypatch.setitem(sys.modules, "pynvml", Nvml(after))
            assert mine.load() == load
        monkeypatch.setitem(sys.modules, "pynvml", None)
        mine.begin()
        assert mine.load() is None
