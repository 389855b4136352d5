"""Layers whose backward computes the rows that train, and no others.

A layer has one of these classes as long as a NeuronFreezer is at work: parameters, buffers, hooks
and `state_dict` stay as they are. While nothing in it is frozen, without gradients, under
torch.func's transforms, where it is traced or exported and in forward mode it computes like the
plain layer.
README.md beside this file tells why it is done so.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from neq import compiled
from neq.changes import Counting
from neq.kernels import Geometry, everything
from neq.plain import Selective, plain_class
from neq.work import Work, convolution, linear

WORK, TRACED = "_neq_work", "_neq_traced"


class Traced:
    """What of a layer's work goes into a graph of torch.compile.

    A graph is traced for one `cut` (see Work), and where nothing upstream of the layer trains for
    one `whole` (every neuron is frozen): the gradient ends there. It is given tensors: `handle`,
    which stands for the work, and `trains`, which the normalisation layers read under `cut`: 1 or 0
    for each neuron. `held`: whose running statistics stand still, bool [neurons], or None.
    """

    def __init__(self, module: nn.Module, cut: bool) -> None:
        self.cut = cut
        self.held: Tensor | None = None
        self._shape, self.arguments = geometry(module), None
        if (shape := self._shape) is not None:
            zeros = (0,) * len(shape.stride)
            static = shape.stride, shape.padding, shape.dilation, False, zeros, shape.groups
            self.arguments = static
        self.assign(module, None)

    def assign(self, module: nn.Module, work: Work | None) -> None:
        """Let graphs do `work`, and the plain layer's where it is None."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        work = work or self._dense(weight)
        self.whole, self.handle = work.rows is None, compiled.handle(work)
        if not self.cut or work.rows is None:
            return
        with torch.inference_mode(False):  # a graph saves it for its backward
            trains = torch.ones(weight.shape[:1], device=weight.device)
            self.trains = trains.index_fill_(0, work.rows.fillers.to(weight.device), 0)

    def _dense(self, weight: Tensor) -> Work:
        """All rows, told on the weight's device: a GPU would be waited for in each backward."""
        nobody = torch.zeros(len(weight), dtype=torch.bool)
        rows = everything(nobody, 1 if self._shape is None else self._shape.groups)
        return Work("dense", rows.to(weight.device), self.cut, self._shape)

    def ends(self, inputs: Tensor) -> bool:
        """Whether no gradient leaves the layer: neither for what is upstream nor for its own."""
        return (self.cut or not inputs.requires_grad) and self.whole


def prepare(module: nn.Module, cut: bool) -> Traced:
    """Let a supported layer be told what its backward does, from now on; `cut`: see Work.

    Compiled code is traced for a class: were it to change with the mask, so would the code.
    """
    # Another class, not another module: parameters, buffers, hooks and keys stay as they are.
    module.__class__ = _SELECTIVE[plain_type(module)]
    module.__dict__[WORK] = None
    module.__dict__[TRACED] = traced = Traced(module, cut)
    return traced


def assign(module: nn.Module, work: Work | None) -> None:
    """Let the backward of `module` do `work`; None: that of the plain layer."""
    if not isinstance(module, _Selective):
        prepare(module, work is not None and work.cut)
    module.__dict__[WORK] = work
    module.__dict__[TRACED].assign(module, work)


def hold(module: nn.Module, frozen: Tensor) -> None:
    """Let the running statistics of the `frozen`, bool [neurons], stand still, where the prepared
    `module` has any.
    """
    if not isinstance(module, _BatchNorm):
        return
    weight = module.weight
    assert isinstance(weight, Tensor)
    with torch.inference_mode(False):  # a graph may read it
        module.__dict__[TRACED].held = frozen.to(weight.device, copy=True)


def is_prepared(module: nn.Module, prepared: Traced) -> bool:
    """Whether the layer is as `prepare` made it then, and nobody has prepared it anew."""
    return module.__dict__.get(TRACED) is prepared


