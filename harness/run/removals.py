"""After the trials: dead neurons are removed for real, and forwards timed alone on the device."""

import io
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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
    reason_of,
    was_alone,
    watched,
)
from harness.storage.locations import StorageError
from harness.storage.store import Store
from harness.suite.config import TrialSpec
from harness.train.removal import (
    Clock,
    Latency,
    Measurable,
    Removed,
    dense,
    examples,
    measure,
    remove,
)
from harness.train.tuning import Tuning
from neq.pruning import Shrunk

FOLDER = "shrunk"
ELSEWHERE = "; no latency, since it was trained on another kind of machine"
SECONDS = 30.0  # of a trial, where a node is waited for


@dataclass(frozen=True, slots=True)
class _Group:
    """What the trials of a group have in common: results, the dense model, samples; and keys of
    those that are still to be measured, and of those whose networks are kept.
    """

    store: Store
    whole: Measurable
    example: Tensor
    unmeasured: Set[str]
    kept: Set[str]


@dataclass(frozen=True, slots=True)
class _End:
    """What became of a trial: what was found, and what was seen meanwhile (None: it has all that
    already); or why it was not. `unsaved`: why its network was not kept, if that was asked for.
    """

    spec: TrialSpec
    removed: Removed | None = None
    seen: Row | None = None
    why: str = ""
    unsaved: str = ""


@dataclass(frozen=True, slots=True)
class Removals:
    """Dead neurons of trials that prune are removed; `save`: the smaller networks are kept."""

    save: bool
    done: ClassVar[str] = "removed"

    def within(self, trials: int) -> float:
        """See Work."""
        return SECONDS * trials

    def lacking(self, trials: Sequence[TrialSpec], store: Store) -> Pairs:
        """See Work: those that have pruned something, or may have."""
        mine = [trial for trial in trials if trial.method_spec.may_prune]
        if not mine:
            return []
        found = finished(mine, store, "removals")
        if self.save:
            known = _kept(store) | {spec.key for spec, _ in found}
            found += finished([t for t in mine if t.key not in known], store, None)
        keys = {spec.key for spec, _ in found}  # epochs are many: of those that lack it alone
        rows = store.read("epochs", ["trial", "effective_parameters"], only=keys).to_pylist()
        pruned = {row["trial"] for row in rows if row["effective_parameters"] is not None}
        return [pair for pair in found if pair[0].key in pruned]

    def never(self, spec: TrialSpec) -> str | None:
        """See Work."""
        return None

    def measure(self, pairs: Pairs, root: str, shown: Shown) -> Iterator[Told]:
        """See Work: method by method."""
        return self._all(pairs, root, shown, timed=True)

    def count(self, pairs: Pairs, root: str, shown: Shown) -> Iterator[Told]:
        """See Work: all but latency, unless there is a row already."""
        store = Store(root, pairs[0][0].suite.name)
        keys = {spec.key for spec, _ in pairs}
        known = set(store.read("removals", ["trial"], only=keys)["trial"].to_pylist())
        fresh = [pair for pair in pairs if pair[0].key not in known]
        if fresh:
            yield from self._all(fresh, root, shown, timed=False)
        for name, mine in by_method([pair for pair in pairs if pair[0].key in known]).items():
            text = f"removed {name} before: {counted(mine)}{ELSEWHERE}"
            yield Told(text, tuple(spec.key for spec, _ in mine), well=False)

    def _all(self, pairs: Pairs, root: str, shown: Shown, *, timed: bool) -> Iterator[Told]:
        first = pairs[0][0]
        try:
            store = Store(root, first.suite.name)
            group = _Group(
                store=store,
                whole=dense(first.suite, first.folder),
                example=examples(first),
                unmeasured={
                    spec.key for spec, _ in finished([s for s, _ in pairs], store, "removals")
                },
                kept=_kept(store) if self.save else set(),
            )
        except Exception as error:  # the user's model or data may raise anything
            yield from _told("", [_End(spec, why=reason_of(error)) for spec, _ in pairs])
            return
        for name, mine in by_method(pairs).items():
            ends = []
            for number, (spec, row) in enumerate(mine):
                shown(f"removing what {name} left dead: {number} of {counted(mine)}")
                try:
                    ends.append(self._one(spec, row, group, timed=timed))
                except Exception as error:  # the trials are done, and safe
                    ends.append(_End(spec, why=reason_of(error)))
            yield from _told(name, ends)

    def _one(self, spec: TrialSpec, row: Row, group: _Group, *, timed: bool) -> _End:
        """Remove, measure and store, of one trial; what was measured alone stays."""
        store, end = group.store, _End(spec)
        state = store.load_checkpoint(spec.key)
        if state is None:
            path = store.location.path(f"checkpoints/{spec.key}")
            raise StorageError(f"the trained model is not there ({path})")
        found, reason = remove(spec, state["model"], group.example)
        if spec.key in group.unmeasured:
            tuning = Tuning.from_json(state["tuning"])
            end = _measured(spec, row, found, reason, group.whole, tuning if timed else None)
            keep(store, "removals", spec, end.removed, end.seen or {})
        if self.save and spec.key not in group.kept:
            try:
                _save(store, spec, found)
            except Exception as error:  # of any kind, from a forward that export can't follow
                end = replace(end, unsaved=reason_of(error))
        return end


