"""What the backward of a layer does under a mask, and the autograd functions that do it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional

from neq.kernels import KERNELS, Geometry, Kept, Rows, channels


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the backward of a layer does.

    `kernel`: the name of the one that computes `rows`, which are None where every neuron is frozen.
    `cut`: the input gradient flows through trainable neurons only. `shape`: of a convolution.
    `kept`: memory of a gradient of zeros.
    """

    kernel: str
    rows: Rows | None
    cut: bool
    shape: Geometry | None
    kept: Kept = field(default_factory=Kept)

    def weight_gradient(
        self, gradient: Tensor, x: Tensor, size: torch.Size, stride: tuple[int, ...]
    ) -> Tensor:
        """The gradient of a weight of `size` and `stride`, with zeros for rows that do not train.

        `gradient`: of the output, [samples, neurons, …]; `x`: the input, [samples, …].
        """
        if self.rows is None:
            full, _ = self.kept.take(gradient, size, stride)
            return self.kept.give(full.zero_(), versioned=False)
        rows = self.rows.to(gradient.device)
        if self.kernel == "dense":
            full = _strided(self._product(gradient, x, rows), stride)
            return full.index_fill_(0, rows.fillers, 0) if len(rows.fillers) else full
        computed = self._product(rows.gather(gradient), x, rows)
        return rows.scatter(computed, size, stride, versioned=False)

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """The gradient of the input `x`, through the rows that train alone."""
        assert self.rows is not None
        rows, shape = self.rows.to(gradient.device), self.shape
        if self.kernel == "dense":
            gradient, weight = _without(rows, gradient, weight)
            return gradient @ weight if shape is None else shape.input_gradient(gradient, x, weight)
        chosen = rows.gather(gradient)
        if shape is None:
            return chosen @ rows.weights(weight)
        return _through_rows(chosen, x, weight, shape, rows)

    def _product(self, chosen: Tensor, x: Tensor, rows: Rows) -> Tensor:
        if self.shape is None:
            return chosen.t() @ x
        return KERNELS[self.kernel](chosen, x, self.shape, rows)


def _strided(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride:
        return tensor
    return tensor.new_empty_strided(tensor.shape, stride).copy_(tensor)


def _needed(ctx: Any) -> tuple[bool, bool, bool]:
    """Whether this backward is asked for the gradients of input, weight and bias.

    needs_input_grad stays true for what `autograd.grad` does not ask for.
    """
    nodes = [node for node, _ in ctx.next_functions] + [None]  # a bias that is None has no node
    inputs, weight, bias = (_executes(node) for node in nodes[:3])
    return inputs, weight, bias


def _executes(node: Any) -> bool:
    try:
        return node is not None and torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that `autograd.grad` asks for
        return True


class _ConvolutionFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, work: Work) -> Tensor:
        assert work.shape is not None
        _save(ctx, x, weight, work)
        if _packs():
            return x.new_empty(_convolved(x, weight, work.shape))
        return work.shape.forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        if x is None:  # frozen whole: the input was not kept
            x = gradient.new_empty_strided(*ctx.like)  # its values are never read
        work, shape = ctx.work, ctx.work.shape
        needs_input, needs_weight, needs_bias = needed = _needed(ctx)
        if work.kernel == "dense":
            if weight is None:  # nobody needs its values
                weight = gradient.new_empty(shape.weight)
            rows = work.rows.to(gradient.device)
            if needs_input and work.cut:
                gradient, weight = _without(rows, gradient, weight)
            return *_zeroed(rows, *shape.gradients(gradient, x, weight, needed)), None
        by_input = by_weight = by_bias = None
        # From all channels, frozen or not: what flows through a frozen neuron still counts.
        if needs_input and not work.cut:
            by_input = shape.input_gradient(gradient, x, weight)
        if work.rows is None:
            return by_input, None, None, None
        rows = work.rows.to(gradient.device)
        chosen = rows.gather(gradient)
        if needs_input and work.cut:
            by_input = _through_rows(chosen, x, weight, shape, rows)
        if needs_weight:
            computed = KERNELS[work.kernel](chosen, x, shape, rows)
            by_weight = rows.scatter(computed, *ctx.weight_like)
        if needs_bias:
            summed = chosen.sum([0, *range(2, chosen.dim())])
            by_bias = rows.scatter(summed, gradient.shape[1:2], (1,))
        return by_input, by_weight, by_bias, None


