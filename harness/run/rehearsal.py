"""A method of a user's own, tried out on a few samples before hours are spent."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness import parallel
from harness.errors import UserError, with_origin
from harness.methods.building import CALLS, STATED, check_state, equal
from harness.seeds import seed_globals
from harness.suite.config import Sharpness, TrialSpec
from harness.train.assembly import Assembly, assemble
from harness.train.compiling import start_anew, without_compiler
from harness.train.loop import Loop
from harness.train.tuning import Tuning, numerics

EPOCHS = 2  # at most
NEAR = 0.02  # of the way that the weights have gone


def rehearse(trial: TrialSpec, samples: int) -> None:
    """Run the trial's method through epochs of one step on so many samples of each part, on the
    CPU.

    Raises UserError, naming class and hook, for a hook that is missing, fails or can't be called as
    it is; for FLOPs, measures and states that can't be stored; for a state that does not bring the
    method back to where it was; for neurons that are said to stand still, and don't; and for
    weights that change once the epoch has ended; where the recipe compiles, also for a method that
    fails or trains otherwise then.
    """
    recipe = trial.suite.recipe
    short = recipe.model_copy(update={"batch_size": samples, "forward_batch": None})
    often = trial.suite.sharpness and Sharpness(every=1, iterations=1)  # `kept_weights` must fit
    changes: dict[str, Any] = {"sharpness": often, "probe": None}

    def rehearsed(compile_it: bool) -> tuple[Tensor, Tensor]:
        changes["recipe"] = short.model_copy(update={"compile": compile_it})
        suite = trial.suite.model_copy(update=changes)
        rehearsal = _Rehearsal(trial.model_copy(update={"suite": suite}), samples)
        start = rehearsal.weights()
        for epoch in range(min(EPOCHS, recipe.epochs)):
            rehearsal.epoch(epoch)
        rehearsal.check_resumed()
        return start, rehearsal.weights()

    with numerics(recipe.precision):
        plain = rehearsed(False)
        if recipe.compile:
            _check_compiled(trial.method, *plain, lambda: rehearsed(True)[1])


def _check_compiled(
    method: str, start: Tensor, plain: Tensor, rehearsed: Callable[[], Tensor]
) -> None:
    """Raises UserError where it fails when compiled, or does not come near the `plain` weights.

    Rounding may turn a step of Adam where a gradient is next to nothing: near is as seen from the
    `start`, and by all weights together.
    """
    start_anew()
    try:
        with without_compiler():
            compiled = rehearsed()
    except UserError as error:
        raise UserError(f"{error}; without recipe.compile it does not fail") from error
    if (compiled - plain).norm() > NEAR * (plain - start).norm():
        raise UserError(
            f"method {method} trains to other weights with recipe.compile: what it looks at inside "
            "a forward, or in its graph, a compiled one does not have; drop one of them"
        )


class _Rehearsal:
    """The method of `spec` at work on so many samples of each part, with nothing timed."""

    def __init__(self, spec: TrialSpec, samples: int) -> None:
        self._spec, self._samples = spec, samples
        self._work = self._assembled()
        self._loop = Loop(self._work, spec.suite.recipe, spec.seed)
        with self._blaming():
            self._work.start()

    def _assembled(self) -> Assembly:
        untimed = {"tuning": Tuning().to_json()}
        work = assemble(self._spec, torch.device("cpu"), None, untimed, most=self._samples)
        seed_globals(self._spec.seed, "rehearsal")
        # With torch's own scale the first steps in float16 may be skipped, without after_step.
        half = work.scaler.is_enabled()
        return replace(work, scaler=torch.amp.GradScaler("cpu", init_scale=1.0, enabled=half))

    def epoch(self, epoch: int) -> None:
        """One step, and all that a trial asks after an epoch."""
        work = self._work
        with self._blaming():
            frozen, plan = work.begin_epoch()
            before = self._rows(frozen)
            self._loop.train(epoch)
            if not equal(before, self._rows(frozen)):
                raise self._wrong("frozen names neurons whose weights have changed in the epoch")
            work.method.end_epoch(epoch)
            ended = parallel.fingerprint(work.model)
            work.flops(frozen, plan)
            work.layer_rows(frozen, plan)
            work.measure_rows()
            work.analysis.rows(epoch, 0.0)
            work.size()
            check_state(self._spec.method, work.method)
        if not torch.equal(ended, parallel.fingerprint(work.model)):
            raise self._wrong(
                "changes weights after end_epoch; change them in a step or in end_epoch, so that "
                "what is tested is what is kept"
            )

    def weights(self) -> Tensor:
        """All weights as they are now, one after the other; no biases, since those before a
        normalisation move by what rounding leaves of their gradient.
        """
        weights = (p for p in self._work.model.parameters() if p.dim() > 1)
        return torch.cat([torch.zeros(1), *(w.detach().flatten() for w in weights)]).double()

    def _rows(self, frozen: Tensor) -> list[Tensor]:
        """The parameters of the neurons that stand still."""
        layers = self._work.costs.neurons.layers
        modules = dict(self._work.model.named_modules())
        return [
            parameter.detach()[frozen[layer.neurons]].clone()
            for layer in layers
            for parameter in modules[layer.name].parameters(recurse=False)
        ]

    def check_resumed(self) -> None:
        """Raises UserError where a checkpoint does not bring back the method."""
        name, method = self._spec.method, self._work.method
        state, other = check_state(name, method), self._assembled()
        with self._blaming():
            other.restore(self._work.state() | {"method": check_state(name, method)})
            again = check_state(name, other.method)
            masks = [work.begin_epoch()[0] for work in (self._work, other)]
        lost = [key for key in state if key not in again or not equal(state[key], again[key])]
        lost += ["frozen"] if not equal(*masks) else []
        if lost:
            raise self._wrong(
                f"load_state_dict does not bring back {', '.join(map(repr, lost))}; a trial would "
                "not resume to the bit"
            )

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Inside, an error becomes a UserError that names the hook in which it arose."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            hook = self._hook(error)
            if hook is None:
                raise UserError(f"a first step fails: {with_origin(error)}") from error
            raise self._wrong(f"{hook} failed: {with_origin(error)}") from error

    def _hook(self, error: Exception) -> str | None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            name, whose = frame.f_code.co_name, frame.f_locals.get("self")
            if isinstance(whose, type(self._work.method)) and name in (*CALLS, *STATED):
                return f"{name}()" if name in CALLS else name
        return None

    def _wrong(self, what: Any) -> UserError:
        return UserError(f"method {self._spec.method}: {type(self._work.method).__name__}: {what}")