def _measured(
    spec: TrialSpec,
    row: Row,
    found: Shrunk,
    reason: str | None,
    whole: Measurable,
    tuning: Tuning | None,
) -> _End:
    """By the clock, too, where there is a tuning."""
    if tuning is None:
        removed = measure(spec, found, reason, whole, lambda *_: Latency())
        return _End(spec, removed, {"trials_on_device": None, "other_load": None, "device": None})
    with watched(spec, row) as watch:
        suite = spec.trained_suite
        clock = Clock(suite=suite, device=watch.device, tuning=tuning, look=watch.look)
        return _End(spec, measure(spec, found, reason, whole, clock), watch.seen())


def _save(store: Store, spec: TrialSpec, found: Shrunk) -> None:
    """`<trial>.pt`: its state_dict, and widths by layer; `<trial>.pt2`: a program of torch.export,
    which needs neither neqbench nor the suite's code.
    """
    program, buffer = io.BytesIO(), io.BytesIO()
    torch.export.save(_exported(found.model, spec.suite.model.input), program)
    torch.save({"state_dict": found.model.state_dict(), "widths": found.widths}, buffer)
    store.location.write(f"{FOLDER}/{spec.key}.pt", buffer.getvalue())
    store.location.write(f"{FOLDER}/{spec.key}.pt2", program.getvalue())


def _kept(store: Store) -> set[str]:
    """Keys of the trials whose networks are there."""
    return {name.removesuffix(".pt2") for name in store.location.names(FOLDER)}


def _exported(model: nn.Module, shape: Sequence[int]) -> Any:
    """For batches of any size; of one sample where the model's forward counts on the size."""
    try:
        sizes = ({0: torch.export.Dim("batch")},)
        return torch.export.export(model.eval(), (torch.randn(2, *shape),), dynamic_shapes=sizes)
    except Exception:  # of any kind
        return torch.export.export(model.eval(), (torch.randn(1, *shape),))


def _told(name: str, ends: Sequence[_End]) -> Iterator[Told]:
    """A line on what went well, and one for each reason why something did not."""
    found = [end for end in ends if not end.why and (end.removed or not end.unsaved)]
    if found:
        yield _told_well(name, found)
    for what, attribute in (("removed", "why"), ("saved", "unsaved")):
        reasons = [(end.spec, getattr(end, attribute)) for end in ends if getattr(end, attribute)]
        for why in dict.fromkeys(reason for _, reason in reasons):
            mine = [spec for spec, reason in reasons if reason == why]
            methods = name or ", ".join(dict.fromkeys(spec.method for spec in mine))
            keys = tuple(spec.key for spec in mine)
            yield Told(f"not {what}: {methods} ({counted(mine)}): {why}", keys, well=False)


def _told_well(name: str, ends: Sequence[_End]) -> Told:
    keys = tuple(end.spec.key for end in ends)
    left = [end.removed for end in ends if end.removed]
    if not left:
        return Told(f"saved {name}: {counted(keys)}", keys)
    gone = sum(one.neurons_removed for one in left)
    text = f"removed {name}: {counted(keys)}, {gone} neuron{'s' * (gone != 1)}"
    reasons = dict.fromkeys(one.reason for one in left if one.reason)
    if reasons:
        text += f" ({'; '.join(reasons)})"
    share = sum(one.parameters / one.parameters_dense for one in left) / len(left)
    text += f", {share:.0%} of the parameters left"
    if left[0].latency_one is None:
        return Told(f"{text}{ELSEWHERE}", keys, well=False)
    disturbed = [end.seen for end in ends if end.seen and not was_alone(end.seen)]
    if not disturbed:
        return Told(text, keys)
    return Told(f"{text}, while {busy(disturbed[0])}: no latency; run it again", keys, well=False)
