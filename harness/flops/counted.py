"""What the passes of any model cost, in one call: by definition and by layer."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import neq
from harness.console import as_text, table
from harness.errors import one_line
from harness.flops.costs import Backward, Costs, LayerPlans, count_costs
from neq.batches import few
from neq.calls import Arguments, tensors
from neq.neurons import NeuronIndex, unwrapped
from neq.required import BATCH

if TYPE_CHECKING:
    import pandas as pd

OUTSIDE = "outside of layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFlops:
    """What one layer costs; `frozen` and `fixed` (by `requires_grad=False`) of its neurons.

    `kind`: the class of its module, "" of what is outside of layers.
    """

    kind: str
    neurons: int
    frozen: int
    fixed: int
    forward: int
    backward: Backward


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCount:
    """FLOPs of a model's passes, for one sample; 2 × multiply-accumulates.

    `forward` in train mode, `evaluation` in eval mode, `backward` by each definition: `dense`
    (nothing frozen but what the model fixes itself), `paper`, `required`, `executed`, and of that
    `recomputed`. `overhead`: of deciding, for one validation sample. `layers`: by their names, in
    the order of execution; with what is done `outside` of them, such as attention, they add up to
    the whole. `neurons`: of the model, `frozen` by the mask, `fixed` by `requires_grad=False`.
    `parameters`: numbers in the model, `trainable` those that train: neither fixed nor frozen.
    `dense_only`: modules that can't freeze, with the reason; `uncounted`: what multiplies and is in
    no count.
    """

    forward: int
    evaluation: int
    backward: Backward
    overhead: int
    layers: Mapping[str, LayerFlops]
    outside: LayerFlops
    neurons: int
    frozen: int
    fixed: int
    parameters: int
    trainable: int
    dense_only: Mapping[str, str]
    uncounted: list[str]

    def frame(self) -> "pd.DataFrame":
        """A row for each of `layers`, by name, and a last one, "outside of layers": kind, neurons,
        frozen, fixed, forward, and the backward by each definition.
        """
        import pandas as pd

        rows = []
        for name, layer in (*self.layers.items(), (OUTSIDE, self.outside)):
            row = {"layer": name} | asdict(layer)
            backward = row.pop("backward")
            rows.append(row | {f"backward_{kind}": n for kind, n in backward.items()})
        return pd.DataFrame(rows).set_index("layer")

    def __str__(self) -> str:
        shown = table("FLOPs per sample", "")
        shown.columns[1].justify = "right"
        backward = {f"backward, {name}": n for name, n in asdict(self.backward).items()}
        rows = {"forward": self.forward} | backward
        rows |= {"deciding, per validation sample": self.overhead, "parameters": self.parameters}
        rows |= {"parameters that train": self.trainable, "neurons": self.neurons}
        rows |= {"neurons frozen": self.frozen, "neurons fixed": self.fixed}
        for title, number in rows.items():
            if number or title not in ("backward, recomputed", "neurons fixed"):
                shown.add_row(title, f"{number:,}")
        return as_text(shown, *(f"not counted: {name}" for name in self.uncounted))

    def _repr_html_(self) -> str:
        return str(self.frame().to_html())


def count_flops(
    model: nn.Module, example: Any, frozen: "Tensor | neq.NeuronFreezer | None" = None
) -> FlopCount:
    """Count the FLOPs of a model's forward and backward, for one sample.

        from harness import count_flops

        count = count_flops(model, images)  # or (images, texts), or a tokenizer's mapping
        count.backward.executed  # what a backward does, with what the model fixes left out
        count_flops(model, images, freezer).frame()  # by layer, under a freezer's mask

    `example`: what the model is called with: a tensor [samples, …], a tuple of arguments, or a
    mapping of them by name; the first sample is taken, whatever their number. `frozen`: who stands
    still besides: bool [neurons] in the order of `neq.NeuronIndex(model)`, or a NeuronFreezer,
    whose plan then counts as well. Neurons that can't freeze are left out of a mask. Parameters
    with `requires_grad=False` cost no weight gradient, and no input gradient is counted below which
    nothing trains. A backward begins at every output that needs a gradient: `loss` and `logits` of
    a model that is given labels, for example. It is counted on a copy on the CPU, in float32; the
    model may be on any device, in half precision, compiled or wrapped.

    Raises ValueError for a model without parameters or without a supported layer, for an example
    without samples, one with which the model does not run, and a mask that is not the model's.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _counted(model, example, frozen)


