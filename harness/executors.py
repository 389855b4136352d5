"""Run trials: `inline` in this process one after the other, `ray` as one task each."""

import os
import socket
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from harness import parallel
from harness.config import Resources, TrialSpec
from harness.errors import UserError
from harness.records import EpochRecord
from harness.rows import Failure, Slot
from harness.storage import Store
from harness.together import MAX_RETRIES, workers_of
from harness.trial import Broken, Event, lost, supervised
from harness.tuning import check_precision

Events = Generator[tuple[TrialSpec, Event | None]]


class Executor(Protocol):
    """Runs trials and says what happens to each; `None` ends a trial."""

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """Events of all trials, interleaved as they happen."""
        ...


class Inline:
    """One trial after the other, in this process, and in the others that torchrun has started."""

    def run(self, specs: Sequence[TrialSpec], root: str) -> Events:
        """Events in the order of the trials."""
        for spec in specs:
            slot = _slot_here(spec)
            try:
                for event in supervised(spec, root, slot):
                    yield spec, event
            except Broken as error:  # the other processes wait for this one: end them all
                yield spec, Failure(str(error), "")
                raise SystemExit(1) from error
            yield spec, None


def _slot_here(spec: TrialSpec) -> Slot:
    import torch

    wanted = spec.suite.resources
    gpu = torch.cuda.is_available() and wanted.gpus != 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if parallel.workers() > 1 else 1
    if wanted.gpus not in ("auto", 0) and not gpu:
        raise UserError(_no_gpu(spec, "this machine"))
    if gpu and here > torch.cuda.device_count():
        raise UserError(
            f"{here} workers on this machine need a GPU each, and it has "
            f"{torch.cuda.device_count()}; start fewer, or run on the CPU with "
            "--set resources.gpus=0"
        )
    if wanted.world_size != parallel.workers():
        raise UserError(
            f"suite {spec.suite.name}: one process can't be {wanted.world_size} workers; leave "
            "--executor inline out, or start them with "
            f"torchrun --nproc-per-node {wanted.world_size} -m harness run …"
        )
    check_precision(spec.suite.recipe.precision, parallel.device(gpu))
    return Slot(gpu, 1)


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

        running: dict[Any, _Task] = {}
        waiting = waiting[::-1]
        if waiting:
            _check_device(waiting[-1], _slots(waiting[-1], len(waiting))[1])
        while waiting or running:
            while waiting:
                spec = waiting[-1]
                slots, slot = _slots(spec, len(waiting) + len(running))
                together = spec.suite.resources.world_size > 1
                if len(running) >= slots * (1 if together else 2):
                    break
                # With max_calls the process ends with its trial, and gives its memory back.
                task = ray.remote(max_calls=1)(workers_of if together else supervised)
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
    """Of a trial's task; one of several workers only watches over them."""
    alone = resources.world_size == 1
    return {
        "num_cpus": resources.cpus if alone else 0,
        "num_gpus": resources.gpus_each if slot.gpu and alone else 0,
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
    gpus = wanted.gpus_each if any_gpu or wanted.gpus != "auto" else 0
    if gpus and not any_gpu:
        raise UserError(_no_gpu(spec, "the Ray cluster"))
    fitting = [
        int(min(node.get("CPU", 0) / wanted.cpus, node.get("GPU", 0) / gpus if gpus else 1e9))
        for node in nodes
    ]
    world = wanted.world_size
    if sum(fitting) < world:
        each = f"{world} workers with {wanted.cpus} CPUs and {gpus:g} GPUs each"
        alone = f"{wanted.cpus} CPUs and {gpus:g} GPUs, more than any node of"
        total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
        raise UserError(
            f"suite {spec.suite.name}: one trial asks for "
            + (alone if world == 1 else f"{each}, more than there are in")
            + f" the Ray cluster, with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs in all; "
            "lower them with --set resources.cpus=… or resources.gpus=…"
        )
    per_device = max(int(1 / gpus), 1) if gpus else max(max(fitting) // world, 1)
    return sum(fitting) // world, Slot(bool(gpus), min(per_device, trials))


def _check_device(spec: TrialSpec, slot: Slot) -> None:
    """Raises UserError where the cluster's GPU lacks the suite's precision."""
    import ray

    if not slot.gpu:
        return
    precision, gpus = spec.suite.recipe.precision, spec.suite.resources.gpus_each
    try:
        ray.get(ray.remote(max_calls=1)(_look).options(num_cpus=0, num_gpus=gpus).remote(precision))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None


def _look(precision: str) -> None:
    check_precision(precision, parallel.device(gpu=True))


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
