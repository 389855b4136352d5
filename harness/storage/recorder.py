"""The rows of one trial: collected epoch by epoch, kept in its checkpoint, published as parquet."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from harness.storage.checkpoint import pack_table, table_in
from harness.storage.owner import Owner
from harness.storage.provenance import Slot, is_commit, provenance
from harness.storage.schema import SCHEMAS, EpochRecord, Failure, identified
from harness.suite.config import TrialSpec

HARDWARE = ("cpu", "gpu", "driver")


class Recorder:
    """Collects the rows of the trial `spec` and publishes them through its `owner`.

    `slot`: what this attempt runs on. `here`: whether this process is the one that computes; a
    driver that only records why a worker died is not. `epochs`: the records so far. `threads` is
    decided by the first attempt and kept by every later one; what else attempts ran on is
    collected.
    """

    def __init__(self, spec: TrialSpec, owner: Owner, slot: Slot, *, here: bool = True) -> None:
        self.epochs: list[EpochRecord] = []
        self.threads = spec.suite.resources.cpus
        self._spec, self._owner, self._slot = spec, owner, slot
        self._tables = {kind: SCHEMAS[kind].empty_table() for kind in ("layers", "measures")}
        self._provenance = provenance(slot.gpu)
        self._hardware: dict[str, list[str | None]] = {
            name: [self._provenance[name]] if here else [] for name in HARDWARE
        }
        self._sharing = slot.sharing
        self._earlier = owner.store.trial(spec.key) or {}
        self._attempts = self._earlier.get("attempts", 0) + 1
        self._started = self._earlier.get("started") or datetime.now(UTC)

    @property
    def complete(self) -> bool:
        """Whether all epochs of the recipe are there."""
        return len(self.epochs) == self._spec.suite.recipe.epochs

    def add(
        self, record: EpochRecord, layers: list[dict[str, Any]], measures: list[dict[str, Any]]
    ) -> None:
        """Add one epoch, with the rows of `layers` and `measures` that belong to it."""
        self.epochs.append(record)
        for kind, rows in (("layers", layers), ("measures", measures)):
            new = identified(self._spec, [{"epoch": record.epoch} | row for row in rows], kind)
            self._tables[kind] = pa.concat_tables([self._tables[kind], new])

    def sharing(self, trials: int) -> None:
        """So many trials were seen on the device."""
        self._sharing = max(self._sharing, trials)

    def committed(self, seconds: float) -> EpochRecord:
        """Publish and return the last epoch, whose commit took `seconds`."""
        self.epochs[-1] = replace(self.epochs[-1], seconds_checkpoint=seconds)
        self.publish()
        return self.epochs[-1]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as `state["rows"]`: tensors and plain values."""
        tables = {"epochs": self._epochs_table(), **self._tables}
        ran_on = {"hardware": self._hardware, "sharing": self._sharing}
        packed = {kind: pack_table(table) for kind, table in tables.items()}
        return packed | ran_on | {"threads": self.threads}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on after the rows of a checkpoint's `state`."""
        rows = state["rows"]
        self.epochs = [EpochRecord.of(row) for row in table_in(rows, "epochs").to_pylist()]
        for kind in self._tables:
            if kind in rows:  # measures came with schema version 3
                self._tables[kind] = table_in(rows, kind)
        self.threads = rows["threads"]
        if self.complete:  # this attempt has nothing left to compute
            self._sharing, self._hardware = rows["sharing"], rows["hardware"]
            return
        self._sharing = max(self._sharing, rows["sharing"])
        for name, earlier in rows["hardware"].items():
            now = self._hardware[name]
            self._hardware[name] = earlier + [value for value in now if value not in earlier]

    def publish(self, failure: Failure | None = None) -> None:
        """Rewrite the trial's parquet files; with `failure`, as those of a trial that failed."""
        if self.epochs:
            for kind, table in self._tables.items():
                if len(table):
                    self._owner.write_table(kind, table)
            self._owner.write_table("epochs", self._epochs_table())
        row = self._trial_row(failure)
        self._owner.write_table("trials", identified(self._spec, [row], "trials"))

    def _epochs_table(self) -> pa.Table:
        return identified(self._spec, [record.row() for record in self.epochs], "epochs")

    def _trial_row(self, failure: Failure | None) -> dict[str, Any]:
        suite = self._spec.suite
        state = "failed" if failure else "done" if self.complete else "running"
        return {
            "state": state,
            "reason": failure.reason if failure else None,
            "traceback": failure.traceback if failure else None,
            "epochs": suite.recipe.epochs,
            "epochs_done": len(self.epochs),
            "metric": self._spec.metric,
            "title": suite.title,
            "experiment": json.dumps(suite.experiment()),
            "parameters": self._spec.parameters,
            "data": self._spec.data_name,
            "data_fingerprint": self._spec.fingerprint,
            "attempts": self._attempts,
            "trials_on_device": self._sharing,
            "threads": self.threads,
            "device": self._slot.device,
            **self._provenance,
            **self._code(),
            **{name: _joined(values) for name, values in self._hardware.items()},
            "measures": len(self._tables["measures"]),
            "started": self._started,
            "updated": datetime.now(UTC),
        }

    def _code(self) -> dict[str, Any]:
        """The commits that computed the epochs; of epochs that don't say so, what was known."""
        if not self.epochs:
            return {}
        codes = [record.code for record in self.epochs]
        earlier = self._earlier
        if None in codes and earlier.get("git_sha"):  # they came with schema version 3
            mark = "+" if earlier["git_dirty"] else ""
            codes = [*(f"{sha}{mark}" for sha in earlier["git_sha"].split("; ")), *codes]
        known = list(dict.fromkeys(one for one in codes if one))
        dirty = any(one.endswith("+") for one in known)
        found = {
            "git_sha": _joined(list(dict.fromkeys(one.rstrip("+") for one in known))),
            "git_dirty": dirty if any(map(is_commit, known)) else None,
        }
        if earlier.get("epochs_done") == len(self.epochs):  # this attempt has computed nothing
            found["versions"] = earlier["versions"]
        return found


def _joined(values: list[str | None]) -> str | None:
    return "; ".join(value for value in values if value) or None
