"""The operators that multiply: FLOPs of those that PyTorch's counter lacks, names of the others."""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten
Shape = Sequence[int]

# No rule is exact for these, forward and backward. The names are those of the caller's operators.
_NAMES = {
    "_trilinear": "bilinear",
    "mkldnn_rnn_layer": "lstm",
    "_cudnn_rnn": "lstm",
    "_cdist_forward": "cdist",
    "_euclidean_dist": "cdist",
}
# Words in the names of operators that multiply matrices, whatever stands around them.
_WORDS = {"mm", "bmm", "addmm", "baddbmm", "addbmm", "sspaddmm", "hspmm", "matmul", "mv", "addmv"}
_WORDS |= {"dot", "vdot", "conv", "convolution", "conv1d", "conv2d", "conv3d", "deconv", "linear"}
_WORDS |= {"attention", "rnn", "lstm", "gru", "trilinear", "bilinear"}
_SOLVERS = ("cholesky", "geqrf", "linalg", "lu_", "ormqr", "triangular_solve", "svd", "inverse")
_ELEMENTWISE = ("linalg_cross", "linalg_vector_norm", "linalg_check_errors", "thnn_fused")


def uncounted_name(operator: str) -> str | None:
    """What to call an operator of aten without a rule, where it multiplies matrices."""
    bare = operator.lstrip("_")
    if bare.startswith(_ELEMENTWISE):
        return None
    if operator in _NAMES or bare.startswith(("fft", *_SOLVERS)) or _WORDS & {*bare.split("_")}:
        return f"aten::{_NAMES.get(operator, operator)}"
    return None


def added_rules() -> dict[Any, Callable[..., int]]:
    """Rules for FlopCounterMode: products with vectors, sums of products, fused encoder layers."""
    rules: dict[Any, Callable[..., int]] = {
        aten.mv: lambda matrix, _vector, **_: 2 * prod(matrix),
        aten.addmv: lambda _self, matrix, _vector, **_: 2 * prod(matrix),
        aten.dot: lambda left, _right, **_: 2 * prod(left),
        aten.vdot: lambda left, _right, **_: 2 * prod(left),
        aten.addbmm: lambda _self, left, right, **_: 2 * prod(left) * right[-1],
        aten.affine_grid_generator: lambda theta, *_, out_shape, **__: (
            2 * prod(out_shape) * theta[-1]
        ),
        aten._addmm_activation: lambda _self, left, right, **_: 2 * prod(left) * right[-1],
    }
    return rules | _OF_TENSORS


def _attend(query: Tensor, key: Tensor, width: int) -> int:
    """Multiply-accumulates of scores and of what they weigh, by the lengths of each sample."""
    pairs = zip(_lengths(query), _lengths(key), strict=True)
    return 2 * width * sum(rows * columns for rows, columns in pairs)


def _lengths(tokens: Tensor) -> list[int]:
    """Of each sample of a batch, nested or not."""
    if tokens.is_nested:
        nested: Any = tokens
        return [size[0] for size in nested._nested_tensor_size().tolist()]
    return [tokens.shape[1]] * tokens.shape[0]


def _encoder_layer(source: Tensor, width: int, *rest: Any, **_: Any) -> int:
    matrices = rest[1], rest[3], rest[12], rest[14]  # queries, keys and values; out; two outside
    each: int = sum(matrix.numel() for matrix in matrices)
    return 2 * (sum(_lengths(source)) * each + _attend(source, source, width))


def _heads(query: Tensor, key: Tensor, value: Tensor, width: int, *rest: Any, **_: Any) -> int:
    packed, projection = rest[1], rest[3]
    into: int = sum(sum(_lengths(part)) for part in (query, key, value)) * packed.numel() // 3
    out: int = sum(_lengths(query)) * projection.numel()
    return 2 * (into + out + _attend(query, key, width))


_OF_TENSORS: dict[Any, Callable[..., int]] = {
    aten._transformer_encoder_layer_fwd: _encoder_layer,
    aten._native_multi_head_attention: _heads,
}
for _rule in _OF_TENSORS.values():
    _rule._get_raw = True  # type: ignore[attr-defined]
NESTED = frozenset(_OF_TENSORS)  # exact for nested tensors, too

_OURS = ("aten", "prim", "prims", "neq", "c10d", "_c10d_functional", "profiler")


def is_foreign(operator: Any) -> bool:
    """Whether an operator is neither PyTorch's nor neq's."""
    return getattr(operator, "namespace", "aten") not in _OURS


def opened(operators: Iterable[Any], mapping: dict[Any, Any]) -> dict[Any, Callable[..., int]]:
    """Rules for operators that somebody has registered: what their bodies do, done once more."""

    def rule(packet: Any) -> Callable[..., int]:
        def count_again(*args: Any, out_val: Any = None, **keywords: Any) -> int:
            inside = body(packet.default)
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                (inside or packet.default)(*args, **keywords)
            return int(counter.get_total_flops())

        count_again._get_raw = True  # type: ignore[attr-defined]
        return count_again

    return {packet: rule(packet) for packet in operators}


def body(operator: Any) -> Callable[..., Any] | None:
    """What runs on the CPU for a foreign operator; None for any other, and where nobody knows."""
    if not is_foreign(operator):
        return None
    keys = torch._C.DispatchKey
    for key in (keys.CPU, keys.CompositeExplicitAutograd):
        if operator.has_kernel_for_dispatch_key(key):
            return lambda *args, **keywords: operator._op_dk(key, *args, **keywords)
    return None
