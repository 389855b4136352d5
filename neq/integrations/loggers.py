"""A training in TensorBoard, MLflow or Weights & Biases, each value of each epoch once for ever."""

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol

from neq.freezer import NeuronFreezer

# By the kind of a place: the module that writes there.
KINDS = {"tensorboard": "to_tensorboard", "mlflow": "to_mlflow", "wandb": "to_wandb"}
PLACES = "tensorboard:FOLDER, mlflow:URI, wandb or wandb:offline"


class Place(Protocol):
    """One run in one of these places."""

    def read(self) -> Iterator[tuple[str, int, float | None]]:
        """(name, epoch, value) of all that is there already; None where no value is known."""

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        """Add the values of an epoch."""

    def close(self) -> None:
        """Write down what is still in memory."""


class Logger:
    """Writes the values of each epoch to one run, but what is there already.

    So a process that was killed and is started anew doubles nothing, and adds what is missing. A
    place that fails costs one warning: from then on nothing is written to it. `failed`: whether it
    has.
    """

    def __init__(
        self, where: str, open_place: Callable[[], Place], warn: Callable[[str], None]
    ) -> None:
        self._where, self._warn = where, warn
        self.failed = False
        self._known: dict[tuple[str, int], float | None] = {}

        def begin() -> None:
            self._place = open_place()
            self._known = {(name, epoch): value for name, epoch, value in self._place.read()}

        self._tried(begin)

    def log(self, epoch: int, values: Mapping[str, float | None]) -> None:
        """Write what is not there yet of the values, by name; None and what is not finite is left
        out. W&B takes the values of an epoch in one call.
        """
        new = {
            name: float(value)
            for name, value in values.items()
            if value is not None and math.isfinite(value) and (name, epoch) not in self._known
        }
        if new and self._tried(lambda: self._place.write(epoch, new)):
            self._known |= {(name, epoch): value for name, value in new.items()}

    def logged(self, name: str, epoch: int) -> float | None:
        """The value that is there; None where there is none, or where the place can't tell."""
        return self._known.get((name, epoch))

    def close(self) -> None:
        """Write down what is still in memory: the last call."""
        self._tried(lambda: self._place.close())

    def _tried(self, act: Callable[[], None]) -> bool:
        if self.failed:
            return False
        try:
            act()
        except Exception as error:
            self.failed = True
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            self._warn(plainly(f"{self._where} can't be written to ({text})"))
            return False
        return True


def open_logger(
    where: str,
    run: str = "run",
    config: Mapping[str, Any] | None = None,
    *,
    project: str = "neq",
    warn: Callable[[str], None] = warnings.warn,
) -> Logger:
    """Log to the run called `run` at the place `where`, which is made unless it is there.

    `where`: "tensorboard:FOLDER" (the run is a folder in it), "mlflow:URI" (of a server, a database
    such as sqlite:///mlflow.db, or a folder), "wandb" or "wandb:offline" (files in ./wandb, for
    `wandb sync`). `project`: MLflow's experiment, or W&B's project. `config`: kept with the run.
    `warn` is called with a sentence where the place can't be written to, once.

    Raises ValueError for another place, ImportError where its package is not installed.
    """
    module, rest = _writer(where)
    return Logger(where, lambda: module.open_place(rest, run, dict(config or {}), project), warn)


def check_place(where: str) -> None:
    """Raises ValueError for what is no place to log to, or a folder that can't be written,
    ImportError without its package.
    """
    module, rest = _writer(where)
    try:
        getattr(module, "check", str)(rest)
    except OSError as error:
        raise ValueError(f"{where!r} can't be written ({error.strerror})") from None


def frozen_shares(freezer: NeuronFreezer) -> dict[str, float]:
    """The share of neurons that are frozen, "frozen", and that of each layer, by its name,
    "frozen_by_layer/…".
    """
    frozen, layers = freezer.frozen.double(), freezer.neurons.items()
    return {"frozen": float(frozen.mean())} | {
        by_layer(name): float(frozen[neurons].mean()) for name, neurons in layers
    }


def by_layer(name: str) -> str:
    """What the frozen share of a layer is called; the model itself may be one."""
    return f"frozen_by_layer/{name or 'model'}"


def plainly(text: str) -> str:
    """`text` without the user and password of a URI."""
    return re.sub(r"//[^/@\s]*@", "//", text)


def _writer(where: str) -> tuple[Any, str]:
    kind, colon, rest = where.partition(":")
    known = kind in KINDS and (rest in ("", "offline") if kind == "wandb" else bool(rest))
    if not known or (colon and not rest):
        raise ValueError(f"{where!r} is no place to log to: write {PLACES}")
    return import_module(f"neq.integrations.{KINDS[kind]}"), rest
