"""Bytes that a training step keeps: activations for its backward, and the optimizer's state.

Counted from the tensors themselves, so that they can be told on every device, a CPU, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer


class KeptBytes:
    """How much memory autograd keeps; `total` in bytes, each storage once."""

    def __init__(self, model: nn.Module) -> None:
        """`model`: whose parameters and buffers are there anyway, and don't count."""
        self.total = 0
        own = (*model.parameters(), *model.buffers())
        self._seen = {_storage(tensor) for tensor in own}

    def add(self, saved: Tensor) -> Tensor:
        """Count the memory of a tensor that is saved for the backward; the tensor itself."""
        storage = _storage(saved)
        if storage not in self._seen:
            self._seen.add(storage)
            self.total += saved.untyped_storage().nbytes()
        return saved


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[KeptBytes]:
    """Inside, a forward of `model` is watched; afterwards `total` says what its graph keeps.

    Hold on to the output until then: memory that is let go of may be counted once for two.
    """
    kept = KeptBytes(model)
    with saved_tensors_hooks(kept.add, lambda saved: saved):
        yield kept


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state: momentum and the like, of all parameters."""
    tensors = (v for state in optimizer.state.values() for v in state.values())
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
