"""Whether each forward of a model does the same work: no layer may be left out at random."""

import copy
import math
import time
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

LEAST, MOST = 12, 128  # forwards
FEWEST = 4  # where products are computed, which may take long
# FLOPs and seconds of all forwards, above which fewer have to do.
LARGE = 2 * 10**11
SECONDS = 3.0
FIRST = 4377  # seed; first draws of the MOST after it come within 0.005 of both 0 and 1


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
    products, by operator; how many operators that took.
    """

    calls: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)
    operators: int = field(default=0, compare=False)
    multiplied: int = field(default=0, compare=False)  # products among the operators


def _works(model: nn.Module, inputs: Tensor) -> list[_Work]:
    """The work of some forwards, each with random streams of its own."""
    try:
        return _repeated(model, inputs, computed=False)
    except Exception:
        pass  # there are models that do not run on zeros, or do other work
    try:
        return _repeated(model, inputs, computed=True)
    except Exception as error:
        raise UserError(
            f"the model runs, but not in every forward in train mode: {with_origin(error)}"
        ) from error


def _repeated(model: nn.Module, inputs: Tensor, *, computed: bool) -> list[_Work]:
    copied = copy.deepcopy(unwrapped(model)).cpu().float().train()
    first = _of_one(copied, inputs, FIRST, None, True)  # it may make what the others find
    forwards = min(max(LARGE // max(first.products.total(), 1), LEAST), MOST)
    least = FEWEST if computed else LEAST
    works: list[_Work] = []
    end = time.monotonic() + SECONDS
    while len(works) < least or (len(works) < forwards and time.monotonic() < end):
        works.append(_of_one(copied, inputs, FIRST + 1 + len(works), first, computed))
    if not computed and works[0] != first and all(work == works[0] for work in works):
        raise _OtherWorkError  # what is done depends on values
    return works


class _OtherWorkError(Exception):
    """A forward does not do the work of the first one, which was computed."""


def _of_one(
    model: nn.Module, inputs: Tensor, number: int, first: _Work | None, computed: bool
) -> _Work:
    """`first`: the work of another forward; far more is not done to its end. Raises _OtherWorkError
    where it was to be, with products that are not computed.
    """
    work = _Work()
    with (
        warnings.catch_warnings(),
        uncompiled(),
        seeded(number, "routes"),
        _watched(model, work),
        _Products(work, first, computed=computed),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")  # the count has said them
        try:
            model(inputs.clone())
        except _OtherWorkError:
            if not computed:
                raise
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

    A loop that waits for a value may never end on zeros: far more than the work of the `first`
    forward raises _OtherWorkError.
    """

    def __init__(self, work: _Work, first: _Work | None, *, computed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._work, self._computed = work, computed
        self._operators = self._multiplied = math.inf
        if first is not None:
            self._multiplied = 4 * first.multiplied + 100
            if not computed:
                self._operators = 4 * first.operators + 100

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        rule = flop_registry.get(func._overloadpacket)
        work = self._work
        work.operators += 1
        work.multiplied += rule is not None
        if work.operators > self._operators or work.multiplied > self._multiplied:
            raise _OtherWorkError
        if rule is None:
            return func(*args, **named)
        found = func(*args, **named) if self._computed else _zeros(func, args, named)
        work.products[str(func)] += rule(*args, **named, out_val=found)
        return found


def _zeros(function: Any, args: Any, named: Any) -> Any:
    """What the function would return, in its shapes, as zeros."""
    args, named = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, named))
    made = function(*args, **named)
    return tree_map_only(Tensor, lambda tensor: torch.zeros_like(tensor, device="cpu"), made)
