"""The masks of a trial, epoch by epoch, as its rows of `layers` tell them.

What a layer's backward costs depends on how many of its neurons stand still, not on which; but in a
convolution with groups all groups compute as many rows as the one that needs most. So of these the
mask itself is kept, and of all others the count.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neq import Layer, NeuronIndex


class UnknownMaskError(Exception):
    """The rows don't tell which neurons stood still."""


def grouped(layer: Layer) -> bool:
    """Whether it matters which neurons of the layer stand still."""
    return int(getattr(layer.module, "groups", 1)) > 1


def layer_mask(layer: Layer, frozen: Tensor) -> bytes | None:
    """A layer's part of a mask, bool [neurons of the layer], where the count tells too little."""
    partly = 0 < int(frozen.sum()) < layer.size
    return np.packbits(frozen.numpy()).tobytes() if grouped(layer) and partly else None


@dataclass(frozen=True, slots=True)
class EpochMask:
    """What is known of the mask of an epoch: neurons frozen in each layer, and stored masks."""

    layers: tuple[tuple[str, int, int], ...]  # name, neurons, frozen
    stored: tuple[bytes | None, ...]

    def tensor(self, neurons: NeuronIndex) -> Tensor:
        """Such a mask, bool [neurons]: where only a count is known, of neurons drawn at random.

        Raises UnknownMaskError where the layers are not those of `neurons`, or a mask is missing.
        """
        if [(layer.name, layer.size) for layer in neurons.layers] != [
            (name, size) for name, size, _ in self.layers
        ]:
            raise UnknownMaskError("its layers are not those of the model")
        generator = torch.Generator().manual_seed(0)
        parts = [
            _of_layer(layer, count, stored, generator)
            for layer, (_, _, count), stored in zip(
                neurons.layers, self.layers, self.stored, strict=True
            )
        ]
        return torch.cat(parts)


def _of_layer(layer: Layer, count: int, stored: bytes | None, generator: torch.Generator) -> Tensor:
    order = torch.randperm(layer.size, generator=generator)
    if stored is not None:
        bits = np.unpackbits(np.frombuffer(stored, np.uint8), count=layer.size)
        return torch.from_numpy(bits).bool()
    if grouped(layer) and 0 < count < layer.size:
        raise UnknownMaskError(
            f"which neurons of {layer.name}, a convolution with groups, stood still is only known "
            "from schema version 4 on"
        )
    mask = torch.zeros(layer.size, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def epoch_masks(rows: Iterable[Mapping[str, Any]]) -> Sequence[EpochMask]:
    """The masks of a trial's epochs, from its rows of `layers` in their order."""
    found: dict[int, tuple[list[tuple[str, int, int]], list[bytes | None]]] = {}
    for row in rows:
        layers, stored = found.setdefault(row["epoch"], ([], []))
        layers.append((row["layer"], row["neurons"], row["frozen"]))
        stored.append(row["mask"])
    return [EpochMask(tuple(found[e][0]), tuple(found[e][1])) for e in sorted(found)]
