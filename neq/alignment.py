"""Masks in blocks of rows: what trains in a layer becomes a multiple of what kernels compute at
once (16 rows in oneDNN, 8 in half precision on a GPU).
"""

from typing import Literal

import torch
from torch import Tensor

from neq.neurons import NeuronIndex

Rounding = Literal["down", "up"]


def aligned(
    frozen: Tensor, velocity: Tensor, neurons: NeuronIndex, multiple: int, rounding: Rounding
) -> Tensor:
    """`frozen`, bool [neurons], changed so that in each layer a `multiple` of neurons trains.

    "down" freezes those of the next smallest |velocity| as well, "up" lets those of the largest
    train. A layer in which nobody stands still is left as it is; where fewer than a `multiple`
    would train, "down" freezes the whole layer. Neurons that may not freeze never do. `velocity`:
    float64 [neurons]; where it is NaN nobody is frozen for the sake of others: if too few are left
    to freeze, such a layer stays as it was.
    """
    if multiple == 1:
        return frozen
    changed = frozen.clone()
    speed = velocity.abs().nan_to_num(torch.inf)
    may_follow = neurons.freezable & ~velocity.isnan()
    for _, part in neurons.items():
        mask, order = changed[part], torch.argsort(speed[part], stable=True)
        trains = int((~mask).sum())
        excess = trains % multiple
        if not excess or not bool(mask.any()):
            continue
        if rounding == "up":
            fastest = order.flip(0)
            mask[fastest[mask[fastest]][: multiple - excess]] = False
            continue
        candidates = order[(~mask & may_follow[part])[order]]
        if len(candidates) >= excess:
            mask[candidates[:excess]] = True
    return changed


def check_alignment(multiple: int, rounding: str) -> None:
    """Raises ValueError for a multiple below 1, and for any other rounding."""
    if multiple < 1:
        raise ValueError(f"align must be at least 1, got {multiple}")
    if rounding not in ("down", "up"):
        raise ValueError(f"rounding must be 'down' or 'up', got {rounding!r}")
