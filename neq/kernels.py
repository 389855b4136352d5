"""Weight gradients of convolutions for some of their rows, by aten's own kernels.

A kernel takes gathered gradient channels and returns the rows of the weight gradient that belong to
them. All cost the same FLOPs; which one is fast depends on shape, rows, precision and machine.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor


class Kept:
    """The memory of a weight's full gradient, used again as soon as nobody else refers to it.

    On the CPU new memory costs page faults.
    """

    def __init__(self) -> None:
        # One or none: a gradient, and its version when it was given away. pop() is atomic.
        self._last: list[tuple[Tensor, int]] = []

    def take(self, like: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> tuple[Tensor, bool]:
        """Memory for a gradient like `like`, and whether it is as it was given or cleared last."""
        if _keeps(like, shape) and self._last:
            with suppress(IndexError):  # another thread was faster
                full, version = self._last.pop()
                if _alone(full) and full.dtype == like.dtype and full.stride() == stride:
                    return full, full._version == version
        return like.new_empty_strided(shape, stride), False

    def give(self, full: Tensor, versioned: bool = True) -> Tensor:
        """`full` to be returned by a backward: autograd makes it a parameter's `grad` as it is.

        `versioned`: nobody changes it without a new version, as compiled code does.
        """
        if not _keeps(full, full.shape):
            return full
        given = full.detach()  # with another reference to the tensor itself autograd would copy it
        # Only now: another thread takes what nobody else refers to.
        self._last[:] = [(full, full._version if versioned else -1)]
        return given

    def cleared(self, gradient: Tensor) -> None:
        """Frozen rows of `gradient`, which may be what was given away, have just been cleared."""
        for full, _ in self._last:
            if gradient.data_ptr() == full.data_ptr() and gradient._version == full._version:
                self._last[:] = [(full, full._version)]

    def holds(self, gradient: Tensor) -> bool:
        """Whether `gradient` is what the backward has just given away, as it was."""
        return any(
            gradient.data_ptr() == full.data_ptr() and gradient._version == version
            for full, version in self._last
        )


def _keeps(gradient: Tensor, shape: torch.Size) -> bool:
    """Not what transforms wrap, what a graph goes on from, or what a CUDA stream may still read."""
    plain = type(gradient) is Tensor and torch._C._has_storage(gradient)
    return (
        plain and gradient.device.type == "cpu" and not torch.is_grad_enabled() and len(shape) > 1
    )


def _uses(tensor: Tensor) -> int:
    """How many refer to the memory of `tensor`, this call included; 0 where torch can't tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return 0 if count is None else int(count(tensor.untyped_storage()._cdata))


_ALONE = _uses(torch.empty(1))


def _alone(tensor: Tensor) -> bool:
    """Whether no other tensor shares its memory."""
    return 0 < _uses(tensor) <= _ALONE


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The rows of a layer that its backward computes, as int64 tensors.

    `index` [computed]: those rows, sorted, as many of each group that takes part; `others`: the
    remaining rows; `fillers`: computed ones that do not train. `groups`: how many take part;
    `inputs`: the input channels that they read, None for all. `kept`: memory of the weight's
    gradient.
    """

    index: Tensor
    others: Tensor
    fillers: Tensor
    inputs: Tensor | None
    groups: int
    kept: Kept = field(default_factory=Kept)

    def to(self, device: torch.device) -> "Rows":
        """The same rows on the device of a model that was moved, or of a replica."""
        if self.index.device == device:
            return self
        inputs = None if self.inputs is None else self.inputs.to(device)
        index, others, fillers = (t.to(device) for t in (self.index, self.others, self.fillers))
        return Rows(index, others, fillers, inputs, self.groups)

    def gather(self, gradient: Tensor) -> Tensor:
        """The channels (axis 1) of the output's `gradient` that belong to the computed rows."""
        return channels(gradient, self.index) if len(self.others) else gradient

    def scatter(
        self,
        computed: Tensor,
        shape: torch.Size,
        stride: tuple[int, ...],
        versioned: bool = True,
    ) -> Tensor:
        """The full gradient of `shape` and `stride`: computed rows in their places, zeros
        elsewhere; `versioned`: see Kept.
        """
        full, zeroed = self.kept.take(computed, shape, stride)
        # Whoever writes to `grad.data` leaves no version. Compiled gradients are cleared anyway.
        if versioned or not zeroed:
            full.index_fill_(0, self.others, 0)
        full.index_copy_(0, self.index, computed)
        if len(self.fillers):
            full.index_fill_(0, self.fillers, 0)
        return self.kept.give(full, versioned)

    def weights(self, weight: Tensor) -> Tensor:
        """The computed rows of `weight`: [computed, …], with zeros for fillers."""
        masked = weight.index_fill(0, self.fillers, 0) if len(self.fillers) else weight
        return masked.index_select(0, self.index) if len(self.others) else masked


