"""The parts that a suite names by import string: its model, data, task and own methods.

"parts:model" is `model` in parts.py beside the suite's file, or else in an installed module;
"nets.body:model" is in nets/body.py below it.
"""

import hashlib
import importlib
import sys
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from harness.errors import UserError, with_origin
from harness.paths import passed_over
from harness.suite import imports
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
        raise UserError(f"{reference!r} cannot be loaded: it has no {error.name!r}") from error


def _module(reference: str, folder: Path | str) -> Any:
    name, _, attribute = reference.partition(":")
    if not attribute:
        raise UserError(f"{reference!r}: write it as module:callable")
    from harness.seeds import restored

    try:
        with restored():  # a module may seed the streams when it is imported
            return imports.beside(name, Path(folder).resolve()) or _installed(name)
    except Exception as error:
        raise UserError(f"{reference!r} cannot be loaded: {with_origin(error)}") from error


def code_digests(suite: Suite, folder: Path, *, shipped: bool) -> tuple[str, dict[str, str]]:
    """Hashes of the user's own code: of the suite, and by name of each method of the user's own.

    The suite's: modules beside its file, unless it is `shipped` with neqbench, modules below its
    folder that its parts import, and modules elsewhere that its parts are. A method's likewise;
    what only methods import (files beside that import harness.methods, and what these import) is
    not the suite's.

    Code of neqbench itself and of installed packages is left out: `numerics` and the versions in
    the results speak for them.
    """
    folder = folder.resolve()
    references = [suite.task, suite.model.build, suite.data.load]
    references += [suite.probe.load] if suite.probe else []
    parts = _files(references, folder, shipped)
    methods = {
        name: _files([method.work[0]], folder, shipped)
        for name, method in suite.methods.items()
        if method.foreign
    }
    beside = {path for path in folder.glob("*.py") if not passed_over(path.name)}
    own = set() if shipped else beside
    heads = [path for path in own if imports.mentions(path, "harness.methods")]
    of_methods = imports.modules_below(folder, heads).union(*methods.values())
    return _digest(parts | (own - of_methods), folder), {
        name: _digest(files, folder) for name, files in methods.items()
    }


def _files(references: Iterable[str], folder: Path, shipped: bool) -> set[Path]:
    """The files of these parts, with what they import below the folder, that are the user's."""
    found = set()
    for reference in references:
        beside = imports.file_beside(reference.partition(":")[0], folder)
        if beside is not None:
            found |= set() if shipped else imports.modules_below(folder, [beside])
            continue
        path = Path(getattr(_module(reference, folder), "__file__", None) or __file__).resolve()
        if imports.own(path, folder):
            found |= imports.modules_below(folder, [path])
        elif "site-packages" not in path.parts and not any(map(path.is_relative_to, imports.OURS)):
            found.add(path)
    return found


def _digest(files: Iterable[Path], folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        known = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
        digest.update(known.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_part(reference: str, folder: Path | str, arguments: dict[str, Any]) -> Any:
    """What the callable at "module:attribute" returns; raises UserError where it fails."""
    builder = load_part(reference, folder)
    try:
        with imports.importing(folder):
            return builder(**arguments)
    except Exception as error:
        raise UserError(f"{reference!r} failed: {with_origin(error)}") from error


def build_model(reference: str, folder: Path | str, arguments: dict[str, Any]) -> "nn.Module":
    """The torch module that the callable at `reference` returns.

    Raises UserError for anything else, and for a module with layers whose sizes are not known yet.
    """
    from torch import nn

    module = build_part(reference, folder, arguments)
    if not isinstance(module, nn.Module):
        raise UserError(f"{reference!r} returned {type(module).__name__}, not a torch module")
    check_sizes(f"{reference!r}", module)
    return module


def check_sizes(where: str, model: "nn.Module") -> None:
    """Raises UserError, which begins with `where`, for layers such as nn.LazyLinear whose sizes
    are not known yet.
    """
    from neq.neurons import lazy_layers

    lazy = lazy_layers(model)
    if lazy:
        kind = type(model.get_submodule(lazy[0])).__name__
        raise UserError(
            f"{where}: layer {lazy[0] or '(the model itself)'}, a {kind}, has no size yet; run one "
            "forward on a sample where the model is built"
        )


def _installed(name: str) -> ModuleType:
    top = name.split(".")[0]
    if top in ("torchvision", "timm"):
        from harness.vision import torchvision

        return torchvision(name)
    if top == "suites":
        return imports.shipped(name)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)
