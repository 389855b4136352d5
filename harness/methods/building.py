"""Builds the method of a trial, and holds what it states against what can be stored."""

import inspect
import io
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError, one_line, with_origin
from harness.methods.method import Measures, Method
from harness.methods.training import Training
from harness.storage.schema import COLUMNS, IDENTITY
from harness.suite.config import Probe, Sharpness, TrialSpec
from harness.suite.imports import importing
from harness.suite.parts import load_part

# What each hook is called with: by position, and by name.
CALLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "start": ((), ()),
    "after_forward": (("inputs", "targets", "outputs"), ("weight", "last")),
    "after_backward": ((), ()),
    "after_step": ((), ()),
    "end_epoch": (("epoch",), ()),
    "flops": (("usual",), ()),
    "measures": ((), ()),
    "readings": ((), ()),
    "state_dict": ((), ()),
    "load_state_dict": (("state",), ()),
}
STATED = ("frozen", "plan", "size")  # properties
COUNTS = tuple(f"backward_{name}" for name in ("dense", "paper", "required", "executed"))
FLOPS = ("forward", *COUNTS, "overhead")
READINGS = ("phi", "delta_phi", "velocity")
INHERIT = "let the class inherit from harness.methods.Method, whose hooks do nothing"


def build_method(spec: TrialSpec, training: Training) -> Method:
    """The method of `spec`, for this training.

    Raises UserError where it can't be built, does not fit the model or the optimizer, or lacks a
    hook.
    """
    reference, arguments = spec.method_spec.work
    builder = load_part(reference, spec.folder)
    try:
        inspect.signature(builder).bind(training, **arguments)
    except TypeError as error:
        words = ", ".join(["training", *arguments])
        raise UserError(
            f"method {spec.method}: {reference} is called as {reference.partition(':')[2]}({words})"
            f", and {one_line(error)}; mend its parameters, or methods.{spec.method}.arguments"
        ) from None
    try:
        with importing(spec.folder):
            method: Method = builder(training, **arguments)
    except ValueError as error:
        raise UserError(f"method {spec.method} on this model: {error}") from error
    except Exception as error:
        raise UserError(f"method {spec.method}: {reference}: {with_origin(error)}") from error
    _check_hooks(spec.method, method)
    return method


def _check_hooks(name: str, method: Any) -> None:
    kind = type(method).__name__
    for hook, (positional, named) in CALLS.items():
        found = getattr(method, hook, None)
        if not callable(found):
            raise UserError(f"method {name}: {kind} has no hook {hook}(); {INHERIT}")
        try:
            inspect.signature(found).bind(*positional, **dict.fromkeys(named))
        except (TypeError, ValueError) as error:  # ValueError: it has no signature
            called = ", ".join([*positional, *(f"{word}=…" for word in named)])
            raise UserError(
                f"method {name}: {kind}.{hook} is called as {hook}({called}), and {error}; mend "
                "its parameters"
            ) from None
    for attribute in STATED:
        if not hasattr(type(method), attribute) and attribute not in vars(method):
            raise UserError(f"method {name}: {kind} has no {attribute!r}; {INHERIT}")


def checked_mask(name: str, method: Method, neurons: int) -> Tensor:
    """Who stands still, as a copy: bool [neurons]; raises UserError for another type or shape."""
    found = method.frozen
    if found is None:
        return torch.zeros(neurons, dtype=torch.bool)
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != (neurons,):
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise _wrong(name, method, "frozen", f"must be None or bool [{neurons}], got {got}")
    return found.detach().cpu().clone()


def checked_readings(name: str, method: Method, neurons: int) -> dict[str, Tensor]:
    """Readings of the neurons by name; raises UserError for other names, and other shapes."""
    found = dict(method.readings())
    for key, values in found.items():
        if key not in READINGS:
            raise _wrong(
                name,
                method,
                "readings",
                f"{key!r} is none of {', '.join(READINGS)}; record it in measures()",
            )
        if not isinstance(values, Tensor) or values.shape != (neurons,):
            raise _wrong(name, method, "readings", f"{key!r} must be a tensor [{neurons}]")
    return found


