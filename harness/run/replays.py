"""After the trials: what their masks cost, measured alone on the device that they ran on."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
from harness.storage.masks import epoch_masks
from harness.storage.store import Store
from harness.suite.config import TrialSpec
from harness.train.replay import Course, Place, Progress, Replayed, UnreplayableError, replay


@dataclass(frozen=True, slots=True)
class Replays:
    """The masks of trials are replayed, for about so many `seconds` a group."""

    seconds: float
    done: ClassVar[str] = "replayed"

    def lacking(self, trials: Sequence[TrialSpec], store: Store) -> Pairs:
        """See Work: those that may have frozen something."""
        return finished([t for t in trials if t.method_spec.may_freeze], store, "replays")

    def within(self, trials: int) -> float:
        """See Work: however many they are."""
        return self.seconds

    def count(self, pairs: Pairs, root: str, shown: Shown) -> Iterator[Told]:
        """See Work: nothing."""
        return iter(())

    def never(self, spec: TrialSpec) -> str | None:
        """See Work."""
        if spec.suite.resources.world_size > 1:
            return "several workers trained it together, and a replay has one"
        if _plain(spec) is None:
            return "the suite has no baseline whose steps could stand beside its own"
        return None

    def measure(self, pairs: Pairs, root: str, shown: Shown) -> Iterator[Told]:
        """See Work: method by method."""
        store, methods = Store(root, pairs[0][0].suite.name), by_method(pairs)
        courses = {name: _courses(mine, store) for name, mine in methods.items()}
        plans = {name: len({m for c in found for m in c.masks}) for name, found in courses.items()}
        for name, mine in methods.items():
            part = self.seconds * plans[name] / max(sum(plans.values()), 1)

            def progress(done: int, of: int, name: str = name) -> None:
                shown(f"replaying {name}: {done} of {of} pairs of steps")

            yield _replayed(mine, courses[name], store, part, progress)


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
    pairs: Pairs, courses: Sequence[Course], store: Store, seconds: float, progress: Progress
) -> Told:
    """Replay the trials of one method, and store what was found."""
    specs, first = [spec for spec, _ in pairs], pairs[0][0]
    plain, name = _plain(first), first.method
    assert plain is not None
    try:
        with watched(first, pairs[0][1]) as watch:

            def looked(done: int, of: int) -> None:
                watch.look()
                progress(done, of)

            tuning = _tuning(store, first)
            place = Place(device=watch.device, location=store.location, tuning=tuning)
            found = replay(first, plain, courses, place, seconds, looked)
            seen = watch.seen()
        for spec, one in zip(specs, found, strict=True):
            keep(store, "replays", spec, one, seen)
    except Exception as error:  # a user's method may raise anything; the trials are done, and safe
        why = str(error) if isinstance(error, UnreplayableError) else reason_of(error)
        text = f"not replayed: {name} ({counted(specs)}): {why}"
        return Told(text, tuple(spec.key for spec in specs), well=False)
    return _told(name, found, seen)


def _tuning(store: Store, trial: TrialSpec) -> Mapping[str, Any] | None:
    """That of the trial's checkpoint, if it is still there."""
    state = store.load_checkpoint(trial.key)
    return None if state is None else state["tuning"]


def _told(name: str, found: Sequence[Replayed], seen: Row) -> Told:
    keys = tuple(one.trial for one in found)
    measured, of = (sum(getattr(one, n) for one in found) for n in ("plans_measured", "plans"))
    text = f"replayed {name}: {counted(keys)}, {measured} of their {of} masks measured"
    if was_alone(seen):
        return Told(text, keys)
    return Told(f"{text}, while {busy(seen)}: no verdict; run it again", keys, well=False)
