"""Find suites, read their files, apply `--set`, and say in a line what is wrong in them."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from harness.errors import UserError
from harness.paths import is_file, lost_link, read_text
from harness.suite import sweep
from harness.suite.config import Suite
from harness.suite.imports import SHIPPED
from harness.suite.method_specs import KINDS


def shipped_suites() -> dict[str, Path]:
    """Name → file of each suite that is shipped with neqbench."""
    return {_name(path): path for path in sorted(SHIPPED.glob("*/*.toml"), key=_name)}


def _name(path: Path) -> str:
    """`cifar10/suite.toml` is cifar10, `cifar10/adam.toml` is cifar10-adam."""
    folder = path.parent.name
    return folder if path.stem == "suite" else f"{folder}-{path.stem}"


def load_suite(name: str, settings: Sequence[str] = ()) -> tuple[Suite, Path]:
    """The suite called `name`, or at that path, with `settings` applied; and its folder.

    `settings`: as after `--set`, "recipe.epochs=5". Of a sweep over model, data or recipe it is the
    first experiment. Raises UserError for an unknown suite, an unreadable file, an unknown key or a
    bad value.
    """
    suites, folder = load_experiments(name, settings)
    return suites[0], folder


def load_experiments(name: str, settings: Sequence[str] = ()) -> tuple[list[Suite], Path]:
    """As `load_suite`, with a suite for each experiment of a sweep."""
    path = suite_file(name)
    values = _read(path)
    for setting in settings:
        _apply(values, setting)
    values.setdefault("name", _name(path))
    try:
        if "point" in values:
            raise ValueError("point: unknown key")
        points = sweep.grid_points(values)
        return [Suite.model_validate(v | {"point": point}) for point, v in points], path.parent
    except ValidationError as error:
        raise UserError(_explain(error, path)) from None
    except ValueError as error:
        raise UserError(f"{path.parent.name}/{path.name}: {error}") from None


def suite_file(name: str) -> Path:
    """The file of a suite, by its name or path; raises UserError where there is none."""
    known = shipped_suites()
    if name in known:
        return known[name]
    path = Path(name)
    if is_file(path / "suite.toml"):
        return (path / "suite.toml").resolve()
    if path.suffix == ".toml" and is_file(path):
        return path.resolve()
    raise UserError(
        lost_link(path / "suite.toml")
        or f"unknown suite {name!r}{_similar(name, known)}: it is neither one of "
        f"{', '.join(known)} nor a folder with a suite.toml"
    )


def _read(path: Path, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        values = tomllib.loads(read_text(path))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or not is_file(path.parent / base):
        lost = lost_link(path.parent / base) if isinstance(base, str) else ""
        raise UserError(f"{path}: extends: {lost or f'no file {base!r} beside it'}")
    if path.resolve() in extended:
        raise UserError(f"{path}: extends: it extends itself, by way of {extended[-1]}")
    return _merge(_read(path.parent / base, (*extended, path.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` wins; tables merge, but one that names a class or kind anew replaces the old."""
    merged = dict(base)
    for key, value in over.items():
        old = base.get(key)
        anew = isinstance(value, dict) and ("name" in value or "kind" in value)
        if isinstance(old, dict) and isinstance(value, dict) and not anew:
            value = _merge(old, value)
        merged[key] = value
    return merged


def _apply(values: dict[str, Any], setting: str) -> None:
    path, separator, text = setting.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise UserError(f"--set {setting}: write it as path=value, such as recipe.epochs=5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    except RecursionError:
        raise UserError(f"--set {setting[:60]}…: too deep to be a value") from None
    table = values
    for key in keys[:-1]:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            raise UserError(f"--set {setting}: {key!r} is a value, not a table with keys")
    table[keys[-1]] = value


def _explain(error: ValidationError, path: Path) -> str:
    errors = error.errors(include_url=False)  # a key misspelt is missing, too: say it first
    first, *more = sorted(errors, key=lambda found: found["type"] != "extra_forbidden")
    location = [str(part) for part in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    known = _fields(location[:-1])
    if location[:1] == ["methods"]:
        del location[2:3]  # the kind, which the user did not write there
    if first["type"] == "extra_forbidden":
        message = f"unknown key{_similar(location[-1], known)}; known: {', '.join(known)}"
    elif first["type"] == "too_short":
        message = "must not be empty"
    elif first["type"] == "union_tag_invalid":
        tags = ", ".join(kind for kind, spec in KINDS.items() if not spec.foreign)
        message = (
            f"unknown method kind {first['ctx']['tag']!r}; known: {tags}; a method of your own has "
            'build = "module:Class"'
        )
    elif first["type"] != "missing" and not isinstance(first["input"], dict):
        message += f", got {first['input']!r}"
    internal = ("constrained-", "function-", "literal[", "tuple[")
    where = ".".join(part for part in location if not part.startswith(internal))
    also = f" (and {len(more)} more)" if more else ""
    return f"{path.parent.name}/{path.name}: {where or 'suite'}: {message}{also}"


def _fields(location: list[str]) -> list[str]:
    """Keys that the model at `location` of a Suite knows; for methods, those of the kind."""
    model: Any = Suite
    for part in location:
        field = model.model_fields.get(part)
        if part == "methods" or field is None:
            model = KINDS.get(location[-1], Suite)
            break
        model = next(filter(_is_table, get_args(field.annotation)), field.annotation)
    return [name for name in getattr(model, "model_fields", {}) if name != "kind"]


def _is_table(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _similar(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
