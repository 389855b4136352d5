"""`neqbench speed`: does freezing pay on this machine? Real steps, frozen and dense by turns."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.compilations import compilations
from harness.errors import UserError, with_origin
from harness.flops.subject import Subject
from harness.suite.config import Recipe, Suite, TorchClass
from harness.suite.parts import build_part, load_part
from harness.train.compiling import check_compiler, compiled
from harness.train.optimizers import build_optimizer
from harness.train.pays import Asked, Progress, align_of, measured, pays
from harness.train.speeds import Speed
from harness.train.tuning import autocast, numerics, square, tune
from harness.train.watched import Watched
from neq.calls import Arguments

Precision = Literal["float32", "bf16", "fp16"]


def parse_shares(text: str) -> list[float]:
    """The shares that "0,0.5,1" names; raises UserError for anything outside of 0 to 1."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"--frozen {text}: write shares from 0 to 1, such as 0,0.5,1")
    return values


def speed(
    subject: Subject,
    batch: int | None,
    precision: Precision | None,
    asked: Asked,
    compile: bool = False,
) -> Speed:
    """Time a model in its suite's recipe, or with SGD, frozen and dense steps by turns.

    `batch`, `precision` and `compile` (by torch.compile): where it is no suite's. Raises UserError
    where the model can't be trained so, or this machine can't compile.
    """
    recipe = _recipe(subject.suite, batch, precision, compile)
    try:
        with numerics(recipe.precision):
            return _timed(subject, recipe, asked)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{subject.name} can't be trained with a batch of {recipe.batch_size} and "
            f"{recipe.optimizer.name} ({type(error).__name__}: {error})"
        ) from error


def _timed(subject: Subject, recipe: Recipe, asked: Asked) -> Speed:
    gpu = torch.cuda.is_available() and (subject.suite is None or subject.suite.resources.gpus != 0)
    device = torch.device("cuda" if gpu else "cpu")
    if recipe.compile:
        check_compiler(device)
    model = subject.module.to(device).train()
    cases = asked.cases(model, subject.freezable, align_of(device, recipe.precision))
    inputs = subject.inputs.random(recipe.batch_size, device)
    compile_seconds, how = None, (recipe.batch_size, recipe.precision)
    with compilations() as compiling:
        if recipe.compile:  # before what is compiled for the tuning is there to be taken
            asked.progress("compiling a dense step")
            first = _watched(subject, recipe, inputs)
            compile_seconds = first.compile_seconds(first.take()[1])
        asked.progress("choosing memory format and kernels")
        masks = [case.mask for case in cases]
        tuning = tune(model, subject.inputs, *how, masks, compiled=recipe.compile)
    asked.ends += sum(compiling)
    tuning.convert(model)
    return measured(
        _watched(subject, recipe, tuning.applied(inputs)),
        subject.costs,
        subject.freezable,
        cases,
        tuning.timings,
        asked,
        compile_seconds,
        name=subject.name,
        batch=recipe.batch_size,
        precision=recipe.precision,
        channels_last=tuning.channels_last,
    )


def _watched(subject: Subject, recipe: Recipe, inputs: Arguments) -> Watched:
    """The steps of the model on its device, compiled where the recipe says so."""
    model = compiled(subject.module) if recipe.compile else subject.module
    optimizer, _ = build_optimizer(subject.name, recipe, subject.module)
    return Watched(model, optimizer, _step(model, optimizer, inputs, recipe.precision))


def _step(
    model: nn.Module, optimizer: Optimizer, inputs: Tensor | Arguments, precision: str
) -> Callable[[], Tensor]:
    """A training step on the same inputs; no weight moves, for the learning rate is zero."""
    device = next(model.parameters()).device.type
    call = inputs if isinstance(inputs, Arguments) else Arguments(args=(inputs,))
    for group in optimizer.param_groups:
        group["lr"] = 0.0

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = square(call(model))
        torch.autograd.backward(loss)
        optimizer.step()
        return loss

    return step


def _recipe(
    suite: Suite | None, batch: int | None, precision: Precision | None, compile: bool = False
) -> Recipe:
    if suite is not None and compile:
        raise UserError("--compile belongs to --model; for a suite: --set recipe.compile=true")
    if suite is not None and (batch is not None or precision is not None):
        raise UserError("--batch and --precision belong to --model; a suite's recipe has its own")
    if suite is not None:
        torch.set_num_threads(suite.resources.cpus)
        size = suite.recipe.forward_size(suite.resources.world_size)
        return suite.recipe.model_copy(update={"batch_size": size})
    if batch is not None and batch < 1:
        raise UserError(f"--batch {batch}: must be at least 1")
    arguments: Any = {"momentum": 0.9, "weight_decay": 5e-4, "lr": 0.1}
    return Recipe(
        epochs=1,
        batch_size=batch or 32,
        precision=precision or "float32",
        compile=compile,
        optimizer=TorchClass(name="SGD", **arguments),
    )


def own_speed(
    reference: str, shares: Sequence[float], seed: int, seconds: float, progress: Progress
) -> Speed:
    """Time the step of a training of the user's: that of `(model, optimizer, step)`, which the
    function at "module:function" returns.

    Raises UserError for a function that can't be loaded, fails or returns something else, and for a
    step that fails or is none (harness.train.pays).
    """
    where = f"--step {reference}:"
    if not callable(load_part(reference, ".")):
        raise UserError(f"{where} not a function; write one that returns (model, optimizer, step)")
    parts = build_part(reference, ".", {})
    try:
        model, optimizer, step = parts
        wrong = not (
            isinstance(model, nn.Module) and isinstance(optimizer, Optimizer) and callable(step)
        )
    except (TypeError, ValueError):
        wrong = True
    if wrong:
        raise UserError(
            f"{where} returned {_kinds(parts)}; it must return (model, optimizer, step): a torch "
            "module, its torch optimizer, and a function that does one training step"
        )
    try:
        found = pays(
            model, optimizer, step, frozen=shares, seed=seed, seconds=seconds, progress=progress
        )
    except UserError as error:
        raise UserError(f"{where} {error}") from error
    except Exception as error:
        raise UserError(f"{where} a step failed: {with_origin(error)}") from error
    return replace(found, name=reference)


def _kinds(parts: Any) -> str:
    if isinstance(parts, tuple):
        return f"({', '.join(type(part).__name__ for part in parts)})"
    return type(parts).__name__
