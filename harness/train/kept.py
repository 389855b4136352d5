"""Bytes that a training step keeps: activations for its backward, and the optimizer's state.

Counted from the tensors themselves, so that they can be told on every device, a CPU, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from harness.compilations import as_written
from neq import NeuronIndex


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
    with saved_tensors_hooks(as_written(kept.add), as_written(_itself)):
        yield kept


def _itself(saved: Tensor) -> Tensor:
    return saved


def state_bytes(
    optimizer: Optimizer, neurons: NeuronIndex | None = None, frozen: Tensor | None = None
) -> int:
    """Bytes of the optimizer's state: momentum and the like, of all parameters.

    `frozen`: bool [neurons], who has always stood still; a parameter of such rows alone never gets
    a state, and does not count.
    """
    layers = () if neurons is None or frozen is None else neurons.layers
    whole = [layer for layer in layers if frozen is not None and frozen[layer.neurons].all()]
    never = {id(parameter) for layer in whole for parameter in layer.parameters}
    states = (state for p, state in optimizer.state.items() if id(p) not in never)
    tensors = (value for state in states for value in state.values())
    return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
