"""The optimizers that a loop steps: taken out of their wrappers, and what they hold."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

HOOKS = "_optimizer_step_pre_hooks"


def given(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers given, one or several, each once and without its wrappers.

    Raises TypeError for what is no optimizer of torch's and wraps none, ValueError for none at all
    and for LBFGS.
    """
    several = isinstance(optimizers, Iterable) and not isinstance(optimizers, (Optimizer, str))
    found: dict[int, Optimizer] = {}
    for each in optimizers if several else [optimizers]:  # type: ignore[union-attr]
        inner = bare(each)
        found[id(inner)] = inner
    if not found:
        raise ValueError("no optimizer was given: give every one that steps the model")
    if any(isinstance(each, torch.optim.LBFGS) for each in found.values()):
        raise ValueError("LBFGS moves all parameters along one direction: rows can't freeze")
    return list(found.values())


def bare(optimizer: Any) -> Optimizer:
    """What is inside wrappers that forward to their `.optimizer`, as Accelerate's do.

    Those derive from Optimizer without being made as one, and have no hooks. Raises TypeError where
    nothing inside has any.
    """
    seen: list[Any] = []
    inner = optimizer
    while not (isinstance(inner, Optimizer) and HOOKS in vars(inner)):
        seen.append(inner)
        inner = getattr(inner, "optimizer", None)
        if inner is None or any(inner is each for each in seen):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}: give "
                "the one whose step() moves the parameters"
            )
    return inner


def parameters_of(optimizers: Iterable[Optimizer]) -> Iterator[Tensor]:
    """The parameters that the optimizers hold now."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def then(
    arguments: tuple[Any, ...], keywords: Mapping[str, Any], clear: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a step, the optimizer first, whose closure calls `clear` when it is done;
    None where there is no closure.
    """
    optimizer, *rest = arguments
    closure = rest[0] if rest else keywords.get("closure")
    if not callable(closure):
        return None

    def cleared() -> Any:
        loss = closure()
        clear()
        return loss

    if rest:
        return (optimizer, cleared, *rest[1:]), dict(keywords)
    return (optimizer,), {**keywords, "closure": cleared}
