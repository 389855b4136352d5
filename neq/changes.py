"""Layers that count how often their weights have been loaded or cast: then they are others, and
nobody has moved them.
"""

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

_changes: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def changes(layer: nn.Module) -> int:
    """How often `layer` has been loaded or cast, or moved to another device, while it counts."""
    return _changes.get(layer, 0)


class Counting(nn.Module):
    """A layer that counts."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        _changes[self] = changes(self) + 1

    def _apply(self, *arguments: Any, **keywords: Any) -> Any:
        before = _kinds(self)
        applied: Any = super()._apply(*arguments, **keywords)  # type: ignore[no-untyped-call]
        if _kinds(self) != before:
            _changes[self] = changes(self) + 1
        return applied


def _kinds(layer: nn.Module) -> list[tuple[Any, ...]]:
    tensors = (t for t in layer._parameters.values() if isinstance(t, Tensor))
    return [(t.dtype, t.device) for t in tensors]
