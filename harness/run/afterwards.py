"""After the trials: what is measured of them alone on the device that they ran on."""

import io
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any, ClassVar, Protocol

import pyarrow.parquet as pq
import torch

from harness import parallel
from harness.errors import UserError, one_line
from harness.run import ray_cluster
from harness.run.attempt import undisturbed
from harness.storage.locations import StorageError
from harness.storage.provenance import Slot, alone, code, hardware, provenance
from harness.storage.schema import identified
from harness.storage.store import Store
from harness.suite.config import TrialSpec, digest
from harness.train.neighbours import Neighbours

Row = Mapping[str, Any]
Pairs = Sequence[tuple[TrialSpec, Row]]
Shown = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Told:
    """A line on what became of some trials, by their keys; `well`: whether it was measured, and
    nothing else used the device meanwhile.
    """

    text: str
    trials: tuple[str, ...]
    well: bool = True


class Work(Protocol):
    """What is measured: `done` says it of trials ("replayed")."""

    done: ClassVar[str]

    def within(self, trials: int) -> float:
        """About how many seconds it takes for so many trials of a group."""
        ...

    def lacking(self, trials: Sequence[TrialSpec], store: Store) -> Pairs:
        """The trials that are finished, and lack it, with their rows of `trials`."""
        ...

    def never(self, spec: TrialSpec) -> str | None:
        """Why it can be measured of such a trial nowhere."""
        ...

    def measure(self, pairs: Pairs, root: str, shown: Shown) -> Iterator[Told]:
        """Measure and store it, of trials of one group, which ran on a machine of this kind.

        Nothing is raised for what can't be measured: it is told.
        """
        ...

    def count(self, pairs: Pairs, root: str, shown: Shown) -> Iterator[Told]:
        """Store what needs no machine, of trials that ran on one of another kind."""
        ...


def here(work: Work, trials: Sequence[TrialSpec], root: str, shown: Shown) -> Iterator[Told]:
    """Do the work for `trials`, of one group, in this process; tell what can't be done here."""
    told = []
    for one in chain(measured(work, trials, root, shown), elsewhere(work, trials, root, shown)):
        told.append(one)
        yield one
    yield from refused(work, trials, root, told, [this_machine(gpu=True)])


def on_cluster(
    work: Work, address: str | None, trials: Sequence[TrialSpec], root: str, shown: Shown
) -> Iterator[Told]:
    """Do it on a Ray cluster, node after node: each, which the work has for itself, takes the
    trials of one group that ran on its kind of machine.
    """
    told: list[Told] = []
    machines: dict[str, None] = {}
    busy_nodes = False
    store = Store(root, trials[0].suite.name)
    if not work.lacking(trials, store):
        return
    with ray_cluster.connected(address) as head:
        for node in [n for n in head.nodes if n["Alive"] and n["Resources"].get("CPU")]:
            known = {key for one in told for key in one.trials}
            left = [spec for spec, _ in work.lacking(trials, store) if spec.key not in known]
            if not left:
                break
            name = node["NodeManagerHostname"]
            shown(f"measuring on {name}")
            seconds = work.within(len(left))
            found = ray_cluster.alone_on(node, seconds, _on_this_node, work, left, root)
            if isinstance(found, str):
                yield Told(f"nothing {work.done} on {name}: {found}", (), well=False)
                busy_nodes = True
                continue
            kinds, lines = found
            machines |= dict.fromkeys(kinds)
            told += lines
            yield from lines
    if machines and not busy_nodes:
        for one in elsewhere(work, trials, root, shown, machines):
            told.append(one)
            yield one
    yield from refused(work, trials, root, told, list(machines) or ["no node that was free"])


def _on_this_node(
    work: Work, trials: Sequence[TrialSpec], root: str
) -> tuple[list[str], list[Told]]:
    """The kinds of machine that this is, by its GPU and by its CPU, and what was done on it."""
    kinds = [this_machine(gpu=True), this_machine(gpu=False)]
    return kinds, list(measured(work, trials, root))


def measured(
    work: Work, trials: Sequence[TrialSpec], root: str, shown: Shown = lambda text: None
) -> Iterator[Told]:
    """Do the work for those of `trials` that lack it and ran on a machine of this kind.

    `shown`: is told what is going on.
    """
    pairs = [pair for pair in _open(work, trials, root) if _ran_here(pair[1])]
    if pairs:
        yield from work.measure(pairs, root, shown)


def elsewhere(
    work: Work,
    trials: Sequence[TrialSpec],
    root: str,
    shown: Shown,
    machines: Container[str] = (),
) -> Iterator[Told]:
    """Do what can be done of it for those that ran neither on this kind of machine nor on one of
    `machines`.
    """
    pairs = [
        pair
        for pair in _open(work, trials, root)
        if not _ran_here(pair[1]) and _ran_on(pair[1]) not in machines
    ]
    if pairs:
        yield from work.count(pairs, root, shown)


