"""Masks drawn at random, to be timed: single neurons, neurons in blocks of rows, whole layers."""

from typing import Literal

import torch
from torch import Tensor

import neq
from neq.alignment import aligned

Granularity = Literal["neuron", "neuron-aligned", "layer"]


def draw(
    granularity: Granularity,
    share: float,
    seed: int,
    neurons: neq.NeuronIndex,
    freezable: Tensor,
    align: int,
) -> Tensor:
    """A mask of about that share of the `freezable`, both bool [neurons].

    "neuron": drawn uniformly over the model. "neuron-aligned": in each layer as many of its own,
    and then fewer, so that a multiple of `align` neurons trains there. "layer": whole layers, until
    the next one would be too many.
    """
    if granularity == "layer":
        return _layers(share, seed, neurons, freezable)
    if granularity == "neuron-aligned":
        generator = torch.Generator().manual_seed(seed)
        velocity = torch.rand(len(neurons), dtype=torch.float64, generator=generator)
        keep = round(1 - share, 12)
        chosen = neq.SmallestVelocity(keep).frozen(1, neurons, velocity) & freezable
        return aligned(chosen, velocity, neurons, align, "up")
    positions = freezable.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(positions), generator=generator)
    mask = torch.zeros_like(freezable)
    mask[positions[order[: round(share * len(positions))]]] = True
    return mask


def _layers(share: float, seed: int, neurons: neq.NeuronIndex, freezable: Tensor) -> Tensor:
    mask = torch.zeros_like(freezable)
    parts = [part for _, part in neurons.items()]
    wanted = round(share * int(freezable.sum()))
    generator = torch.Generator().manual_seed(seed)
    for position in torch.randperm(len(parts), generator=generator).tolist():
        part = parts[position]
        if int(mask.sum()) + int(freezable[part].sum()) <= wanted:
            mask[part] = freezable[part]
    return mask
