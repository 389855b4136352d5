"""The rows of one trial: collected epoch by epoch, kept in its checkpoint, published as parquet."""

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

import neq
from harness.storage.checkpoint import pack_table, table_in
from harness.storage.owner import Owner
from harness.storage.provenance import Slot, provenance
from harness.storage.schema import QUANTILES, SCHEMAS, EpochRecord, Failure, identified
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
        self._layers = SCHEMAS["layers"].empty_table()
        self._provenance = provenance(slot.gpu)
        self._hardware: dict[str, list[str | None]] = {
            name: [self._provenance[name]] if here else [] for name in HARDWARE
        }
        self._sharing = slot.sharing
        earlier = owner.store.trial(spec.key)
        self._attempts = earlier["attempts"] + 1 if earlier else 1
        self._started = earlier["started"] if earlier else datetime.now(UTC)

    @property
    def complete(self) -> bool:
        """Whether all epochs of the recipe are there."""
        return len(self.epochs) == self._spec.suite.recipe.epochs

    def add(
        self,
        record: EpochRecord,
        frozen: Tensor,
        flops: Mapping[str, Mapping[str, int]],
        freezer: neq.NeuronFreezer,
    ) -> None:
        """Add one epoch and the rows of its layers.

        `frozen`: bool [neurons], in force during the epoch; the freezer's reading was taken after
        it. `flops`: FLOPs columns of each layer that is called; they are null for the others.
        """
        self.epochs.append(record)
        rows = [
            {
                "epoch": record.epoch,
                "layer": name,
                "neurons": part.stop - part.start,
                "frozen": int(frozen[part].sum()),
                **flops.get(name, {}),
                "phi_quantiles": _quantiles(freezer.reading.phi[part]),
                "delta_phi_quantiles": _quantiles(freezer.reading.delta_phi[part]),
                "velocity_quantiles": _quantiles(freezer.reading.velocity[part]),
            }
            for name, part in freezer.neurons.items()
        ]
        self._layers = pa.concat_tables([self._layers, identified(self._spec, rows, "layers")])

    def committed(self, seconds: float) -> EpochRecord:
        """Publish and return the last epoch, whose commit took `seconds`."""
        self.epochs[-1] = replace(self.epochs[-1], seconds_checkpoint=seconds)
        self.publish()
        return self.epochs[-1]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps as `state["rows"]`: tensors and plain values."""
        tables = {"epochs": self._epochs_table(), "layers": self._layers}
        ran_on = {"hardware": self._hardware, "sharing": self._sharing}
        packed = {kind: pack_table(table) for kind, table in tables.items()}
        return packed | ran_on | {"threads": self.threads}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on after the rows of a checkpoint's `state`."""
        rows = state["rows"]
        epochs, self._layers = table_in(rows, "epochs"), table_in(rows, "layers")
        self.epochs = [EpochRecord.of(row) for row in epochs.to_pylist()]
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
            self._owner.write_table("layers", self._layers)
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
            "parameters": self._spec.method_spec.model_dump_json(),
            "data": self._spec.data_name,
            "data_fingerprint": self._spec.fingerprint,
            "attempts": self._attempts,
            "trials_on_device": self._sharing,
            "threads": self.threads,
            "device": self._slot.device,
            **self._provenance,
            **{name: _joined(values) for name, values in self._hardware.items()},
            "started": self._started,
            "updated": datetime.now(UTC),
        }


def _joined(values: list[str | None]) -> str | None:
    return "; ".join(value for value in values if value) or None


def _quantiles(values: Tensor) -> list[float] | None:
    """At schema.QUANTILES, of the values that are defined; None where none is."""
    defined = values[~values.isnan()]
    if not len(defined):
        return None
    at = torch.tensor(QUANTILES, dtype=defined.dtype)
    return [float(q) for q in torch.quantile(defined, at)]