def _save(ctx: Any, x: Tensor, weight: Tensor, work: Work) -> None:
    """Keep for the backward what it needs, and no more."""
    needs_input, needs_weight, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if needs_weight else None, weight if needs_input else None)
    ctx.work, ctx.like = work, (x.shape, x.stride())
    ctx.weight_like = weight.shape, weight.stride()


def _without(rows: Rows, gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The output's gradient and the weight, one of them with zeros for rows that do not train.

    Their product is the input gradient, so that the smaller one is enough.
    """
    if not len(rows.fillers):
        return gradient, weight
    if weight.numel() <= gradient.numel():
        return gradient, weight.index_fill(0, rows.fillers, 0)
    return gradient.index_fill(1, rows.fillers, 0), weight


def _zeroed(rows: Rows, by_input: Any, by_weight: Any, by_bias: Any) -> tuple[Any, Any, Any]:
    """Fresh gradients of a layer, with zeros for rows that do not train.

    No hook clears what `autograd.grad` returns.
    """
    for computed in (by_weight, by_bias):
        if computed is not None:
            computed.index_fill_(0, rows.fillers, 0)
    return by_input, by_weight, by_bias


def _through_rows(chosen: Tensor, x: Tensor, weight: Tensor, shape: Geometry, rows: Rows) -> Tensor:
    """The input gradient from the `chosen` gradient channels, as far as they train."""
    part = replace(shape, groups=rows.groups)
    like = x if rows.inputs is None else channels(x, rows.inputs)
    gradient = part.input_gradient(chosen, like, rows.weights(weight))
    if rows.inputs is None:
        return gradient
    return torch.zeros_like(x).index_copy(1, rows.inputs, gradient)


class _LinearFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, work: Work) -> Tensor:
        _save(ctx, x, weight, work)
        if _packs():
            return x.new_empty((*x.shape[:-1], len(weight)))
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        rows = ctx.work.rows.to(gradient.device)
        needs_input, needs_weight, needs_bias = _needed(ctx)
        if ctx.work.kernel == "dense":
            if needs_input and ctx.work.cut:
                gradient, weight = _without(rows, gradient, weight)
            by_input = gradient @ weight if needs_input else None
            by_weight = gradient.t() @ x if needs_weight else None
            by_bias = gradient.sum(0) if needs_bias else None
            return *_zeroed(rows, by_input, by_weight, by_bias), None
        chosen = rows.gather(gradient)
        by_input = by_weight = by_bias = None
        if needs_input:
            by_input = chosen @ rows.weights(weight) if ctx.work.cut else gradient @ weight
        if needs_weight:
            by_weight = rows.scatter(chosen.t() @ x, *ctx.weight_like)
        if needs_bias:
            by_bias = rows.scatter(chosen.sum(0), gradient.shape[1:], (1,))
        return by_input, by_weight, by_bias, None


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, work: Work) -> Tensor:
    """The convolution of `x`, [samples, …], whose backward does `work`."""
    assert work.shape is not None
    output: Tensor = _ConvolutionFunction.apply(x, weight, bias, work)  # type: ignore[no-untyped-call]
    return _filled(output, work.shape.forward, x, weight, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, work: Work) -> Tensor:
    """The product of `x`, [rows, inputs], with a layer's weight, whose backward does `work`."""
    output: Tensor = _LinearFunction.apply(x, weight, bias, work)  # type: ignore[no-untyped-call]
    return _filled(output, functional.linear, x, weight, bias)


def _packs() -> bool:
    """Whether somebody packs what is saved for the backward, such as activation checkpointing.

    That stops computing a region again where it has all that was saved. PyTorch's own layers save
    before they multiply, a function afterwards: it would do a product more. So there it returns
    memory, which is filled when all is saved.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _filled(output: Tensor, product: Callable[..., Tensor], *operands: Any) -> Tensor:
    if _packs():
        with torch.no_grad():
            output.data = product(*operands)
    return output


def _convolved(x: Tensor, weight: Tensor, shape: Geometry) -> tuple[int, ...]:
    """The sizes of a convolution's output."""
    how = weight.shape[2:], shape.stride, shape.padding, shape.dilation
    sides = zip(x.shape[2:], *how, strict=True)
    places = ((n + 2 * pad - d * (k - 1) - 1) // step + 1 for n, k, step, pad, d in sides)
    return (x.shape[0], weight.shape[0], *places)