def epoch_flops(name: str, method: Method, usual: Mapping[str, int]) -> dict[str, int | None]:
    """FLOPs of the epoch by name: the `usual` ones, and what the method states otherwise.

    Raises UserError for names that are none, and for anything but whole numbers from 0 on; what was
    executed may be None, where it can't be told.
    """
    stated = dict(method.flops(dict(usual)))
    for key, value in stated.items():
        if key not in FLOPS:
            raise _wrong(name, method, "flops", f"{key!r} is none of {', '.join(FLOPS)}")
        if value is None and key == "backward_executed":
            continue
        if not isinstance(value, int) or value < 0:
            raise _wrong(
                name, method, "flops", f"{key!r} must be a whole number from 0 on, got {value!r}"
            )
    return {**usual, **stated}


def checked_size(name: str, method: Method) -> int | None:
    """Parameters that are left, of a method that prunes; raises UserError for no whole number."""
    found = method.size
    if found is not None and (not isinstance(found, int) or found < 0):
        raise _wrong(name, method, "size", f"must be None or a whole number, got {found!r}")
    return found


def measure_rows(name: str, method: Method, layers: Any) -> list[dict[str, Any]]:
    """What the method records of the epoch: rows with `layer`, `name` and `value`.

    `layers`: names of the model's modules. Raises UserError for a name that is a column of
    `epochs`, an unknown layer, and a value that is no number; one that is not finite is null.
    """
    by_epoch = (IDENTITY, COLUMNS["epochs"], COLUMNS["measures"])
    taken = {column.name for table in by_epoch for column in table}
    taken -= {column.name for column in COLUMNS["measures"]} - {"layer", "epoch"}
    of_suites = {*Sharpness.measures, *Probe.measures}
    measures: Measures = method.measures()
    rows = []
    for key, value in measures.items():
        measure, layer = key if isinstance(key, tuple) and len(key) == 2 else (key, None)
        if not isinstance(measure, str) or not measure:
            raise _wrong(name, method, "measures", f"{key!r} is no name; write 'x' or ('x', layer)")
        if measure in taken:
            raise _wrong(
                name, method, "measures", f"{measure!r} is a column already; choose another name"
            )
        if measure in of_suites:
            raise _wrong(
                name, method, "measures", f"{measure!r} is what suites ask for; choose another name"
            )
        if layer is not None and layer not in layers:
            raise _wrong(name, method, "measures", f"no layer is called {layer!r}")
        rows.append({"layer": layer, "name": measure, "value": _number(name, method, key, value)})
    return rows


def _number(name: str, method: Method, key: Any, value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise _wrong(name, method, "measures", f"{key!r} is {value!r}, and no number") from None
    return number if math.isfinite(number) else None


def check_state(name: str, method: Method) -> dict[str, Any]:
    """The method's state, as it comes out of a checkpoint.

    Raises UserError where it holds more than tensors and plain values, or comes out otherwise.
    """
    state = method.state_dict()
    if not isinstance(state, dict):
        raise _wrong(name, method, "state_dict", f"must return a dict, got {type(state).__name__}")
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    except Exception as error:
        raise _wrong(
            name,
            method,
            "state_dict",
            f"can't be stored ({one_line(error)[:80]}); keep tensors and plain values",
        ) from None
    if not equal(state, loaded):
        raise _wrong(name, method, "state_dict", "comes out of a checkpoint otherwise")
    return loaded


def equal(a: Any, b: Any) -> bool:
    """Whether two states are the same to the bit, through dicts, lists and tuples."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return alike and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b) or (a != a and b != b)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _wrong(name: str, method: Method, hook: str, what: str) -> UserError:
    """The error about what a hook of the method called `name` gives."""
    return UserError(f"method {name}: {type(method).__name__}.{hook}: {what}")
