"""A training step of anybody's that is watched: its time, its backward's, its input, its loss."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

import neq
from harness.compilations import as_written, compilations
from harness.errors import UserError
from neq.compiled import is_compiled
from neq.evaluation import uncompiled

FIRST = 3  # calls in which the optimizer must have stepped: a GradScaler skips some at first
SETTLED = 10  # steps, one of which at least must compile nothing


@dataclass(frozen=True, slots=True)
class Call:
    """How a step calls its model: with which arguments, under which autocast (None: without)."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        return [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Tensor)]


class Watched:
    """A training step and what it trains: `step()` does one and returns its loss.

    `compiling`: seconds of the steps in which torch.compile was at work, so far. Raises UserError
    for an optimizer that has none of the model's parameters, and for LBFGS, under which rows can't
    freeze.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, step: Callable[[], Any]) -> None:
        self.model, self.optimizer = model, optimizer
        self._step = step
        own = {id(p) for p in model.parameters()}
        if own.isdisjoint(id(p) for g in optimizer.param_groups for p in g["params"]):
            raise UserError("the optimizer has none of the model's parameters")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise UserError("LBFGS moves all parameters along one direction: rows can't freeze")
        self.device = next(model.parameters()).device
        self.compiling: list[float] = []
        self._clock = _BackwardClock(self.device)

    @property
    def compiled(self) -> bool:
        """Whether steps are compiled: a compiled function is found out when it compiles."""
        return bool(self.compiling) or is_compiled(self.model)

    def take(self) -> tuple[float, float]:
        """Take a step: seconds of its backward, NaN where none was seen, and of all of it.

        A step in which something is compiled is no step: another one is taken. Raises UserError
        where the step returns no loss, or never ceases to compile.
        """
        for _ in range(SETTLED):
            with compilations() as compiled:
                times = self._take()
            if not compiled:
                return times
            self.compiling.append(times[1])
        raise UserError(
            f"each of {SETTLED} steps was compiled anew, so that none can be timed: "
            "TORCH_LOGS=recompiles says why"
        )

    def compile_seconds(self, later: float) -> float | None:
        """Seconds that compiling has taken so far, where a later step takes so many; None where
        nothing was compiled.
        """
        return sum(step - later for step in self.compiling) if self.compiling else None

    def _take(self) -> tuple[float, float]:
        with self._clock.watching(), neq.stopwatch(self.device) as whole:
            loss = self._step()
        number = isinstance(loss, Real) and not isinstance(loss, bool)
        if not (number or (isinstance(loss, Tensor) and loss.numel() == 1)):
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else None
            raise UserError(
                f"step() returned {what or type(loss).__name__}, not the loss: "
                "return it as a number, or a tensor of one"
            )
        return self._clock.seconds(), whole[0]

    def look(self) -> Call:
        """Take steps until the optimizer has stepped, too, and tell how they call the model.

        They run as they are written: compiled code sees no hook that comes later, and keeps one
        that it was compiled with. Raises UserError where they do not call the model, or leave the
        optimizer alone.
        """
        calls: list[Call] = []
        steps: list[None] = []

        def called(_module: nn.Module, args: Any, kwargs: Any) -> None:
            kind = self.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            calls.append(Call(args, kwargs, dtype))

        handles = [
            self.model.register_forward_pre_hook(called, with_kwargs=True),
            self.optimizer.register_step_post_hook(lambda *_: steps.append(None)),
        ]
        try:
            with uncompiled():
                for _ in range(FIRST):
                    if not steps:
                        self._take()
        finally:
            for handle in handles:
                handle.remove()
        if not calls:
            raise UserError("step() does not call the model: return the one that it does call")
        if not steps:
            raise UserError("step() does not step the optimizer: return the one that it does step")
        return calls[-1]


class _BackwardClock:
    """Takes the time of backwards, from the call of torch's engine to its end.

    Nothing is hooked to the model: its code may be compiled. On a GPU by events in its own queue:
    nothing waits for them within a step.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._running = False
        self._marks: list[Any] = []  # beginnings and ends by turns

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, backwards are timed."""
        self._marks.clear()
        autograd: Any = torch.autograd
        engine = autograd._engine_run_backward  # all ways to a backward lead here
        mark = as_written(self._mark)

        def run(*args: Any, **kwargs: Any) -> Any:
            if self._running:  # one inside another, as of checkpoints
                return engine(*args, **kwargs)
            self._running = True
            mark()
            try:
                return engine(*args, **kwargs)
            finally:
                self._running = False
                mark()

        # What the backward calls is the training's own, to be compiled or not.
        autograd._engine_run_backward = as_written(run, recursive=False)
        try:
            yield
        finally:
            autograd._engine_run_backward = engine

    def seconds(self) -> float:
        """Of those backwards together; NaN where there was none. The device must be done."""
        if not self._marks:
            return math.nan
        pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
        if self._device.type == "cuda":
            return float(sum(begin.elapsed_time(end) for begin, end in pairs)) / 1000
        return float(sum(end - begin for begin, end in pairs))

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
