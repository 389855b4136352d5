"""`neqbench flops`: the accounting of one model, with a share of its neurons frozen at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.flops.costs import CONVOLUTIONS, Costs, measure
from harness.suite import files
from harness.suite.config import Suite
from harness.suite.parts import build_model
from neq import NeuronIndex


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to look at; `freezable`: bool [neurons]; `suite`: where it is a suite's."""

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    costs: Costs
    freezable: Tensor
    suite: Suite | None = None

    def draw(self, share: float, seed: int) -> Tensor:
        """round(share · freezable) neurons, uniformly over the model: bool [neurons]."""
        places = self.freezable.nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(places), generator=generator)[: round(share * len(places))]
        mask = torch.zeros_like(self.freezable)
        mask[places[chosen]] = True
        return mask


def subject(
    suite: str | None, settings: Sequence[str], model: str | None, shape: str | None
) -> Subject:
    """A suite's model, or any model by import string; raises UserError."""
    if (suite is None) == (model is None):
        raise UserError("name a suite, or a model with --model module:callable --input 3x224x224")
    if suite is not None:
        if shape is not None:
            raise UserError("--input belongs to --model; a suite's file says its own input")
        loaded, folder = files.load(suite, settings)
        parts = loaded.model
        module = build_model(parts.build, folder, parts.arguments)
        costs = measured(module, parts.input, parts.unpublished)
        try:
            excluded = costs.neurons.select(parts.exclude)
        except ValueError as error:
            raise UserError(f"suite {loaded.name}: model.exclude: {error}") from None
        freezable = costs.called & ~excluded
        return Subject(loaded.name, module, parts.input, costs, freezable, loaded)
    assert model is not None
    if settings:
        raise UserError("--set belongs to a suite, not to --model")
    size = _shape(shape)
    module = build_model(model, ".", {})
    costs = measured(module, size)
    return Subject(model, module, size, costs, costs.called & ~_head(costs))


def measured(module: nn.Module, shape: tuple[int, ...], unpublished: Sequence[str] = ()) -> Costs:
    """`flops.measure` of what the user named; raises UserError where it does not run."""
    try:
        NeuronIndex(module).select(unpublished)
    except ValueError as error:
        raise UserError(f"model.unpublished: {error}") from None
    try:
        costs = measure(module, shape, unpublished)
    except Exception as error:
        raise UserError(
            f"the model does not run on an input of {'x'.join(map(str, shape))} "
            f"({type(error).__name__}: {error})"
        ) from error
    if not costs.neurons:
        raise UserError("the model has no convolution, linear or normalisation layer to count")
    return costs


def _shape(text: str | None) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in (text or "").split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise UserError(f"--input {text or ''}: give one sample's shape, such as 3x224x224")
    return shape


def _head(costs: Costs) -> Tensor:
    """The last linear layer in execution order, else the last convolution: it never freezes."""
    modules = {layer.name: layer.module for layer in costs.neurons.layers}
    for kinds in ((nn.Linear,), CONVOLUTIONS):
        found = [name for name in costs.execution_order if isinstance(modules[name], kinds)]
        if found:
            return costs.neurons.select(found[-1:])
    return torch.zeros(len(costs.neurons), dtype=torch.bool)
