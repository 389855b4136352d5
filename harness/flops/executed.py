"""What a forward executes, operator by operator, below autograd and whatever has called it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from harness.flops.operators import NESTED, body, is_foreign, uncounted_name
from harness.flops.oracle import Rules
from neq.calls import Run, tensors

_SIZELESS = "no storage"  # stands for all tensors without one
_MEMORY = ("empty", "new_empty", "detach", "alias", "lift")  # compute nothing


def _numbers(values: Any) -> Iterator[int]:
    """Of the storages of the tensors in it."""
    for value in tensors(values):
        if value.layout == torch.strided and not value.is_nested:
            yield value.untyped_storage()._cdata


def _outputs(func: Any, args: Any, named: Any, result: Any) -> list[Any]:
    """What an operator has written: its results, and the arguments that it changes in place."""
    found, schema = [result], getattr(func, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found.append(args[place] if place < len(args) else named.get(argument.name))
    return found


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts products while it is on.

    `flops`: so far; `names`: operators that multiply and that no rule counts; `opened`: those that
    somebody has registered, whose bodies were counted.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        rules: Any = FlopCounterMode(display=False, custom_mapping=Rules().mapping)
        self._rules: dict[Any, Any] = rules.flop_registry
        self.flops = 0
        self.names: set[str] = set()
        self.opened: set[Any] = set()
        self._written: set[int] = set()  # storages, inside of a foreign operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._counted(func, func, args, named) if func in self._rules else NotImplemented
        packet = func._overloadpacket
        if packet not in self._rules and func.namespace != "prim":
            result = self._parts(func, args, named)
            if result is not NotImplemented:
                return result
        return self._counted(func, packet, args, named)

    def _parts(self, func: Any, args: Any, named: Any) -> Any:
        """Run the operators that `func` is made of; NotImplemented where it is one itself."""
        inside = body(func)
        if inside is None:
            with self:
                return func.decompose(*args, **named)
        before, outer, self._written = self.flops, self._written, set()
        with self:
            result = inside(*args, **named)
        written = self._written.issuperset(_numbers(_outputs(func, args, named, result)))
        self._written = outer
        if self.flops > before:
            self.opened.add(func._overloadpacket)
        self._note(func, 0, (args, named), result)
        # Of torchvision's own, written in C++, those without a product in them multiply nothing,
        # and what the backward of the others does can't be seen.
        known = self.flops == before if func.namespace == "torchvision" else written
        if not known:
            self.names.add(f"{func.namespace}::{func._opname}")
        return result

    def _counted(self, func: Any, packet: Any, args: Any, named: Any) -> Any:
        result, rule = func(*args, **named), self._rules.get(packet)
        name = getattr(func, "_opname", str(func))
        given = [leaf for leaf in tree_leaves((args, named)) if isinstance(leaf, Tensor)]
        odd = [t for t in given if t.layout != torch.strided or t.is_nested]
        multiplies = rule is not None or uncounted_name(name) is not None
        if odd and multiplies and packet not in NESTED:
            kind = "nested" if odd[0].is_nested else "sparse"
            self.names.add(f"aten::{name} of {kind} tensors")
            rule = None
        elif rule is None and multiplies:
            self.names.add(str(uncounted_name(name)))
        elif rule is None and is_foreign(func):
            self.names.add(f"{func.namespace}::{name}")
        if not name.startswith(_MEMORY):
            self._written.update(_numbers(_outputs(func, args, named, result)))
        flops = 0 if rule is None else int(rule(*args, **named, out_val=result))
        self.flops += flops
        self._note(func, flops, (args, named), result)
        return result

    def _note(self, func: Any, flops: int, given: Any, result: Any) -> None:
        """An operator has run."""


@dataclass(frozen=True, slots=True)
class _Done:
    """An operator that has run: its FLOPs, the storages that it read, and those that it wrote."""

    flops: int
    read: frozenset[Any]
    written: frozenset[Any]


class Executed(Products):  # type: ignore[no-untyped-call]
    """The products of one forward of a model; `needed`: FLOPs of those that its output needs."""

    def __init__(self, run: Run) -> None:
        """`run`: the forward of the model that it is given."""
        super().__init__()
        self._run = run
        self._done: list[_Done] = []
        self._storages: dict[int, Any] = {}  # held, so that no number comes twice
        self.needed = 0

    def __call__(self, model: nn.Module) -> Any:
        """Run the forward and count it; returns the outputs."""
        outputs: list[Any] = []
        handle = model.register_forward_hook(lambda _module, _args, out: outputs.append(out))
        try:
            with self:
                outputs.append(self._run(model))
        finally:
            handle.remove()
        read = {*self._of(tensors(outputs))}
        for done in reversed(self._done):
            if not read.isdisjoint(done.written):
                read |= done.read
                self.needed += done.flops
        self._done, self._storages = [], {}
        return outputs[-1]

    def _note(self, func: Any, flops: int, given: Any, result: Any) -> None:
        args, named = given
        read = frozenset(self._of(tree_leaves(given)))
        written = frozenset(self._of(tree_leaves(_outputs(func, args, named, result))))
        self._done.append(_Done(flops, read, written))

    def _of(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            if isinstance(value, Tensor):
                try:
                    reference: Any = StorageWeakRef(value.untyped_storage())  # type: ignore[no-untyped-call]
                except (NotImplementedError, RuntimeError):
                    yield _SIZELESS
                    continue
                yield self._storages.setdefault(reference.cdata, reference).cdata
