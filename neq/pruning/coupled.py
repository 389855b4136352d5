"""Which channels of a model can only be removed together, by torch-pruning's dependency graph."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
PADS = (nn.ZeroPad3d, nn.ConstantPad3d)  # of [n, channels, h, w]: their last pair pads channels
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BY_CHANNEL = (*NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.PReLU)
_ACROSS = re.compile(  # operations of torch, without "Backward"
    r"A(min|max|minmax)|Max|Min|Median|Mode|Sort|Topk|(Log)?Softmax|Logsumexp|(Std|Var)(Mean)?"
    r"|(LinalgVector)?Norm|Cum(sum|prod)|Prod"
)
INSTALL = "removal needs torch-pruning: pip install 'neqbench[pruning]'"


class RemovalError(ValueError):
    """A model from which nothing can be removed."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What a channel is in one module: `indices` of its rows ("out") or columns ("in"); other
    modules, such as norms, have one "both". `remove` takes the indices that are to go.
    """

    module: Any
    side: str
    indices: tuple[int, ...]
    dependency: Any


@dataclass(frozen=True, slots=True, eq=False)
class Channel:
    """One channel with all that can only go together with it. `unknown`: why it can't go at all."""

    parts: tuple[Part, ...]
    unknown: str | None

    def sources(self) -> Iterator[Part]:
        """The rows that write it."""
        return (part for part in self.parts if part.side == "out" and not depthwise(part.module))

    def between(self) -> Iterator[Part]:
        """The rows of depthwise convolutions that it passes."""
        return (part for part in self.parts if depthwise(part.module))

    def readers(self) -> Iterator[Part]:
        """The columns that read it."""
        return (part for part in self.parts if part.side == "in")


def depthwise(module: Any) -> bool:
    """Whether each of its channels has one filter of its own."""
    found = isinstance(module, (*CONVOLUTIONS, *TRANSPOSED))
    return found and 1 < module.groups == module.out_channels == module.in_channels


def weighted(module: Any) -> bool:
    """Whether it has rows and columns."""
    return isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED))


def rows(module: Any) -> Tensor:
    """Its weight as [outputs, inputs, positions]; of a depthwise convolution with one input."""
    weight: Tensor = module.weight.detach()
    if isinstance(module, TRANSPOSED) and not depthwise(module):
        weight = weight.transpose(0, 1)
    return weight.reshape(*weight.shape[:2], -1)


