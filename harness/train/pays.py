"""Does freezing pay in a training of one's own, on this machine?"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import neq
from harness.compilations import compilations, room
from harness.errors import UserError
from harness.flops.costs import Costs, count_costs
from harness.flops.drawing import draw
from harness.flops.subject import head
from harness.storage.provenance import hardware
from harness.suite.parts import check_sizes
from harness.train.bench import Bench, Case
from harness.train.kept import state_bytes
from harness.train.speeds import KINDS, Dense, Row, Speed
from harness.train.untouched import untouched
from harness.train.watched import Call, Watched
from neq.compiled import is_compiled
from neq.neurons import unwrapped

SHARES = (0.5, 0.75, 0.9)
SECONDS = 55.0
ALIGN, ALIGN_HALF = 16, 8  # rows that oneDNN computes at once; in half precision on a GPU
NAMES = {torch.float32: "float32", torch.bfloat16: "bf16", torch.float16: "fp16"}

Progress = Callable[[str], None]


def pays(
    model: nn.Module,
    optimizer: Optimizer,
    step: Callable[[], Any],
    *,
    frozen: Sequence[float] = SHARES,
    exclude: Iterable[str] | None = None,
    seed: int = 0,
    seconds: float = SECONDS,
    progress: Progress = lambda text: None,
) -> Speed:
    """Time training steps of your own with neurons frozen at random against dense ones, by turns.

        from harness import pays

        def step():
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        found = pays(model, optimizer, step)
        found.sentences  # from which share on it pays
        found.rows       # medians and quartiles over the dense step, FLOPs, bytes

    `step` does all that your loop does with one batch (autocast, GradScaler, accumulation,
    clipping, loading data) and returns the loss, a number or a tensor of one. What torch.compile
    has made of model or step is timed so. Afterwards model, optimizer and random streams are as
    before, but not a scheduler, which is better left out, nor the scale of a GradScaler. `frozen`:
    shares, 0 to 1, of the neurons that may freeze: those of layers that the optimizer trains,
    without `exclude` (names of layers or dotted prefixes; None: the last linear layer, else the
    last convolution). `seconds`: about how long it may take, without compiling; each mask is timed
    twice anyway. FLOPs are None unless the model takes one tensor of floating point.

    Raises UserError for other shares; for a layer, such as nn.LazyLinear, that has no size yet; for
    a step that returns no loss, does not call the model or does not step the optimizer; for a name
    that matches no layer; where nothing may freeze; and where several processes train together.
    """
    if not frozen or not all(0 <= share <= 1 for share in frozen):
        raise UserError(f"frozen={list(frozen)}: name shares from 0 to 1, such as [0.5, 0.9]")
    asked = Asked(frozen, seed, time.perf_counter() + seconds, progress)
    if neq.parallel.workers() > 1:
        raise UserError("time one process alone: several would have to take the same steps")
    watched = Watched(model, optimizer, step)
    plain = unwrapped(model)
    check_sizes("the model", plain)
    with untouched(model, optimizer):
        progress("looking at a step")
        call = watched.look()
        costs = _costs(plain, call)
        freezable = _freezable(plain, optimizer, costs, exclude)
        precision = _precision(plain, call)
        cases = asked.cases(model, freezable, align_of(watched.device, precision))
        progress("timing kernels")
        with compilations() as compiling:
            timings = _timings(model, call, watched.device, [case.mask for case in cases])
        asked.ends += sum(compiling)
        first = call.tensors[0] if call.tensors else None
        return measured(
            watched,
            costs,
            freezable,
            cases,
            timings,
            asked,
            name=type(plain).__name__,
            batch=len(first) if first is not None and first.dim() else None,
            precision=precision,
            channels_last=first is not None and _channels_last(first),
        )


@dataclass(slots=True)
class Asked:
    """What is to be timed: shares of neurons, drawn from a seed, until time.perf_counter() says
    `ends`, and as much later as compiling has taken; `progress` is told what is being done.
    """

    shares: Sequence[float]
    seed: int
    ends: float
    progress: Progress

    def cases(self, model: nn.Module, freezable: Tensor, align: int) -> list[Case]:
        """Each share of each granularity that freezes something; `freezable`: bool [neurons].

        Raises UserError where nothing may freeze.
        """
        if not bool(freezable.any()):
            raise UserError("the model has no neuron that may freeze")
        neurons = neq.NeuronIndex(unwrapped(model))
        found = []
        for granularity, gradient in KINDS:
            cases = [
                Case(
                    draw(granularity, share, self.seed, neurons, freezable, align),
                    granularity,
                    gradient,
                    share,
                )
                for share in self.shares
            ]
            if granularity != "neuron-aligned" or any(bool(case.mask.any()) for case in cases):
                found += cases
        return found


def align_of(device: torch.device, precision: str) -> int:
    """How many rows the kernels of that precision compute at once."""
    half = device.type == "cuda" and precision in ("bf16", "fp16")
    return ALIGN_HALF if half else ALIGN


def measured(
    watched: Watched,
    costs: Costs | None,
    freezable: Tensor,
    cases: Sequence[Case],
    timings: neq.Timings,
    asked: Asked,
    compile_seconds: float | None = None,
    **about: Any,
) -> Speed:
    """Time the cases; `about`: name, batch, precision and channels_last of the result.

    `compile_seconds`: of the first dense step, where one was taken already.
    """
    asked.progress("taking dense steps")
    floors = [] if costs is None else [Case(freezable, floor=True)]
    with room():
        bench = Bench(watched, timings, [] if costs is None else costs.entrances)
        bench.run([*cases, *floors], asked.ends, asked.progress)
    neurons = neq.NeuronIndex(unwrapped(watched.model))
    seconds = bench.plain()
    dense = Dense(
        step_seconds=seconds[1],
        backward_seconds=_known(seconds[0]),
        activation_bytes=bench.kept,
        optimizer_bytes=state_bytes(watched.optimizer, neurons, torch.zeros_like(freezable)),
        compile_seconds=bench.compile_seconds if compile_seconds is None else compile_seconds,
    )
    floor = _known(floors[0].backward().middle) if floors else None
    rows = [
        Row(
            granularity=case.granularity,
            gradient=case.gradient,
            frozen=case.share,
            drawn=int(case.mask.sum()) / int(freezable.sum()),
            floor_ratio=floor,
            activation_ratio=_ratio(case.kept, dense.activation_bytes),
            optimizer_ratio=_ratio(
                state_bytes(watched.optimizer, neurons, case.mask), dense.optimizer_bytes
            ),
            pairs=len(case.pairs),
            **_times(case),
            **_counted(costs, case),
        )
        for case in cases
    ]
    device, align = (
        hardware(watched.device.type == "cuda"),
        align_of(watched.device, about["precision"]),
    )
    about |= {"device": device, "align": align, "compiled": watched.compiled}
    return Speed(dense=dense, rows=rows, **about)


def _costs(model: nn.Module, call: Call) -> Costs | None:
    """Counts of a model that takes one tensor of floating point, and that fvcore can trace."""
    if len(call.args) != 1 or call.kwargs or not isinstance(call.args[0], Tensor):
        return None
    inputs = call.args[0]
    if inputs.is_floating_point() and inputs.dim() > 1:
        with suppress(Exception):  # whatever a model of anybody's raises on zeros, or on the CPU
            return count_costs(model, tuple(inputs.shape[1:]))
    return None


def _freezable(
    model: nn.Module, optimizer: Optimizer, costs: Costs | None, exclude: Iterable[str] | None
) -> Tensor:
    """Whom freezing would change anything for: bool [neurons]."""
    neurons = neq.NeuronIndex(model)
    order = list(neurons) if costs is None else costs.execution_order
    try:
        excluded = neurons.select(head(neurons, order) if exclude is None else exclude)
    except ValueError as error:
        raise UserError(f"exclude: {error}") from None
    trained = {id(p) for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
    learns = torch.zeros_like(excluded)
    for layer in neurons.layers:
        learns[layer.neurons] = any(id(p) in trained for p in layer.parameters)
    called = torch.ones_like(excluded) if costs is None else costs.called
    return learns & called & ~excluded


class _Called(nn.Module):
    """A model that is called as it was in a step, whatever it is given."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model

        def run(inner: nn.Module) -> Any:  # a function: copies of the model share its tensors
            return inner(*call.args, **call.kwargs)

        self.run = run

    def forward(self, _inputs: Tensor) -> Any:
        return self.run(self.model)


