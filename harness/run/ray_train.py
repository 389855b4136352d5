"""A trial of several workers under Ray Train: they run it, this process watches what they store."""

import os
import re
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from typing import Any

from harness import parallel
from harness.run import ray_cluster
from harness.run.attempt import attempt_under_lease, ended_meanwhile, record_death
from harness.run.events import Event, Halted, Held, Started, went_on
from harness.storage import leases
from harness.storage.leases import Claim, Lease, LeaseLost
from harness.storage.locations import StorageError
from harness.storage.provenance import Slot
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite.config import TrialSpec

POLL = 0.5  # seconds


def run_with_workers(spec: TrialSpec, root: str, slot: Slot, claim: Claim) -> Iterator[Event]:
    """Run a trial with several workers: its events, as `attempt` gives them.

    Dead workers are started again, and the trial goes on from its checkpoint. A Python exception in
    a worker is a failure, and is not tried again.
    """
    yield Started()
    told = deaths = 0
    try:
        while True:
            known = told
            told, died = yield from _attempt(spec, root, slot, claim, told)
            if died is None:
                return
            deaths = 1 if told > known else deaths + 1
            if deaths > ray_cluster.MAX_RETRIES:
                break
    except LeaseLost:
        yield Held()
    except StorageError as error:
        yield Halted(str(error))
    else:
        reason = f"its workers died {deaths} times ({died})"
        yield record_death(spec, root, slot, reason, claim.owner)


def _attempt(
    spec: TrialSpec, root: str, slot: Slot, claim: Claim, told: int
) -> Generator[Event, None, tuple[int, str | None]]:
    """What the workers store, as they store it, from epoch `told` on.

    Returns how many epochs are told then, and why the workers died; None where the trial has ended.
    Every attempt has a lease of its own: a worker that was thought dead can't spoil the next.
    """
    store = Store(root, spec.suite.name)
    lease = Lease.acquire(store.location, spec.key, claim)
    if lease is None:
        raise LeaseLost
    with lease, ThreadPoolExecutor(1) as pool:
        found = ended_meanwhile(store, spec.key, claim)
        if found:
            yield found
            return told, None
        damaged: list[str] = []
        store.load_checkpoint(spec.key, damaged.append)
        yield from map(went_on, damaged)
        before = _row(store, spec)
        fit = pool.submit(_fit, spec, root, slot, lease.number)
        while True:  # and once more after the end
            ended = bool(wait([fit], POLL).done)
            with nullcontext() if ended else suppress(StorageError):  # it comes back, or fails
                for record in store.epochs(spec.key)[told:]:
                    told += 1
                    yield EpochRecord.of(record)
            if ended:
                break
        leases.check_owned(store.location, spec.key, lease.number)
        row = _row(store, spec)
    if row.get("state") == "done":
        return told, None
    if row.get("state") == "failed" and row["updated"] != before.get("updated"):
        yield Failure(row["reason"], row["traceback"])
        return told, None
    unstored = re.search(r"\bUnstored: (.*)", str(fit.exception()))
    if unstored:
        raise StorageError(unstored[1])
    return told, _last_line(fit.exception())


def _row(store: Store, spec: TrialSpec) -> dict[str, Any]:
    return store.trial(spec.key) or {}


def _fit(spec: TrialSpec, root: str, slot: Slot, lease: int) -> None:
    """Start the workers and wait for them; raises where one of them dies or raises."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = spec.suite.resources
    each = {"CPU": resources.cpus} | ({"GPU": resources.gpus_each} if slot.gpu else {})
    location = Store(root, spec.suite.name).location
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": spec, "root": root, "slot": slot, "lease": lease},
        torch_config=TorchConfig(backend=parallel.backend(slot.gpu)),
        scaling_config=ScalingConfig(
            num_workers=resources.world_size, use_gpu=slot.gpu, resources_per_worker=each
        ),
        run_config=RunConfig(name=spec.key, storage_path=location.path(".train")),
    )
    try:
        trainer.fit()
    finally:
        location.remove(f".train/{spec.key}")


def _worker(config: dict[str, Any]) -> None:
    for _ in attempt_under_lease(**config):
        pass


def _last_line(error: BaseException | None) -> str:
    lines = str(error or "").strip().splitlines()
    return lines[-1].strip()[:200] if lines else "they ended before the trial"
