"""The momentum of fused SGD, where torch's own start of it fails."""

from typing import Any

import torch
from torch.optim import Optimizer


def complete_momentum(optimizer: Optimizer, *_: Any) -> None:
    """Give zeros where fused SGD has no momentum yet, with which it takes the same first step.

    torch's own start fails where a parameter's first gradient comes later than others', and keeps
    unwritten memory where a GradScaler skips the first step. It can be a step pre-hook itself.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum") and not group["dampening"]:
            for parameter in group["params"]:
                state = optimizer.state[parameter]
                if parameter.grad is not None and state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