def _precision(model: nn.Module, call: Call) -> str:
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    dtype = call.autocast or own
    return NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _timings(
    model: nn.Module, call: Call, device: torch.device, masks: Sequence[Tensor]
) -> neq.Timings:
    """Of the kernels of its layers, as the step calls it; compiled where the model is."""
    if not call.tensors:
        return neq.Timings()
    called = _Called(model if is_compiled(model) else unwrapped(model), call)
    with torch.autocast(device.type, dtype=call.autocast, enabled=call.autocast is not None):
        timed = neq.measure(called, call.tensors[0], masks)
    names = dict(zip(neq.NeuronIndex(called), neq.NeuronIndex(unwrapped(model)), strict=True))
    return neq.Timings({names[name]: of for name, of in timed.layers.items()})


def _channels_last(inputs: Tensor) -> bool:
    last = torch.channels_last
    return inputs.dim() == 4 and inputs.is_contiguous(memory_format=last) > inputs.is_contiguous()


def _times(case: Case) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, spread in (("backward", case.backward()), ("step", case.step())):
        found[f"{name}_ratio"] = _known(spread.middle)
        found[f"{name}_ratio_low"] = _known(spread.low)
        found[f"{name}_ratio_high"] = _known(spread.high)
    return found


def _counted(costs: Costs | None, case: Case) -> dict[str, Any]:
    if costs is None:
        return {"required_ratio": None, "executed_ratio": None}
    backward = costs.backward(case.mask, plan=case.plan)
    return {
        "required_ratio": backward.required / max(backward.dense, 1),
        "executed_ratio": backward.executed / max(backward.dense, 1),
    }


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
