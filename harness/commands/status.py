"""`neqbench status`: what became of every trial, read from the results alone."""

import time
from collections import Counter
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.storage import leases
from harness.storage.leases import Beat
from harness.storage.locations import StorageError
from harness.storage.requests import read_requests
from harness.storage.store import NothingError, Store
from harness.suite.sweep import point_label

STATES = ("done", "running", "to do", "interrupted", "failed")
REFRESH = 2.0  # seconds
LISTED = 30  # trials of a group, at the most
COLUMNS = ["trial", "group", "method", "seed", "state", "epochs", "epochs_done", "reason"]


@dataclass(frozen=True, slots=True)
class TrialStatus:
    """What became of a trial; `state`: one of STATES ("interrupted": the same command goes on).

    `heartbeat_age`: seconds since its owner last said that it is alive, by the clocks of both.
    """

    trial: str
    method: str
    seed: int
    state: str
    epochs_done: int
    epochs: int | None = None
    heartbeat_age: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """The trials of one group; `point`: which point of a sweep it is, as a user reads it."""

    suite: str
    group: str
    point: str
    trials: list[TrialStatus]

    @property
    def counts(self) -> dict[str, int]:
        """How many trials are in each state."""
        return {state: Counter(t.state for t in self.trials)[state] for state in STATES}

    @property
    def open(self) -> bool:
        """Whether a run may still change something."""
        return any(self.counts[state] for state in ("running", "to do", "interrupted"))


class Reader:
    """Reads the results that `find` finds, again and again; what is done is read once."""

    def __init__(self, find: Callable[[], list[Store]]) -> None:
        self._find = find
        self._done: dict[str, dict[str, dict[str, Any]]] = {}  # by results folder and trial

    def read(self) -> list[GroupStatus]:
        """The status of every group; raises UserError for damaged files."""
        return [status for store in self._find() for status in self._suite(store)]

    def _suite(self, store: Store) -> list[GroupStatus]:
        done = self._done.setdefault(store.location.uri, {})
        rows = store.read("trials", COLUMNS, but=done).to_pylist()
        done |= {row["trial"]: row for row in rows if row["state"] == "done"}
        known = done | {row["trial"]: row for row in rows}
        groups: dict[str, dict[str, TrialStatus]] = {}
        beats = _beats(store, done)
        points: dict[str, str] = {}
        for request in read_requests(store.location):
            points[request.group] = point_label(request.point) or points.get(request.group, "")
            trials = groups.setdefault(request.group, {})
            for key, method, seed in request.trials:
                if key not in known:
                    row = {"trial": key, "method": method, "seed": seed}
                    trials[key] = _status(row, beats.get(key))
        for key, row in known.items():
            beat = None if row["state"] == "done" else beats.get(key)
            groups.setdefault(row["group"], {})[key] = _status(row, beat)
        return [
            GroupStatus(store.name, group, points.get(group, ""), list(trials.values()))
            for group, trials in groups.items()
        ]


def _beats(store: Store, done: Container[str]) -> dict[str, Beat | None]:
    keys = [key for key in store.location.names("leases") if key not in done]
    with ThreadPoolExecutor(store.location.readers) as pool:
        found = pool.map(lambda key: leases.latest(store.location, key), keys)
        return dict(zip(keys, found, strict=True))


def _status(row: dict[str, Any], beat: Beat | None) -> TrialStatus:
    alive = beat and beat.owner and not beat.released and not beat.dead
    age = max(time.time() - beat.at, 0.0) if beat and alive else None
    state = row.get("state") or "to do"
    if age is not None and age < leases.STALE:
        state = "running"  # a failed one, too, is tried again
    elif state == "running":
        state = "interrupted"
    return TrialStatus(
        trial=row["trial"],
        method=row["method"],
        seed=row["seed"],
        state=state,
        epochs_done=row.get("epochs_done") or 0,
        epochs=row.get("epochs"),
        heartbeat_age=age,
        reason=row.get("reason") if state == "failed" else None,
    )


def to_json(found: list[GroupStatus]) -> dict[str, Any]:
    """The documented JSON: {"groups": [{suite, group, point, counts, trials}]}."""
    return {"groups": [asdict(status) | {"counts": status.counts} for status in found]}


def print_status(found: list[GroupStatus], console: Console) -> None:
    """Print counts, and every trial that is neither done nor to do."""
    console.print(_view(found))


def watch(find: Callable[[], list[Store]], console: Console) -> None:
    """Print the status again and again, until no trial is left that may change.

    Where there are no results yet it waits for them.
    """
    reader = Reader(find)
    with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
        while True:
            try:
                found = reader.read()
            except (NothingError, StorageError) as error:
                live.update(Text(f"waiting: {error}"), refresh=True)
            else:
                live.update(_view(found), refresh=True)
                if found and not any(status.open for status in found):
                    return
            time.sleep(REFRESH)


def _view(found: list[GroupStatus]) -> RenderableType:
    parts: list[RenderableType] = []
    for status in found:
        counts = ", ".join(f"{n} {state}" for state, n in status.counts.items() if n)
        named = " · ".join(filter(None, [status.suite, status.point, f"group {status.group}"]))
        parts.append(Text(f"{named}: {counts}", style="bold"))
        listed = [t for t in status.trials if t.state not in ("done", "to do")]
        if listed:
            parts.append(_table(listed[:LISTED]))
        if len(listed) > LISTED:
            parts.append(Text(f"and {len(listed) - LISTED} more (--format json has all of them)"))
        parts += [
            Text(f"failed: {t.method} seed {t.seed}: {t.reason}", style="red")
            for t in listed[:LISTED]
            if t.reason
        ]
    return Group(*parts or [Text("no trial has been started yet")])


def _table(trials: list[TrialStatus]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("trial", "method", "seed", "state", "epochs", "heard"):
        table.add_column(title)
    for t in trials:
        heard = "" if t.heartbeat_age is None else f"{t.heartbeat_age:.0f} s ago"
        epochs = f"{t.epochs_done}/{t.epochs or '?'}"
        table.add_row(t.trial, t.method, str(t.seed), t.state, epochs, heard)
    return table