def choose_rows(frozen: Tensor, groups: int = 1, inputs: int = 1, multiple: int = 1) -> Rows:
    """The rows to compute while `frozen` (bool [neurons]) stand still, at least one of which
    trains.

    Groups without a trainable row are left out, the others get equal counts, rounded up to a
    `multiple` where there are as many rows. `inputs`: channels of the layer's input.
    """
    device, frozen = frozen.device, frozen.cpu()
    per_group = frozen.view(groups, -1)
    size = per_group.shape[1]
    taking_part = (~per_group).any(1).nonzero()
    most = int((~per_group).sum(1).max())
    count = min(-(-most // multiple) * multiple, size)
    # Trainable rows first, then frozen ones to fill up.
    places = per_group[taking_part[:, 0]].byte().argsort(dim=1, stable=True)[:, :count]
    index = (places.sort(1).values + taking_part * size).flatten()
    width = inputs // groups
    read = None
    if len(taking_part) < groups:
        read = (taking_part * width + torch.arange(width)).flatten()
    return _rows(frozen, index, read, len(taking_part), device)


def everything(frozen: Tensor, groups: int = 1) -> Rows:
    """All rows as Rows, whichever of them train."""
    return _rows(frozen.cpu(), torch.arange(len(frozen)), None, groups, frozen.device)


def _rows(
    frozen: Tensor, index: Tensor, inputs: Tensor | None, groups: int, device: torch.device
) -> Rows:
    others = torch.ones_like(frozen).index_fill(0, index, False).nonzero()[:, 0]
    fillers = index[frozen[index]]
    return Rows(index, others, fillers, inputs, groups).to(device)


def channels(tensor: Tensor, index: Tensor) -> Tensor:
    """`tensor[:, index]` in the memory format of `tensor`.

    index_select along an axis that is not the first was seen to be up to ten times slower.
    """
    last = tensor.movedim(1, -1)
    if tensor.is_contiguous() and tensor.dim() > 2:
        samples, size, *positions = tensor.shape
        offsets = torch.arange(0, samples * size, size, device=index.device)
        flat = (offsets.unsqueeze(1) + index).flatten()
        picked = tensor.reshape(samples * size, prod(positions)).index_select(0, flat)
        return picked.view(samples, len(index), *positions)
    if last.is_contiguous():
        table = last.reshape(-1, last.shape[-1])
        picked = table.gather(1, index.expand(table.shape[0], -1))
        return picked.view(*last.shape[:-1], len(index)).movedim(-1, 1)
    return tensor.index_select(1, index)


@dataclass(frozen=True, slots=True)
class Geometry:
    """A convolution: the shape of its weight, and its arguments as aten::convolution takes them."""

    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output of the convolution."""
        zeros = (0,) * len(self.stride)
        arguments = self.stride, self.padding, self.dilation, False, zeros, self.groups
        return torch.convolution(inputs, weight, bias, *arguments)

    def input_gradient(self, gradient: Tensor, inputs: Tensor, weight: Tensor) -> Tensor:
        """The exact, dense gradient of the input; of `inputs` only shape and layout matter."""
        found: Tensor = self.gradients(gradient, inputs, weight, (True, False, False))[0]
        return found

    def weight_gradient(self, gradient: Tensor, inputs: Tensor) -> Tensor:
        """The weight gradient of as many rows as `gradient` has channels."""
        weight = gradient.new_empty(gradient.shape[1], *self.weight[1:])
        found: Tensor = self.gradients(gradient, inputs, weight, (False, True, False))[1]
        return found

    def gradients(
        self, gradient: Tensor, inputs: Tensor, weight: Tensor, needed: tuple[bool, bool, bool]
    ) -> Any:
        """The dense gradients of input, weight and bias, None where they are not `needed`."""
        zeros, bias = (0,) * len(self.stride), [gradient.shape[1]] if needed[2] else None
        arguments = self.stride, self.padding, self.dilation, False, zeros, self.groups, needed
        return torch.ops.aten.convolution_backward(gradient, inputs, weight, bias, *arguments)

    @property
    def swaps(self) -> bool:
        """Whether input and gradient may change places: their positions are the same."""
        sides = zip(self.padding, self.dilation, self.weight[2:], strict=True)
        same = all(2 * p == d * (k - 1) for p, d, k in sides)
        return same and self.groups == 1 and set(self.stride) == {1}

    @property
    def multiplies(self) -> bool:
        """Whether a matrix product per sample does it."""
        single = set(self.weight[2:]) == {1} and not any(self.padding)
        return single and self.groups == 1


Kernel = Callable[[Tensor, Tensor, Geometry, Rows], Tensor]


def gather(chosen: Tensor, inputs: Tensor, geometry: Geometry, rows: Rows) -> Tensor:
    """The weight gradient [computed, …] by the dense kernel, on fewer channels."""
    if rows.inputs is not None:
        inputs = channels(inputs, rows.inputs)
    if rows.groups != geometry.groups:
        geometry = replace(geometry, groups=rows.groups)
    return geometry.weight_gradient(chosen, inputs)


def swap(
    chosen: Tensor, inputs: Tensor, geometry: Geometry, rows: Rows, *, chunk: int | None = None
) -> Tensor:
    """The weight gradient where `geometry.swaps`: input and gradient change places in a
    convolution.

    Its kernel positions come out reversed. oneDNN has a fast case for up to three channels.
    """
    kernel = geometry.weight[2:]
    parts = [
        replace(geometry, weight=(inputs.shape[1], part.shape[1], *kernel)).weight_gradient(
            inputs, part
        )
        for part in torch.split(chosen, chunk or chosen.shape[1], dim=1)
    ]
    gradient = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return gradient.transpose(0, 1).flip(list(range(2, gradient.dim())))


def swap_last(chosen: Tensor, inputs: Tensor, geometry: Geometry, rows: Rows) -> Tensor:
    """`swap` with the channels last: copying them there was seen to pay for 4 to 16 of them."""
    layout = torch.channels_last
    chosen, inputs = (t.contiguous(memory_format=layout) for t in (chosen, inputs))
    return swap(chosen, inputs, geometry, rows)


def matmul(chosen: Tensor, inputs: Tensor, geometry: Geometry, rows: Rows) -> Tensor:
    """The weight gradient where `geometry.multiplies`: one matrix product for each sample."""
    everywhere: tuple[Any, ...] = (slice(None), slice(None))
    strided = inputs[everywhere + tuple(slice(None, None, s) for s in geometry.stride)]
    products = torch.bmm(chosen.flatten(2), strided.flatten(2).transpose(1, 2))
    return products.sum(0).view(-1, *geometry.weight[1:])


KERNELS: dict[str, Kernel] = {
    "dense": gather,
    "gather": gather,
    "gather/8": gather,
    "swap": swap,
    "swap/3": partial(swap, chunk=3),
    "swap/last": swap_last,
    "matmul": matmul,
}
MULTIPLES = {"gather/8": 8}
MOST = {"swap/3": 6, "swap/last": 16}


def rows_for(kernel: str, frozen: Tensor, shape: Geometry | None) -> Rows:
    """The rows that `kernel` computes in a layer of `shape`, None if it is no convolution."""
    groups, inputs = (1, 1) if shape is None else (shape.groups, shape.groups * shape.weight[1])
    if kernel == "dense":
        return everything(frozen, groups)
    return choose_rows(frozen, groups, inputs, MULTIPLES.get(kernel, 1))


def candidates(geometry: Geometry | None, inputs: Tensor, dtype: torch.dtype) -> list[str]:
    """Names of the kernels that are worth timing on `inputs`; a geometry of None: a linear layer.

    `dtype`: in which the products are computed.
    """
    half, cuda = dtype in (torch.float16, torch.bfloat16), inputs.is_cuda
    plain = inputs.is_contiguous()
    names = ["gather"] + ["gather/8"] * (half and cuda)
    if geometry is not None and geometry.swaps and not cuda:
        names += ["swap", "swap/3"] + ["swap/last"] * (len(geometry.stride) == 2 and plain)
    if geometry is not None and geometry.multiplies and not half:  # sums over samples: rounds
        names += ["matmul"]
    return names
