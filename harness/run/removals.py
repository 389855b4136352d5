"""After the trials: dead neurons are removed for real, and forwards timed alone on the device."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from harness.errors import UserError, one_line
from harness.run.afterwards import (
    Pairs,
    Row,
    Shown,
    Told,
    busy,
    by_method,
    counted,
    finished,
    keep,
    was_alone,
    watched,
)
from harness.storage.locations import StorageError
from harness.storage.store import Store
from harness.suite.config import TrialSpec
from harness.train.removal import Measurable, Removed, dense, measure, remove
from harness.train.tuning import Tuning
from neq.pruning import Shrunk

if TYPE_CHECKING:
    from torch import nn

FOLDER = "shrunk"
SECONDS = 120.0  # of a group, where a node is waited for


class LostError(Exception):
    """The trained model is not there any more."""


@dataclass(frozen=True, slots=True)
class Removals:
    """Dead neurons of trials that prune are removed; `save`: the smaller networks are kept."""

    save: bool
    done: ClassVar[str] = "removed"
    seconds: ClassVar[float] = SECONDS

    def lacking(self, trials: Sequence[TrialSpec], store: Store) -> Pairs:
        """See Work: those that have pruned something, or may have."""
        mine = [trial for trial in trials if trial.method_spec.may_prune]
        if not mine:
            return []
        keys = {trial.key for trial in mine}
        rows = store.read("epochs", ["trial", "effective_parameters"], only=keys).to_pylist()
        pruned = {row["trial"] for row in rows if row["effective_parameters"] is not None}
        those = [trial for trial in mine if trial.key in pruned]
        found = finished(those, store, "removals")
        if self.save:
            kept = {name.removesuffix(".pt2") for name in store.location.names(FOLDER)}
            known = {spec.key for spec, _ in found}
            again = [t for t in those if t.key not in kept | known]
            found += finished(again, store, None)
        return found

    def never(self, spec: TrialSpec) -> str | None:
        """See Work."""
        return None

    def measure(self, pairs: Pairs, root: str, shown: Shown) -> Iterator[Told]:
        """See Work: method by method."""
        first = pairs[0][0]
        store, whole = Store(root, first.suite.name), None
        for name, mine in by_method(pairs).items():
            try:
                whole = whole or dense(first.suite, first.folder)
                found = []
                for number, (spec, row) in enumerate(mine):
                    shown(f"removing what {name} left dead: {number} of {counted(mine)}")
                    found.append(self._one(spec, row, store, whole))
            except Exception as error:  # a user's model may raise anything; the trials are safe
                known = isinstance(error, (LostError, ImportError, UserError, StorageError))
                why = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
                text = f"not removed: {name} ({counted(mine)}): {why}"
                yield Told(text, tuple(spec.key for spec, _ in mine), well=False)
                continue
            yield _told(name, mine, found)

    def _one(
        self, spec: TrialSpec, row: Row, store: Store, whole: Measurable
    ) -> tuple[Removed, Row]:
        """Remove, measure and store, of one trial."""
        state = store.load_checkpoint(spec.key)
        if state is None:
            raise LostError(f"{store.location.path(f'checkpoints/{spec.key}')} is not there")
        with watched(spec, row) as watch:
            found, reason = remove(spec, state["model"])
            tuning = Tuning.from_json(state["tuning"])
            removed = measure(spec, found, reason, whole, watch.device, tuning)
            seen = watch.seen()
        keep(store, "removals", spec, removed, seen)
        if self.save:
            _save(store, spec, found)
        return removed, seen


def _save(store: Store, spec: TrialSpec, found: Shrunk) -> None:
    """`<trial>.pt`: its state_dict, and widths by layer; `<trial>.pt2`: a program of torch.export,
    which needs neither neqbench nor the suite's code.
    """
    import torch

    buffer = io.BytesIO()
    torch.save({"state_dict": found.model.state_dict(), "widths": found.widths}, buffer)
    store.location.write(f"{FOLDER}/{spec.key}.pt", buffer.getvalue())
    program = io.BytesIO()
    torch.export.save(_exported(found.model, spec.suite.model.input), program)
    store.location.write(f"{FOLDER}/{spec.key}.pt2", program.getvalue())


def _exported(model: "nn.Module", shape: Sequence[int]) -> Any:
    """For batches of any size, where the model has no other mind."""
    import torch

    inputs = (torch.randn(2, *shape),)
    try:
        return torch.export.export(
            model.eval(), inputs, dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    except Exception:  # its forward counts on the batch's size
        return torch.export.export(model.eval(), inputs)


def _told(name: str, pairs: Pairs, found: Sequence[tuple[Removed, Row]]) -> Told:
    keys = tuple(spec.key for spec, _ in pairs)
    count, left = len(found), [removed for removed, _ in found]
    gone = sum(one.neurons_removed for one in left)
    text = f"removed {name}: {counted(keys)}, {gone} neurons"
    reasons = dict.fromkeys(one.reason for one in left if one.reason)
    if reasons:
        text += f" ({'; '.join(reasons)})"
    share = sum(one.parameters / one.parameters_dense for one in left) / count
    text += f", {share:.0%} of the parameters left"
    disturbed: list[Mapping[str, Any]] = [seen for _, seen in found if not was_alone(seen)]
    if not disturbed:
        return Told(text, keys)
    return Told(f"{text}, while {busy(disturbed[0])}: no latency; run it again", keys, well=False)
