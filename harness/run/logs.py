"""A run in TensorBoard, MLflow or Weights & Biases: written from what its trials have committed."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from harness.errors import UserError, one_line
from harness.run.events import Elsewhere, Event, Held
from harness.storage.schema import EpochRecord
from harness.storage.store import Store
from harness.suite.config import TrialSpec
from harness.suite.sweep import point_label
from neq.integrations.loggers import Logger, by_layer, check_place, open_logger, plainly

PATIENCE = 20.0  # seconds without a sign of any place at the end of a run
HASTE = 2.0  # seconds for what is under way, where a run is broken off
PAUSE = 300.0  # seconds in which a place that has failed is left alone
AGREE = 1e-5  # two values of one epoch: TensorBoard keeps float32
AGAIN = "the same command brings it up to date"
COLUMNS = {  # of `epochs`, by their names in a log
    "flops/executed": "backward_flops_executed",
    "flops/required": "backward_flops_required",
    "flops/dense": "backward_flops_dense",
    "flops/deciding": "overhead_flops",
    "seconds/train": "seconds_train",
    "seconds/deciding": "seconds_equilibrium",
    "loss/train": "train_loss",
    "loss/validation": "val_loss",
    "loss/test": "test_loss",
    "metric": "test_metric",
    "lr": "lr",
}


def check_places(places: Iterable[str]) -> None:
    """Raises UserError for what can't be logged to: no place, or one whose package is missing."""
    for place in places:
        try:
            check_place(place)
        except (ValueError, ImportError) as error:
            raise UserError(f"--log: {error}") from None


