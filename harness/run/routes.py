"""Whether each forward of a model does the same work: no layer may be left out at random."""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from harness.errors import UserError, with_origin
from harness.seeds import seeded
from neq.evaluation import uncompiled
from neq.neurons import unwrapped
from neq.required import BATCH

LEAST, MOST = 12, 32  # forwards
LARGE = 2 * 10**11  # FLOPs of all forwards, above which fewer have to do


def check_routes(model: nn.Module, shape: Sequence[int]) -> None:
    """Raises UserError where a layer is not called in every forward in train mode, or is called
    with other sizes, by chance: FLOPs are counted in one forward, and stand for all.

    `shape`: of one float32 input, without the batch dimension. The model and all random streams are
    left as they were.
    """
    works = _works(model, torch.zeros(BATCH, *shape))
    names = dict.fromkeys(name for work in works for name in work.calls)
    for name in names:
        counts = [work.calls[name] for work in works]
        if len(set(counts)) > 1:
            times = sum(count > 0 for count in counts)
            said = f"in {times} of {len(works)} forwards"
            if min(counts) > 0:
                said = f"{min(counts)} to {max(counts)} times in a forward"
            raise UserError(
                f"the model leaves layers out at random ({name} was called {said}), so that FLOPs "
                "would differ from trial to trial; switch that off, for instance by model.arguments"
            )
    flops = sorted({work.products.total() for work in works})
    if len(flops) > 1 or any(work.products != works[0].products for work in works):
        raise UserError(
            f"the model's matrix products differ from forward to forward ({flops[0]:,} to "
            f"{flops[-1]:,} FLOPs), so that those of a training can't be counted; switch off what "
            "does that, for instance by model.arguments"
        )


@dataclass(slots=True)
class _Work:
    """What a forward did: calls of modules with parameters of their own, by name; FLOPs of the
    products, by operator.
    """

    calls: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)


def _works(model: nn.Module, inputs: Tensor) -> list[_Work]:
    """The work of some forwards, each with random streams of its own."""
    copied = copy.deepcopy(unwrapped(model)).cpu().float().train()
    try:
        return _repeated(copied, inputs, computed=False)
    except Exception:
        pass  # there are models that do not run on zeros
    try:
        return _repeated(copied, inputs, computed=True)
    except Exception as error:
        raise UserError(
            f"the model runs, but not in every forward in train mode: {with_origin(error)}"
        ) from error


def _repeated(model: nn.Module, inputs: Tensor, *, computed: bool) -> list[_Work]:
    first = _of_one(model, inputs, 0, computed)  # it may make what the others find
    forwards = min(max(LARGE // max(first.products.total(), 1), LEAST), MOST)
    return [_of_one(model, inputs, 1 + number, computed) for number in range(forwards)]


def _of_one(model: nn.Module, inputs: Tensor, number: int, computed: bool) -> _Work:
    work = _Work()
    with (
        warnings.catch_warnings(),
        uncompiled(),
        seeded(number, "routes"),
        _watched(model, work),
        _Products(work, computed=computed),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # the count has said them
        model(inputs.clone())
    return work


@contextmanager
def _watched(model: nn.Module, work: _Work) -> Iterator[None]:
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):

                def count(*_: Any, name: str = name) -> None:
                    work.calls[name] += 1

                handle = module.register_forward_pre_hook(count)
                stack.callback(handle.remove)
        yield


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the products of a forward; unless they are `computed`, zeros take their place, which
    makes a forward of a large model a matter of moments.
    """

    def __init__(self, work: _Work, *, computed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._work, self._computed = work, computed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        rule = flop_registry.get(func._overloadpacket)
        if rule is None:
            return func(*args, **named)
        found = func(*args, **named) if self._computed else _zeros(func, args, named)
        self._work.products[str(func)] += rule(*args, **named, out_val=found)
        return found


def _zeros(function: Any, args: Any, named: Any) -> Any:
    """What the function would return, in its shapes, as zeros."""
    args, named = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, named))
    made = function(*args, **named)
    return tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), made)