def release(module: nn.Module, prepared: Traced) -> None:
    """Let `module` be the plain layer again, unless somebody has prepared it anew."""
    if not is_prepared(module, prepared):
        return
    module.__class__ = plain_class(type(module))
    for name in (WORK, TRACED):
        module.__dict__.pop(name, None)


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


class _Selective(Counting, Selective):
    _neq_work: Work | None
    _neq_traced: Traced

    def _reached(self, inputs: Tensor) -> Tensor:
        """The input, cut off from its graph where nothing flows back."""
        work = self._neq_work
        return inputs.detach() if work is not None and work.cut and work.rows is None else inputs

    def _plainly(self, forward: Callable[..., Any], inputs: Any, *parameters: Any) -> Any:
        if isinstance(inputs, fx.Proxy):
            return self.traced_by_fx(inputs)
        return forward(inputs, *parameters)


def selecting() -> bool:
    """Whether a backward may follow that these layers know how to shorten.

    Whoever traces a forward (torch.export, torch.func, torch.fx, torch.jit) must see the plain
    layer.
    """
    if torch.compiler.is_compiling() or transformed():
        return False
    if torch._C._is_tracing() or fx._symbolic_trace.is_fx_symbolic_tracing():
        return False
    return torch.is_grad_enabled() and forward_ad._current_level < 0


def tracing() -> bool:
    """Whether torch.compile traces a forward that such a backward may follow."""
    # Not is_exporting(): dynamo of torch 2.11 takes it for true wherever it traces.
    if not torch.compiler.is_dynamo_compiling() or torch.compiler._is_exporting_flag:
        return False
    return torch.is_grad_enabled()


def transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


class _Convolution(_Selective):
    def _conv_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        if tracing() and not transformed():
            return self._traced_forward(inputs, weight, bias)
        if not selecting() or self._neq_work is None:
            return self._plainly(super()._conv_forward, inputs, weight, bias)  # type: ignore[misc]
        # Frozen whole: with its parameters detached autograd itself stops where nothing upstream
        # trains. Toggling requires_grad would break DistributedDataParallel at the next step.
        if self._neq_work.rows is None:
            weight, bias = _detached(weight), _detached(bias)
        return self._convolved(self._reached(inputs), weight, bias, convolution, self._neq_work)

    def _traced_forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        traced = self._neq_traced
        compiled.note_graph()
        if traced.ends(inputs):
            return super()._conv_forward(inputs, weight, bias).detach()  # type: ignore[misc]
        how = traced.handle, traced.arguments, traced.cut
        return self._convolved(inputs, weight, bias, compiled.convolution, *how)

    def _convolved(
        self, inputs: Tensor, weight: Tensor, bias: Tensor | None, function: Any, *how: Any
    ) -> Any:
        """By `function`, which is told `how`."""
        if inputs.dim() < weight.dim():
            return self._convolved(inputs[None], weight, bias, function, *how)[0]
        if _pads(self):
            inputs = _pad(inputs, self)
        inputs, weight, bias = _cast(inputs, weight, bias)
        # aten lifts one dimension to two as well; done here, the output is no view of a function's
        # output, which could not be changed in place.
        if inputs.dim() == 3:
            lifted = inputs.unsqueeze(2), weight.unsqueeze(2), bias
            return function(*lifted, *how).squeeze(2)
        return function(inputs, weight, bias, *how)


