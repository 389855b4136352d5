"""From a suite to its trials: which there are, and how far each one is."""

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
from harness.train.probe import probe_data

STATE_NAMES = {None: "to do", "running": "partial", "done": "done", "failed": "failed"}


class Trials(Sequence[TrialSpec]):
    """A sequence of trials, each made when it is asked for.

    `choices`: for each trial one of the same experiment, its method and its seed.
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
        """The trials for which `wanted`, with one value for each trial, is true."""
        return Trials(list(compress(self._choices, wanted)))

    def groups(self) -> "list[Trials]":
        """The trials of each experiment, experiment by experiment."""
        groups = dict.fromkeys(first.group for first, _, _ in self._choices)
        return [self.those(f.group == group for f, _, _ in self._choices) for group in groups]


@dataclass(frozen=True, slots=True)
class TrialState:
    """A trial and how far it is; `state`: "to do", "partial", "done" or "failed"."""

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
    """The trials of the suite called `name`: all methods of the first seed, then of the next.

    So a run that is broken off has seeds with every method, which can be compared.

    `settings`, `methods` and `seeds` are as on the command line: "recipe.epochs=5", "baseline,neq",
    "0-4" or "0,2". Opens the data for their fingerprint. Raises UserError for anything wrong in
    suite, choice or data.
    """
    points, folder = files.load_experiments(name, settings)
    shipped = name in files.shipped_suites()
    chosen = [chosen_methods(point, methods) for point in points]
    numbers = chosen_seeds(seeds) if seeds is not None else points[0].seeds
    firsts = [_first(*resolved(p, folder, synthetic=synthetic), shipped) for p in points]
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
    code, method_code = parts.code_digests(suite, folder, shipped=shipped)
    first = TrialSpec(
        suite=suite,
        folder=str(folder),
        method=next(iter(suite.methods)),
        seed=suite.seeds[0],
        code=code,
        method_code=method_code,
        fingerprint=data.fingerprint(),
        probe_fingerprint=probe_data(suite, folder).fingerprint() if suite.probe else "",
        weights=weights.weights_identity(suite.model.weights),
        data_name=data.name,
        metric=build_task(suite, folder).metric,
    )
    _ = first.group  # which all copies keep
    return first


def states(trials: Sequence[TrialSpec], root: str) -> list[TrialState]:
    """The state of each trial in the results below `root`."""
    store = Store(root, trials[0].suite.name)
    rows = store.read("trials", ["trial", "state", "epochs_done", "measures"]).to_pylist()
    known = {row["trial"]: (row["state"], row["epochs_done"]) for row in rows}
    whole = store.with_rows(rows)
    found = []
    for spec in trials:
        key = spec.key
        state, done = known.get(key, (None, 0))
        if state == "done" and key not in whole:
            state = "running"  # its checkpoint still has them
        name = STATE_NAMES[state]
        found.append(TrialState(key, spec.group, spec.method, spec.seed, name, done))
    return found


def resolved(suite: Suite, folder: Path, *, synthetic: bool) -> tuple[Suite, Path]:
    """The suite as it is to be run here, and its folder.

    Paths are absolute, the data noise where that is asked for, and the workers as many as torchrun
    has started. Raises UserError where the suite asks for another number of them.
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
    """The names of the methods to run: those of `--methods`, or the suite's own choice.

    Raises UserError for a method that the suite does not have, or that lacks validation images.
    """
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
    needing = [name for name in names if suite.methods[name].needs_validation]
    if needing and suite.data.validation_size == 0:
        raise UserError(
            f"suite {suite.name}: {needing[0]} decides on validation images: "
            "data.validation_size must be at least 1"
        )
    return list(dict.fromkeys(names))


def chosen_seeds(text: str) -> list[int]:
    """The numbers that `--seeds` names ("0-4", "0,2"); raises UserError for anything else."""
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
