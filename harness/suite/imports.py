"""Imports of a suite's own modules: from its folder first, and none of another suite's.

Suites lie side by side, and each may have a `layers.py`. Python knows one module of a name: while a
suite's code is loaded, its own modules are the ones that are known.
"""

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType

SHIPPED = Path(__file__).parents[2] / "suites"
OURS = [SHIPPED, SHIPPED.parent / "harness", SHIPPED.parent / "neq"]

_neighbours: dict[Path, dict[str, ModuleType]] = {}  # by folder: what its code has imported there


@contextmanager
def importing(folder: Path | str) -> Iterator[None]:
    """Inside, `import name` finds the modules of this folder before any other."""
    folder = Path(folder).resolve()
    for modules in _neighbours.values():
        for name, module in modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
    mine = _neighbours.setdefault(folder, {})
    sys.modules.update(mine)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        new = {name: sys.modules[name] for name in set(sys.modules) - before}
        mine.update({name: module for name, module in new.items() if _below(module, folder)})


def own(path: Path, folder: Path) -> bool:
    """Whether a file below the folder, or linked there, is the user's: neither of an environment
    that lies there, nor of neqbench itself.
    """
    if not path.is_relative_to(folder):
        return False
    real = path.resolve()
    inside = real.relative_to(folder) if real.is_relative_to(folder) else real
    if "site-packages" in (*path.relative_to(folder).parts, *inside.parts):
        return False
    return not any(real.is_relative_to(o) and not folder.is_relative_to(o) for o in OURS)


def _below(module: ModuleType, folder: Path) -> bool:
    """Whether a module, or a package without a file, is the user's own below the folder."""
    where = [module.__file__] if getattr(module, "__file__", None) else _paths(module)
    return any(own(Path(path).absolute(), folder) for path in where if path)


def _paths(module: ModuleType) -> list[str]:
    return list(getattr(module, "__path__", []))


def file_beside(name: str, folder: Path) -> Path | None:
    """The user's file of that module in the folder, or below it; None where there is none."""
    path = folder.joinpath(*name.split("."))
    files = (path.parent / f"{path.name}.py", path / "__init__.py")
    return next((file for file in files if file.is_file() and own(file, folder)), None)


def beside(name: str, folder: Path) -> ModuleType | None:
    """The module called `name` in the folder, or below it ("nets.body"); None where there is none.

    Raises whatever the module raises.
    """
    file = file_beside(name, folder)
    if file is None:
        return None
    if "." not in name and file.name != "__init__.py":
        return _alone(file)
    with importing(folder):
        module = importlib.import_module(name)
    if not _below(module, folder):
        raise ImportError(f"{name} is a module elsewhere already; give {file} another name")
    return module


def _alone(path: Path) -> ModuleType:
    """A module under a name that no other suite's module has: several may be loaded."""
    name = f"neqbench_suite_{path.parent.name}_{abs(hash(path)):x}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with importing(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def shipped(name: str) -> ModuleType:
    """A module of neqbench's own `suites`, also where a folder of the user's has that name."""
    known = sys.modules.get("suites")
    if known is None or SHIPPED not in map(Path, _paths(known)):
        for other in [n for n in sys.modules if n == "suites" or n.startswith("suites.")]:
            del sys.modules[other]
        spec = importlib.util.spec_from_file_location("suites", SHIPPED / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules["suites"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["suites"])
    return importlib.import_module(name)


def modules_below(folder: Path, start: Iterable[Path]) -> set[Path]:
    """The files of `start`, and those below the folder that they import, directly or not.

    Found by reading them, so that an import inside a function counts, too.
    """
    found: set[Path] = set()
    todo = [path.absolute() for path in start]  # not where a link leads: that is elsewhere
    while todo:
        path = todo.pop()
        if path not in found and own(path, folder):
            found.add(path)
            todo += [file.absolute() for file in _imported(path, folder) if file.is_file()]
    return found


def mentions(path: Path, module: str) -> bool:
    """Whether a file imports the module, or something from it."""
    for node in _statements(path.read_bytes()):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if any(f"{name}.".startswith(f"{module}.") for name in names):
            return True
    return False


@lru_cache(maxsize=1024)  # every point of a sweep reads the same files
def _statements(source: bytes) -> list[ast.Import | ast.ImportFrom]:
    """What a file imports, also inside functions."""
    with suppress(SyntaxError):  # who imports it will say so
        nodes = ast.walk(ast.parse(source))
        return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return []


def _imported(path: Path, folder: Path) -> Iterator[Path]:
    for node in _statements(path.read_bytes()):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _files(folder, alias.name.split("."))
        else:
            base = path.parents[node.level - 1] if node.level else folder
            module = node.module.split(".") if node.module else []
            for alias in node.names:
                yield from _files(base, [*module, alias.name])


def _files(base: Path, names: list[str]) -> Iterator[Path]:
    """Where the modules of "a.b.c" may lie: a package runs before what is in it."""
    yield base / "__init__.py"
    for count in range(1, len(names) + 1):
        path = base.joinpath(*names[:count])
        yield path / "__init__.py"
        yield path.parent / f"{path.name}.py"
