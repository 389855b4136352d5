"""Run trials: `inline` in this process one after the other, `ray` as one task each."""

import os
import socket
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness.config import Resources, TrialSpec
from harness.errors import UserError
from harness.records import EpochRecord
from harness.rows import Failure, Slot
from harness.storage import Store
from harness.trial import Event, lost, supervised

MAX_RETRIES = 3

Events = Generator[tuple[TrialSpec, Event | None]]


class Executor(Protocol):
    """Runs trials and says what happens to each; `None` ends a trial."""

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """Events of all trials, interleaved as they happen."""
        ...


class Inline:
    """One trial after the other, in this process."""

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """Events in the order of the trials."""
        import torch

        gpu = torch.cuda.is_available()
        for spec in specs:
            wanted = spec.suite.resources.gpus
            if wanted not in ("auto", 0) and not gpu:
                raise UserError(_no_gpu(spec, "this machine"))
            for event in supervised(spec, root, Slot(gpu and wanted != 0, 1)):
                yield spec, event
            yield spec, None


class Ray:
    """One Ray task per trial: on this machine, or on the cluster at `address`."""

    def __init__(self, address: str | None = None) -> None:
        self._address = address

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """Events as they happen. A dead worker's trial is tried again, from its checkpoint."""
        import ray

        _connect(self._address)
        try:
            yield from self._run(list(specs), root)
        finally:
            ray.shutdown()

    def _run(self, waiting: list[TrialSpec], root: str) -> Events:
        import ray

        # With max_calls the process ends with its trial, and gives its memory back.
        task = ray.remote(max_calls=1)(supervised)
        running: dict[Any, _Task] = {}
        waiting = waiting[::-1]
        while waiting or running:
            while waiting:
                spec = waiting[-1]
                slots, slot = _slots(spec, len(waiting) + len(running))
                if len(running) >= 2 * slots:
                    break
                stream = task.options(**_options(spec.suite.resources, slot))
                running[stream.remote(spec, root, slot)] = _Task(waiting.pop(), root, slot)
            ready, _ = ray.wait(list(running), timeout=1.0, fetch_local=False)
            for stream in ready:
                event = running[stream].next(stream)
                yield running[stream].spec, event
                if event is None:
                    del running[stream]


@dataclass(slots=True)
class _Task:
    spec: TrialSpec
    root: str
    slot: Slot
    ended: bool = False

    def next(self, stream: Any) -> Event | None:
        """The next event of a stream that is ready. None, once, after the trial has ended."""
        import ray

        try:
            event: Event | None = ray.get(next(stream))
        except StopIteration:
            event = None if self.ended else self._unheard()
        except ray.exceptions.RayError as error:
            reason = f"its worker died {MAX_RETRIES + 1} times ({type(error).__name__})"
            event = lost(self.spec, self.root, self.slot, reason)
        last = self.spec.suite.recipe.epochs - 1
        self.ended |= isinstance(event, Failure)
        self.ended |= isinstance(event, EpochRecord) and event.epoch == last
        return event

    def _unheard(self) -> Failure:
        """A second attempt that fails sooner than the first was killed ends without a word."""
        row = Store(self.root, self.spec.suite.name).trial(self.spec.key)
        if row is None or row["state"] != "failed":
            return lost(self.spec, self.root, self.slot, "its worker ended before the trial")
        return Failure(row["reason"], row["traceback"])


def _options(resources: Resources, slot: Slot) -> dict[str, Any]:
    gpus = resources.gpus if resources.gpus != "auto" else 1
    return {
        "num_cpus": resources.cpus,
        "num_gpus": gpus if slot.gpu else 0,
        "num_returns": "streaming",
        "max_retries": MAX_RETRIES,
    }


def _slots(spec: TrialSpec, trials: int) -> tuple[int, Slot]:
    """How many trials fit the cluster at a time, and what each is given.

    Raises UserError where not even one fits.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = spec.suite.resources
    any_gpu = any(node.get("GPU", 0) for node in nodes)
    gpus = (1 if any_gpu else 0) if wanted.gpus == "auto" else wanted.gpus
    if gpus and not any_gpu:
        raise UserError(_no_gpu(spec, "the Ray cluster"))
    fitting = [
        int(min(node.get("CPU", 0) / wanted.cpus, node.get("GPU", 0) / gpus if gpus else 1e9))
        for node in nodes
    ]
    if not any(fitting):
        raise UserError(
            f"suite {spec.suite.name}: one trial asks for {wanted.cpus} CPUs and {gpus} GPUs, "
            "more than any node of the Ray cluster has; lower them with --set resources.cpus=…"
        )
    per_device = max(int(1 / gpus), 1) if gpus else max(fitting)
    return sum(fitting), Slot(bool(gpus), min(per_device, trials))


def _no_gpu(spec: TrialSpec, where: str) -> str:
    return (
        f"suite {spec.suite.name}: resources.gpus asks for {spec.suite.resources.gpus} and "
        f"{where} has none; run on the CPU with --set resources.gpus=0"
    )


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    # Without "local" Ray would join whatever was last started on this machine, alive or not.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _knock(address)
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"no Ray cluster answers at {address} ({error}); check --address, RAY_ADDRESS and, "
            "where the cluster asks for one, the token (RAY_AUTH_TOKEN)"
        ) from None


def _knock(address: str) -> None:
    """Raise OSError at once where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
