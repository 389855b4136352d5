"""From a suite to its trials: what there is to run, and how far each one is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import overload

from harness import parallel
from harness.data.load import load_data
from harness.errors import UserError
from harness.storage.store import Store
from harness.suite import files, parts, sweep
from harness.suite.config import Resources, Suite, TrialSpec
from harness.tasks import build_task
from harness.train import weights

STATES = {None: "to do", "running": "partial", "done": "done", "failed": "failed"}


class Trials(Sequence[TrialSpec]):
    """The trials of a suite, each made when it is asked for.

    `choices`: one of the trial's experiment, its method and seed.
    """

    def __init__(self, choices: Sequence[tuple[TrialSpec, str, int]]) -> None:
        self._choices = choices

    @overload
    def __getitem__(self, at: int) -> TrialSpec: ...
    @overload
    def __getitem__(self, at: slice) -> "Trials": ...
    def __getitem__(self, at: int | slice) -> "TrialSpec | Trials":
        if isinstance(at, slice):
            return Trials(self._choices[at])
        first, method, seed = self._choices[at]
        return first.model_copy(update={"method": method, "seed": seed})

    def __len__(self) -> int:
        return len(self._choices)

    def those(self, wanted: Iterable[bool]) -> "Trials":
        """Those for which it is true, one for each trial."""
        return Trials(list(compress(self._choices, wanted)))

    def groups(self) -> "list[Trials]":
        """Those of each experiment."""
        groups = dict.fromkeys(first.group for first, _, _ in self._choices)
        return [self.those(f.group == group for f, _, _ in self._choices) for group in groups]


@dataclass(frozen=True, slots=True)
class Planned:
    """A trial and its state: to do, partial, done or failed."""

    key: str
    group: str
    method: str
    seed: int
    state: str
    epochs_done: int


def specs(
    name: str,
    settings: Sequence[str] = (),
    methods: str | None = None,
    seeds: str | None = None,
    synthetic: bool = False,
) -> Trials:
    """The suite's trials, seed by seed so that a run broken off has whole comparisons.

    `methods` and `seeds` are as on the command line: "baseline,neq", "0-4" or "0,2". Opens the
    data for their fingerprint. Raises UserError for anything wrong in suite, choice or data.
    """
    points, folder = files.experiments(name, settings)
    shipped = name in files.builtin()
    chosen = [chosen_methods(point, methods) for point in points]
    numbers = chosen_seeds(seeds) if seeds is not None else points[0].seeds
    firsts = [_first(*located(p, folder, synthetic=synthetic), shipped) for p in points]
    return Trials(
        [
            (first, method, seed)
            for seed in numbers
            for first, names in zip(firsts, chosen, strict=True)
            for method in names
        ]
    )


def _first(suite: Suite, folder: Path, shipped: bool) -> TrialSpec:
    """A trial of the experiment, of which the others differ in method and seed."""
    data = load_data(suite, folder)
    first = TrialSpec(
        suite=suite,
        folder=str(folder),
        method=next(iter(suite.methods)),
        seed=suite.seeds[0],
        code=parts.code(suite, folder, shipped=shipped),
        fingerprint=data.fingerprint(),
        weights=weights.identity(suite.model.weights),
        data_name=data.name,
        metric=build_task(suite, folder).metric,
    )
    _ = first.group  # which all copies keep
    return first


def states(trials: Sequence[TrialSpec], root: str) -> list[Planned]:
    """Each trial with its state below the results folder `root`."""
    store = Store(root, trials[0].suite.name)
    rows = store.read("trials", ["trial", "state", "epochs_done"]).to_pylist()
    known = {row["trial"]: (row["state"], row["epochs_done"]) for row in rows}
    whole = store.with_rows()
    planned = []
    for spec in trials:
        key = spec.key
        state, done = known.get(key, (None, 0))
        if state == "done" and key not in whole:
            state = "running"  # its checkpoint still has them
        planned.append(Planned(key, spec.group, spec.method, spec.seed, STATES[state], done))
    return planned


def located(suite: Suite, folder: Path, *, synthetic: bool) -> tuple[Suite, Path]:
    """The suite with absolute paths, on noise where that is asked for, and with as many workers as
    torchrun has started; raises UserError where it asks for another number.
    """
    data, model = suite.data, suite.model
    synthetic = synthetic or data.synthetic
    root = str(Path(data.root).absolute()) if data.root else ""
    weight = model.weights
    if weight and weight.partition(":")[0] not in weights.LIBRARIES:
        weight = str(Path(weight).absolute())
    if synthetic:
        root = weight = ""
    changed = {
        "data": data.model_copy(update={"root": root, "synthetic": synthetic}),
        "model": model.model_copy(update={"weights": weight}),
        "resources": _launched(suite),
    }
    return suite.model_copy(update=changed), folder


def _launched(suite: Suite) -> Resources:
    """With as many workers as torchrun has started; raises UserError where others are asked for."""
    launched, wanted = parallel.launched(), suite.resources
    if launched == 1 or wanted.world_size == launched:
        return wanted
    if wanted.world_size > 1:
        raise UserError(
            f"torchrun started {launched} processes, suite {suite.name} asks for "
            f"{wanted.world_size} workers; make them equal"
        )
    return wanted.model_copy(update={"workers": launched, "gpus": "auto" if wanted.gpus else 0})


def chosen_methods(suite: Suite, chosen: str | None) -> list[str]:
    """By `--methods`, or the suite's own choice; raises UserError for one that it does not have."""
    names = list(suite.default_methods or suite.methods)
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
    if not names:
        raise UserError("--methods: no method is named; write --methods baseline,neq")
    families = {name: sweep.family(name, list(suite.methods)) for name in names}
    for name, found in families.items():
        if not found:
            raise UserError(
                f"--methods: unknown method {name!r}; suite {suite.name} has "
                f"{', '.join(suite.methods)}"
            )
    names = [name for found in families.values() for name in found]
    needing = [n for n in names if suite.methods[n].kind in ("neq", "smallest_velocity")]
    if needing and suite.data.validation_size == 0:
        raise UserError(
            f"suite {suite.name}: {needing[0]} decides on validation images: "
            "data.validation_size must be at least 1"
        )
    return list(dict.fromkeys(names))


def chosen_seeds(text: str) -> list[int]:
    """By `--seeds`; raises UserError for what is none."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start = int(first)
            numbers += range(start, int(last) + 1) if dash else [start]
        except (ValueError, OverflowError, MemoryError):
            raise UserError(f"--seeds {text!r}: write numbers such as 0,1,2 or 0-4") from None
    if not numbers or len(set(numbers)) < len(numbers) or max(numbers) >= 2**63:
        raise UserError(f"--seeds {text!r}: name at least one seed below 2^63, and each only once")
    return numbers
