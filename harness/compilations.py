"""What torch.compile compiles while steps are taken, and room for all that it is to keep."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

import neq.compiled

Run = TypeVar("Run", bound=Callable[..., Any])

MANY = 10_000  # graphs of a function: more than there are masks


@contextmanager
def compilations() -> Iterator[list[float]]:
    """Inside, every compilation adds its seconds to the list: one that a call causes, the first
    backward, or the recording of a CUDA graph.
    """
    from torch._dynamo.callback import callback_handler

    seconds: list[float] = []

    def begun(_told: Any) -> None:
        seconds.append(-time.perf_counter())

    def ended(_told: Any) -> None:
        seconds[-1] += time.perf_counter()

    callback_handler.register_start_callback(begun)
    callback_handler.register_end_callback(ended)
    try:
        yield seconds
    finally:
        if begun in callback_handler.start_callbacks:  # torch._dynamo.reset() drops them all
            callback_handler.remove_start_callback(begun)
            callback_handler.remove_end_callback(ended)


def as_written(function: Run, *, recursive: bool = True) -> Run:
    """The function, which a compiled step that comes to call it runs as it is written.

    `recursive`: with all that it calls itself.
    """
    disable: Any = torch.compiler.disable
    return cast("Run", disable(function, recursive=recursive))


@contextmanager
def room() -> Iterator[None]:
    """Inside, no graph is forgotten, so that masks come by turns and each is compiled for once.

    A training, whose masks do not come back, keeps a few graphs, and so does dynamo.
    """
    from torch._dynamo import config

    kept: Any = neq.compiled
    before: int = kept.GRAPHS
    with config.patch(recompile_limit=MANY, accumulated_recompile_limit=MANY):
        kept.GRAPHS = MANY
        try:
            yield
        finally:
            kept.GRAPHS = before
            kept.make_room(before)  # else dynamo, beyond its own limit, would compile no more
