"""Who else uses this machine's device while a trial trains: without them, seconds are its own.

A trial registers in the machine's temporary directory, so that trials of other runs, and of other
users, see it; the name of its file says which process that is, and when it was born.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import torch

from harness import parallel
from harness.storage.leases import born, machine
from harness.suite.config import digest

FOLDER = "neqbench-trials"


class Neighbours:
    """Counts the trials on `device`, and what other processes do there, while it is `registered`.

    `trial`: a name for the trial, the same in all of its processes.
    """

    def __init__(self, device: torch.device, trial: str) -> None:
        self._device, self._trial = device, trial
        place = digest({"machine": machine()})[:8]
        self._name = f"{trial}.{os.getpid()}.{born(os.getpid())}.{place}"
        self._place = place
        self._folder = Path(tempfile.gettempdir()) / FOLDER / _device_name(device)
        self._began = (0.0, 0.0, 0.0)

    @contextmanager
    def registered(self) -> Iterator[Self]:
        """Inside, other trials see this one. Where nothing can be written there, they don't."""
        with suppress(OSError):
            for folder in (self._folder.parent, self._folder):
                folder.mkdir(exist_ok=True)
                with suppress(PermissionError):  # another user's: open already
                    folder.chmod(0o1777)  # other users' trials register here, too
            (self._folder / self._name).touch()
        try:
            yield self
        finally:
            with suppress(OSError):
                (self._folder / self._name).unlink(missing_ok=True)

    def trials(self) -> int:
        """Trials on the device now, this one among them; of several workers, where most are."""
        return parallel.largest(len({self._trial, *(trial for trial, _ in self._alive())}))

    def begin(self) -> None:
        """From here on the `load` is measured."""
        self._others = self._processes_on_gpu()
        self._began = time.monotonic(), _busy_seconds(), self._own_seconds()

    def load(self) -> float | None:
        """What else the device did since `begin`, of the worker that had most of it.

        On a CPU: how many CPUs other processes kept busy, on average; on a GPU: how many other
        processes had memory there at the start or now. None where it can't be told, as without
        nvidia-ml-py.
        """
        if self._device.type == "cuda":
            found = [count for count in (self._others, self._processes_on_gpu()) if count]
            load = float(max(found)) if found else self._others
        else:
            then, busy, own = self._began
            others = _busy_seconds() - busy - (self._own_seconds() - own)
            known = busy > 0  # not everywhere does /proc say it
            load = max(others, 0.0) / max(time.monotonic() - then, 1e-9) if known else None
        thousandths = parallel.largest(-1 if load is None else round(1000 * load))
        return None if thousandths < 0 else thousandths / 1000

    def _alive(self) -> list[tuple[str, int]]:
        """(trial, pid) of all that are registered on the device; dead ones are removed."""
        found = []
        with suppress(OSError):
            for path in self._folder.iterdir():
                trial, pid, since, place = (*path.name.split("."), "", "", "")[:4]
                if place != self._place or not pid.isdecimal():
                    continue  # of another process table: whether it lives can't be told
                if str(born(int(pid))) == since:
                    found.append((trial, int(pid)))
                else:
                    with suppress(OSError):
                        path.unlink()
        return found

    def _own_seconds(self) -> float:
        """CPU seconds of this trial's processes on this machine, and of those that they started."""
        mine = {pid for trial, pid in self._alive() if trial == self._trial} | {os.getpid()}
        return sum(map(_cpu_seconds, mine))

    def _processes_on_gpu(self) -> float | None:
        """How many processes but this one have memory on the GPU; None where it can't be told."""
        if self._device.type != "cuda":
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            handle: Any = pynvml.nvmlDeviceGetHandleByUUID(_device_name(self._device))
            pids = [p.pid for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        except Exception:  # not installed, no such device (a MIG slice), or too old
            return None
        # In a container processes have other numbers here than for the driver: one of them is this.
        return float(max(len(pids) - 1, 0))


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _busy_seconds() -> float:
    """Seconds in which this machine's CPUs have worked since its start, all of them together."""
    times = psutil.cpu_times()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user's time already
    return float(sum(times) - sum(getattr(times, name, 0.0) for name in idle))


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of all that it has started."""
    total = 0.0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += sum(each.cpu_times()[:4])
    return total
