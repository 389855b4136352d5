"""A model that a user names on the command line, to be counted or timed."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from harness.errors import UserError
from harness.flops.costs import Costs, count_costs
from harness.flops.drawing import draw
from harness.flops.inputs import Inputs, parse_inputs
from harness.flops.layer_costs import CONVOLUTIONS
from harness.suite import files
from harness.suite.config import Suite
from harness.suite.parts import build_model
from neq import NeuronIndex
from neq.neurons import unwrapped
from neq.required import BATCH


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to look at.

    `name`: as the user gave it; `inputs`: what it is called with; `freezable`: bool [neurons];
    `suite`: the suite that it belongs to, if any.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    costs: Costs
    freezable: Tensor
    suite: Suite | None = None

    def draw(self, share: float, seed: int) -> Tensor:
        """A mask of round(share · freezable) neurons, drawn uniformly over the model: bool
        [neurons].
        """
        return draw("neuron", share, seed, self.costs.neurons, self.freezable, align=1)


def subject(
    suite: str | None, settings: Sequence[str], model: str | None, inputs: str | None
) -> Subject:
    """The model of a suite, or any model by import string with its `inputs`, as of parse_inputs.

    Raises UserError where neither or both are named, or where the model does not run.
    """
    if (suite is None) == (model is None):
        raise UserError("name a suite, or a model with --model module:callable --input 3x224x224")
    if suite is not None:
        if inputs is not None:
            raise UserError("--input belongs to --model; a suite's file says its own input")
        loaded, folder = files.load_suite(suite, settings)
        parts = loaded.model
        module = build_model(parts.build, folder, parts.arguments)
        costs = costs_of(module, parts.input, parts.unpublished)
        try:
            excluded = costs.neurons.select(parts.exclude)
        except ValueError as error:
            raise UserError(f"suite {loaded.name}: model.exclude: {error}") from None
        freezable = costs.called & ~excluded & ~costs.neurons.fixed
        inputs_of = Inputs.of(parts.input)
        return Subject(loaded.name, module, inputs_of, costs, freezable, loaded)
    assert model is not None
    if settings:
        raise UserError("--set belongs to a suite, not to --model")
    given = parse_inputs(inputs)
    module = build_model(model, ".", {})
    costs = costs_of(module, given)
    excluded = costs.neurons.select(head(costs.neurons, costs.execution_order))
    freezable = costs.called & ~excluded & ~costs.neurons.fixed
    return Subject(model, module, given, costs, freezable)


def costs_of(
    module: nn.Module, inputs: tuple[int, ...] | Inputs, unpublished: Sequence[str] = ()
) -> Costs:
    """`count_costs` of a model that the user named; raises UserError where it does not run."""
    try:
        NeuronIndex(unwrapped(module)).select(unpublished)
    except ValueError as error:
        raise UserError(f"model.unpublished: {error}") from None
    given = inputs if isinstance(inputs, Inputs) else Inputs.of(inputs)
    try:
        costs = count_costs(module, given.zeros(BATCH), unpublished)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"the model does not run on an input of {given} "
            f"({type(error).__name__}: {error}){_hint(given, error)}"
        ) from error
    if not costs.neurons:
        raise UserError("the model has no convolution, linear or normalisation layer to count")
    return costs


def _hint(inputs: Inputs, error: Exception) -> str:
    """What may be wrong with inputs on which a model fails."""
    if inputs.floating and "long" in str(error).lower():
        return "; token ids are integers: --input input_ids:int64:128, with the model's own name"
    if isinstance(error, TypeError) and "argument" in str(error):
        return "; name its arguments: --input input_ids:int64:128,attention_mask:int64:128"
    return ""


def head(neurons: NeuronIndex, order: Sequence[str]) -> list[str]:
    """The last linear layer in the `order` of execution, else the last convolution."""
    modules = {layer.name: layer.module for layer in neurons.layers}
    for kinds in ((nn.Linear,), CONVOLUTIONS):
        found = [name for name in order if isinstance(modules[name], kinds)]
        if found:
            return found[-1:]
    return []
