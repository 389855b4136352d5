"""What a model is called with, and what it returns: tensors, whatever holds them."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Run = Callable[[nn.Module], Any]  # a forward of the model that it is given


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """The arguments of a model's forward."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, model: nn.Module) -> Any:
        """Call the model with them."""
        return model(*self.args, **self.kwargs)


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in `value`, in order: in containers, mappings and dataclasses of any kind."""
    for leaf in tree_leaves(value, is_leaf=_opened_here):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            for part in leaf.values():
                yield from tensors(part)
        elif _is_dataclass(leaf):
            for part in dataclasses.fields(leaf):
                yield from tensors(getattr(leaf, part.name, None))


def changed(change: Callable[[Any], Any], value: Any) -> Any:
    """A copy of `value` with `change` made to all that is no container, mapping or dataclass."""
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for name, part in value.items():
            copied[name] = changed(change, part)
        return copied
    if isinstance(value, Mapping):
        return {name: changed(change, part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [changed(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if _is_dataclass(value):
        copied = copy.copy(value)
        for each in dataclasses.fields(value):
            object.__setattr__(copied, each.name, changed(change, getattr(value, each.name)))
        return copied
    return change(value)


def _opened_here(value: Any) -> bool:
    return isinstance(value, Mapping) or _is_dataclass(value)


def _is_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)
