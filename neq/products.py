"""The matrix products in the backward of one node of the autograd graph."""

from collections.abc import Callable
from math import prod
from typing import Any

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

# Of the backward of somebody's own function: (operands, FLOPs) for parts of it, each of which is
# done where one of its operands needs a gradient; FLOPs may be negative.
Opaque = Callable[[Any], list[tuple[list[Any], int]]]


def products_of(
    node: Any, order: dict[Node, int], opaque: Opaque | None = None
) -> tuple[bool, list[tuple[list[int], int]]]:
    """Whether one operator makes them all; (operands, FLOPs) of each product of its backward.

    `order`: number of each node; operands are given by these.
    """
    name = type(node).__name__.rstrip("0123456789").removesuffix("Backward")
    operands = [source for source, _ in node.next_functions]
    fused = name.startswith("ScaledDotProduct")
    if fused:
        pairs = _attention(node, operands)
    elif name in _MATRIX_PRODUCTS:
        flops = 2 * _MATRIX_PRODUCTS[name](node)
        pairs = [([source], flops) for source in operands[-2:]]
    elif name == "AffineGridGenerator":
        shape = _output_shape(node)
        pairs = [(operands, 2 * prod(shape) * (len(shape) - 1))]
    elif name == "Convolution":
        flops = 2 * _convolution(node)
        pairs = [([source], flops) for source in operands[:2]]
    elif name in _VECTOR_PRODUCTS:
        # The other gradient is an outer product, which sums nothing.
        vector = operands[-1]
        pairs = [] if vector is None else [([vector], 2 * _VECTOR_PRODUCTS[name](node))]
    elif isinstance(node, BackwardCFunction):
        pairs = opaque(node) if opaque else []
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


def _summed(node: Any) -> int:
    """Multiply-accumulates of the sum of [b, m, k] @ [b, k, n] over b."""
    left, right = node._saved_batch1, node._saved_batch2
    rows, columns = _output_shape(node)
    return int(right.numel()) * rows if left is None else int(left.numel()) * columns


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
    "Addbmm": lambda n: _summed(n),
    "Addr": lambda n: prod(_output_shape(n)),
}
_VECTOR_PRODUCTS: dict[str, Callable[[Any], int]] = {
    "Mv": lambda n: n._saved_self.numel(),
    "Addmv": lambda n: n._saved_mat.numel(),
}


def _attention(node: Any, operands: list[Any]) -> list[tuple[list[Any], int]]:
    """Four products: values; probabilities, for the sake of queries and keys; queries; keys."""
    query, key, value = operands[:3]
    scores = prod(node._saved_query.shape[:-1]) * node._saved_key.shape[-2]
    by_value = 2 * scores * node._saved_value.shape[-1]
    by_query = 2 * scores * node._saved_query.shape[-1]
    return [([value], by_value), ([query, key], by_value), ([query], by_query), ([key], by_query)]
