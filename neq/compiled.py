"""The backward of layers inside a graph of torch.compile: new rows are no new graph.

The graph holds opaque operators. They are told what to do by a number in a tensor, which the layer
gives its forward and the graph keeps for the backward: another mask is another number. The rest,
with the forward, is aten's, and the compiler's to fuse.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import CodeType
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from neq.work import Work

GRAPHS = 7  # of a function that are kept: where dynamo has eight it compiles no more of it

_numbers = count()
_works: dict[int, Work] = {}


def handle(work: Work) -> Tensor:
    """A tensor, int64 [] on the CPU, that stands for `work` in a graph, and keeps it alive."""
    number = next(_numbers)
    _works[number] = work
    with torch.inference_mode(False):  # a graph saves it for its backward
        tensor = torch.tensor(number, device="cpu")
    finalize(tensor, _works.pop, number)
    return tensor


def _asked(work: Tensor, gradient: Tensor) -> Work:
    if gradient.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph would keep the rows of this mask: capture it without a NeuronFreezer"
        )
    return _works[int(work)]


def _weight_gradient(
    gradient: Tensor, inputs: Tensor, work: Tensor, size: Sequence[int], stride: Sequence[int]
) -> Tensor:
    asked = _asked(work, gradient)
    return asked.weight_gradient(gradient, inputs, torch.Size(size), tuple(stride))


def _input_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor, work: Tensor) -> Tensor:
    found = _asked(work, gradient).input_gradient(gradient, inputs, weight)
    like = torch.empty_like(inputs)
    return found if found.stride() == like.stride() else like.copy_(found)


_SCHEMAS = {
    "weight_gradient": (
        "Tensor gradient, Tensor inputs, Tensor work, SymInt[] size, SymInt[] stride"
    ),
    "input_gradient": "Tensor gradient, Tensor inputs, Tensor weight, Tensor work",
}
_BODIES: dict[str, Callable[..., Tensor]] = {
    "weight_gradient": _weight_gradient,
    "input_gradient": _input_gradient,
}
# Row counts are fixed in a CUDA graph (mode="reduce-overhead"): inductor leaves these outside.
_TAGS = [torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe]
for _name, _body in _BODIES.items():
    # torch.library.custom_op would check each call in Python: that takes longer than a small layer.
    torch.library.define(f"neq::{_name}", f"({_SCHEMAS[_name]}) -> Tensor", tags=_TAGS)
    # Not `impl`: dynamo would trace the body, where the backward is part of what it compiles.
    torch.library.register_kernel(f"neq::{_name}", None, _body)

torch.library.register_fake(
    "neq::weight_gradient",
    lambda gradient, inputs, work, size, stride: gradient.new_empty_strided(size, stride),
)
torch.library.register_fake(
    "neq::input_gradient", lambda gradient, inputs, weight, work: torch.empty_like(inputs)
)


def flop_rules(mapping: dict[Any, Any]) -> dict[Any, Callable[..., int]]:
    """Rules for FlopCounterMode: it counts what is computed inside the operators, by the rules of
    `mapping` and its own. For that their work is done once more.
    """

    def rule(body: Callable[..., Tensor]) -> Callable[..., int]:
        def count_again(*args: Any, out_val: Any = None, **keywords: Any) -> int:
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                body(*args, **keywords)
            return int(counter.get_total_flops())

        count_again._get_raw = True  # type: ignore[attr-defined]
        return count_again

    return {getattr(torch.ops.neq, name): rule(body) for name, body in _BODIES.items()}


for _operator, _rule in flop_rules({}).items():
    register_flop_formula(_operator, get_raw=True)(_rule)


# Dynamo makes gradients contiguous in a backward that asks for shape, strides or layout of what it
# is given: these are kept by the forward.
class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        work: Tensor,
        arguments: Any,
        cut: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, work)
        ctx.arguments, ctx.cut, ctx.like = arguments, cut, (weight.shape, weight.stride())
        ctx.places = [0, *range(2, x.dim())]
        return torch.convolution(x, weight, bias, *arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, work = ctx.saved_tensors
        by_input = by_weight = by_bias = None
        if ctx.needs_input_grad[0] and ctx.cut:
            by_input = torch.ops.neq.input_gradient(gradient, x, weight, work)
        elif ctx.needs_input_grad[0]:
            only = [True, False, False]
            by_input = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, *ctx.arguments, only
            )[0]
        if ctx.needs_input_grad[1]:
            by_weight = torch.ops.neq.weight_gradient(gradient, x, work, *ctx.like)
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum(ctx.places)
        return by_input, by_weight, by_bias, None, None, None


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, work: Tensor, cut: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight, work)
        ctx.cut, ctx.like = cut, (weight.shape, weight.stride())
        return torch.nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, work = ctx.saved_tensors
        by_input = by_weight = by_bias = None
        if ctx.needs_input_grad[0] and ctx.cut:
            by_input = torch.ops.neq.input_gradient(gradient, x, weight, work)
        elif ctx.needs_input_grad[0]:
            by_input = gradient @ weight
        if ctx.needs_input_grad[1]:
            by_weight = torch.ops.neq.weight_gradient(gradient, x, work, *ctx.like)
        if ctx.needs_input_grad[2]:
            by_bias = gradient.sum(0)
        return by_input, by_weight, by_bias, None, None


class _Masked(Function):
    """The identity, whose gradient is multiplied by a mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, None


