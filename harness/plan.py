"""From a suite to its trials: what there is to run, and how far each one is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import suites
from harness.config import Suite, TrialSpec
from harness.data import Images, load_images
from harness.errors import UserError
from harness.storage import Store

STATES = {None: "to do", "running": "partial", "done": "done", "failed": "failed"}


@dataclass(frozen=True, slots=True)
class Planned:
    """A trial and its state: to do, partial, done or failed."""

    spec: TrialSpec
    state: str
    epochs_done: int


def specs(
    name: str,
    settings: Sequence[str] = (),
    methods: str | None = None,
    seeds: str | None = None,
) -> list[TrialSpec]:
    """The suite's trials, seed by seed so that a run broken off has whole comparisons.

    `methods` and `seeds` are as on the command line: "baseline,neq", "0-4" or "0,2". Opens the
    data for their fingerprint. Raises UserError for anything wrong in suite, choice or data.
    """
    suite, folder = suites.load(name, settings)
    root = str(Path(suite.data.root).absolute()) if suite.data.root else ""
    suite = suite.model_copy(update={"data": suite.data.model_copy(update={"root": root})})
    chosen = _methods(suite, methods)
    numbers = _seeds(seeds) if seeds is not None else suite.seeds
    images = load_images(suite, folder)
    _check_shape(suite, images)
    fingerprint = images.fingerprint()
    code = suites.code(suite, folder, shipped=name in suites.builtin())
    metric = suites.build(suite.task, folder, {}).metric
    return [
        TrialSpec(
            suite=suite,
            folder=str(folder),
            method=method,
            seed=seed,
            code=code,
            fingerprint=fingerprint,
            data_name=images.name,
            metric=metric,
        )
        for seed in numbers
        for method in chosen
    ]


def states(trials: Sequence[TrialSpec], root: str) -> list[Planned]:
    """Each trial with its state below the results folder `root`."""
    planned = []
    for spec in trials:
        store = Store(root, spec.suite.name)
        row = store.trial(spec.key)
        state, done = (row["state"], row["epochs_done"]) if row else (None, 0)
        if state == "done" and not store.has_rows(spec.key):
            state = "running"  # its checkpoint still has them
        planned.append(Planned(spec, STATES[state], done))
    return planned


def check(trials: Sequence[TrialSpec]) -> None:
    """Build everything once, so that what is wrong shows before hours are spent.

    Raises UserError.
    """
    from harness.count import measured
    from harness.methods import Method
    from harness.trial import build_optimizer

    suite, folder = trials[0].suite, trials[0].folder
    model = suites.build_model(suite.model.build, folder, suite.model.arguments)
    measured(model, suite.model.input)
    for name in dict.fromkeys(trial.method for trial in trials):
        optimizer, _ = build_optimizer(suite.name, suite.recipe, model.parameters())
        try:
            method = Method(suite.methods[name], model, optimizer, suite.model.exclude, seed=0)
        except ValueError as error:
            raise UserError(f"suite {suite.name}: method {name} on this model: {error}") from None
        method.freezer.remove()


def _check_shape(suite: Suite, images: Images) -> None:
    shape = tuple(images.train.read(torch.tensor([0])).shape[1:])
    if shape != suite.model.input:
        raise UserError(
            f"suite {suite.name}: model.input is {list(suite.model.input)}, "
            f"the images are {list(shape)}"
        )


def _methods(suite: Suite, chosen: str | None) -> list[str]:
    names = list(suite.default_methods or suite.methods)
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
    for name in names:
        if name not in suite.methods:
            raise UserError(
                f"--methods: unknown method {name!r}; suite {suite.name} has "
                f"{', '.join(suite.methods)}"
            )
    if not names:
        raise UserError("--methods: no method is named; write --methods baseline,neq")
    needing = [n for n in names if suite.methods[n].kind in ("neq", "smallest_velocity")]
    if needing and suite.data.validation_size == 0:
        raise UserError(
            f"suite {suite.name}: {needing[0]} decides on validation images: "
            "data.validation_size must be at least 1"
        )
    return list(dict.fromkeys(names))


def _seeds(text: str) -> list[int]:
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
