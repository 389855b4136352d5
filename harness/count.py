"""`neqbench flops`: the accounting of one model, with a share of its neurons frozen at random."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from harness import suites
from harness.errors import UserError
from harness.flops import CONVOLUTIONS, Costs, measure


@dataclass(frozen=True, slots=True)
class Counted:
    """Costs of a model, and the mask for which they are shown."""

    name: str
    costs: Costs
    frozen: Tensor

    def json(self) -> dict[str, Any]:
        """The documented JSON, per sample; `frozen` is the share of all neurons."""
        backward = self.costs.backward(self.frozen)
        return {
            "forward": self.costs.forward(),
            "backward": {
                "dense": backward.dense,
                "paper": backward.paper,
                "required": backward.required,
                "executed": backward.executed,
            },
            "overhead_per_validation_sample": self.costs.overhead(),
            "neurons": len(self.frozen),
            "frozen": float(self.frozen.double().mean()),
            "verify": None,
        }


def count(
    suite: str | None,
    settings: Sequence[str],
    model: str | None,
    shape: str | None,
    share: float,
    seed: int,
) -> Counted:
    """Count a suite's model, or any model by import string; raises UserError."""
    if (suite is None) == (model is None):
        raise UserError("name a suite, or a model with --model module:callable --input 3x224x224")
    if not 0 <= share <= 1:
        raise UserError(f"--frozen {share}: must be between 0 and 1")
    if suite is not None:
        if shape is not None:
            raise UserError("--input belongs to --model; a suite's file says its own input")
        loaded, folder = suites.load(suite, settings)
        parts = loaded.model
        costs = measured(suites.build_model(parts.build, folder, parts.arguments), parts.input)
        try:
            excluded = costs.neurons.select(parts.exclude)
        except ValueError as error:
            raise UserError(f"suite {loaded.name}: model.exclude: {error}") from None
        return Counted(loaded.name, costs, _draw(costs.called & ~excluded, share, seed))
    assert model is not None
    if settings:
        raise UserError("--set belongs to a suite, not to --model")
    size = _shape(shape)
    costs = measured(suites.build_model(model, ".", {}), size)
    return Counted(model, costs, _draw(costs.called & ~_head(costs), share, seed))


def measured(module: nn.Module, shape: tuple[int, ...]) -> Costs:
    """`flops.measure` of what the user named; raises UserError where it does not run."""
    try:
        costs = measure(module, shape)
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


def _draw(freezable: Tensor, share: float, seed: int) -> Tensor:
    """round(share · freezable) neurons, uniformly over the model."""
    places = freezable.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(places), generator=generator)[: round(share * len(places))]
    mask = torch.zeros_like(freezable)
    mask[places[chosen]] = True
    return mask


def show(counted: Counted, console: Console) -> None:
    """The same numbers for people, with what is counted dense."""
    numbers = counted.json()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=None)
    table.add_column("FLOPs per sample")
    table.add_column(counted.name, justify="right")
    rows = {"forward": numbers["forward"]}
    rows |= {f"backward, {name}": value for name, value in numbers["backward"].items()}
    rows["deciding, per validation sample"] = numbers["overhead_per_validation_sample"]
    for title, value in rows.items():
        table.add_row(title, "–" if value is None else f"{value:,}")
    table.add_row("neurons", f"{numbers['neurons']:,}")
    table.add_row("frozen", f"{numbers['frozen']:.2%}")
    console.print(table)
    dense = counted.costs.dense_only
    for name, reason in list(dense.items())[:5]:
        console.print(f"never frozen: {name or '(the model itself)'}: {reason}", style="dim")
    if len(dense) > 5:
        console.print(f"never frozen: {len(dense) - 5} more", style="dim")
    for name in counted.costs.uncounted:
        console.print(f"not counted: {name}, which fvcore does not know", style="red")
