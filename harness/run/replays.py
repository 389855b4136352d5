"""After the trials: what their masks cost, measured alone on the device that they ran on."""

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.parquet as pq
import torch

from harness import parallel
from harness.errors import UserError, one_line
from harness.run.attempt import undisturbed
from harness.storage.locations import StorageError
from harness.storage.masks import epoch_masks
from harness.storage.provenance import Slot, alone, code, hardware, provenance
from harness.storage.schema import identified
from harness.storage.store import Store
from harness.suite.config import TrialSpec, digest
from harness.train.neighbours import Neighbours
from harness.train.replay import Course, Place, Progress, Replayed, UnreplayableError, replay

Row = Mapping[str, Any]
Shown = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Told:
    """A line on what became of the replays of some trials, by their keys; `well`: whether they are
    there, and nothing else used the device meanwhile.
    """

    text: str
    trials: tuple[str, ...]
    well: bool = True


def replay_here(
    trials: Sequence[TrialSpec], root: str, seconds: float, shown: Shown
) -> Iterator[Told]:
    """Replay what is finished of `trials` in this process, and tell what can't be replayed here."""
    told = []
    for one in replays(trials, root, seconds, shown):
        told.append(one)
        yield one
    yield from refused(trials, root, told, [this_machine(gpu=True)])


def replays(
    trials: Sequence[TrialSpec], root: str, seconds: float, shown: Shown = lambda text: None
) -> Iterator[Told]:
    """Replay those of `trials`, of one group, that are finished, not replayed yet, and ran on a
    machine of this kind.

    It takes about so many seconds; what was measured is stored below `root`, method by method.
    `shown`: is told what is going on. Nothing is raised for what can't be replayed: it is told.
    """
    store = Store(root, trials[0].suite.name)
    by_method: dict[str, list[tuple[TrialSpec, Row]]] = {}
    for spec, row in lacking(trials, store):
        if _never(spec) is None and _ran_on(row) == this_machine(row["device"] == "cuda"):
            by_method.setdefault(spec.method, []).append((spec, row))
    courses = {name: _courses(pairs, store) for name, pairs in by_method.items()}
    plans = {name: len({m for c in found for m in c.masks}) for name, found in courses.items()}
    for name, pairs in by_method.items():
        part = seconds * plans[name] / max(sum(plans.values()), 1)

        def progress(done: int, of: int, name: str = name) -> None:
            shown(f"replaying {name}: {done} of {of} pairs of steps")

        yield _replayed(pairs, courses[name], store, part, progress)


def refused(
    trials: Sequence[TrialSpec], root: str, told: Sequence[Told], machines: Sequence[str]
) -> Iterator[Told]:
    """Why the others of `trials` that lack a replay have none: a line for each reason.

    `told`: what became of some; `machines`: the kinds that were at hand.
    """
    known = {key for one in told for key in one.trials}
    reasons: dict[str, list[TrialSpec]] = {}
    for spec, row in lacking(trials, Store(root, trials[0].suite.name)):
        if spec.key not in known:
            elsewhere = f"trained on {_ran_on(row)}, and here is {', '.join(machines)}"
            reasons.setdefault(_never(spec) or elsewhere, []).append(spec)
    for reason, specs in reasons.items():
        methods = ", ".join(dict.fromkeys(spec.method for spec in specs))
        keys = tuple(spec.key for spec in specs)
        yield Told(f"not replayed: {methods} ({counted(keys)}): {reason}", keys, well=False)


def lacking(trials: Sequence[TrialSpec], store: Store) -> list[tuple[TrialSpec, Row]]:
    """The trials, with their rows, that are done, may have frozen something, and have no replay
    that was alone on its device.
    """
    keys = {trial.key for trial in trials if trial.method_spec.may_freeze}
    rows = {row["trial"]: row for row in store.read("trials", only=keys).to_pylist()}
    known = store.read("replays", ["trial", "trials_on_device", "other_load"], only=keys)
    there = {row["trial"] for row in known.to_pylist() if _alone(row)}
    return [
        (trial, rows[trial.key])
        for trial in trials
        if trial.key in rows and rows[trial.key]["state"] == "done" and trial.key not in there
    ]


def _alone(row: Row) -> bool:
    return alone(row["trials_on_device"], row["other_load"])


def _never(spec: TrialSpec) -> str | None:
    """Why such a trial is replayed nowhere."""
    if spec.suite.resources.world_size > 1:
        return "several workers trained it together, and a replay has one"
    if _plain(spec) is None:
        return "the suite has no baseline whose steps could stand beside its own"
    return None