class Logs:
    """Each trial as a run of its own in each of the `places`.

    What the store has of a trial is written by a thread of its own, so that nobody waits for a
    server; nothing is taken from events, which only tell that there is more. Only the run that
    computes a trial logs it, and afterwards whoever finds it done: two would write the same epochs.
    A place that fails is left alone for a while, and asked once more at the end. `warn` is called
    with a sentence for each such place, once, from that thread.
    """

    def __init__(self, places: Sequence[str], store: Store, warn: Callable[[str], None]) -> None:
        self._places = list(dict.fromkeys(places))
        self._store, self._warn = store, warn
        self._mine: set[str] = set()  # trials that this run computes
        self._told: set[str] = set()  # places of which the user has been told
        self._paused: dict[str, float] = {}  # places that have failed, and until when
        self._missed: dict[str, TrialSpec] = {}  # trials that such a place lacks
        self._loggers: dict[tuple[str, str], Logger] = {}  # by place and trial
        self._jobs = threading.Condition()
        self._live: dict[str, tuple[TrialSpec, bool]] = {}  # to be written; whether they have ended
        self._done: dict[str, TrialSpec] = {}  # written where nothing else is to do
        self._closing, self._given_up = False, threading.Event()
        self._sign = time.monotonic()  # when something was written last
        self._thread = threading.Thread(target=self._work, name="logs", daemon=True)

    def __enter__(self) -> Self:
        if self._places:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Write what is left, without waiting for places that give no sign, or for long where the
        run was broken off.
        """
        if not self._places:
            return
        with self._jobs:
            self._closing = True
            self._jobs.notify()
        self._sign = started = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.05)
            now = time.monotonic()
            if now > (self._sign + PATIENCE if kind is None else started + HASTE):
                break
        if self._thread.is_alive():
            self._given_up.set()
            slow = [plainly(place) for place in self._places if place not in self._told]
            if kind is None and slow:
                self._warn(f"the log is not complete: {', '.join(slow)} takes long; {AGAIN}")

    def fill(self, spec: TrialSpec) -> None:
        """The trial has ended: write what the places lack of it, when there is time."""
        if self._places:
            with self._jobs:
                self._done[spec.key] = spec
                self._jobs.notify()

    def follow(self, spec: TrialSpec, event: Event | None) -> None:
        """Take one event of a trial; None ends it."""
        if not self._places:
            return
        if isinstance(event, (Held, Elsewhere)):  # another run's: it logs it, or a later command
            self._mine.discard(spec.key)
        elif isinstance(event, EpochRecord):
            self._mine.add(spec.key)
        if spec.key in self._mine and (event is None or isinstance(event, EpochRecord)):
            with self._jobs:
                self._live[spec.key] = spec, event is None
                self._jobs.notify()

    def _work(self) -> None:
        while (job := self._next()) is not None and not self._given_up.is_set():
            self._bring_up(*job)
        self._paused.clear()
        for spec in list(self._missed.values()):
            self._bring_up(spec, True)
        while self._loggers and not self._given_up.is_set():
            self._loggers.popitem()[1].close()
            self._sign = time.monotonic()

    def _next(self) -> tuple[TrialSpec, bool] | None:
        """Wait for a trial, and whether it has ended; None where there will be none any more."""
        with self._jobs:
            while not (self._live or self._done or self._closing):
                self._jobs.wait()
            if self._live:
                return self._live.pop(next(iter(self._live)))
            return (self._done.pop(next(iter(self._done))), True) if self._done else None

    def _bring_up(self, spec: TrialSpec, ended: bool) -> None:
        try:
            epochs = self._store.epochs(spec.key)
            layers = self._layers(spec.key) if epochs else {}
        except Exception as error:  # what else is in the store is logged all the same
            self._tell(spec.key, f"{_name(spec)} is not logged ({one_line(error)}); {AGAIN}")
            return
        rows = {row["epoch"]: _values(row) | layers.get(row["epoch"], {}) for row in epochs}
        self._missed.pop(spec.key, None)
        for place in self._places if rows else ():
            if not self._logged(place, spec, rows, ended):
                self._missed[spec.key] = spec

    def _logged(
        self, place: str, spec: TrialSpec, rows: Mapping[int, Mapping[str, Any]], ended: bool
    ) -> bool:
        """Whether the place has all of the trial's epochs now."""
        if time.monotonic() < self._paused.get(place, 0.0):
            return False
        logger = self._loggers.get((place, spec.key)) or self._opened(place, spec, rows)
        for epoch, values in rows.items():
            if logger.failed or self._given_up.is_set():
                return False
            logger.log(epoch, values)
            self._sign = time.monotonic()
        if ended:
            self._loggers.pop((place, spec.key)).close()
        return not logger.failed

    def _opened(self, place: str, spec: TrialSpec, rows: Mapping[int, Mapping[str, Any]]) -> Logger:
        project, warn = f"neqbench-{spec.suite.name}", partial(self._failed, place)
        logger = open_logger(place, _name(spec), _config(spec), project=project, warn=warn)
        self._loggers[place, spec.key] = logger
        if any(_differs(logger.logged("loss/train", e), v["loss/train"]) for e, v in rows.items()):
            self._tell(
                f"{place} {spec.key}",
                f"{plainly(place)} holds other numbers of {_name(spec)} than the results: they "
                "were computed anew since; log to another place",
            )
        return logger

    def _layers(self, key: str) -> dict[int, dict[str, float | None]]:
        """By epoch: the share of frozen neurons of each layer."""
        columns = ["trial", "epoch", "layer", "neurons", "frozen"]
        found: dict[int, dict[str, float | None]] = {}
        for row in self._store.read("layers", columns, only={key}).to_pylist():
            share = row["frozen"] / row["neurons"]
            found.setdefault(row["epoch"], {})[by_layer(row["layer"])] = share
        return found

    def _failed(self, place: str, text: str) -> None:
        """Leave the place alone: a server that does not answer takes its time in every call."""
        self._paused[place] = time.monotonic() + PAUSE
        self._loggers = {key: logger for key, logger in self._loggers.items() if key[0] != place}
        self._tell(place, f"{text}; {AGAIN}")

    def _tell(self, what: str, text: str) -> None:
        if what not in self._told and not self._given_up.is_set():
            self._told.add(what)
            self._warn(text)


def _name(spec: TrialSpec) -> str:
    words = [point_label(spec.suite.point), spec.method, f"seed {spec.seed}", spec.key[:8]]
    return f"{spec.suite.name}/{' '.join(filter(None, words))}"


def _config(spec: TrialSpec) -> dict[str, Any]:
    """What the trial is, in words and numbers of one level."""
    found: dict[str, Any] = {"suite": spec.suite.name, "method": spec.method, "seed": spec.seed}
    found["trial"] = spec.key
    _flatten("recipe", spec.suite.recipe.model_dump(mode="json"), found)
    _flatten("method", spec.method_spec.model_dump(mode="json"), found)
    return found


def _flatten(name: str, value: Any, found: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _flatten(f"{name}.{key}", inner, found)
    elif value is not None:
        found[name] = value


def _values(row: Mapping[str, Any]) -> dict[str, float | None]:
    frozen = row["frozen_neurons"] / row["total_neurons"]
    return {"frozen": frozen} | {name: row[column] for name, column in COLUMNS.items()}


def _differs(there: float | None, here: float | None) -> bool:
    if there is None or here is None:
        return False
    return not math.isclose(there, here, rel_tol=AGREE)