def _counted(
    model: nn.Module, example: Any, frozen: "Tensor | neq.NeuronFreezer | None"
) -> FlopCount:
    inner, arguments = unwrapped(model), _arguments(example)
    if next(inner.parameters(), None) is None:
        raise ValueError(
            "the model has no parameters: there is nothing that trains or stands still"
        )
    if not NeuronIndex(inner):
        raise ValueError("the model has no convolution, linear or normalisation layer to count")
    try:
        costs = count_costs(model, arguments)
    except Exception as error:
        shapes = ", ".join(str(list(t.shape)) for t in tensors(example))
        raise ValueError(
            f"the model does not run on two copies of the first sample of the example, of {shapes} "
            f"({type(error).__name__}: {one_line(error)}): give what the model is called with, "
            "samples along the first axis"
        ) from error
    mask, plan = _mask(costs, frozen)
    return _count(inner, costs, mask, plan)


def _arguments(example: Any) -> Arguments:
    """A call of the model with two copies of the first sample."""
    if isinstance(example, Mapping):
        given = Arguments(kwargs=example)
    else:
        given = Arguments(args=tuple(example) if isinstance(example, (tuple, list)) else (example,))
    found = list(tensors(example))
    if any(t.requires_grad for t in found):
        raise ValueError("the example needs a gradient, whose cost is not counted: detach it")
    if not any(t.dim() for t in found):
        raise ValueError(
            "the example has no tensor with an axis of samples: give what the model is called "
            "with, as images [samples, …], (images, texts) or {'input_ids': …}"
        )
    call = few(given, BATCH, lambda model, batch: batch(model))
    if call is None:
        raise ValueError("the example has no sample: give at least one")
    assert isinstance(call, Arguments)
    return call


def _mask(
    costs: Costs, frozen: "Tensor | neq.NeuronFreezer | None"
) -> tuple[Tensor, LayerPlans | None]:
    plan: LayerPlans | None = None
    neurons = costs.neurons
    if isinstance(frozen, neq.NeuronFreezer):
        if list(frozen.neurons.items()) != list(neurons.items()):
            raise ValueError("the freezer belongs to a model with other layers or sizes")
        plan, frozen = frozen.plan, frozen.frozen
    if frozen is None:
        frozen = torch.zeros(len(neurons), dtype=torch.bool)
    if not isinstance(frozen, Tensor):
        raise ValueError(
            f"frozen must be a mask or a NeuronFreezer, not {type(frozen).__name__}: "
            f"bool [{len(neurons)}]"
        )
    if frozen.dtype != torch.bool or frozen.shape != (len(neurons),):
        raise ValueError(
            f"frozen must be bool [{len(neurons)}], got {frozen.dtype} {list(frozen.shape)}"
        )
    return frozen.cpu() & costs.called & ~neurons.fixed, plan


def _count(model: nn.Module, costs: Costs, mask: Tensor, plan: LayerPlans | None) -> FlopCount:
    neurons, fixed = costs.neurons, costs.neurons.fixed
    whole = costs.backward(mask, 1, plan)
    by_name, costly = {layer.name: layer for layer in neurons.layers}, costs.layers(mask, 1, plan)
    layers = {}
    for name in costs.execution_order:
        layer, (forward, backward) = by_name[name], costly[name]
        layers[name] = LayerFlops(
            kind=type(layer.module).__name__,
            neurons=layer.size,
            frozen=int(mask[layer.neurons].sum()),
            fixed=int(fixed[layer.neurons].sum()),
            forward=forward,
            backward=backward,
        )
    still = sum(
        p.numel() // len(p) * int(mask[layer.neurons].sum())
        for layer in neurons.layers
        for p in layer.parameters
        if p.requires_grad
    )
    return FlopCount(
        forward=costs.forward(),
        evaluation=costs.evaluation(),
        backward=whole,
        overhead=costs.overhead(),
        layers=layers,
        outside=_outside(costs.forward(), whole, [*layers.values()]),
        neurons=len(neurons),
        frozen=int(mask.sum()),
        fixed=int(fixed.sum()),
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad) - still,
        dense_only=dict(costs.dense_only),
        uncounted=costs.left_out(compiled=False),
    )


def _outside(forward: int, whole: Backward, layers: list[LayerFlops]) -> LayerFlops:
    """What is left of the whole: attention, functions, what is computed again."""
    left = {
        name: n - sum(asdict(layer.backward)[name] for layer in layers)
        for name, n in asdict(whole).items()
    }
    return LayerFlops(
        kind="",
        neurons=0,
        frozen=0,
        fixed=0,
        forward=forward - sum(layer.forward for layer in layers),
        backward=Backward(**left),
    )