convolution: Any = _Convolution.apply
linear: Any = _Linear.apply
masked: Any = _Masked.apply


@dataclass(slots=True)
class _Function:
    """What dynamo has compiled of a function with a layer in it: ids of its graphs; `known`: how
    many there were when room was made for others.
    """

    code: CodeType
    graphs: set[Any] = field(default_factory=set)
    known: int = 0


_functions: dict[int, _Function] = {}  # by the code's id: equal code is not the same


def note_graph() -> None:
    """Called while dynamo traces a layer: take note of the graph."""
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import CompileContext

    code = InstructionTranslator.current_tx().output.root_tx.f_code
    function = _functions.setdefault(id(code), _Function(code))
    function.graphs.add(CompileContext.current_compile_id())


# As torch.compiler.assume_constant_result does, which would load all of dynamo with this module.
note_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


def graphs() -> int:
    """How many graphs dynamo has traced, and may still keep, of the function with the most."""
    return max((len(function.graphs) for function in _functions.values()), default=0)


def make_room(most: int = GRAPHS + 1) -> bool:
    """Let dynamo forget the graphs of functions that may soon have more than GRAPHS; whether any.

    To be called before what may need other graphs. Those that a function has had from the start,
    for layers of several shapes, say, are as many afterwards: only what has come since counts, and
    more than `most`.
    """
    full = []
    for function in _functions.values():
        count = len(function.graphs)
        grown = count - function.known if function.known else 0
        others = _others(function)
        if count + others > most or (grown and count + grown + others > GRAPHS):
            full.append(function.code)
        function.known = count
    for code in full:
        forget(code)
    return bool(full)


def _others(function: _Function) -> int:
    """How many graphs it has, but for one, in which no layer is to be told what to do: of plain
    models and of evaluations.
    """
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    return max(len(_debug_get_cache_entry_list(function.code)) - len(function.graphs) - 1, 0)


def forgotten() -> None:
    """Somebody has let dynamo forget everything."""
    _functions.clear()


def forget(code: CodeType) -> None:
    """Let dynamo forget the graphs of the function with that code."""
    from torch._dynamo.eval_frame import remove_from_cache

    _functions.pop(id(code), None)
    remove_from_cache(code)


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile was applied to it or to a part of it, or their `compile` was called.

    Of a function that calls the model, and is compiled itself, nobody can tell.
    """
    return compiler_of(model) is not None


def compiler_of(model: nn.Module) -> Any:
    """The backend that the model, or a part of it, is compiled with; None where none is.

    Where torch does not tell, its default.
    """
    for module in model.modules():
        inside = module._compiled_call_impl  # by `module.compile()`, which may have disabled it
        context = inspect.getclosurevars(inside).nonlocals.get("self") if inside else None
        context = getattr(module, "dynamo_ctx", context)
        if context is None:
            continue
        backend: Any = getattr(context, "callback", None)
        while hasattr(backend, "_torchdynamo_orig_backend"):
            backend = backend._torchdynamo_orig_backend
        return backend or "inductor"
    return None
