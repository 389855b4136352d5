"""Pruning for an ordinary PyTorch training loop: SeReNe, LOBSTER, magnitudes, PSP-entropy."""

from neq.pruning.coupled import RemovalError
from neq.pruning.entropy import NoClassesError, PSPEntropy, psp_entropy
from neq.pruning.magnitude import Bisection, EmptiedLayerError, MagnitudePruner
from neq.pruning.masks import Masks, Size, prunable
from neq.pruning.removal import Shrunk, Stuck, dead_neurons, shrunk
from neq.pruning.schedules import Plateau, Schedule
from neq.pruning.sensitivity import (
    NeuronSensitivity,
    Preactivations,
    neuron_sensitivity,
    parameter_sensitivity,
)
from neq.pruning.shrink import Shrink

__all__ = [
    "Bisection",
    "EmptiedLayerError",
    "MagnitudePruner",
    "Masks",
    "NeuronSensitivity",
    "NoClassesError",
    "PSPEntropy",
    "Plateau",
    "Preactivations",
    "RemovalError",
    "Schedule",
    "Shrink",
    "Shrunk",
    "Size",
    "Stuck",
    "dead_neurons",
    "neuron_sensitivity",
    "parameter_sensitivity",
    "prunable",
    "psp_entropy",
    "shrunk",
]
