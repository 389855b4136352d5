"""What is left of a trained model when its dead neurons are removed, and how long a forward takes.

It is compared with the suite's own model: a control that trains a smaller one is, too.
"""

import copy
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import neq
from harness.data.load import load_data
from harness.flops.costs import count_costs
from harness.suite.config import Suite, TrialSpec
from harness.suite.parts import build_model
from harness.train.tuning import Tuning, autocast
from neq.pruning import RemovalError, Shrunk, Stuck, dead_neurons, shrunk

SAMPLES = 8  # of the test part, on which outputs are compared
LEAST, MOST = 7, 101  # pairs of forwards
SECONDS = 2.0  # of pairs, for each size of a batch
ROW = 0.02  # seconds that are timed in a row, at least
WARM = 3  # forwards that are not counted
NOTHING = "nothing is dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Seconds of forwards, medians over pairs taken by turns; their ratio with its quartiles. None:
    not measured.
    """

    seconds: float | None = None
    dense: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """A row of `removals`, but for what it was measured on."""

    reason: str | None
    stuck: str
    neurons_dead: int
    neurons_removed: int
    parameters: int
    parameters_dense: int
    forward_flops: int
    forward_flops_dense: int
    file_bytes: int
    file_bytes_dense: int
    difference: float | None
    difference_float64: float | None
    batch: int
    latency_one: float | None
    latency_one_low: float | None
    latency_one_high: float | None
    latency_batch: float | None
    latency_batch_low: float | None
    latency_batch_high: float | None
    seconds_one: float | None
    seconds_one_dense: float | None
    seconds_batch: float | None
    seconds_batch_dense: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurable:
    """A model in evaluation on the CPU, and what it takes by count."""

    model: nn.Module
    parameters: int
    flops: int
    file_bytes: int

    @classmethod
    def of(cls, model: nn.Module, suite: Suite) -> "Measurable":
        """Count a model that takes the suite's samples."""
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        costs = count_costs(model, suite.model.input)
        return cls(
            model=model.eval(),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            flops=costs.forward(),
            file_bytes=buffer.tell(),
        )


def dense(suite: Suite, folder: str) -> Measurable:
    """The suite's own model, as it is built."""
    parts = suite.model
    return Measurable.of(build_model(parts.build, folder, parts.arguments), suite)


def examples(spec: TrialSpec) -> Tensor:
    """Some samples of the test part; one, where they differ in shape."""
    recipe = spec.suite.recipe
    data = load_data(spec.suite, spec.folder).open(torch.device("cpu"), 0, recipe, most=SAMPLES)
    found = [inputs for inputs, _ in data.evaluate("test", SAMPLES)]
    return torch.cat(found) if len({inputs.shape[1:] for inputs in found}) == 1 else found[0]


def remove(spec: TrialSpec, weights: dict[str, Any], example: Tensor) -> tuple[Shrunk, str | None]:
    """The trial's model with these `weights`, without what is dead; and why nothing went, if so."""
    parts = spec.trained_suite.model
    model = build_model(parts.build, spec.folder, parts.arguments)
    model.load_state_dict(weights)
    try:
        found = shrunk(model, example)
    except RemovalError as error:
        return _as_it_is(model, str(error)), str(error)
    if found.removed:
        return found, None
    return found, NOTHING if not found.dead else "none of the dead neurons can be removed"


def _as_it_is(model: nn.Module, why: str) -> Shrunk:
    """Nothing was removed, and nothing compared."""
    dead = {layer: neurons for layer, neurons in dead_neurons(model).items() if neurons}
    return Shrunk(
        model=model,
        removed={},
        dead=sum(dead.values()),
        stuck=tuple(Stuck(layer=name, neurons=n, reason=why) for name, n in dead.items()),
        difference=math.nan,
        difference_float64=math.nan,
    )


def measure(
    spec: TrialSpec,
    found: Shrunk,
    reason: str | None,
    whole: Measurable,
    timed: Callable[[nn.Module, nn.Module, int], Latency],
) -> Removed:
    """What is left of the `whole` suite's model, by count; `timed` measures the latency of the
    smaller beside the whole model, for so many samples.
    """
    suite = spec.trained_suite
    left = Measurable.of(found.model, suite)
    batch = suite.recipe.forward_size(suite.resources.world_size)
    one, many = (timed(left.model, whole.model, size) for size in (1, batch))
    return Removed(
        reason=reason,
        stuck=json.dumps([asdict(stuck) for stuck in found.stuck]),
        neurons_dead=found.dead,
        neurons_removed=sum(map(len, found.removed.values())),
        parameters=left.parameters,
        parameters_dense=whole.parameters,
        forward_flops=left.flops,
        forward_flops_dense=whole.flops,
        file_bytes=left.file_bytes,
        file_bytes_dense=whole.file_bytes,
        difference=_known(found.difference),
        difference_float64=_known(found.difference_float64),
        batch=batch,
        latency_one=one.ratio,
        latency_one_low=one.low,
        latency_one_high=one.high,
        latency_batch=many.ratio,
        latency_batch_low=many.low,
        latency_batch_high=many.high,
        seconds_one=one.seconds,
        seconds_one_dense=one.dense,
        seconds_batch=many.seconds,
        seconds_batch_dense=many.dense,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """Times forwards as the `suite` evaluates: on its device, in its precision and memory format.

    `look`: is called after each pair, to see who else is there.
    """

    suite: Suite
    device: torch.device
    tuning: Tuning
    look: Callable[[], None]

    def __call__(self, smaller: nn.Module, whole: nn.Module, size: int) -> Latency:
        """The latency of batches of `size` samples."""
        noise = torch.randn(size, *self.suite.model.input)
        inputs = self.tuning.apply(noise.to(self.device))
        sides = [
            self.tuning.convert(copy.deepcopy(model)).to(self.device).requires_grad_(False)
            for model in (smaller, whole)
        ]
        precision = self.suite.recipe.precision
        forwards = [partial(_forward, side, inputs, precision) for side in sides]
        return _by_turns(forwards[0], forwards[1], self.device, self.look)


@torch.inference_mode()
def _forward(model: nn.Module, inputs: Tensor, precision: str) -> None:
    with autocast(inputs.device.type, precision):
        model(inputs)


def _by_turns(
    smaller: Callable[[], None],
    whole: Callable[[], None],
    device: torch.device,
    look: Callable[[], None],
) -> Latency:
    """Time both, each first every other time, for about SECONDS."""
    sides = [smaller, whole]
    each = min(_seconds(side, WARM, device) for side in sides)
    row = max(math.ceil(ROW / max(each, 1e-6)), 1)
    pairs: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(pairs) < LEAST or (len(pairs) < MOST and time.perf_counter() - began < SECONDS):
        order = [0, 1] if len(pairs) % 2 else [1, 0]
        found = {side: _seconds(sides[side], row, device) for side in order}
        pairs.append((found[0], found[1]))
        look()
    seconds, dense_seconds = np.array(pairs).T
    low, middle, high = np.percentile(seconds / dense_seconds, [25, 50, 75])
    return Latency(
        seconds=float(np.median(seconds)),
        dense=float(np.median(dense_seconds)),
        ratio=float(middle),
        low=float(low),
        high=float(high),
    )


def _seconds(forward: Callable[[], None], times: int, device: torch.device) -> float:
    """Of one forward, in a row of so many."""
    with neq.stopwatch(device) as seconds:
        for _ in range(times):
            forward()
    return seconds[0] / times
