"""How much a network's outputs, or its loss, depend on neurons (SeReNe) and on weights (LOBSTER).

y: the logits, with C classes; z: the output of a neuron, a row of a linear or convolution layer,
before its activation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from neq.neurons import Layer, unwrapped
from neq.parallel import add_up, workers
from neq.pruning.masks import prunable

Kind = Literal["exact", "lower", "local"]
Positions = Literal["sum", "mean"]
KINDS, POSITIONS = ("exact", "lower", "local"), ("sum", "mean")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer in a forward.

    `axis`: of its output that holds the neurons; `elements`: of its output for each of them.
    `edge`: where that output enters the autograd graph, before an activation changes it in place;
    None where it is not part of one. `total`: float32 [neurons], the output summed over all else.
    """

    layer: str
    axis: int
    neurons: int
    elements: int
    edge: GradientEdge | None
    total: Tensor | None


class Preactivations:
    """Records, in each forward of `model` with gradients, the calls of its prunable layers.

    `calls`: those of the last forward; they keep its graph alive until `clear`. `recording`: set it
    to False to pause. `values`: whether outputs are summed up, which kind "local" needs.
    """

    def __init__(
        self, model: nn.Module, exclude: Iterable[str] = (), *, values: bool = False
    ) -> None:
        self.layers = {layer.name: layer for layer in prunable(model, exclude)}
        self.calls: list[Call] = []
        self.recording = True
        self._values = values
        root = unwrapped(model)
        self._handles = [root.register_forward_pre_hook(lambda *_: self.clear())]
        for layer in self.layers.values():
            self._handles.append(layer.module.register_forward_hook(self._hook(layer)))

    def _hook(self, layer: Layer) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not (self.recording and torch.is_grad_enabled()):
                return None
            # A view that is changed in place gets a new place in the graph: no edge would lead to
            # the old one.
            changed = output.clone() if output._is_view() else output
            edge = get_gradient_edge(changed) if changed.requires_grad else None
            detached, axis = output.detach(), layer.axis % output.dim()
            total = _over_others(detached.float(), axis) if self._values else None
            elements = output.numel() // layer.size
            self.calls.append(Call(layer.name, axis, layer.size, elements, edge, total))
            return changed

        return hook

    def clear(self) -> None:
        """Let go of the last forward."""
        self.calls = []

    def remove(self) -> None:
        """Let go of the model."""
        self.clear()
        for handle in self._handles:
            handle.remove()


def _over_others(values: Tensor, axis: int) -> Tensor:
    """Sums over all axes but one."""
    others = [d for d in range(values.dim()) if d != axis]
    return values.sum(others) if others else values


def neuron_sensitivity(
    logits: Tensor,
    calls: Sequence[Call],
    kind: Kind = "lower",
    positions: Positions = "sum",
) -> dict[str, Tensor]:
    """The sensitivity S of each neuron over a batch: layer name → float32 [neurons].

    `logits`: float [samples, C, …], whose graph is alive; `calls`: of the forward that made them
    (`Preactivations`). "exact": the mean over classes of |∂y/∂z|, C passes back through the
    network; "lower": |∂(Σ y)/∂z| / C, one pass, nowhere above the exact one; "local": 1 where the
    mean of z is positive, else 0, no pass. |…| is taken for each sample and position; then
    `positions` of a convolution, and calls of a layer that is called several times, are summed
    ("sum") or averaged ("mean", as the authors' code does, under which S is about 1e-3 everywhere),
    and samples averaged. A layer that the logits do not depend on has S = 0. Only this process's
    samples are looked at. Source: SeReNe, arXiv 2102.03773.

    Raises ValueError for logits that are no tensor [samples, C, …].
    """
    sums = _sums(logits, calls, kind, positions)
    return {name: _finished(total / len(logits), kind) for name, total in sums.items()}


def parameter_sensitivity(parameters: Iterable[Tensor]) -> list[Tensor | None]:
    """The sensitivity of each weight of `parameters`: |∂L/∂w|, from the gradients that a backward
    has left; None where there is none.

    Read it after a GradScaler has unscaled, and before gradients are clipped. Source: LOBSTER,
    arXiv 2011.09905.
    """
    return [None if p.grad is None else p.grad.detach().abs() for p in parameters]


