"""Sweeps: where a suite expects one value, a list of them makes a grid.

A method's parameters make methods: `[methods.neq] eps = [0, 1e-4]` is "neq eps=0" and "neq
eps=0.0001". Values of model, data and recipe make experiments, each with a baseline of its own.
"""

import re
from itertools import product
from typing import Any, get_origin

from harness.suite.config import Data, Model, Recipe
from harness.suite.method_specs import with_kind

SECTIONS = {"model": Model, "data": Data, "recipe": Recipe}
# Arguments of torch's optimizers and schedulers that are one number, and those that are lists.
NUMBERS = {"lr", "momentum", "dampening", "weight_decay", "alpha", "rho", "lr_decay", "nesterov"}
NUMBERS |= {"gamma", "power", "factor", "start_factor", "end_factor", "step_size", "total_iters"}
NUMBERS |= {"T_max", "T_0", "T_mult", "eta_min", "max_lr", "amsgrad"}
NUMBERS |= {"patience", "threshold", "cooldown"}
LISTS = {"betas", "milestones", "schedulers", "etas", "step_sizes", "eps"}

Point = dict[str, Any]


def grid_points(values: dict[str, Any]) -> list[tuple[Point, dict[str, Any]]]:
    """(point, the suite's values there) for each point of its grid; a point is what was chosen for
    each axis, by path ("data.validation_size").

    Raises ValueError for an axis that is empty or has a value twice.
    """
    values = _with_methods(values)
    axes = dict(_axes(values))
    found = []
    for choice in product(*axes.values()):
        point, chosen = {}, values
        for (path, options), value in zip(axes.items(), choice, strict=True):
            chosen = _replaced(chosen, path.split("."), value)
            point[path] = _short(value, options)
        found.append((point, chosen))
    return found


def point_label(point: Point) -> str:
    """The point as a user reads it: "validation_size=50 optimizer=SGD"."""
    return " ".join(f"{path.rpartition('.')[2]}={_number(v)}" for path, v in point.items())


def family(name: str, known: list[str]) -> list[str]:
    """The methods of `known` that `name` means: itself, or all that a list in its table made."""
    return [name] if name in known else [k for k in known if k.startswith(f"{name} ")]


def _axes(values: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    found = [
        (f"{section}.{key}", options)
        for section, model in SECTIONS.items()
        for key, options in _table(values, section).items()
        if isinstance(options, list) and _takes_one(model, key)
    ]
    for part in ("optimizer", "scheduler"):
        for key, options in _table(_table(values, "recipe"), part).items():
            path = f"recipe.{part}.{key}"
            if isinstance(options, list) and key in NUMBERS:
                found.append((path, options))
            elif isinstance(options, list) and key not in LISTS:
                raise ValueError(f"{path}: a list; to sweep it, give a list of whole {part}s")
    return [(path, _distinct(path, options)) for path, options in found]


def _takes_one(model: Any, key: str) -> bool:
    """Whether a list there is an axis: the field itself is none."""
    field = model.model_fields.get(key)
    return field is not None and get_origin(field.annotation) is not tuple


def _replaced(values: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    return values | {first: _replaced(values[first], rest, value) if rest else value}


def _short(value: Any, others: list[Any]) -> Any:
    """A value as a point is named after it; of a table, what tells it from the others."""
    if not isinstance(value, dict):
        return value
    keys = [k for k in value if k == "name" or any(_other(o, k) != value[k] for o in others)]
    words = [value[k] if k == "name" else f"{k}={_number(value[k])}" for k in keys]
    return " ".join(words) or "{}"


def _other(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, dict) else None


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _with_methods(values: dict[str, Any]) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for name, table in _table(values, "methods").items():
        methods |= _expanded(name, table) if isinstance(table, dict) else {name: table}
    if not methods:
        return values
    chosen = values.get("default_methods", ())
    if isinstance(chosen, list) and all(isinstance(name, str) for name in chosen):
        chosen = [each for name in chosen for each in family(name, list(methods)) or [name]]
    return values | {"methods": methods, "default_methods": chosen}


def _expanded(name: str, table: dict[str, Any]) -> dict[str, Any]:
    axes = {
        key: _distinct(f"methods.{name}.{key}", options)
        for key, options in table.items()
        if isinstance(options, list)
    }
    if not axes:
        return {name: table}
    made: dict[str, Any] = {}
    for choice in product(*axes.values()):
        chosen = dict(zip(axes, choice, strict=True))
        words = (_worded(key, value, axes[key]) for key, value in chosen.items())
        label = " ".join([name, *words])
        if label in made:
            raise ValueError(f"methods.{name}: two of its values are both called {label!r}")
        made[label] = with_kind(name, table | chosen)
    return made


def _worded(key: str, value: Any, others: list[Any]) -> str:
    """A parameter as the method is called after it; of a table, what tells it from the others."""
    if not isinstance(value, dict):
        return f"{key}={_number(value)}"
    keys = [k for k in value if any(_other(other, k) != value[k] for other in others)]
    words = (f"{k}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', _number(value[k]))}" for k in keys)
    return " ".join(words) or f"{key}=default"


def _distinct(path: str, options: list[Any]) -> list[Any]:
    if not options:
        raise ValueError(f"{path}: an empty list; give at least one value")
    for position, value in enumerate(options):
        if value in options[:position]:
            raise ValueError(f"{path}: {value!r} is listed twice")
    return options


def _table(values: dict[str, Any], key: str) -> dict[str, Any]:
    table = values.get(key)
    return table if isinstance(table, dict) else {}