def _open(work: Work, trials: Sequence[TrialSpec], root: str) -> Pairs:
    """Those that lack it, and may have it."""
    found = work.lacking(trials, Store(root, trials[0].suite.name))
    return [pair for pair in found if work.never(pair[0]) is None]


def _ran_here(row: Row) -> bool:
    return _ran_on(row) == this_machine(row["device"] == "cuda")


def refused(
    work: Work,
    trials: Sequence[TrialSpec],
    root: str,
    told: Sequence[Told],
    machines: Sequence[str],
) -> Iterator[Told]:
    """Why the others of `trials` that lack it go without: a line for each reason.

    `told`: what became of some; `machines`: the kinds that were at hand.
    """
    known = {key for one in told for key in one.trials}
    reasons: dict[str, list[TrialSpec]] = {}
    for spec, row in work.lacking(trials, Store(root, trials[0].suite.name)):
        if spec.key not in known:
            elsewhere = f"trained on {_ran_on(row)}, and here is {', '.join(machines)}"
            reasons.setdefault(work.never(spec) or elsewhere, []).append(spec)
    for reason, specs in reasons.items():
        methods = ", ".join(dict.fromkeys(spec.method for spec in specs))
        keys = tuple(spec.key for spec in specs)
        yield Told(f"not {work.done}: {methods} ({counted(keys)}): {reason}", keys, well=False)


def finished(
    trials: Sequence[TrialSpec], store: Store, table: str | None
) -> list[tuple[TrialSpec, Row]]:
    """The trials, with their rows, that are done and have no row in `table` that was measured alone
    on its device; None: whatever they have.
    """
    keys = {trial.key for trial in trials}
    rows = {row["trial"]: row for row in store.read("trials", only=keys).to_pylist()}
    there = set()
    if table is not None:  # of what was only counted, not measured, these columns are null
        known = store.read(table, ["trial", "trials_on_device", "other_load"], only=keys)
        there = {r["trial"] for r in known.to_pylist() if r["trials_on_device"] and was_alone(r)}
    return [
        (trial, rows[trial.key])
        for trial in trials
        if trial.key in rows and rows[trial.key]["state"] == "done" and trial.key not in there
    ]


def was_alone(row: Row) -> bool:
    """Whether nothing else used the device meanwhile."""
    return alone(row["trials_on_device"], row["other_load"])


def reason_of(error: Exception) -> str:
    """In a line, with its kind where neqbench did not raise it."""
    known = isinstance(error, (UserError, StorageError, ImportError))
    return one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"


def busy(seen: Row) -> str:
    """What else used the device, where something did."""
    if seen["trials_on_device"] > 1:
        return f"{seen['trials_on_device']} trials were on the device"
    return f"other processes used the device (load {seen['other_load']:.1f})"


@dataclass(slots=True)
class Watch:
    """Looks who else is on the `device` while something is measured."""

    device: torch.device
    _gpu: bool
    _others: Neighbours
    _most: int = 1

    def look(self) -> None:
        """Now and then."""
        self._most = max(self._most, self._others.trials())

    def seen(self) -> dict[str, Any]:
        """Columns of what was measured; was_alone(…) tells whether it is worth anything."""
        self.look()
        load = self._others.load()
        return {"trials_on_device": self._most, "other_load": load, "device": hardware(self._gpu)}


@contextmanager
def watched(spec: TrialSpec, row: Row) -> Iterator[Watch]:
    """Inside, something is measured as the trial was trained: with its threads, on its device."""
    gpu = row["device"] == "cuda"
    device = parallel.device(gpu)
    others = Neighbours(device, digest({"afterwards": spec.key, "process": os.getpid()}))
    with undisturbed(spec.suite, Slot(gpu, 1)), others.registered():
        torch.set_num_threads(row["threads"])
        others.begin()
        yield Watch(device, gpu, others)


def keep(store: Store, table: str, spec: TrialSpec, found: Any, seen: Row) -> None:
    """Store what was `found`, a dataclass with a table's other columns, in the trial's file."""
    row = asdict(found) | dict(seen) | {"code": code(), "updated": datetime.now(UTC)}
    buffer = io.BytesIO()
    pq.write_table(identified(spec, [row], table), buffer)
    store.location.write(f"{table}/{spec.key}.parquet", buffer.getvalue())


def by_method(pairs: Pairs) -> dict[str, list[tuple[TrialSpec, Row]]]:
    """The pairs of each method."""
    found: dict[str, list[tuple[TrialSpec, Row]]] = {}
    for spec, row in pairs:
        found.setdefault(spec.method, []).append((spec, row))
    return found


def this_machine(gpu: bool) -> str:
    """The kind of machine that this is, as rows of `trials` name it."""
    if gpu and not torch.cuda.is_available():
        gpu = False
    return str(provenance(gpu)["gpu" if gpu else "cpu"])


def _ran_on(row: Row) -> str:
    return str(row["gpu"] if row["device"] == "cuda" else row["cpu"])


def counted(trials: Sequence[Any]) -> str:
    """How many trials: "5 trials"."""
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}"