def fresh(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies, which a model may change in place."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def channels(model: nn.Module, example: tuple[Any, ...]) -> list[Channel]:
    """All channels that layers with weights write, each once; raises RemovalError where
    torch-pruning can't trace the model.
    """
    graph = _graph(model, example)
    found: list[Channel] = []
    seen: dict[Any, set[int]] = {}
    for module in list(graph.module2node):
        if not weighted(module):
            continue
        pruner = graph.get_pruner_of_module(module)
        known = seen.setdefault(module, set())
        fresh = [i for i in range(pruner.get_out_channels(module)) if i not in known]
        if not fresh:
            continue
        for channel in _of_group(graph.get_pruning_group(module, pruner.prune_out_channels, fresh)):
            found.append(channel)
            for part in channel.parts:
                if part.side != "in" and weighted(part.module):
                    seen.setdefault(part.module, set()).update(part.indices)
    return found


def _graph(model: nn.Module, example: tuple[Any, ...]) -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ImportError(INSTALL) from None
    pads = _Pads()
    handles = [
        module.register_forward_hook(pads.look)
        for module in model.modules()
        if type(module) in PADS
    ]
    graph: Any = torch_pruning.DependencyGraph()
    try:
        with torch.enable_grad():
            graph.build_dependency(
                model,
                example_inputs=fresh(example),
                customized_pruners=dict.fromkeys(PADS, pads),
                output_transform=_with_gradients,
                verbose=False,
            )
        pads.shift(graph)
    except Exception as error:  # of any kind, from a model that it was not made for
        raise RemovalError(f"torch-pruning can't trace the model: {one_line(error)}") from error
    finally:
        for handle in handles:
            handle.remove()
    return graph


def _with_gradients(outputs: Any) -> list[Tensor]:
    """Those that have a graph to look at."""
    found = [x for x in tree_leaves(outputs) if isinstance(x, Tensor) and x.requires_grad]
    if not found:
        raise ValueError("its outputs have no gradients")
    return found


def one_line(error: Exception) -> str:
    """What it is, and what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Pads:
    """Tells torch-pruning what modules do that put channels of zeros around others.

    Their channels are counted as in their output.
    """

    pruning_dim = 1

    def __init__(self) -> None:
        self._inside: dict[nn.Module, range] = {}
        self._channels: dict[nn.Module, int] = {}

    def look(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Hook of a forward."""
        left = _padding(module)[4] if output.dim() == 4 else 0
        self._inside[module] = range(left, left + inputs[0].shape[1])
        self._channels[module] = output.shape[1]

    def shift(self, graph: Any) -> None:
        """Whose indices are others before and after a pad."""
        for module, inside in self._inside.items():
            node = graph.module2node.get(module)
            if node is None:
                continue
            for dependency in node.dependencies:
                if dependency.target in node.inputs:
                    dependency.index_mapping[1] = _Shift(-inside.start, inside)
            for before in node.inputs:
                for dependency in before.dependencies:
                    if dependency.target is node:
                        dependency.index_mapping[1] = _Shift(inside.start, range(len(inside)))

    def prune_out_channels(self, module: Any, indices: Sequence[int]) -> Any:
        """As torch-pruning calls it."""
        if self._channels[module] > len(self._inside[module]):
            inside, padding = self._inside[module], _padding(module)
            padding[4] -= sum(i < inside.start for i in indices)
            padding[5] -= sum(i >= inside.stop for i in indices)
            module.padding = tuple(padding)
        return module

    prune_in_channels = prune_out_channels

    def get_out_channels(self, module: nn.Module) -> int:
        """As torch-pruning calls it."""
        return self._channels[module]

    get_in_channels = get_out_channels


def _padding(module: Any) -> list[int]:
    return list(module.padding)


@dataclass(frozen=True, slots=True)
class _Shift:
    """Indices that are `among` some, moved `by` so many."""

    by: int
    among: range

    def __call__(self, indices: Sequence[Any]) -> list[Any]:
        return [i._replace(idx=i.idx + self.by) for i in indices if i.idx in self.among]


def _of_group(group: Any) -> Iterator[Channel]:
    """The channels of one of torch-pruning's groups."""
    by_root: dict[Any, dict[Any, list[int]]] = {}
    for item in group.items:
        for index, root in zip(item.idxs, item.root_idxs, strict=True):
            by_root.setdefault(root, {}).setdefault(item.dep, []).append(index)
    for found in by_root.values():
        told = [
            Part(dep.target.module, _side(dep), tuple(indices), dep)
            for dep, indices in found.items()
        ]
        parts = tuple(part for part in told if _fits(part))
        unknown = next(filter(None, map(_unknown, told)), None)
        if unknown is None and len(parts) < len(told):
            unknown = "torch-pruning mistakes how its channels are arranged"
        yield Channel(parts, unknown)


def _fits(part: Part) -> bool:
    """Whether there are such rows or columns."""
    if not weighted(part.module):
        return True
    size = rows(part.module).shape[1 if part.side == "in" else 0]
    return max(part.indices) < size and min(part.indices) >= 0


def _side(dependency: Any) -> str:
    module = dependency.target.module
    if not weighted(module) or depthwise(module):
        return "both"
    return "in" if dependency.handler.__name__ == "prune_in_channels" else "out"


def _unknown(part: Part) -> str | None:
    """Why nobody knows what would be without this part of a channel."""
    module, node = part.module, part.dependency.target
    kind = type(module).__name__
    if kind == "_OutputOp":
        return "it is an output of the model"
    if isinstance(module, nn.Parameter):
        return "a parameter that belongs to no layer has its length"
    if weighted(module):
        grouped = getattr(module, "groups", 1) > 1
        return "a convolution with groups" if grouped and not depthwise(module) else None
    if isinstance(module, (*_BY_CHANNEL, *PADS)):
        return None
    if kind.startswith("_"):  # an operation of torch
        return _unknown_operation(node.grad_fn)
    return f"{kind} computes across channels, or can't be made narrower"


def _unknown_operation(grad_fn: Any) -> str | None:
    amounts = getattr(grad_fn, "_saved_pad", None)
    if amounts is not None and len(amounts) > 4 and any(amounts[4:6]):
        return "a function pads its channels; nn.ZeroPad3d can be made narrower"
    name = "" if grad_fn is None else grad_fn.name().partition("Backward")[0]
    return f"torch's {name} may compute across channels" if _ACROSS.fullmatch(name) else None
