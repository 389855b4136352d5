"""Layers whose backward computes the rows that train, and no others.

A layer takes on one of these classes while some of its neurons are frozen, and its own again
afterwards: parameters, buffers, hooks and `state_dict` stay as they are. Without gradients, under
torch.compile, under torch.func's transforms and in forward mode it computes like the plain layer.
README.md beside this file tells why it is done so.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from neq.kernels import KERNELS, Geometry, Rows, channels


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """What the backward of a layer does.

    `kernel`: the name of the one that computes `rows`, which are None where every neuron is frozen.
    `cut`: the input gradient flows through trainable neurons only. `shape`: of a convolution.
    """

    kernel: str
    rows: Rows | None
    cut: bool
    shape: Geometry | None


WORK = "_neq_work"


def assign(module: nn.Module, work: Work | None) -> None:
    """Let the backward of `module`, a supported layer, do `work`; None: be the plain layer
    again.
    """
    plain = plain_type(module)
    # Another class, not another module: parameters, buffers, hooks and keys stay as they are.
    if work is None:
        module.__class__ = plain
        module.__dict__.pop(WORK, None)
    else:
        module.__class__ = _SELECTIVE[plain]
        module.__dict__[WORK] = work


def plain_type(module: nn.Module) -> type[nn.Module]:
    """The type that the module was made with, whatever class it has taken on."""
    return type(module).plain if isinstance(module, _Selective) else type(module)


def geometry(module: nn.Module) -> Geometry | None:
    """The geometry of a convolution; None for any other layer.

    Padding that the kernels don't do is left out, and one dimension is made two, as aten does: its
    output is then no view, which could not be changed in place.
    """
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None
    shape = tuple(module.weight.shape)
    padding = (0,) * len(module.stride) if _pads(module) else _padding(module)
    stride, dilation = module.stride, module.dilation
    if len(stride) == 1:
        shape, stride = (*shape[:2], 1, shape[2]), (1, *stride)
        padding, dilation = (0, *padding), (1, *dilation)
    return Geometry(shape, stride, padding, dilation, module.groups)


def _padding(module: Any) -> tuple[int, ...]:
    """On each side; `padding` may have been assigned after the layer was made."""
    if isinstance(module.padding, str):
        return tuple(module._reversed_padding_repeated_twice[::-2])
    return tuple(module.padding)


def _pads(module: Any) -> bool:
    """Whether the input has to be padded beforehand: unevenly, or not with zeros."""
    sides = module._reversed_padding_repeated_twice
    uneven = isinstance(module.padding, str) and sides[::2] != sides[1::2]
    return bool(uneven or module.padding_mode != "zeros")


def _pad(inputs: Tensor, module: Any) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)


def _bare(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class _Selective(nn.Module):
    plain: ClassVar[type[nn.Module]]
    _neq_work: Work

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """Copies and pickles are plain layers: what is frozen here is not frozen there."""
        state = {name: value for name, value in self.__dict__.items() if name != WORK}
        return _bare, (self.plain,), state

    def _reached(self, inputs: Tensor) -> Tensor:
        """The input, cut off from its graph where nothing flows back."""
        return inputs.detach() if self._neq_work.cut and self._neq_work.rows is None else inputs


def selecting() -> bool:
    """Whether a backward may follow that these layers know how to shorten.

    torch.compile and torch.func trace a forward: they must see the plain layer.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return torch.is_grad_enabled() and forward_ad._current_level < 0


class _Convolution(_Selective):
    def _conv_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if not selecting():
            return super()._conv_forward(inputs, weight, bias)  # type: ignore[misc]
        # Frozen whole: with its parameters detached autograd itself stops where nothing upstream
        # trains. Toggling requires_grad would break DistributedDataParallel at the next step.
        if self._neq_work.rows is None:
            weight, bias = _detached(weight), _detached(bias)
        inputs = self._reached(inputs)
        if inputs.dim() < weight.dim():
            return self._conv_forward(inputs[None], weight, bias)[0]
        if _pads(self):
            inputs = _pad(inputs, self)
        inputs, weight, bias = _cast(inputs, weight, bias)
        # aten lifts one dimension to two as well; done here, the output is no view of a function's
        # output, which could not be changed in place.
        if inputs.dim() == 3:
            lifted = inputs.unsqueeze(2), weight.unsqueeze(2), bias
            return _convolution(*lifted, self._neq_work).squeeze(2)
        return _convolution(inputs, weight, bias, self._neq_work)


class _Linear(_Selective):
    def forward(self, input: Tensor) -> Any:
        if not selecting():
            return super().forward(input)
        input = self._reached(input)
        if self._neq_work.rows is None:
            return functional.linear(input, _detached(self.weight), _detached(self.bias))
        x, weight, bias = _cast(input, self.weight, self.bias)
        output = _linear(x.reshape(-1, x.shape[-1]), weight, bias, self._neq_work)
        return output.view(*input.shape[:-1], output.shape[-1])


class _Norm(_Selective):
    """Sums over all channels are part of the dense kernel: fewer rows were seen to cost more."""

    def forward(self, input: Tensor) -> Any:
        if not selecting():
            return super().forward(input)
        if self._neq_work.rows is None:
            with self._frozen():
                return super().forward(self._reached(input))
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        with saved_tensors_hooks(*self._around(*outer) if outer else (self._pack, _unpack)):
            return super().forward(input)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        kept = self._parameters
        self.__dict__["_parameters"] = {name: _detached(p) for name, p in kept.items()}
        try:
            yield
        finally:
            self.__dict__["_parameters"] = kept

    def _pack(self, saved: Tensor) -> tuple[Tensor, int]:
        saved = self._passing(saved)
        return saved, saved._version

    def _around(self, pack: Any, unpack: Any) -> tuple[Any, Any]:
        """Hooks of the caller's, who would not see what is saved under others."""
        return lambda saved: pack(self._passing(saved)), unpack

    def _passing(self, saved: Tensor) -> Tensor:
        """The backward multiplies by the weight it finds: zero for what passes nothing on."""
        weight, rows = self.weight, self._neq_work.rows
        assert isinstance(weight, Tensor)
        assert rows is not None
        # Of a parameter, or of a part of one that holds several flattened.
        same = saved.untyped_storage()._cdata == weight.untyped_storage()._cdata
        if not same or saved.storage_offset() != weight.storage_offset():
            return saved
        return weight.detach().index_fill(0, rows.fillers, 0)


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    saved, version = packed
    if saved._version != version:
        raise RuntimeError("the input of a normalisation layer was changed in place before its use")
    return saved


def _detached(parameter: Any) -> Any:
    return None if parameter is None else parameter.detach()


def _cast(*tensors: Any) -> list[Any]:
    """As autocast would, which does not reach what a function saves and returns."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors]


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


_convolution: Any = _ConvolutionFunction.apply
_linear: Any = _LinearFunction.apply

_BASES: dict[type[nn.Module], type[_Selective]] = {
    nn.Conv1d: _Convolution,
    nn.Conv2d: _Convolution,
    nn.Conv3d: _Convolution,
    nn.Linear: _Linear,
    nn.BatchNorm1d: _Norm,
    nn.BatchNorm2d: _Norm,
    nn.BatchNorm3d: _Norm,
    nn.SyncBatchNorm: _Norm,
    nn.GroupNorm: _Norm,
    nn.LayerNorm: _Norm,
}
_SELECTIVE: dict[type[nn.Module], type[_Selective]] = {
    plain: type(plain.__name__, (base, plain), {"plain": plain}) for plain, base in _BASES.items()
}
