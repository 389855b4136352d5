"""Freeze neurons at equilibrium (NEq, NeurIPS 2022) in an ordinary PyTorch training loop."""

from neq.equilibrium import Reading
from neq.freezer import NeuronFreezer
from neq.gradients import Gradient, LayerPlan, plan
from neq.neurons import Layer, NeuronIndex
from neq.policies import AtEquilibrium, Everyone, FreezeAfter, Policy, Random, SmallestVelocity
from neq.timings import Timings, measure

__all__ = [
    "AtEquilibrium",
    "Everyone",
    "FreezeAfter",
    "Gradient",
    "Layer",
    "LayerPlan",
    "NeuronFreezer",
    "NeuronIndex",
    "Policy",
    "Random",
    "Reading",
    "SmallestVelocity",
    "Timings",
    "measure",
    "plan",
]
