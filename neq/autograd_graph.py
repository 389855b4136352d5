"""Reads the autograd graph of one forward: which parameters lie upstream of which product.

Execution order would be the wrong test: a class token enters late, a frozen branch may run first.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from neq.calls import Run, tensors
from neq.neurons import Layer, NeuronIndex
from neq.products import Opaque, products_of

NodeT = TypeVar("NodeT")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a supported layer.

    `upstream`: bit i is set where its input depends on parameter i. `elements`: of its output, over
    the whole batch. `reached`: whether the model's output depends on it, so that the backward
    visits it.
    """

    layer: str
    elements: int
    upstream: int
    reached: bool


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product of the backward outside supported layers; `flops` of the whole batch.

    It is required where one of the parameters with bits in `upstream` trains, and done where one of
    those in `triggers` does: these are more where one operator makes several products at once.
    """

    flops: int
    upstream: int
    triggers: int


@dataclass(frozen=True, slots=True)
class Graph:
    """The autograd graph of one forward, in numbers.

    Node i reads the nodes `sources[i]`, all smaller than i, and accumulates into the parameters of
    the bits `own[i]`. `roots`: the nodes of the model's outputs; `runs`: the calls of layers;
    `products`: the matrix products outside them; `checkpointed`: whether a backward does parts of
    the forward once more.
    """

    sources: list[list[int]]
    own: list[int]
    roots: frozenset[int]
    runs: list["_Run[int]"]
    products: list["_Operator"]
    checkpointed: bool = False

    @property
    def elsewhere(self) -> int:
        """Bits of the parameters that something else than their layer's own forward reads."""
        owned = set().union(*(run.inside for run in self.runs))
        readers = (node for node in range(len(self.sources)) if node not in owned)
        return _union(self.own[source] for node in readers for source in self.sources[node])

    def calls_and_products(
        self, cut: frozenset[str] = frozenset()
    ) -> tuple[list[Call], list[Product]]:
        """The calls of layers and the other products, with no gradient through the layers of
        `cut`.
        """
        gone = set().union(*(run.inside for run in self.runs if run.layer in cut))
        upstream: list[int] = []
        for node, sources in enumerate(self.sources):
            bits = self.own[node] | _union(upstream[s] for s in sources)
            upstream.append(0 if node in gone else bits)
        reached = self._reached(gone)
        calls = [
            Call(
                run.layer,
                run.elements,
                0 if run.layer in cut else _union(upstream[node] for node in run.inputs),
                # Not its output: an in-place operation on a view rewrites that node.
                not run.inside.isdisjoint(reached),
            )
            for run in self.runs
        ]
        products: list[Product] = []
        for operator in self.products:
            if operator.node in reached:
                products += operator.products(upstream)
        return calls, products

    def _reached(self, gone: set[int]) -> set[int]:
        found: set[int] = set()
        stack = [root for root in self.roots if root not in gone]
        while stack:
            node = stack.pop()
            found.add(node)
            stack += [s for s in self.sources[node] if s not in found and s not in gone]
        return found


def trace(
    model: nn.Module,
    run: Run,
    neurons: NeuronIndex,
    numbers: dict[int, int],
    opaque: Opaque | None = None,
) -> Graph:
    """The graph that `run(model)` leaves behind, run once with gradients.

    `numbers`: id of each parameter → number of the bit that stands for it. The outputs are what
    the model returns, and what `run` does. `opaque`: says what the backward of somebody's own
    autograd function multiplies (default: nothing). Regions with activation checkpointing keep
    here what their backward needs.
    """
    recorder = _Recorder(neurons)
    outputs: list[Any] = []
    returned = model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with recorder.hooks(), torch.enable_grad(), _all_kept() as regions:
            outputs.append(run(model))
    finally:
        returned.remove()
    roots = list(_nodes(outputs))
    order = _order([*roots, *recorder.nodes()])
    own = [numbers.get(id(getattr(node, "variable", None))) for node in order]
    runs = [
        _Run(
            run.layer,
            run.elements,
            frozenset(order[node] for node in run.inputs),
            frozenset(order[node] for node in run.inside if node in order),
        )
        for run in recorder.runs
    ]
    owned = set().union(*(run.inside for run in runs))
    products = [
        _Operator(position, *products_of(node, order, opaque))
        for node, position in order.items()
        if position not in owned
    ]
    return Graph(
        [[order[source] for source in _sources(node)] for node in order],
        [0 if number is None else 1 << number for number in own],
        frozenset(order[root] for root in roots),
        runs,
        [operator for operator in products if operator.pairs],
        bool(regions),
    )


