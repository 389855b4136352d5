"""What data-parallel processes agree on: the same buffers, sums over all their samples, one mask.

Where torch.distributed is not initialised, or has one process, every function returns at once.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn


def workers() -> int:
    """How many processes are in torch.distributed's default group; 1 where there is none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the model buffers of rank 0: each rank's BatchNorm has seen other samples."""
    if workers() > 1:
        for buffer in model.buffers():
            # Not the buffer itself: NCCL and gloo want contiguous memory.
            buffer.copy_(broadcast(buffer.detach().clone(memory_format=torch.contiguous_format)))


def broadcast(tensor: Tensor) -> Tensor:
    """The values of rank 0, written into `tensor`, which must be contiguous."""
    if workers() > 1:
        distributed.broadcast(tensor, src=0)
    return tensor


def add_up(tensor: Tensor) -> Tensor:
    """The sum of all ranks' tensors, written into `tensor`, which must be contiguous."""
    if workers() > 1:
        distributed.all_reduce(tensor)
    return tensor


def largest(tensor: Tensor) -> list[int]:
    """The largest of all ranks' values at each place of `tensor`, int64 [n]."""
    if workers() > 1:
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
    found: list[int] = tensor.tolist()
    return found


def first_given(value: Any, device: torch.device, error: Exception | None = None) -> Any:
    """The value of the first rank whose own is not None; None where each is. It is pickled.

    Raises `error`, which kept this rank from its value, and ValueError where another has one.
    """
    if workers() == 1:
        if error is not None:
            raise error
        return value
    place = 0 if value is None else workers() - distributed.get_rank()
    found, failed = largest(torch.tensor([place, int(error is not None)], device=device))
    if error is not None:
        raise error
    if failed:
        raise ValueError("another process can't read its validation batches: see its error")
    held = [value]
    if found:
        distributed.broadcast_object_list(held, src=workers() - found, device=device)
    return held[0]