class _Linear(_Selective):
    def forward(self, input: Tensor) -> Any:
        if tracing() and not transformed():
            return self._traced_forward(input)
        if not selecting() or self._neq_work is None:
            return self._plainly(super().forward, input)
        input = self._reached(input)
        if self._neq_work.rows is None:
            return functional.linear(input, _detached(self.weight), _detached(self.bias))
        return self._product(input, linear, self._neq_work)

    def _traced_forward(self, input: Tensor) -> Any:
        traced = self._neq_traced
        compiled.note_graph()
        if traced.ends(input):
            return super().forward(input).detach()
        return self._product(input, compiled.linear, traced.handle, traced.cut)

    def _product(self, input: Tensor, function: Any, *how: Any) -> Tensor:
        """By `function`, which is told `how`."""
        x, weight, bias = _cast(input, self.weight, self.bias)
        output: Tensor = function(x.reshape(-1, x.shape[-1]), weight, bias, *how)
        return output.view(*input.shape[:-1], output.shape[-1])


class _Norm(_Selective):
    """Sums over all channels are part of the dense kernel: fewer rows were seen to cost more."""

    def forward(self, input: Tensor) -> Any:
        if tracing() and not transformed():
            return self._traced_forward(input)
        if not selecting() or self._neq_work is None:
            return self._plainly(super().forward, input)
        if self._neq_work.rows is None:
            with self._frozen():
                return super().forward(self._reached(input))
        outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
        with saved_tensors_hooks(*self._around(*outer) if outer else (self._pack, _unpack)):
            return super().forward(input)

    def _traced_forward(self, input: Tensor) -> Any:
        traced = self._neq_traced
        compiled.note_graph()
        output = super().forward(input)
        if traced.ends(input):
            return output.detach()
        if not traced.cut:
            return output
        # With the output's gradient masked, that of the input and of the rows vanish alike.
        axis = -1 if self.plain is nn.LayerNorm else 1
        shape = [-1 if i == axis % output.dim() else 1 for i in range(output.dim())]
        mask = traced.trains.to(output.device, output.dtype).view(shape)
        return compiled.masked(output, mask)

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
        weight, work = self.weight, self._neq_work
        assert isinstance(weight, Tensor)
        assert work is not None
        assert work.rows is not None
        # Of a parameter, or of a part of one that holds several flattened.
        same = saved.untyped_storage()._cdata == weight.untyped_storage()._cdata
        if not same or saved.storage_offset() != weight.storage_offset():
            return saved
        return weight.detach().index_fill(0, work.rows.fillers, 0)


class _BatchNorm(_Norm):
    running_mean: Tensor | None
    running_var: Tensor | None

    def forward(self, input: Tensor) -> Any:
        held, mean, var = self._neq_traced.held, self.running_mean, self.running_var
        if held is None or not self.training or mean is None or var is None or not _holding(input):
            return super().forward(input)
        # A backward may need what the forward has left: that is not to be changed afterwards.
        self.running_mean, self.running_var = mean.clone(), var.clone()
        try:
            output = super().forward(input)
            held = held.to(mean.device)
            mean.copy_(torch.where(held, mean, self.running_mean))
            var.copy_(torch.where(held, var, self.running_var))
        finally:
            self.running_mean, self.running_var = mean, var
        return output


def _holding(input: Any) -> bool:
    """Whether this forward is one of a training, and not for those who are to see the plain layer.

    Without gradients, too: statistics move there as well.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_dynamo_compiling() and not torch.compiler._is_exporting_flag
    return isinstance(input, Tensor) and not torch._C._is_tracing()


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


_BASES: dict[type[nn.Module], type[_Selective]] = {
    nn.Conv1d: _Convolution,
    nn.Conv2d: _Convolution,
    nn.Conv3d: _Convolution,
    nn.Linear: _Linear,
    nn.BatchNorm1d: _BatchNorm,
    nn.BatchNorm2d: _BatchNorm,
    nn.BatchNorm3d: _BatchNorm,
    nn.SyncBatchNorm: _BatchNorm,
    nn.GroupNorm: _Norm,
    nn.LayerNorm: _Norm,
}
_SELECTIVE: dict[type[nn.Module], type[_Selective]] = {
    plain: type(plain.__name__, (base, plain), {"plain": plain}) for plain, base in _BASES.items()
}
