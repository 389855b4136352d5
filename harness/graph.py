"""What the autograd graph of one forward says: which parameters lie upstream of which product.

Execution order would be the wrong test: a class token enters late, a frozen branch may run first.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils._pytree import tree_leaves

from neq import Layer, NeuronIndex


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a supported layer; `upstream`: bit i set where its input depends on parameter i.

    `elements`: of its output, over the whole batch. `reached`: whether the model's output depends
    on it, so that the backward visits it.
    """

    layer: str
    elements: int
    upstream: int
    reached: bool


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix product of the backward, outside supported layers, over the whole batch."""

    flops: int
    upstream: int


@dataclass(frozen=True, slots=True)
class Graph:
    """Calls and products of one forward."""

    calls: tuple[Call, ...]
    products: tuple[Product, ...]


def trace(model: nn.Module, inputs: Tensor, neurons: NeuronIndex, numbers: dict[int, int]) -> Graph:
    """Run `model(inputs)` once with gradients and read the graph that it leaves behind.

    `numbers`: id of each parameter → the bit that stands for it.
    """
    recorder = _Recorder(neurons)
    with recorder.hooks(), torch.enable_grad():
        outputs = model(inputs)
    roots = list(_nodes(outputs))
    upstream = _upstream([*roots, *recorder.nodes()], numbers)
    reached = _upstream(roots, numbers).keys()
    insides = [_between(run.output, run.inputs) for run in recorder.runs]
    owned = set().union(*insides)
    calls = tuple(
        Call(
            run.layer.name,
            run.elements,
            _union(upstream[node] for node in run.inputs),
            # Not `run.output in reached`: an in-place operation on a view rewrites its node.
            not inside.isdisjoint(reached),
        )
        for run, inside in zip(recorder.runs, insides, strict=True)
    )
    products = (
        Product(flops, _union(upstream[source] for source in sources))
        for node in reached - owned
        for sources, flops in _products(node)
    )
    return Graph(calls, tuple(p for p in products if p.upstream))


@dataclass(frozen=True, slots=True)
class _Run:
    layer: Layer
    inputs: frozenset[Node]
    output: Node | None
    elements: int


class _Recorder:
    def __init__(self, neurons: NeuronIndex) -> None:
        self.runs: list[_Run] = []
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
            node = next(_nodes(output), None)
            run = _Run(layer, self._inputs[layer.name], node, output.numel())
            self.runs.append(run)

        return hook

    def nodes(self) -> Iterator[Node]:
        for run in self.runs:
            yield from run.inputs


def _nodes(value: Any) -> Iterator[Node]:
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            yield get_gradient_edge(leaf).node


def _sources(node: Node) -> list[Node]:
    return [source for source, _ in node.next_functions if source is not None]


def _upstream(roots: list[Node], numbers: dict[int, int]) -> dict[Node, int]:
    """For every node reachable from the roots, the bits of the parameters it depends on."""
    found: dict[Node, int] = {}
    stack = list(roots)
    while stack:
        node = stack[-1]
        missing = [s for s in _sources(node) if s not in found]
        if missing:
            stack += missing
            continue
        stack.pop()
        number = numbers.get(id(getattr(node, "variable", None)))
        own = 0 if number is None else 1 << number
        found[node] = own | _union(found[s] for s in _sources(node))
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


def _products(node: Node) -> Iterator[tuple[list[Node], int]]:
    """(operands, FLOPs) of each product that the backward of `node` makes for those operands."""
    name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
    operands = [source for source, _ in node.next_functions]
    if name.startswith("ScaledDotProduct"):
        pairs = _attention(node, operands)
    elif name in _MATRIX_PRODUCTS:
        flops = 2 * _MATRIX_PRODUCTS[name](node)
        pairs = [([source], flops) for source in operands[-2:]]
    elif name == "Convolution":
        flops = 2 * _convolution(node)
        pairs = [([source], flops) for source in operands[:2]]
    else:
        pairs = []
    for sources, flops in pairs:
        needed = [source for source in sources if source is not None]
        if needed:
            yield needed, flops


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
