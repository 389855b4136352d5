"""Validation batches, as loaders yield them: how a model is called with one, and what counts.

A batch is a tensor, a mapping of the model's arguments, or a tuple that begins with one of these.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neq.calls import Arguments, Run, changed, tensors
from neq.evaluation import full_precision
from neq.positions import LEFT_IN, LEFT_OUT, flat_mask, masks_of

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """`run(model)` is a forward on it; `masks`: bool [samples, positions] each, True where a
    position counts.
    """

    run: Run
    samples: int
    masks: tuple[Tensor, ...]


def read_batch(batch: Any, device: torch.device, forward: Forward | None = None) -> Batch:
    """A batch on `device` and not in half precision.

    `forward(model, batch)` calls the model with it; by default it is called with the tensor, or
    with the mapping's items by name. Samples are the first axis of a mask, else of the first
    tensor. Raises TypeError for what is no batch, ValueError for one without an axis of samples.
    """
    inputs, rest = _parts(batch)
    masks = masks_of(inputs, device) if isinstance(inputs, Mapping) else ()
    if forward is not None:
        moved, samples = _moved(batch, device), _samples(masks or batch, 1)
        return Batch(run=lambda model: forward(model, moved), samples=samples, masks=masks)
    if isinstance(inputs, Tensor):
        call = Arguments(args=(_moved(inputs, device),))
    elif isinstance(inputs, Mapping):
        call = Arguments(kwargs={name: _moved(part, device) for name, part in inputs.items()})
    else:
        raise TypeError(
            f"a validation batch must begin with a tensor, not {type(inputs).__name__}, or with a "
            "mapping of the model's arguments; forward=… says how the model is called with others"
        )
    return Batch(run=_Default(call, rest), samples=_samples(masks or inputs), masks=masks)


def masks_of_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, ...]:
    """The masks among the arguments of a call of `model`, those in mappings included."""
    try:
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # they misfit, or it has no signature
        named = dict(kwargs)
    found: dict[Any, Any] = {}
    for part in named.values():
        found.update(part if isinstance(part, Mapping) else {})
    return masks_of(found | named, device)


def check_batches(batches: Any) -> None:
    """Raises TypeError for a single batch where an iterable of batches is wanted."""
    if isinstance(batches, (Mapping, Tensor)):
        raise TypeError("one batch where an iterable of batches is wanted: put it into a list")


def few(batch: Any, samples: int, forward: Forward | None = None) -> Any:
    """A batch of so many copies of the first sample of `batch`, on the CPU and in float32; None
    where it has no sample. Without `forward` it holds no more than what the model is called with.
    """
    first = next(tensors(batch), torch.empty(0))
    count = read_batch(batch, first.device, forward).samples

    def small(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.dim() and len(value) == count:
            value = value[:1].expand(samples, *value.shape[1:])
        value = value.detach().to("cpu", copy=True)
        return value.float() if value.is_floating_point() else value

    if forward is None:
        batch, _ = _parts(batch)
        batch = dict(batch) if isinstance(batch, Mapping) else batch
    return changed(small, batch) if count else None


def _parts(batch: Any) -> tuple[Any, tuple[Any, ...]]:
    """What the model is called with, and what else a tuple holds."""
    if not isinstance(batch, (tuple, list)):
        return batch, ()
    return (batch[0], tuple(batch[1:])) if batch else (None, ())


def _moved(value: Any, device: torch.device) -> Any:
    def moved(part: Any) -> Any:
        if isinstance(part, Tensor):
            return full_precision(part.to(device))
        return part.to(device) if callable(getattr(part, "to", None)) else part

    return changed(moved, value)


def _samples(value: Any, otherwise: int | None = None) -> int:
    for tensor in tensors(value):
        if tensor.dim():
            return len(tensor)
    if otherwise is None:
        raise ValueError("a validation batch has no tensor whose first axis is samples")
    return otherwise


@dataclass(frozen=True, slots=True)
class _Default:
    """The call of a model with its arguments; `rest`: what else the batch holds."""

    call: Arguments
    rest: tuple[Any, ...]

    def __call__(self, model: nn.Module) -> Any:
        self._check(model)
        try:
            return self.call(model)
        except TypeError as error:
            misfit = self._misfit(model)
            if misfit is None:
                raise
            raise TypeError(
                f"the model can't be called with a validation batch ({misfit}): let batches be "
                "mappings of its arguments, or pass forward=…, which calls it with one"
            ) from error

    def _misfit(self, model: nn.Module) -> str | None:
        """Why the arguments are not those of the model's forward; None where they are."""
        try:
            inspect.signature(model.forward).bind(*self.call.args, **self.call.kwargs)
        except TypeError as error:
            return str(error)
        except ValueError:  # it has no signature
            pass
        return None

    def _check(self, model: nn.Module) -> None:
        """Raises ValueError where a mask that leaves positions out would be dropped."""
        shapes = [argument.shape[:2] for argument in self.call.args if argument.dim() > 1]
        parts = [flat_mask(part) for part in self.rest if isinstance(part, Tensor)]
        if not any(part.shape in shapes and _leaves_out(part) for part in parts):
            return
        try:
            names = inspect.signature(model.forward).parameters
        except ValueError:
            return
        for name in (*LEFT_IN, *LEFT_OUT):
            if name in names:
                raise ValueError(
                    f"a validation batch is a tuple that seems to hold the model's {name}, and of "
                    "a tuple only the first item is used: let batches be mappings of the model's "
                    "arguments, or pass forward=…, which calls it with one"
                )


def _leaves_out(mask: Tensor) -> bool:
    """Whether it has zeros and ones, as bools, or as integers with all padding on one side."""
    zeros, ones = mask == 0, mask == 1
    if not (bool(zeros.any()) and bool(ones.any()) and bool((zeros | ones).all())):
        return False
    if mask.is_floating_point():
        return False
    steps = mask.int().diff(dim=1)
    return mask.dtype == torch.bool or bool((steps <= 0).all()) or bool((steps >= 0).all())