def _finished(mean: Tensor, kind: Kind) -> Tensor:
    return (mean > 0).float() if kind == "local" else mean


def _sums(
    logits: Tensor, calls: Sequence[Call], kind: Kind, positions: Positions
) -> dict[str, Tensor]:
    """Sums over samples, by layer: of |…| over classes and positions, or (local) of z."""
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"neurons' sensitivity needs logits [samples, classes, …], the model gives {shape}"
        )
    elements: dict[str, int] = {}
    for call in calls:
        elements[call.layer] = elements.get(call.layer, 0) + call.elements
    sums: dict[str, Tensor] = {}
    for call, total in zip(calls, _per_call(logits, calls, kind), strict=True):
        sums[call.layer] = sums[call.layer] + total if call.layer in sums else total
    if positions == "sum":
        return sums
    return {name: total * len(logits) / elements[name] for name, total in sums.items()}


def _per_call(logits: Tensor, calls: Sequence[Call], kind: Kind) -> list[Tensor]:
    if kind == "local":
        if any(call.total is None for call in calls):
            raise ValueError("kind 'local' needs Preactivations(…, values=True)")
        return [call.total for call in calls if call.total is not None]
    classes = logits.shape[1]
    totals = [torch.zeros(call.neurons, device=logits.device) for call in calls]
    reached = [i for i, call in enumerate(calls) if call.edge is not None]
    edges: Any = [calls[i].edge for i in reached]
    if not edges or not logits.requires_grad:
        return totals
    for part in [logits] if kind == "lower" else logits.unbind(1):
        gradients = torch.autograd.grad(
            part, edges, torch.ones_like(part), retain_graph=True, allow_unused=True
        )
        for i, gradient in zip(reached, gradients, strict=True):
            if gradient is not None:
                totals[i] += _over_others(gradient.detach().abs().float(), calls[i].axis) / classes
    return totals


class NeuronSensitivity:
    """The sensitivity of the neurons of `model` over a step: all its microbatches and processes.

    After each forward, before its backward, call `add(logits)`; `take` gives what
    `neuron_sensitivity` would over all the samples at once.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "lower",
        *,
        positions: Positions = "sum",
        exclude: Iterable[str] = (),
    ) -> None:
        if kind not in KINDS or positions not in POSITIONS:
            raise ValueError(
                f"kind must be one of {', '.join(KINDS)} and positions one of "
                f"{', '.join(POSITIONS)}, got {kind!r} and {positions!r}"
            )
        self.kind: Kind = kind
        self.positions: Positions = positions
        self._recorded = Preactivations(model, exclude, values=kind == "local")
        self.layers = self._recorded.layers
        self.reset()

    def reset(self) -> None:
        """Forget what was added."""
        self._samples = 0
        self._totals: dict[str, Tensor] = {}

    @property
    def recording(self) -> bool:
        """Whether forwards are recorded, which costs something; False: nothing can be added."""
        return self._recorded.recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self._recorded.recording = value

    def add(self, logits: Tensor) -> None:
        """Count in the samples of the last forward; its graph must be alive."""
        found = _sums(logits, self._recorded.calls, self.kind, self.positions)
        self._recorded.clear()
        self._samples += len(logits)
        for name, total in found.items():
            before = self._totals.get(name)
            self._totals[name] = total if before is None else before + total

    def take(self) -> Mapping[str, Tensor]:
        """S by layer, float32 [neurons], over all that was added since; then begin anew.

        Where torch.distributed has several processes, all of them call this.
        """
        device = next(iter(self.layers.values())).parameters[0].device
        sizes = [layer.size for layer in self.layers.values()]
        parts = [
            self._totals.get(name, torch.zeros(layer.size, device=device))
            for name, layer in self.layers.items()
        ]
        samples = torch.full((1,), float(self._samples), device=device)
        self.reset()
        if workers() > 1:
            flat = add_up(torch.cat([*parts, samples]))
            *parts, samples = torch.split(flat, [*sizes, 1])
        count = samples.clamp(min=1)
        return {
            name: _finished(total / count, self.kind)
            for name, total in zip(self.layers, parts, strict=True)
        }

    def remove(self) -> None:
        """Let go of the model."""
        self._recorded.remove()
