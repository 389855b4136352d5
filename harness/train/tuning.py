"""What is chosen by the clock: memory format and backward kernels.

Both change how results round, so they are chosen once for each kind of machine and model, kept with
the results, and used by every trial; a trial's checkpoint holds its own copy.
"""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

import neq
from harness.errors import UserError
from harness.flops.inputs import Inputs
from harness.storage.locations import Location, StorageError
from harness.storage.provenance import hardware
from harness.storage.tuning_cache import make_once
from harness.suite.config import NUMERICS, Recipe, Suite, digest
from harness.train import compiling
from neq.calls import Arguments, tensors

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
GAIN = 0.9  # channels_last is taken where its step takes less than this share of the other's time
SECONDS = 2.0
NARROW = 16  # input channels


@dataclass(frozen=True, slots=True)
class Tuning:
    """Choices that were made by time.

    `channels_last`: whether model and images have that memory format; `timings`: of backward
    kernels.
    """

    channels_last: bool = False
    timings: neq.Timings = field(default_factory=neq.Timings)

    def apply(self, images: Tensor) -> Tensor:
        """The images [samples, channels, height, width] in the memory format of the model."""
        if self.channels_last and images.dim() == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def applied(self, inputs: Arguments) -> Arguments:
        """The same for all that a model is called with."""
        return Arguments(
            args=tuple(map(self.apply, inputs.args)),
            kwargs={name: self.apply(tensor) for name, tensor in inputs.kwargs.items()},
        )

    def convert(self, model: nn.Module) -> nn.Module:
        """The model itself, now in that memory format."""
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back."""
        return {"channels_last": self.channels_last, "timings": self.timings.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Tuning":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError for anything else."""
        if not isinstance(value["channels_last"], bool):
            raise TypeError("channels_last")
        return cls(value["channels_last"], neq.Timings.from_json(value["timings"]))


def tuning_for(location: Location, suite: Suite, model: nn.Module) -> Tuning:
    """The tuning of a suite's model for this kind of machine; measured where none is kept yet.

    `location`: of the suite's results; `model`: on its device. Raises StorageError for a damaged
    file.
    """
    gpu = next(model.parameters()).is_cuda
    batch_size = suite.recipe.forward_size(suite.resources.world_size)
    conditions = {
        "model": suite.model.model_dump(mode="json", exclude={"weights"}),
        "batch_size": batch_size,
        "precision": suite.recipe.precision,
        "hardware": hardware(gpu),
        "torch": torch.__version__,
        "numerics": NUMERICS,
        "architecture": digest({"modules": repr(model)}),
    }
    if suite.recipe.compile:  # older tunings keep their names
        conditions["compile"] = True

    def make() -> dict[str, Any]:
        recipe = suite.recipe
        how = batch_size, recipe.precision, None, recipe.compile
        tuned = tune(model, suite.model.input, *how)
        return conditions | tuned.to_json()

    name = digest(conditions)
    found = make_once(location, name, make)
    try:
        return Tuning.from_json(found)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise StorageError(
            f"{location.uri}/tuning/{name}.json is damaged; delete it, and it is measured anew"
        ) from None


def tune(
    model: nn.Module,
    inputs: tuple[int, ...] | Inputs,
    batch_size: int,
    precision: str,
    masks: Sequence[Tensor] | None = None,
    compiled: bool = False,
) -> Tuning:
    """Time `model`, on its device, in training steps on random batches, and choose.

    `inputs`: the shape of a sample, or what it is called with; `precision`: float32, bf16 or fp16;
    `masks`: as of neq.measure; `compiled`: whether the steps are. Channels last is not chosen where
    `narrow_strided` names a layer, in float32 on a CPU. Model and random streams are left as they
    were.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        given = inputs if isinstance(inputs, Inputs) else Inputs.of(inputs)
        batch = given.random(batch_size, device)
        formats = [Tuning(False)]
        if any(isinstance(module, nn.Conv2d) for module in model.modules()):
            formats.append(Tuning(True))
        if device.type == "cpu" and precision == "float32" and narrow_strided(model):
            formats = formats[:1]
        best = formats[0]
        if len(formats) > 1:
            copied = (_copied(model, each, compiled) for each in formats)
            best = _fastest(formats, [*copied], batch, precision)
        chosen = _copied(model, best, compiled)
        with autocast(device.type, precision):
            timings = neq.measure(chosen, best.applied(batch), masks)
    return Tuning(best.channels_last, timings)


def narrow_strided(model: nn.Module) -> list[str]:
    """Names of the 1 × 1 convolutions of `model` with stride 2 and fewer than 16 input channels, in
    each group where there are several.

    Of these, in channels last and float32 on a CPU, oneDNN is reported to write past its memory
    (oneDNN issue 6035; torch 2.13 bundles such a version).
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and 2 in module.stride
        and module.in_channels // module.groups < NARROW
    ]


@contextmanager
def numerics(precision: str) -> Iterator[None]:
    """Inside: deterministic convolutions, and no TF32 where the precision is float32."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=precision != "float32"
    ):
        yield


def check_recipe(recipe: Recipe, device: torch.device) -> None:
    """Raises UserError where the device lacks the recipe's precision, or the compiler it wants."""
    check_precision(recipe.precision, device)
    if recipe.compile:
        compiling.check_compiler(device)


def check_precision(precision: str, device: torch.device) -> None:
    """Raises UserError where the device would only emulate the precision."""
    needed = precision == "bf16" and device.type == "cuda"
    if needed and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"recipe.precision: {torch.cuda.get_device_name(device)} has no bf16; "
            "run with --set recipe.precision=fp16 or float32"
        )


def autocast(device: str, precision: str) -> torch.autocast:
    """The autocast context of a precision; for float32, one that does nothing."""
    dtype = HALF.get(precision)
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def _copied(model: nn.Module, tuning: Tuning, compiled: bool) -> nn.Module:
    copied = tuning.convert(copy.deepcopy(model)).train()
    return compiling.compiled(copied) if compiled else copied


def _fastest(
    formats: list[Tuning], models: list[nn.Module], inputs: Arguments, precision: str
) -> Tuning:
    batches = [tuning.applied(inputs) for tuning in formats]
    device = next(models[0].parameters()).device
    best = [inf, inf]
    start, rounds = time.perf_counter(), 0
    while rounds < 2 or (rounds < 6 and time.perf_counter() - start < SECONDS):
        for i, (copied, batch) in enumerate(zip(models, batches, strict=True)):
            with neq.stopwatch(device) as seconds:
                with autocast(device.type, precision):
                    loss = square(batch(copied))
                torch.autograd.backward(loss)
            copied.zero_grad()
            best[i] = min(best[i], seconds[0]) if rounds else inf
        if not rounds:  # what is compiled is compiled now
            start = time.perf_counter()
        rounds += 1
    return formats[1] if best[1] < GAIN * best[0] else formats[0]


def square(outputs: Any) -> Tensor:
    """A loss for any outputs: the sum over tensors of the mean of their squares."""
    floating = [t for t in tensors(outputs) if t.is_floating_point()]
    return torch.stack([t.float().square().mean() for t in floating]).sum()
