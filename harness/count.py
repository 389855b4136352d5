"""`neqbench flops`: the accounting of one model, with a share of its neurons frozen at random."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from harness import suites
from harness.config import Suite
from harness.errors import UserError
from harness.flops import BATCH, CONVOLUTIONS, Costs, measure
from harness.verify import measured as counted_by_torch
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
        loaded, folder = suites.load(suite, settings)
        parts = loaded.model
        module = suites.build_model(parts.build, folder, parts.arguments)
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
    module = suites.build_model(model, ".", {})
    costs = measured(module, size)
    return Subject(model, module, size, costs, costs.called & ~_head(costs))


@dataclass(frozen=True, slots=True)
class Counted:
    """A model with a mask; `measured`: what PyTorch's counter saw, over a batch of `BATCH`."""

    subject: Subject
    frozen: Tensor
    measured: list[int] | None

    @property
    def agrees(self) -> bool:
        """Whether all that was measured is what was counted, and the order holds."""
        whole = self.subject.costs.backward(self.frozen, BATCH)
        ordered = whole.required <= whole.executed <= whole.dense
        return ordered and all(count == whole.executed for count in self.measured or [])

    def json(self) -> dict[str, Any]:
        """The documented JSON, per sample; `frozen` is the share of all neurons."""
        costs, verify = self.subject.costs, None
        if self.measured is not None:
            counted = costs.backward(self.frozen, BATCH).executed
            wrong = [count for count in self.measured if count != counted]
            verify = {"batch": BATCH, "counted": counted, "measured": (wrong or self.measured)[0]}
        return {
            "forward": costs.forward(),
            "backward": asdict(costs.backward(self.frozen)),
            "overhead_per_validation_sample": costs.overhead(),
            "neurons": len(self.frozen),
            "frozen": float(self.frozen.double().mean()),
            "verify": verify,
        }


def count(subject: Subject, share: float, seed: int, verify: bool) -> Counted:
    """Count with a share of the neurons frozen, and hold it against a real backward; raises
    UserError for a share that is none, or a model that does not run so.
    """
    if not 0 <= share <= 1:
        raise UserError(f"--frozen {share}: must be between 0 and 1")
    frozen = subject.draw(share, seed)
    if not verify:
        return Counted(subject, frozen, None)
    try:
        return Counted(subject, frozen, counted_by_torch(subject.module, subject.shape, frozen))
    except Exception as error:
        raise UserError(
            f"--verify: a backward of {subject.name} fails ({type(error).__name__}: {error})"
        ) from error


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


def show(counted: Counted, console: Console) -> None:
    """The same numbers for people, with what is counted dense."""
    numbers = counted.json()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=None)
    table.add_column("FLOPs per sample")
    table.add_column(counted.subject.name, justify="right")
    rows = {"forward": numbers["forward"]}
    rows |= {f"backward, {name}": value for name, value in numbers["backward"].items()}
    rows["deciding, per validation sample"] = numbers["overhead_per_validation_sample"]
    for title, value in rows.items():
        table.add_row(title, f"{value:,}")
    table.add_row("neurons", f"{numbers['neurons']:,}")
    table.add_row("frozen", f"{numbers['frozen']:.2%}")
    console.print(table)
    if numbers["verify"]:
        seen = numbers["verify"]
        word = "agrees" if counted.agrees else "does NOT agree"
        console.print(
            f"verified on a batch of {seen['batch']}: counted {seen['counted']:,}, "
            f"measured {seen['measured']:,}: {word}"
        )
    dense = counted.subject.costs.dense_only
    for name, reason in list(dense.items())[:5]:
        console.print(f"never frozen: {name or '(the model itself)'}: {reason}", style="dim")
    if len(dense) > 5:
        console.print(f"never frozen: {len(dense) - 5} more", style="dim")
    for name in counted.subject.costs.uncounted:
        console.print(f"not counted: {name}, which fvcore does not know", style="red")
