"""One trial in several processes: which one this is, and what all of them do together.

A process asks torch.distributed alone, so that Ray Train and torchrun serve alike. In a single
process every function here returns at once.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves

from harness.errors import UserError
from neq.parallel import add_up as add_up
from neq.parallel import broadcast as broadcast
from neq.parallel import broadcast_buffers as broadcast_buffers
from neq.parallel import workers as workers

CHUNK = 8191 * 64  # elements


def rank() -> int:
    """The number of this process, from 0."""
    return distributed.get_rank() if workers() > 1 else 0


def leads() -> bool:
    """Whether this process is the one that writes results and prints."""
    return rank() == 0


def backend(gpu: bool) -> str:
    """The backend of torch.distributed: gloo for tensors on the CPU, NCCL for those on a GPU.

    Masks and counts lie on the CPU even where a GPU trains.
    """
    return "cpu:gloo,cuda:nccl" if gpu else "gloo"


def launched() -> int:
    """How many processes torchrun started; 1 where it did not start this one."""
    return int(os.environ.get("WORLD_SIZE", 1)) if distributed.is_torchelastic_launched() else 1


@contextmanager
def group(gpu: bool) -> Iterator[None]:
    """Inside, this process is joined with those that torchrun started.

    After an error the process just ends: others may still wait for it, and leaving would block.
    """
    distributed.init_process_group(backend(gpu))
    yield
    wait()  # gloo aborts a process that leaves while another still talks to it
    distributed.destroy_process_group()


def device(gpu: bool) -> torch.device:
    """The device of this process; of several processes on a machine each has a GPU of its own."""
    if not gpu:
        return torch.device("cpu")
    if workers() > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


def wait() -> None:
    """Wait until all processes are here."""
    if workers() > 1:
        distributed.barrier()


def shared(value: Any) -> Any:
    """The value that rank 0 gave, for every process; it must be picklable."""
    values = [value]
    if workers() > 1:
        distributed.broadcast_object_list(values, src=0)
    return values[0]


def lost_another(error: BaseException) -> bool:
    """Whether the error says no more than that another process is gone."""
    if isinstance(error, UserError):
        return False
    words = ("gloo/transport", "gloo::", "NCCL", "Connection closed by peer")
    return isinstance(error, distributed.DistError) or any(w in str(error) for w in words)


def largest(value: int) -> int:
    """The largest value that a process gave."""
    tensor = torch.tensor(value)
    if workers() > 1:
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return int(tensor)


def equal(value: int) -> bool:
    """Whether all processes gave the same value."""
    return largest(value) == -largest(-value)


def agree(model: nn.Module, state: Any) -> None:
    """Raises RuntimeError where processes differ in a bit of a parameter, or of what is in `state`
    (of a training method: masks, say).
    """
    if workers() == 1:
        return
    leaves = tree_leaves(state)
    others = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    # The order of a set is each process's own.
    plain = repr([sorted(map(repr, v)) if isinstance(v, set) else v for v in others]).encode()
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    sums = [_checksum(t) for t in (*tensors, *model.parameters())]
    sums.append(torch.tensor(int.from_bytes(hashlib.sha256(plain).digest()[:7])))
    drifted = not equal(len(sums))
    if not drifted:
        mine = torch.stack(sums)
        drifted = bool(add_up(torch.count_nonzero(mine != broadcast(mine.clone()))))
    if drifted:
        raise RuntimeError(
            "the workers' masks, states or parameters have drifted apart; let nothing of the model "
            "or the method differ from worker to worker"
        )


def fingerprint(model: nn.Module) -> Tensor:
    """Checksums of all parameters and buffers: int64 [tensors] on the CPU."""
    tensors = [t for t in tree_leaves(model.state_dict()) if isinstance(t, Tensor)]
    return torch.stack([_checksum(t) for t in tensors])


@cache
def _positions(device: torch.device) -> Tensor:
    return torch.arange(CHUNK, device=device) % 8191 + 1


def _checksum(tensor: Tensor) -> Tensor:
    """Exact, whatever the order in which it is added up; int64 on the CPU."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    bits = values.flatten().view(whole[values.element_size()])
    position = _positions(bits.device)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in torch.split(bits, CHUNK):  # a whole one as int64 would take too much memory
        total += (part * position[: len(part)]).sum(dtype=torch.int64)
    return total.cpu()
