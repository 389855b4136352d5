"""Separate random streams, each derived from (seed, purpose, epoch).

Nothing has to be stored to resume: the streams of an epoch follow from its number.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def derive(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose ("initialisation", "order", "augmentation", "masks", …)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A generator for one purpose; on the CPU, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(derive(seed, purpose, epoch))


def seed_globals(seed: int, purpose: str, epoch: int = 0) -> None:
    """Seed the global streams of torch, numpy and random, from which dropout, for one, draws."""
    value = derive(seed, purpose, epoch)
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value % 2**32)


@contextmanager
def restored() -> Iterator[None]:
    """Afterwards the global streams on the CPU are as they were before."""
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])


@contextmanager
def seeded(seed: int, purpose: str, epoch: int = 0) -> Iterator[None]:
    """Inside, the global streams are seeded for one purpose; afterwards they are as before."""
    with restored():
        seed_globals(seed, purpose, epoch)
        yield
