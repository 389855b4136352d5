"""Find suites, read their files, apply `--set`, load the parts that they name."""

import difflib
import hashlib
import importlib
import importlib.util
import sys
import tomllib
import traceback
from collections.abc import Sequence
from functools import reduce
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from harness import grid
from harness.config import Suite
from harness.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from harness.tasks import Task


def builtin() -> dict[str, Path]:
    """Name → file of the suites that ship with neqbench."""
    root = Path(str(resources.files("suites")))
    return {_name(path): path for path in sorted(root.glob("*/*.toml"))}


def _name(path: Path) -> str:
    """`cifar10/suite.toml` is cifar10, `cifar10/adam.toml` is cifar10-adam."""
    folder = path.parent.name
    return folder if path.stem == "suite" else f"{folder}-{path.stem}"


def load(name: str, settings: Sequence[str] = ()) -> tuple[Suite, Path]:
    """The suite called `name`, or at that path, with `--set` applied; and its folder.

    Of a sweep over model, data or recipe its first experiment. Raises UserError for an unknown
    suite, an unreadable file, an unknown key or a bad value.
    """
    suites, folder = experiments(name, settings)
    return suites[0], folder


def experiments(name: str, settings: Sequence[str] = ()) -> tuple[list[Suite], Path]:
    """As `load`, with a suite for each experiment of a sweep."""
    path = locate(name)
    values = _read(path)
    for setting in settings:
        _apply(values, setting)
    values.setdefault("name", _name(path))
    try:
        if "point" in values:
            raise ValueError("point: unknown key")
        points = grid.experiments(values)
        return [Suite.model_validate(v | {"point": point}) for point, v in points], path.parent
    except ValidationError as error:
        raise UserError(_explain(error, path)) from None
    except ValueError as error:
        raise UserError(f"{path.parent.name}/{path.name}: {error}") from None


def locate(name: str) -> Path:
    """The file of a suite by name or path; raises UserError where there is none."""
    known = builtin()
    if name in known:
        return known[name]
    path = Path(name)
    if path.is_dir() and (path / "suite.toml").is_file():
        return (path / "suite.toml").resolve()
    if path.suffix == ".toml" and path.is_file():
        return path.resolve()
    raise UserError(
        f"unknown suite {name!r}{_similar(name, known)}: it is neither one of "
        f"{', '.join(known)} nor a folder with a suite.toml"
    )


def _read(path: Path, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise UserError(f"{path}: extends: no file {base!r} beside it")
    if path in extended:
        raise UserError(f"{path}: extends: it extends itself")
    return _merge(_read(path.parent / base, (*extended, path)), values)


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
        tags = first["ctx"]["expected_tags"].replace("'", "")
        message = f"unknown method kind {first['ctx']['tag']!r}; known: {tags}"
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
            from harness.methods import KINDS

            model = KINDS.get(location[-1], Suite)
            break
        model = field.annotation
    return [name for name in getattr(model, "model_fields", {}) if name != "kind"]


def _similar(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def part(reference: str, folder: Path | str) -> Any:
    """The object at `module:attribute`, from a module beside the suite or an installed one.

    Raises UserError where either is missing or the module fails.
    """
    try:
        return reduce(getattr, reference.partition(":")[2].split("."), _module(reference, folder))
    except AttributeError as error:
        raise UserError(f"{reference!r} cannot be loaded: {error}") from error


def _module(reference: str, folder: Path | str) -> Any:
    name, _, attribute = reference.partition(":")
    if not attribute:
        raise UserError(f"{reference!r}: write it as module:callable")
    beside = Path(folder) / f"{name}.py"
    try:
        return _beside(beside) if beside.is_file() else _installed(name)
    except Exception as error:
        raise UserError(f"{reference!r} cannot be loaded: {said(error)}") from error


def said(error: Exception) -> str:
    """What a part raised, and where, in a line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def code(suite: Suite, folder: Path, shipped: bool) -> str:
    """Digest of the user's own code: modules beside a suite that is not shipped, and of parts.

    Code of neqbench itself and of installed packages is left out: `numerics` and the versions in
    the results speak for them.
    """
    own = set() if shipped else set(folder.glob("*.py"))
    ours = [Path(__file__).parents[1] / name for name in ("harness", "suites", "neq")]
    for reference in (suite.task, suite.model.build, suite.data.load):
        path = Path(getattr(_module(reference, folder), "__file__", None) or __file__)
        if "site-packages" not in path.parts and not any(map(path.is_relative_to, ours)):
            own.add(path)
    digest = hashlib.sha256()
    for path in sorted(path.resolve() for path in own):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build(reference: str, folder: Path | str, arguments: dict[str, Any]) -> Any:
    """What the callable at `reference` returns; raises UserError where it fails."""
    builder = part(reference, folder)
    try:
        return builder(**arguments)
    except Exception as error:
        raise UserError(f"{reference!r} failed: {said(error)}") from error


def build_model(reference: str, folder: Path | str, arguments: dict[str, Any]) -> "nn.Module":
    """The module that the builder at `reference` returns; raises UserError."""
    from torch import nn

    module = build(reference, folder, arguments)
    if not isinstance(module, nn.Module):
        raise UserError(f"{reference!r} returned {type(module).__name__}, not a torch module")
    return module


def build_task(suite: Suite, folder: Path | str) -> "Task":
    """The suite's task; raises UserError where it names none."""
    from harness.tasks import Task

    task = build(suite.task, folder, suite.task_arguments)
    if not isinstance(task, Task):
        raise UserError(f"{suite.task!r} returned {type(task).__name__}, not a harness.tasks.Task")
    if not isinstance(getattr(task, "metric", None), str):
        raise UserError(f"{suite.task!r} has no metric: name what its meter measures")
    return task


def _installed(name: str) -> ModuleType:
    if name.split(".")[0] in ("torchvision", "timm"):
        from harness.vision import torchvision

        return torchvision(name)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _beside(path: Path) -> ModuleType:
    """A suite's own module, under a name that no other suite's module has."""
    name = f"neqbench_suite_{path.parent.name}_{abs(hash(path)):x}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # for imports of its neighbours
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(path.parent))
    return module
