"""Reads the autograd graph of one forward: which parameters lie upstream of which product.

Execution order would be the wrong test: a class token enters late, a frozen branch may run first.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_leaves

from neq.neurons import Layer, NeuronIndex

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
    `products`: the matrix products outside them.
    """

    sources: list[list[int]]
    own: list[int]
    roots: frozenset[int]
    runs: list["_Run[int]"]
    products: list["_Operator"]

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


def trace(model: nn.Module, inputs: Tensor, neurons: NeuronIndex, numbers: dict[int, int]) -> Graph:
    """The graph that `model(inputs)` leaves behind, run once with gradients.

    `numbers`: id of each parameter → number of the bit that stands for it.
    """
    recorder = _Recorder(neurons)
    with recorder.hooks(), torch.enable_grad():
        outputs = model(inputs)
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
        _Operator(position, *_products(node, order))
        for node, position in order.items()
        if position not in owned
    ]
    return Graph(
        [[order[source] for source in _sources(node)] for node in order],
        [0 if number is None else 1 << number for number in own],
        frozenset(order[root] for root in roots),
        runs,
        [operator for operator in products if operator.pairs],
    )


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
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            yield get_gradient_edge(leaf).node


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


def _products(node: Node, order: dict[Node, int]) -> tuple[bool, list[tuple[list[int], int]]]:
    """Whether one operator makes them all; (operands, FLOPs) of each product of its backward."""
    name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
    operands = [source for source, _ in node.next_functions]
    fused = name.startswith("ScaledDotProduct")
    if fused:
        pairs = _attention(node, operands)
    elif name in _MATRIX_PRODUCTS:
        flops = 2 * _MATRIX_PRODUCTS[name](node)
        pairs = [([source], flops) for source in operands[-2:]]
    elif name == "Convolution":
        flops = 2 * _convolution(node)
        pairs = [([source], flops) for source in operands[:2]]
    else:
        pairs = []
    placed = [([order[o] for o in needed if o is not None], flops) for needed, flops in pairs]
    return fused, [(needed, flops) for needed, flops in placed if needed or fused]


def _output_shape(node: Any) -> tuple[int, ...]:
    return tuple(node._input_metadata[0].shape)


def _batched(node: Any, left: str, right: str) -> int:
    """Multiply-accumulates of [b, m, k] @ [b, k, n]; an operand is saved for the other's sake."""
    saved = getattr(node, f"_saved_{left}")
    inner = getattr(node, f"_saved_{right}").shape[1] if saved is None else saved.shape[2]
    return prod(_output_shape(node)) * int(inner)


def _convolution(node: Any) -> int:
    """Multiply-accumulates: each weight is used once per sample and position."""
    weight = node._saved_weight
    per_position = node._saved_input if node._saved_transposed else None
    shape = _output_shape(node) if per_position is None else tuple(per_position.shape)
    return shape[0] * prod(shape[2:]) * int(weight.numel())


_MATRIX_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "Mm": lambda n: prod(_output_shape(n)) * n._saved_self_sym_sizes[1],
    "Addmm": lambda n: prod(_output_shape(n)) * n._saved_mat1_sym_sizes[1],
    "Bmm": lambda n: _batched(n, "self", "mat2"),
    "Baddbmm": lambda n: _batched(n, "batch1", "batch2"),
}


def _attention(node: Any, operands: list[Any]) -> list[tuple[list[Any], int]]:
    """Four products: values; probabilities, for the sake of queries and keys; queries; keys."""
    query, key, value = operands[:3]
    scores = prod(node._saved_query.shape[:-1]) * node._saved_key.shape[-2]
    by_value = 2 * scores * node._saved_value.shape[-1]
    by_query = 2 * scores * node._saved_query.shape[-1]
    return [([value], by_value), ([query, key], by_value), ([query], by_query), ([key], by_query)]
