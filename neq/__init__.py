"""Freeze neurons at equilibrium (NEq, NeurIPS 2022) in an ordinary PyTorch training loop."""

from neq.equilibrium import Reading
from neq.freezer import NeuronFreezer
from neq.neurons import Layer, NeuronIndex
from neq.policies import AtEquilibrium, Everyone, FreezeAfter, Policy, Random, SmallestVelocity

__all__ = [
    "AtEquilibrium",
    "Everyone",
    "FreezeAfter",
    "Layer",
    "NeuronFreezer",
    "NeuronIndex",
    "Policy",
    "Random",
    "Reading",
    "SmallestVelocity",
]
