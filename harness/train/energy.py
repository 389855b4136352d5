"""Energy of the GPU, from its own counter (NVML's, since the driver was loaded)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness import parallel


class Energy:
    """Adds up the energy that this trial's GPUs use while `measuring`.

    Nothing is known on a CPU, on a GPU that other trials use as well (`shared`), whose counter is
    of all of them, or without the package nvidia-ml-py or the counter.
    """

    def __init__(self, device: torch.device, *, shared: bool) -> None:
        counting = device.type == "cuda" and not shared
        self._device, self._read = device, _counter(device) if counting else None
        self._millijoules = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, energy is counted, to the end of the work that the block gives the GPU."""
        before = self._now()
        yield
        self._millijoules += self._now() - before

    def take(self) -> float | None:
        """Joules that all workers used since the last call; None where one of them can't tell."""
        mine = float("nan") if self._read is None else self._millijoules / 1000
        self._millijoules = 0
        total = torch.tensor(mine, dtype=torch.float64, device=self._device)
        joules = float(parallel.add_up(total))
        return None if joules != joules else joules

    def _now(self) -> int:
        if self._read is None:
            return 0
        torch.cuda.synchronize(self._device)
        try:
            return self._read()
        except Exception:  # as when the driver is replaced under way: nothing is known any more
            self._read = None
            return 0


def _counter(device: torch.device) -> Callable[[], int] | None:
    """Reads the device's counter in millijoules; None where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle: Any = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # not installed, no such device (a MIG slice), or too old: nothing is known
        return None
    return lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
