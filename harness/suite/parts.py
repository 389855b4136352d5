"""The parts that a suite names by import string: its model, data and task.

"parts:model" is `model` in parts.py beside the suite's file, or else in an installed module.
"""

import hashlib
import importlib
import importlib.util
import sys
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, with_origin
from harness.suite.config import Suite

if TYPE_CHECKING:
    from torch import nn


def load_part(reference: str, folder: Path | str) -> Any:
    """The object at "module:attribute", from a module in the suite's `folder` or an installed one.

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
        raise UserError(f"{reference!r} cannot be loaded: {with_origin(error)}") from error


def code_digest(suite: Suite, folder: Path, shipped: bool) -> str:
    """Hash of the user's own code: modules in the folder of a suite, unless it is `shipped` with
    neqbench, and modules elsewhere that its parts come from.

    Code of neqbench itself and of installed packages is left out: `numerics` and the versions in
    the results speak for them.
    """
    own = set() if shipped else set(folder.glob("*.py"))
    ours = [Path(__file__).parents[2] / name for name in ("harness", "suites", "neq")]
    for reference in (suite.task, suite.model.build, suite.data.load):
        path = Path(getattr(_module(reference, folder), "__file__", None) or __file__)
        if "site-packages" not in path.parts and not any(map(path.is_relative_to, ours)):
            own.add(path)
    digest = hashlib.sha256()
    for path in sorted(path.resolve() for path in own):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_part(reference: str, folder: Path | str, arguments: dict[str, Any]) -> Any:
    """What the callable at "module:attribute" returns; raises UserError where it fails."""
    builder = load_part(reference, folder)
    try:
        return builder(**arguments)
    except Exception as error:
        raise UserError(f"{reference!r} failed: {with_origin(error)}") from error


def build_model(reference: str, folder: Path | str, arguments: dict[str, Any]) -> "nn.Module":
    """The torch module that the callable at `reference` returns; raises UserError for any other."""
    from torch import nn

    module = build_part(reference, folder, arguments)
    if not isinstance(module, nn.Module):
        raise UserError(f"{reference!r} returned {type(module).__name__}, not a torch module")
    return module


def _installed(name: str) -> ModuleType:
    if name.split(".")[0] in ("torchvision", "timm"):
        from harness.vision import torchvision

        return torchvision(name)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _beside(path: Path) -> ModuleType:
    """A suite's own module, under a name that no other suite's module has: several may be
    loaded.
    """
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
