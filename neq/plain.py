"""Models as PyTorch's own tools expect them: for export and profilers, in copies and in files.

A freezer gives a model's layers other classes, attributes whose names begin with OURS, and hooks.
None of them is in a copy or a pickle, and none is there inside `plain`.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar
from weakref import WeakSet, ref

from torch import fx, nn

OURS = "_neq_"
STATE = "__getstate__"

_resting: WeakSet[nn.Module] = WeakSet()  # modules of models that are plain for a while


class Hook:
    """A module's hook that copies and pickles of it are without."""

    def __reduce__(self) -> Any:
        # A class of its own way to be copied may copy its hooks: as one that does nothing, then,
        # and is to be had where this package is not.
        return getattr, (nullcontext(), "__exit__")


class Selective(nn.Module):
    """A layer that copies, pickles and tools take for the `plain` one that it was made as."""

    plain: ClassVar[type[nn.Module]]

    def __getstate__(self) -> dict[str, Any]:
        return _state(self)

    def __reduce_ex__(self, _protocol: Any) -> Any:
        # A parametrisation's class has a __getstate__ of its own, which raises torch's error.
        return object.__new__, (plain_class(type(self)),), self.__getstate__()

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        copied: nn.Module = object.__new__(plain_class(type(self)))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(_state(self), memo))  # type: ignore[no-untyped-call]
        return copied

    def __prepare_scriptable__(self) -> Any:
        raise RuntimeError(
            "torch.jit.script can't read the layers of a model that a NeuronFreezer is at work on: "
            "call it inside `with freezer.plain():`"
        )

    def traced_by_fx(self, proxy: fx.Proxy) -> Any:
        """What torch.fx makes of a call of the plain layer: one node, unless its tracer says
        otherwise.
        """
        layer, tracer = copy.copy(self), proxy.tracer
        if isinstance(tracer, fx.Tracer):
            name = tracer.path_of_module(self)
            if name and tracer.is_leaf_module(layer, name):
                return tracer.create_proxy("call_module", name, (proxy,), {})
        return layer.forward(proxy)


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """`kind` without what is selective in it, also where a parametrisation derives from that."""
    if not issubclass(kind, Selective):
        return kind
    if "plain" in vars(kind):
        return kind.plain
    body = {name: value for name, value in vars(kind).items() if name not in _OF_EACH_CLASS}
    # torch gives it one only where the class that it derives from has none.
    body["__deepcopy__"] = Selective.__deepcopy__
    bases = tuple(plain_class(base) for base in kind.__bases__)
    derived: type[nn.Module] = type(kind.__name__, bases, body)
    return derived


_OF_EACH_CLASS = ("__dict__", "__weakref__")


def _state(layer: nn.Module) -> dict[str, Any]:
    return _bare(nn.Module.__getstate__(layer))  # type: ignore[no-untyped-call]


def _bare(state: Mapping[str, Any]) -> dict[str, Any]:
    """A module's attributes without ours."""
    kept = {name: value for name, value in state.items() if not _ours(name, value)}
    for name, hooks in _hooks(kept):
        if any(isinstance(hook, Hook) for hook in hooks.values()):
            others = ((key, hook) for key, hook in hooks.items() if not isinstance(hook, Hook))
            kept[name] = type(hooks)(others)
    return kept


def _ours(name: str, value: Any) -> bool:
    return name.startswith(OURS) or (name == STATE and isinstance(value, _State))


def _hooks(attributes: Mapping[str, Any]) -> list[tuple[str, dict[int, Any]]]:
    """A module's tables of hooks, with their names."""
    found = attributes.items()
    return [(n, table) for n, table in found if n.endswith("_hooks") and isinstance(table, dict)]


class _State:
    """What is copied and pickled of a module, in place of its class's `__getstate__`."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = ref(module) if module is not None else lambda: None

    def __call__(self) -> Any:
        module = self._module()
        if module is None:
            raise RuntimeError(
                "this is the copy of a model that a NeuronFreezer was at work on, by its class's "
                "own __deepcopy__: make it inside `with freezer.plain():`"
            )
        state = type(module).__getstate__(module)  # type: ignore[no-untyped-call]
        return _bare(state) if isinstance(state, dict) else state

    def __deepcopy__(self, memo: dict[int, Any]) -> "_State":
        """Only in a class that copies all of its attributes by itself, as parametrised ones do."""
        return _State(memo.get(id(self._module())))

    def __reduce__(self) -> Any:
        return partial, (nn.Module.__getstate__,)


def leave_out(module: nn.Module) -> None:
    """Let copies and pickles of `module` be without its hooks that are Hooks."""
    module.__dict__.setdefault(STATE, _State(module))


def let_in(module: nn.Module) -> None:
    """Undo `leave_out` where `module` has no Hook any more."""
    tables = [table for _, table in _hooks(vars(module))]
    mine = isinstance(vars(module).get(STATE), _State)
    if mine and not any(isinstance(hook, Hook) for table in tables for hook in table.values()):
        del module.__dict__[STATE]


def is_resting(module: nn.Module) -> bool:
    """Whether `module` is part of a model that is plain for a while."""
    return bool(_resting) and module in _resting


@contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """Inside, `model` has the classes, attributes and hooks that it has without freezers.

    A layer that somebody has made another one inside, or has prepared anew, stays as it is.
    """
    resting = [module for module in model.modules() if module not in _resting]
    taken = [_Taken(module) for module in resting]
    _resting.update(resting)
    try:
        yield
    finally:
        for module, ours in zip(resting, taken, strict=True):
            _resting.discard(module)
            ours.put_back(module)


class _Taken:
    """What has been taken from a module to make it plain."""

    def __init__(self, module: nn.Module) -> None:
        self._kind, self._plain = type(module), plain_class(type(module))
        if self._plain is not self._kind:
            module.__class__ = self._plain
        attributes = vars(module)
        self._attributes = {n: attributes.pop(n) for n in [*attributes] if _ours(n, attributes[n])}
        # Each with its table, its key, and those before it.
        self._hooks: list[tuple[dict[int, Any], int, Any, list[int]]] = []
        for _, table in _hooks(attributes):
            keys = list(table)
            for place, key in enumerate(keys):
                if isinstance(table[key], Hook):
                    self._hooks.append((table, key, table.pop(key), keys[:place]))

    def put_back(self, module: nn.Module) -> None:
        if type(module) is self._plain:
            if self._plain is not self._kind:
                module.__class__ = self._kind
            module.__dict__.update(self._attributes)
        for table, key, hook, before in self._hooks:
            keys = list(table)
            place = max((keys.index(other) + 1 for other in before if other in table), default=0)
            table[key] = hook
            for later in keys[place:]:
                table[later] = table.pop(later)
