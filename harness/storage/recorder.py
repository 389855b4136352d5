"""The rows of one trial: collected, kept in its checkpoint, published as parquet."""

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

import neq
from harness.flops.costs import Backward
from harness.storage.provenance import provenance
from harness.storage.schema import QUANTILES, SCHEMAS, EpochRecord, from_bytes, identified, to_bytes
from harness.storage.store import Owner
from harness.suite.config import TrialSpec


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a trial could not be finished."""

    reason: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Slot:
    """What a trial runs on. `sharing`: how many trials use the same CPU or GPU at a time."""

    gpu: bool
    sharing: int

    @property
    def device(self) -> str:
        """Name of the torch device."""
        return "cuda" if self.gpu else "cpu"


class Rows:
    """Rows so far. `threads` is decided by the first attempt and kept by every later one; what
    else the attempts ran on is collected (`here`: this process is one).
    """

    def __init__(self, spec: TrialSpec, store: Owner, slot: Slot, *, here: bool = True) -> None:
        self.spec, self.slot = spec, slot
        self.epochs: list[EpochRecord] = []
        self.threads = spec.suite.resources.cpus
        self.store = store
        self._layers = SCHEMAS["layers"].empty_table()
        self._provenance = provenance(slot.gpu)
        self._hardware: dict[str, list[str | None]] = {
            name: [self._provenance[name]] if here else [] for name in ("cpu", "gpu", "driver")
        }
        self._sharing = slot.sharing
        earlier = store.trial(spec.key)
        self._attempts = earlier["attempts"] + 1 if earlier else 1
        self._started = earlier["started"] if earlier else datetime.now(UTC)

    @property
    def complete(self) -> bool:
        """Whether all epochs are there."""
        return len(self.epochs) == self.spec.suite.recipe.epochs

    def add(
        self,
        record: EpochRecord,
        frozen: Tensor,
        costs: dict[str, tuple[int, Backward]],
        freezer: neq.NeuronFreezer,
    ) -> None:
        """One epoch: `frozen` was in force during it, the freezer's reading was taken after it."""
        self.epochs.append(record)
        rows = [
            {
                "epoch": record.epoch,
                "layer": name,
                "neurons": part.stop - part.start,
                "frozen": int(frozen[part].sum()),
                **_layer_flops(costs.get(name)),
                "phi_quantiles": _quantiles(freezer.reading.phi[part]),
                "delta_phi_quantiles": _quantiles(freezer.reading.delta_phi[part]),
                "velocity_quantiles": _quantiles(freezer.reading.velocity[part]),
            }
            for name, part in freezer.neurons.items()
        ]
        self._layers = pa.concat_tables([self._layers, identified(self.spec, rows, "layers")])

    def committed(self, seconds: float) -> EpochRecord:
        """The last epoch is in a checkpoint, which took `seconds`: publish and return it."""
        self.epochs[-1] = replace(self.epochs[-1], seconds_checkpoint=seconds)
        self.publish()
        return self.epochs[-1]

    def state(self) -> dict[str, Any]:
        """For the checkpoint: loadable without unpickling anything but tensors and numbers."""
        tables = {"epochs": self._epochs_table(), "layers": self._layers}
        data = {name: bytearray(to_bytes(table)) for name, table in tables.items()}
        tensors = {name: torch.frombuffer(b, dtype=torch.uint8) for name, b in data.items()}
        ran_on = {"hardware": self._hardware, "sharing": self._sharing}
        return tensors | ran_on | {"threads": self.threads}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's rows."""
        tables = {name: from_bytes(state[name].numpy().tobytes()) for name in ("epochs", "layers")}
        self.epochs = [EpochRecord.of(row) for row in tables["epochs"].to_pylist()]
        self._layers = tables["layers"]
        self.threads = state["threads"]
        if self.complete:  # this attempt has nothing left to compute
            self._sharing, self._hardware = state["sharing"], state["hardware"]
            return
        self._sharing = max(self._sharing, state["sharing"])
        for name, earlier in state["hardware"].items():
            now = self._hardware[name]
            self._hardware[name] = earlier + [value for value in now if value not in earlier]

    def publish(self, failure: Failure | None = None) -> None:
        """Rewrite the trial's parquet files."""
        if self.epochs:
            self.store.write("layers", self.spec, self._layers)
            self.store.write("epochs", self.spec, self._epochs_table())
        row = self._trial_row(failure)
        self.store.write("trials", self.spec, identified(self.spec, [row], "trials"))

    def _epochs_table(self) -> pa.Table:
        return identified(self.spec, [record.row() for record in self.epochs], "epochs")

    def _trial_row(self, failure: Failure | None) -> dict[str, Any]:
        suite = self.spec.suite
        state = "failed" if failure else "done" if self.complete else "running"
        return {
            "state": state,
            "reason": failure.reason if failure else None,
            "traceback": failure.traceback if failure else None,
            "epochs": suite.recipe.epochs,
            "epochs_done": len(self.epochs),
            "metric": self.spec.metric,
            "title": suite.title,
            "experiment": json.dumps(suite.experiment()),
            "parameters": self.spec.spec.model_dump_json(),
            "data": self.spec.data_name,
            "data_fingerprint": self.spec.fingerprint,
            "attempts": self._attempts,
            "trials_on_device": self._sharing,
            "threads": self.threads,
            "device": self.slot.device,
            **self._provenance,
            **{name: _joined(values) for name, values in self._hardware.items()},
            "started": self._started,
            "updated": datetime.now(UTC),
        }


def _joined(values: list[str | None]) -> str | None:
    return "; ".join(value for value in values if value) or None


def _layer_flops(cost: tuple[int, Backward] | None) -> dict[str, int | None]:
    """Columns of a layer; null for one whose own forward is never called."""
    if cost is None:
        return {}
    forward, backward = cost
    return {
        "forward_flops": forward,
        "backward_flops_dense": backward.dense,
        "backward_flops_paper": backward.paper,
        "backward_flops_required": backward.required,
        "backward_flops_executed": backward.executed,
    }


def _quantiles(values: Tensor) -> list[float] | None:
    """At records.QUANTILES, of the values that are defined."""
    defined = values[~values.isnan()]
    if not len(defined):
        return None
    at = torch.tensor(QUANTILES, dtype=defined.dtype)
    return [float(q) for q in torch.quantile(defined, at)]
