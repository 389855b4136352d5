"""A trial of several workers under Ray Train: they run it, this process watches what they store."""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from harness import parallel
from harness.config import TrialSpec
from harness.records import EpochRecord
from harness.rows import Failure, Slot
from harness.storage import Store
from harness.trial import Event, Started, lost, supervised

MAX_RETRIES = 3
POLL = 0.5  # seconds


def workers_of(spec: TrialSpec, root: str, slot: Slot) -> Iterator[Event]:
    """The trial's events, as `supervised` gives them. Dead workers are started again: the trial
    goes on from its checkpoint. A Python exception is a failure, and is not tried again.
    """
    store = Store(root, spec.suite.name)
    yield Started()
    told = 0
    for _ in range(MAX_RETRIES + 1):
        before = _row(store, spec)
        with ThreadPoolExecutor(1) as pool:
            fit = pool.submit(_fit, spec, root, slot)
            ended = False
            while not ended:  # and once more after the end
                ended = bool(wait([fit], POLL).done)
                for record in store.epochs(spec.key)[told:]:
                    told += 1
                    yield EpochRecord.of(record)
        row = _row(store, spec)
        if row.get("state") == "done":
            return
        if row.get("state") == "failed" and row["updated"] != before.get("updated"):
            yield Failure(row["reason"], row["traceback"])
            return
    reason = f"its workers died {MAX_RETRIES + 1} times ({_last_line(fit.exception())})"
    yield lost(spec, root, slot, reason)


def _row(store: Store, spec: TrialSpec) -> dict[str, Any]:
    return store.trial(spec.key) or {}


def _fit(spec: TrialSpec, root: str, slot: Slot) -> None:
    """Start the workers and wait for them; raises where one of them dies or raises."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = spec.suite.resources
    each = {"CPU": resources.cpus} | ({"GPU": resources.gpus_each} if slot.gpu else {})
    folder = Store(root, spec.suite.name).folder / ".train"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": spec, "root": root, "slot": slot},
        torch_config=TorchConfig(backend=parallel.backend(slot.gpu)),
        scaling_config=ScalingConfig(
            num_workers=resources.world_size, use_gpu=slot.gpu, resources_per_worker=each
        ),
        run_config=RunConfig(name=spec.key, storage_path=str(folder)),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(folder / spec.key, ignore_errors=True)


def _worker(config: dict[str, Any]) -> None:
    for _ in supervised(config["spec"], config["root"], config["slot"]):
        pass


def _last_line(error: BaseException | None) -> str:
    lines = str(error or "").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "they ended before the trial"
