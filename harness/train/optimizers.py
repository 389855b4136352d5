"""Builds the recipe's optimizer and scheduler, which it names as torch does."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from harness.errors import UserError
from harness.suite.config import PLATEAU, Recipe, Suite, TorchClass

# Schedulers that can step with every iteration, for all their arguments of time are among these.
COUNTED = (
    *("SequentialLR", "ChainedScheduler", "ConstantLR", "LinearLR", "PolynomialLR"),
    *("StepLR", "MultiStepLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts"),
)
COUNTS = ("total_iters", "T_max", "T_0", "step_size", "milestones")
PLATEAU_NUMBERS = ("factor", "patience", "threshold", "cooldown", "min_lr", "eps")


def check_followed(suite: Suite) -> None:
    """Raises UserError for a scheduler that follows the validation loss where there is none."""
    scheduler = suite.recipe.scheduler
    if scheduler is not None and scheduler.name == PLATEAU and not suite.data.validation_size:
        raise UserError(
            f"suite {suite.name}: recipe.scheduler: {PLATEAU} follows the validation loss: "
            "data.validation_size must be at least 1"
        )


def build_optimizer(
    suite: str, recipe: Recipe, model: nn.Module, steps: int = 1
) -> tuple[Optimizer, LRScheduler | None]:
    """The recipe's optimizer for `model`, fused where torch has that, and its scheduler.

    `suite`: its name, for messages; `steps`: optimizer steps of an epoch, which a scheduler that
    steps with every iteration counts.

    Raises UserError for an unknown name or for arguments that torch refuses.
    """
    where = f"suite {suite}: recipe."
    named, groups = _fused(recipe.optimizer), _groups(where, recipe, model)
    optimizer = _torch_class(torch.optim, Optimizer, where + "optimizer", named, [groups])
    if recipe.scheduler is None:
        return optimizer, None
    if recipe.scheduler.name == PLATEAU:
        _check_plateau(where + "scheduler", recipe.scheduler, recipe.schedule)
    unit = steps if recipe.schedule == "iteration" else 1
    return optimizer, _scheduler(where + "scheduler", recipe.scheduler, optimizer, unit)


def _groups(where: str, recipe: Recipe, model: nn.Module) -> list[dict[str, Any]]:
    """One group, and one for each part of the model that has a learning rate of its own."""
    lr = recipe.optimizer.arguments.get("lr", math.nan)
    if recipe.lr_factors and not (isinstance(lr, float | int) and math.isfinite(lr)):
        raise UserError(f"{where}lr_factors: they need a number recipe.optimizer.lr to multiply")
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in ("", *recipe.lr_factors)}
    for name, parameter in model.named_parameters():
        of = (part for part in recipe.lr_factors if name.startswith(f"{part}."))
        groups[max(of, key=len, default="")].append(parameter)
    for part, parameters in groups.items():
        if part and not parameters:
            raise UserError(f"{where}lr_factors: no part of the model is called {part!r}")
    factors = {part: {"lr": lr * factor} for part, factor in recipe.lr_factors.items()}
    return [{"params": part, **factors.get(name, {})} for name, part in groups.items() if part]


def _check_plateau(where: str, named: TorchClass, schedule: str) -> None:
    """Torch itself takes any arguments, and fails an epoch later."""
    if schedule == "iteration":
        raise _uncounted(where, named.name)
    if (mode := named.arguments.get("mode", "min")) != "min":
        raise UserError(f'{where}.mode: {mode!r}; {PLATEAU} follows a loss: leave it at "min"')
    for key in PLATEAU_NUMBERS:
        value = named.arguments.get(key, 0)
        numbers = value if key == "min_lr" and isinstance(value, list) else [value]
        if not all(type(number) in (int, float) and number >= 0 for number in numbers):
            raise UserError(f"{where}.{key}: {value!r} must be a number, at least 0")


def _uncounted(where: str, name: str) -> UserError:
    return UserError(
        f'{where}: {name} can\'t step with every iteration; take schedule = "epoch", or '
        f"one of {', '.join(COUNTED)}"
    )


def _scheduler(where: str, named: TorchClass, optimizer: Optimizer, unit: int) -> LRScheduler:
    """Arguments count epochs of `unit` steps; schedulers among them are built first."""
    if unit > 1 and named.name not in COUNTED:
        raise _uncounted(where, named.name)
    milestones = named.arguments.get("milestones", [])
    if not isinstance(milestones, list) or not all(isinstance(m, int) for m in milestones):
        raise UserError(
            f"{where}.milestones: {milestones} must be a list of epochs, such as [15, 22]"
        )
    arguments = {
        key: _built(where, key, value, optimizer, unit) for key, value in named.arguments.items()
    }
    built = TorchClass.model_construct(name=named.name, **arguments)
    scheduler: LRScheduler = _torch_class(
        lr_scheduler, LRScheduler, where, built, _leading(named, optimizer)
    )
    return scheduler


def _leading(named: TorchClass, optimizer: Optimizer) -> list[Any]:
    """ChainedScheduler takes its schedulers first."""
    return [] if named.name == "ChainedScheduler" else [optimizer]


def _built(where: str, key: str, value: Any, optimizer: Optimizer, unit: int) -> Any:
    if key == "schedulers" and isinstance(value, list):
        build: Callable[[Any], LRScheduler] = partial(_nested, where, optimizer, unit)
        return [build(item) for item in value]
    if key in COUNTS and isinstance(value, list):
        return [unit * item for item in value]
    counted = key in COUNTS and isinstance(value, int | float) and not isinstance(value, bool)
    return round(unit * value) if counted and unit > 1 else value


def _nested(where: str, optimizer: Optimizer, unit: int, value: Any) -> LRScheduler:
    if not isinstance(value, dict) or "name" not in value:
        raise UserError(f'{where}.schedulers: each must be a table such as {{name = "LinearLR"}}')
    try:
        named = TorchClass.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{where}.schedulers: {error.errors()[0]['msg']}") from None
    if named.name == PLATEAU:
        raise UserError(
            f"{where}.schedulers: {PLATEAU} follows the validation loss, which only "
            "recipe.scheduler itself is told; take it alone, or other schedulers"
        )
    return _scheduler(where + ".schedulers", named, optimizer, unit)


def _torch_class(module: Any, base: Any, where: str, named: TorchClass, leading: list[Any]) -> Any:
    cls = getattr(module, named.name, None)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        known = [n for n in dir(module) if isinstance(getattr(module, n), type)]
        names = ", ".join(n for n in known if issubclass(getattr(module, n), base) and n[0] != "_")
        raise UserError(f"{where}: unknown name {named.name!r}; torch has {names}")
    try:
        return cls(*leading, **named.arguments)
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{where}: {named.name} refuses its arguments: {error}") from None


def _fused(named: TorchClass) -> TorchClass:
    """The same optimizer, fused where torch has that and the recipe says nothing else."""
    cls = getattr(torch.optim, named.name, None)
    known = inspect.signature(cls).parameters if isinstance(cls, type) else {}
    if "fused" not in known or {"fused", "foreach", "differentiable"} & named.arguments.keys():
        return named
    return TorchClass.model_validate({"name": named.name, **named.arguments, "fused": True})
