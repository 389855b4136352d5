"""Which kernel computes the weight gradient of a layer's rows: measured once, then looked up.

Fewer rows are not always faster: where few are frozen, where channels are few or their number is
odd. And kernels round differently. A table that is kept makes the choice fast and repeatable.
"""

import copy
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn

from neq.calls import Arguments
from neq.compiled import compiler_of, forget
from neq.evaluation import uncompiled
from neq.kernels import MOST, candidates, rows_for
from neq.neurons import Layer, NeuronIndex, unwrapped
from neq.selective import assign, geometry, prepare
from neq.work import Work

GAIN = 0.95  # a kernel is taken where its time is below this share of the dense backward's
SECONDS = 0.1  # per shape, but at least two rounds

CUT = "cut"  # gathered rows, with the input gradient through them alone
CUT_DENSE = "cut/dense"  # all rows, with the input gradient through those that train

Table = Mapping[str, Mapping[str, Mapping[int, float]]]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of a forward and backward, by layer, kernel and number of computed rows.

    The kernel "dense" computes all rows. Where nothing is known of a layer, its rows are gathered
    while at most half of them train.
    """

    layers: Table = field(default_factory=dict)

    def kernel(self, layer: str, rows: int, size: int) -> str:
        """The kernel for `rows` of `size` rows of `layer`, "dense" where none is faster.

        Times are only known for some counts; the next larger one is an upper bound.
        """
        known = self.layers.get(layer, {})
        if size not in known.get("dense", {}):
            return "gather" if 2 * rows <= size else "dense"
        best, fastest = "dense", GAIN * known["dense"][size]
        for kernel in sorted(known.keys() - {"dense", CUT, CUT_DENSE}):
            bound = _bound(known[kernel], rows)
            if bound < fastest:
                best, fastest = kernel, bound
        return best

    def cut_kernel(self, layer: str, rows: int, size: int) -> str:
        """As `kernel`, where the input gradient goes through those `rows` alone."""
        known, chosen = self.layers.get(layer, {}), self.kernel(layer, rows, size)
        if size not in known.get("dense", {}):
            return chosen
        seconds = _bound(known.get(CUT, {}), rows)
        dense = known.get(CUT_DENSE, {}).get(size)
        if dense is None:  # a table from before that was timed: a trial keeps its plan
            gathers = chosen == "dense" and seconds < known["dense"][size]
            return "gather" if gathers else chosen
        if chosen == "dense":
            chosen = "gather"
        else:  # only the weight gradient takes another time
            seconds += _bound(known[chosen], rows) - _bound(known.get("gather", {}), rows)
        return chosen if seconds < GAIN * dense else "dense"

    def to_json(self) -> dict[str, Any]:
        """The table as plain values; `from_json` reads them back."""
        return {
            layer: {kernel: sorted(times.items()) for kernel, times in kernels.items()}
            for layer, kernels in self.layers.items()
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Timings":
        """The inverse of `to_json`."""
        return cls(
            {
                layer: {
                    kernel: {int(rows): float(seconds) for rows, seconds in times}
                    for kernel, times in kernels.items()
                }
                for layer, kernels in value.items()
            }
        )


def _bound(times: Mapping[int, float], rows: int) -> float:
    """Seconds for the next larger count that was timed."""
    known = [count for count in times if count >= rows]
    return times[min(known)] if known else inf


def measure(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Any] | Arguments,
    masks: Sequence[Tensor] | None = None,
) -> Timings:
    """Time the kernels of each convolution and linear layer of `model` on a training batch.

    `inputs` [samples, …], or a mapping of the model's arguments: on the model's device, in the
    memory format of training; call it under the autocast of training. `masks`, bool [neurons] each:
    only what a plan for one of them looks up is timed; None: what any plan does. Layers of a
    compiled model are compiled, each by itself. Model and random streams are left as they were.
    """
    if not isinstance(inputs, Arguments):
        given = inputs
        inputs = Arguments(kwargs=given) if isinstance(given, Mapping) else Arguments(args=(given,))
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    found: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    compiler, plain = compiler_of(model), unwrapped(model)
    with torch.random.fork_rng(devices), torch.enable_grad():
        with uncompiled():
            calls = _calls(copy.deepcopy(plain).train(), inputs)
        keys = {layer.name: (repr(layer.module), sample) for layer, sample in calls}
        asked: dict[tuple[Any, ...], set[int]] = {}
        for layer, _ in calls:
            asked.setdefault(keys[layer.name], set()).update(_rows(layer, masks or ()))
        for layer, sample in calls:
            key = keys[layer.name]
            if key not in found:
                rows = None if masks is None else asked[key]
                found[key] = _time(layer, sample, rows, compiler)
    return Timings({name: found[key] for name, key in keys.items()})


def _rows(layer: Layer, masks: Iterable[Tensor]) -> Iterator[int]:
    """How many rows of the layer a plan looks up, for each mask that freezes a part of it."""
    shape = geometry(layer.module)
    for mask in masks:
        frozen = mask[layer.neurons]
        if bool(frozen.any()) and not bool(frozen.all()):
            yield len(rows_for("gather", frozen, shape).index)


@dataclass(frozen=True, slots=True)
class _Sample:
    """An input to make up: like one that a layer was called with."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    def make(self) -> Tensor:
        x = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return x.normal_().requires_grad_(self.requires_grad)


