"""Gradients for the rows that train, and for no others.

The gradient with respect to a layer's input stays exact: it flows through frozen neurons.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from neq.neurons import Layer


class SelectiveGradients:
    """Keeps the gradient rows of trainable neurons, on the parameters of `layers`.

    Right after the backward the rows of frozen neurons are zero, and a parameter whose every row
    is frozen has no gradient at all.
    """

    def __init__(self, layers: Iterable[Layer]) -> None:
        self._layers = tuple(layers)
        self._rows: dict[nn.Parameter, Tensor] = {}
        self._whole: set[nn.Parameter] = set()
        self._handles: dict[nn.Parameter, RemovableHandle] = {}

    def select(self, frozen: Tensor) -> None:
        """Frozen from now on: bool [neurons of the whole index]."""
        self._rows.clear()
        self._whole.clear()
        for layer in self._layers:
            rows = frozen[layer.neurons].nonzero().squeeze(1)
            for parameter in layer.parameters:
                self._watch(parameter)
                if len(rows) == layer.size:
                    self._whole.add(parameter)
                elif len(rows):
                    self._rows[parameter] = rows.to(parameter.device)

    def _watch(self, parameter: nn.Parameter) -> None:
        """Hook it, if it needs a gradient by now."""
        if parameter.requires_grad and parameter not in self._handles:
            hook = parameter.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]
            self._handles[parameter] = hook

    def partly_frozen(self) -> Iterable[tuple[nn.Parameter, Tensor]]:
        """(parameter, indices of its frozen rows), for those with rows of both kinds."""
        return self._rows.items()

    def apply(self) -> None:
        """Clear what the hooks could not see: gradients that were there before, or assigned."""
        for parameter in (*self._whole, *self._rows):
            self._clear(parameter)

    def _hook(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._clear(parameter)

    def _clear(self, parameter: nn.Parameter) -> None:
        if parameter in self._whole:
            parameter.grad = None
        elif parameter in self._rows and parameter.grad is not None:
            with torch.no_grad():
                parameter.grad.index_fill_(0, self._rows[parameter], 0)

    def remove(self) -> None:
        """Back to plain gradients."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._rows.clear()
        self._whole.clear()
