"""What data-parallel processes agree on: the same buffers, sums over all their samples, one mask.

Everything does nothing where torch.distributed is not initialised or has one process.
"""

import torch
from torch import Tensor, distributed, nn


def workers() -> int:
    """Processes in torch.distributed's default group; 1 where there is none."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def broadcast_buffers(model: nn.Module) -> None:
    """Rank 0's buffers for everybody: each rank's BatchNorm has seen other samples."""
    if workers() > 1:
        for buffer in model.buffers():
            # Not the buffer itself: NCCL and gloo want contiguous memory.
            buffer.copy_(broadcast(buffer.detach().clone(memory_format=torch.contiguous_format)))


def broadcast(tensor: Tensor) -> Tensor:
    """Rank 0's values, written into `tensor`, which must be contiguous."""
    if workers() > 1:
        distributed.broadcast(tensor, src=0)
    return tensor


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all ranks, written into `tensor`, which must be contiguous."""
    if workers() > 1:
        distributed.all_reduce(tensor)
    return tensor
