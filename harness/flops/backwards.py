"""One backward with nothing frozen, run to see whether it multiplies what is counted."""

from typing import Any

import torch
from torch import nn

from harness.flops.executed import Executed, Products
from neq.calls import tensors


class Backwards:
    """What a backward of the sum of a model's outputs does, from the graph of a counted forward.

    `opened`: foreign operators in it whose bodies were counted. Nothing is known where the backward
    fails, or was not run.
    """

    def __init__(self, executed: Executed) -> None:
        """`executed`: counts the forward."""
        self._executed = executed
        self._outputs: Any = None
        self._flops: int | None = None
        self._names: set[str] = set()
        self.opened: set[Any] = set()

    def forward(self, model: nn.Module) -> Any:
        """Run the forward, and keep what it returns; raises ValueError where that has no tensor."""
        self._outputs = outputs = self._executed(model)
        if next(tensors(outputs), None) is None:
            raise ValueError(
                f"the model returns no tensor that can be found (type {type(outputs).__name__}): "
                "return tensors in a tuple, a mapping or a dataclass"
            )
        return outputs

    def backward(self, model: nn.Module, known: bool) -> None:
        """Run the backward, and let the graph go.

        `known`: whether something in it has a name as not counted, which would only be told twice.
        """
        outputs, self._outputs = self._outputs, None
        if known:
            return
        products = Products()
        try:
            with torch.enable_grad():
                wanted = [o for o in tensors(outputs) if o.requires_grad]
                losses = [(o.real if o.is_complex() else o).sum() for o in wanted]
            if losses:
                with products:
                    torch.autograd.backward(losses)
        except Exception:
            return
        finally:
            model.zero_grad()
        self._flops, self._names, self.opened = products.flops, products.names, products.opened

    def differences(self, counted: int) -> set[str]:
        """Names of what it does, where that is not `counted`, FLOPs of a whole batch."""
        if self._flops is None or self._names or self._flops == counted:
            return self._names
        missing = self._flops - counted
        if missing > 0:
            return {f"{missing:,} FLOPs of a dense backward that no rule counts"}
        return {f"{-missing:,} FLOPs of a dense backward that are counted and not done"}
