"""A model that a user names on the command line, to be counted or timed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.errors import UserError
from harness.flops.costs import CONVOLUTIONS, Costs, count_costs
from harness.flops.drawing import draw
from harness.suite import files
from harness.suite.config import Suite
from harness.suite.parts import build_model
from neq import NeuronIndex
from neq.neurons import unwrapped


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to look at.

    `name`: as the user gave it; `shape`: of one sample; `freezable`: bool [neurons]; `suite`: the
    suite that it belongs to, if any.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]
    costs: Costs
    freezable: Tensor
    suite: Suite | None = None

    def draw(self, share: float, seed: int) -> Tensor:
        """A mask of round(share · freezable) neurons, drawn uniformly over the model: bool
        [neurons].
        """
        return draw("neuron", share, seed, self.costs.neurons, self.freezable, align=1)


def subject(
    suite: str | None, settings: Sequence[str], model: str | None, shape: str | None
) -> Subject:
    """The model of a suite, or any model by import string with the shape "3x224x224" of a sample.

    Raises UserError where neither or both are named, or where the model does not run.
    """
    if (suite is None) == (model is None):
        raise UserError("name a suite, or a model with --model module:callable --input 3x224x224")
    if suite is not None:
        if shape is not None:
            raise UserError("--input belongs to --model; a suite's file says its own input")
        loaded, folder = files.load_suite(suite, settings)
        parts = loaded.model
        module = build_model(parts.build, folder, parts.arguments)
        costs = costs_of(module, parts.input, parts.unpublished)
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
    costs = costs_of(module, size)
    freezable = costs.called & ~costs.neurons.select(head(costs.neurons, costs.execution_order))
    return Subject(model, module, size, costs, freezable)


def costs_of(module: nn.Module, shape: tuple[int, ...], unpublished: Sequence[str] = ()) -> Costs:
    """`count_costs` of a model that the user named; raises UserError where it does not run."""
    try:
        NeuronIndex(unwrapped(module)).select(unpublished)
    except ValueError as error:
        raise UserError(f"model.unpublished: {error}") from None
    try:
        costs = count_costs(module, shape, unpublished)
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


def head(neurons: NeuronIndex, order: Sequence[str]) -> list[str]:
    """The last linear layer in the `order` of execution, else the last convolution."""
    modules = {layer.name: layer.module for layer in neurons.layers}
    for kinds in ((nn.Linear,), CONVOLUTIONS):
        found = [name for name in order if isinstance(modules[name], kinds)]
        if found:
            return found[-1:]
    return []
