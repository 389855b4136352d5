"""Separate random streams, each derived from (seed, purpose, epoch).

Nothing has to be stored to resume: an epoch's streams follow from its number.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


def derive(seed: int, purpose: str, epoch: int = 0) -> int:
    """A 63-bit seed for one purpose: initialisation, order, augmentation, training or masks."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """A generator on the CPU, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(derive(seed, purpose, epoch))


def seed_globals(seed: int, purpose: str, epoch: int = 0) -> None:
    """Seed torch, numpy and random: for what draws from the global streams, such as dropout."""
    value = derive(seed, purpose, epoch)
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value % 2**32)


@contextmanager
def restored() -> Iterator[None]:
    """The global streams on the CPU are afterwards as they were."""
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        numpy.random.set_state(states[2])


@contextmanager
def seeded(seed: int, purpose: str, epoch: int = 0) -> Iterator[None]:
    """Global streams seeded for one purpose, and afterwards as they were."""
    with restored():
        seed_globals(seed, purpose, epoch)
        yield