@contextmanager
def _all_kept() -> Iterator[list[None]]:
    """Inside, regions with activation checkpointing keep all; a list with an item for each."""
    found: list[None] = []

    def kept(_frame: Any) -> Any:
        found.append(None)
        return nullcontext()

    module: Any = torch.utils.checkpoint
    before, module._checkpoint_hook = module._checkpoint_hook, kept
    try:
        yield found
    finally:
        module._checkpoint_hook = before


@dataclass(frozen=True, slots=True)
class _Operator:
    """The products of a node: (operands for whose sake, FLOPs) each; `fused`: done all or none."""

    node: int
    fused: bool
    pairs: list[tuple[list[int], int]]

    def products(self, upstream: list[int]) -> Iterator[Product]:
        bits = [_union(upstream[operand] for operand in operands) for operands, _ in self.pairs]
        for own, (_, flops) in zip(bits, self.pairs, strict=True):
            yield Product(flops, own, _union(iter(bits)) if self.fused else own)


@dataclass(frozen=True, slots=True)
class _Run(Generic[NodeT]):
    """A call of a layer: the nodes of its inputs, and those that its forward made."""

    layer: str
    elements: int
    inputs: frozenset[NodeT]
    inside: frozenset[NodeT]


class _Recorder:
    def __init__(self, neurons: NeuronIndex) -> None:
        self.runs: list[_Run[Node]] = []
        self._neurons = neurons
        self._inputs: dict[str, frozenset[Node]] = {}

    @contextmanager
    def hooks(self) -> Iterator[None]:
        with ExitStack() as stack:
            for layer in self._neurons.layers:
                before, after = self._before(layer), self._after(layer)
                module = layer.module
                stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(after))
            yield

    def _before(self, layer: Layer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            self._inputs[layer.name] = frozenset(_nodes((args, kwargs)))

        return hook

    def _after(self, layer: Layer) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            inputs = self._inputs[layer.name]
            inside = _between(next(_nodes(output), None), inputs)
            self.runs.append(_Run(layer.name, output.numel(), inputs, frozenset(inside)))

        return hook

    def nodes(self) -> Iterator[Node]:
        for run in self.runs:
            yield from (*run.inputs, *run.inside)


def _nodes(value: Any) -> Iterator[Node]:
    for tensor in tensors(value):
        if tensor.requires_grad:
            yield get_gradient_edge(tensor).node


def _sources(node: Node) -> list[Node]:
    return [source for source, _ in node.next_functions if source is not None]


def _order(roots: list[Node]) -> dict[Node, int]:
    """Every node reachable from the roots, numbered so that sources come first."""
    found: dict[Node, int] = {}
    stack = list(roots)
    while stack:
        missing = [s for s in _sources(stack[-1]) if s not in found]
        if missing:
            stack += missing
        else:
            found.setdefault(stack.pop(), len(found))
    return found


def _union(bits: Iterator[int]) -> int:
    total = 0
    for b in bits:
        total |= b
    return total


def _between(output: Node | None, inputs: frozenset[Node]) -> set[Node]:
    """The nodes that a layer's forward made: from its output back to, not including, its inputs."""
    owned: set[Node] = set()
    stack = [] if output is None or output in inputs else [output]
    while stack:
        node = stack.pop()
        owned.add(node)
        inner = (s for s in _sources(node) if not hasattr(s, "variable"))  # weights are shared
        stack += [s for s in inner if s not in inputs and s not in owned]
    return owned
