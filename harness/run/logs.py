"""A run in TensorBoard, MLflow or Weights & Biases: written from what its trials have committed."""

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from harness.errors import UserError, one_line
from harness.storage.store import Store
from harness.suite.config import TrialSpec
from harness.suite.sweep import point_label
from neq.integrations.loggers import Logger, by_layer, check_place, open_logger

PATIENCE = 15.0  # seconds without a sign of a place at the end of a run
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
    server. Nothing is taken from events: they only tell that there may be more. `warn` is called
    with a sentence for each place that fails, from that thread.
    """

    def __init__(self, places: Sequence[str], store: Store, warn: Callable[[str], None]) -> None:
        self._places = list(dict.fromkeys(places))
        self._store, self._warn = store, warn
        self._loggers: dict[tuple[str, str], Logger] = {}  # by place and trial
        self._queue: SimpleQueue[tuple[TrialSpec, bool] | None] = SimpleQueue()
        self._sign = time.monotonic()  # when something was written last
        self._given_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="logs", daemon=True)
        if self._places:
            self._thread.start()

    def follow(self, spec: TrialSpec, *, ended: bool = False) -> None:
        """The trial may have committed something; `ended`: and will commit no more for now."""
        if self._places:
            self._queue.put((spec, ended))

    def close(self) -> None:
        """Write what is left, but don't wait for a place that gives no sign any more."""
        if not self._places:
            return
        self._queue.put(None)
        self._sign = time.monotonic()
        while self._thread.is_alive() and time.monotonic() < self._sign + PATIENCE:
            self._thread.join(0.1)
        if self._thread.is_alive():
            self._given_up.set()
            self._warn(f"the log is not complete: {' and '.join(self._places)} take long; {AGAIN}")

    def _work(self) -> None:
        more = True
        while more:
            asked: dict[str, tuple[TrialSpec, bool]] = {}
            more = self._gather(asked)
            for spec, ended in asked.values():
                if self._given_up.is_set():
                    return
                self._bring_up(spec, ended)
        while self._loggers:
            self._loggers.popitem()[1].close()
            self._sign = time.monotonic()

    def _gather(self, asked: dict[str, tuple[TrialSpec, bool]]) -> bool:
        """Wait for a trial, and take all that wait by then; False where it was the last time."""
        found = self._queue.get()
        while found is not None:
            spec, ended = found
            asked[spec.key] = spec, ended or asked.get(spec.key, (spec, False))[1]
            try:
                found = self._queue.get_nowait()
            except Empty:
                return True
        return False

    def _bring_up(self, spec: TrialSpec, ended: bool) -> None:
        try:
            epochs = self._store.epochs(spec.key)
            layers = self._layers(spec.key) if epochs else {}
        except Exception as error:  # what else is in the store is logged all the same
            self._warn(f"{_name(spec)} is not logged ({one_line(error)}); {AGAIN}")
            return
        for place in self._places[:] if epochs else ():
            logger = self._logger(place, spec)
            if _differs(logger, epochs):
                self._warn(
                    f"{place} holds other numbers of {_name(spec)} than the results: they were "
                    "computed anew since; log to another place"
                )
            for row in epochs:
                logger.log(row["epoch"], _values(row) | layers.get(row["epoch"], {}))
            if ended and (place, spec.key) in self._loggers:
                self._loggers.pop((place, spec.key)).close()
            self._sign = time.monotonic()

    def _layers(self, key: str) -> dict[int, dict[str, float]]:
        """By epoch: the share of frozen neurons of each layer."""
        columns = ["trial", "epoch", "layer", "neurons", "frozen"]
        table = self._store.read("layers", columns, only={key})
        found: dict[int, dict[str, float]] = {}
        for row in table.to_pylist():
            share = row["frozen"] / row["neurons"]
            found.setdefault(row["epoch"], {})[by_layer(row["layer"])] = share
        return found

    def _logger(self, place: str, spec: TrialSpec) -> Logger:
        if (place, spec.key) not in self._loggers:
            self._loggers[place, spec.key] = open_logger(  # even if it has just failed
                place,
                _name(spec),
                _config(spec),
                project=f"neqbench-{spec.suite.name}",
                warn=partial(self._failed, place),
            )
        return self._loggers[place, spec.key]

    def _failed(self, place: str, text: str) -> None:
        """Leave the place alone: a server that does not answer takes its time in every call."""
        if place in self._places:
            self._places.remove(place)
            self._warn(f"{text}; {AGAIN}")
        self._loggers = {key: logger for key, logger in self._loggers.items() if key[0] != place}


def _name(spec: TrialSpec) -> str:
    words = [point_label(spec.suite.point), spec.method, f"seed {spec.seed}", spec.key[:8]]
    return f"{spec.suite.name}/{' '.join(filter(None, words))}"


def _config(spec: TrialSpec) -> dict[str, Any]:
    """What the trial is, in words and numbers of one level."""
    found: dict[str, Any] = {"suite": spec.suite.name, "method": spec.method, "seed": spec.seed}
    found["trial"] = spec.key
    _flatten("recipe", spec.suite.recipe.model_dump(mode="json"), found)
    _flatten("method", spec.suite.methods[spec.method].model_dump(mode="json"), found)
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


def _differs(logger: Logger, epochs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the log holds another loss than the results for an epoch."""
    for row in epochs:
        there, here = logger.logged("loss/train", row["epoch"]), row["train_loss"]
        if there is not None and here is not None and not math.isclose(there, here, rel_tol=AGREE):
            return True
    return False