def this_machine(gpu: bool) -> str:
    """The kind of machine that this is, as rows of `trials` name it."""
    if gpu and not torch.cuda.is_available():
        gpu = False
    return str(provenance(gpu)["gpu" if gpu else "cpu"])


def _ran_on(row: Row) -> str:
    return str(row["gpu"] if row["device"] == "cuda" else row["cpu"])


def _plain(spec: TrialSpec) -> TrialSpec | None:
    """The baseline's trial of the same seed."""
    plain = (name for name, method in spec.suite.methods.items() if method.is_baseline)
    name = next(plain, None)
    return None if name is None else spec.model_copy(update={"method": name})


def _courses(pairs: Sequence[tuple[TrialSpec, Row]], store: Store) -> list[Course]:
    keys = {spec.key for spec, _ in pairs}
    told = ["trial", "epoch", "layer", "neurons", "frozen", "mask"]
    layers = _by_trial(store.read("layers", told, only=keys))
    epochs = _by_trial(store.read("epochs", ["trial", "backward_flops_executed"], only=keys))
    return [
        Course(
            trial=spec.key,
            masks=epoch_masks(layers.get(spec.key, [])),
            executed=[row["backward_flops_executed"] for row in epochs.get(spec.key, [])],
        )
        for spec, _ in pairs
    ]


def _by_trial(table: Any) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in table.to_pylist():
        found.setdefault(row["trial"], []).append(row)
    return found


def _replayed(
    pairs: Sequence[tuple[TrialSpec, Row]],
    courses: Sequence[Course],
    store: Store,
    seconds: float,
    progress: Progress,
) -> Told:
    """Replay the trials of one method, and store what was found."""
    specs, row = [spec for spec, _ in pairs], pairs[0][1]
    first, gpu = specs[0], row["device"] == "cuda"
    plain = _plain(first)
    assert plain is not None
    device, name = parallel.device(gpu), first.method
    others = Neighbours(device, digest({"replay": first.key, "process": os.getpid()}))
    most = 1

    def looked(done: int, of: int) -> None:
        nonlocal most
        most = max(most, others.trials())
        progress(done, of)

    try:
        with undisturbed(first.suite, Slot(gpu, 1)), others.registered():
            torch.set_num_threads(row["threads"])
            others.begin()
            place = Place(device=device, location=store.location, tuning=_tuning(store, first))
            found = replay(first, plain, courses, place, seconds, looked)
            seen: dict[str, Any] = {"trials_on_device": most, "other_load": others.load()}
            seen["device"] = hardware(gpu)
        for spec, one in zip(specs, found, strict=True):
            _store(store, spec, one, seen)
    except Exception as error:  # a user's method may raise anything; the trials are done, and safe
        known = isinstance(error, (UnreplayableError, UserError, StorageError))
        why = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        text = f"not replayed: {name} ({counted(specs)}): {why}"
        return Told(text, tuple(spec.key for spec in specs), well=False)
    return _told(name, found, seen)


def _tuning(store: Store, trial: TrialSpec) -> Mapping[str, Any] | None:
    """That of the trial's checkpoint, if it is still there."""
    state = store.load_checkpoint(trial.key)
    return None if state is None else state["tuning"]


def _store(store: Store, spec: TrialSpec, replayed: Replayed, seen: Row) -> None:
    row = asdict(replayed) | dict(seen) | {"code": code(), "updated": datetime.now(UTC)}
    buffer = io.BytesIO()
    pq.write_table(identified(spec, [row], "replays"), buffer)
    store.location.write(f"replays/{spec.key}.parquet", buffer.getvalue())


def _told(name: str, found: Sequence[Replayed], seen: Row) -> Told:
    keys = tuple(one.trial for one in found)
    measured, of = (sum(getattr(one, n) for one in found) for n in ("plans_measured", "plans"))
    text = f"replayed {name}: {counted(keys)}, {measured} of their {of} masks measured"
    if _alone(seen):
        return Told(text, keys)
    busy = (
        f"{seen['trials_on_device']} trials were on the device"
        if seen["trials_on_device"] > 1
        else f"other processes used the device (load {seen['other_load']:.1f})"
    )
    return Told(f"{text}, while {busy}: no verdict; run it again", keys, well=False)


def counted(trials: Sequence[Any]) -> str:
    """How many trials: "5 trials"."""
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}"