def _calls(model: nn.Module, inputs: Arguments) -> list[tuple[Layer, _Sample]]:
    """Convolutions and linear layers as they are called first, with an input as in the last."""
    calls: dict[str, tuple[Layer, _Sample]] = {}

    def recorder(layer: Layer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = args[0] if args else kwargs["input"]
            stride = torch.empty_like(x, device="meta").stride()  # of an expanded one, dense
            sample = _Sample(x.shape, stride, x.dtype, x.device, x.requires_grad)
            if layer.parameters[0].requires_grad and x.numel():
                calls[layer.name] = layer, sample

        return hook

    handles = [
        layer.module.register_forward_pre_hook(recorder(layer), with_kwargs=True)
        for layer in NeuronIndex(model).layers
        if geometry(layer.module) or isinstance(layer.module, nn.Linear)
    ]
    inputs(model)
    for handle in handles:
        handle.remove()
    return list(calls.values())


def _time(
    layer: Layer, sample: _Sample, asked: Collection[int] | None, compiler: Any
) -> dict[str, dict[int, float]]:
    """Best seconds of one forward and backward, by kernel and rows; one round warms up.

    `asked`: how many rows are looked up; None: any number. `compiler`: of torch.compile, or None.
    """
    x = sample.make()
    with torch.no_grad():
        gradient = torch.randn_like(layer.module(x))
    runs = _runs(layer, x, gradient.dtype)
    if asked is not None:
        runs = _looked_up(runs, asked)
    call = _caller(layer.module)
    run = call if compiler is None else torch.compile(call, backend=compiler, dynamic=False)
    best: dict[str, dict[int, float]] = {}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (rounds < 20 and time.perf_counter() - start < SECONDS):
        for kernel, rows, work in runs:
            prepare(layer.module, work is not None and work.cut)
            assign(layer.module, work)
            seconds = _once(layer.module, run, x, gradient)
            times = best.setdefault(kernel, {})
            times[rows] = min(seconds, times.get(rows, inf)) if rounds else inf
        rounds += 1
    if compiler is not None:
        forget(call.__code__)
    return best


Run = tuple[str, int, Work | None]


def _looked_up(runs: list[Run], asked: Collection[int]) -> list[Run]:
    """Of each kernel the run with the fewest rows that are enough for those `asked`, as _bound."""
    counts: dict[str, list[int]] = {}
    for kernel, rows, _ in runs:
        counts.setdefault(kernel, []).append(rows)
    wanted = {
        (kernel, min(enough))
        for kernel, known in counts.items()
        for rows in asked
        if (enough := [count for count in known if count >= rows])
    }
    return [run for run in runs if run[:2] in wanted]


def _runs(layer: Layer, x: Tensor, dtype: torch.dtype) -> list[Run]:
    shape = geometry(layer.module)
    runs: list[Run] = [("dense", layer.size, None)]
    half = torch.arange(layer.size, device=x.device) % 2 == 0
    runs.append((CUT_DENSE, layer.size, Work("dense", rows_for("dense", half, shape), True, shape)))
    for count in sorted({3, *(ceil(layer.size * k / 8) for k in range(1, 8))}):
        if count >= layer.size:
            continue
        frozen = torch.ones(layer.size, dtype=torch.bool, device=x.device)
        frozen[torch.randperm(layer.size)[:count]] = False
        for kernel in candidates(shape, x, dtype):
            rows = rows_for(kernel, frozen, shape)
            computed = len(rows.index)
            if computed < layer.size and computed <= MOST.get(kernel, layer.size):
                runs.append((kernel, computed, Work(kernel, rows, False, shape)))
            if kernel == "gather":
                runs.append((CUT, computed, Work(kernel, rows, True, shape)))
    return runs


def _caller(module: nn.Module) -> Any:
    def call(x: Tensor) -> Any:
        return module(x)

    # A code object of its own: dynamo keeps graphs by those, makes shapes dynamic that differ in
    # one, and compiles none after the eighth.
    call.__code__ = call.__code__.replace()
    return call


def _once(module: nn.Module, run: Any, x: Tensor, gradient: Tensor) -> float:
    with stopwatch(x.device) as seconds:
        run(x).backward(gradient)
    for tensor in (x, *module.parameters()):
        tensor.grad = None
    return seconds[0]


@contextmanager
def stopwatch(device: torch.device) -> Iterator[list[float]]:
    """Times the block: its seconds are appended to the list, the device's own work included."""
    seconds: list[float] = []
    _wait(device)
    start = time.perf_counter()
    yield seconds
    _wait(device)
    seconds.append(time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
