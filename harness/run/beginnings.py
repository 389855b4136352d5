"""Whether the trials of two seeds begin with weights of their own."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.methods.building import equal
from harness.seeds import seeded
from harness.suite.config import Model

# The global streams, and what a builder calls that seeds them.
STREAMS: dict[str, Callable[[], Any]] = {
    "torch.manual_seed": torch.get_rng_state,
    "numpy.random.seed": lambda: numpy.random.get_state(legacy=False)["state"]["key"].tolist(),
    "random.seed": random.getstate,
}


def check_beginnings(parts: Model, build: Callable[[], nn.Module]) -> str:
    """A line where all seeds begin alike, or partly so, for a reason that may be meant; empty where
    they don't, and where the suite gives the weights.

    `parts`: the suite's model table; `build()`: its model, before `parts.weights` are loaded.
    Raises UserError where weights are drawn, and all seeds begin alike since the builder seeds the
    global streams itself.
    """
    if parts.weights:
        return ""
    first, second = (_begun(build, seed) for seed in (0, 1))
    seeding = [name for name in STREAMS if equal(first.streams[name], second.streams[name])]
    others = second.weights
    alike = [n for n, one in first.weights.items() if n in others and torch.equal(one, others[n])]
    whole = len(alike) == len(first.weights)
    drawn = [name for name in alike if not _constant(first.weights[name])]
    if not seeding or not drawn:
        if not whole:
            return ""
        return (
            f"{parts.build!r} gives all seeds the same first weights; where they are not meant to "
            "be (a constant, weights that were trained elsewhere), draw them from torch's, numpy's "
            "or Python's global streams, which are seeded"
        )
    sets = f"{parts.build!r} sets the seed itself ({', '.join(seeding)})"
    if whole:
        raise UserError(
            f"{sets}, so that all seeds begin with the same weights; leave that out: the streams "
            "are seeded before each model is built"
        )
    return f"{sets}: {drawn[0]} begins alike for all seeds; leave that out"


def _constant(weight: Tensor) -> bool:
    return bool((weight.flatten()[1:] == weight.flatten()[:-1]).all())


@dataclass(frozen=True, slots=True)
class _Begun:
    """A model as a seed makes it: its parameters by name, and the global streams afterwards."""

    weights: dict[str, Tensor]
    streams: dict[str, Any]


def _begun(build: Callable[[], nn.Module], seed: int) -> _Begun:
    with seeded(seed, "initialisation"):
        model = build()
        streams = {name: state() for name, state in STREAMS.items()}
    return _Begun({n: p.detach() for n, p in model.named_parameters()}, streams)
