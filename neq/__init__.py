"""Freeze neurons at equilibrium (NEq, NeurIPS 2022) in an ordinary PyTorch training loop.

README.md beside this file explains how a backward skips rows. `neq.parallel` is what data-parallel
processes agree on; without torch.distributed its functions do nothing.
"""

from neq import parallel
from neq.budget import Budget, FreezeFirst, RandomLayers, SlowestLayers
from neq.equilibrium import Reading
from neq.freezer import NeuronFreezer
from neq.gradients import Gradient, LayerPlan, plan
from neq.groups import GroupEquilibrium
from neq.neurons import Layer, NeuronIndex
from neq.policies import AtEquilibrium, Everyone, FreezeAfter, Policy, Random, SmallestVelocity
from neq.required import RequiredFlops
from neq.sharpness import Eigenvalue, top_eigenvalue
from neq.timings import Timings, measure, stopwatch

__all__ = [
    "AtEquilibrium",
    "Budget",
    "Eigenvalue",
    "Everyone",
    "FreezeAfter",
    "FreezeFirst",
    "Gradient",
    "GroupEquilibrium",
    "Layer",
    "LayerPlan",
    "NeuronFreezer",
    "NeuronIndex",
    "Policy",
    "Random",
    "RandomLayers",
    "Reading",
    "RequiredFlops",
    "SlowestLayers",
    "SmallestVelocity",
    "Timings",
    "measure",
    "parallel",
    "plan",
    "stopwatch",
    "top_eigenvalue",
]
