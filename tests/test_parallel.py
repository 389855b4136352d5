"""DistributedDataParallel on two gloo workers against one process with both halves of the batch."""

from dataclasses import dataclass, field

import pytest
import torch
from conftest import start_workers
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import neq

SHARES = (0.0, 0.6, 0.6, 1.0, 0.3)  # frozen in each of the steps; one layer is frozen whole


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(True),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.Flatten(),
        nn.Linear(128, 6),
        nn.LayerNorm(6),
        nn.Linear(6, 4),
    )


@dataclass(frozen=True)
class Output:
    """As many libraries' models return it."""

    logits: torch.Tensor
    name: str = "logits"
    more: dict = field(default_factory=dict, init=False)


class Wrapped(nn.Sequential):
    def forward(self, inputs):
        output = Output(super().forward(inputs))
        output.more["twice"] = (2 * output.logits.detach(), torch.tensor(3))
        return output


def train(model, batches, gradient):
    """Parameters after a step with each share frozen, and the FLOPs of each backward."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone(), gradient=gradient)
    flops = []
    for step, (share, inputs) in enumerate(zip(SHARES, batches, strict=True)):
        generator = torch.Generator().manual_seed(step)
        mask = torch.rand(len(freezer.neurons), generator=generator) < share
        if 0 < share < 0.5:
            mask[freezer.neurons["0"]] = True  # at the entrance
        elif share:
            mask[freezer.neurons["3"]] = True
        freezer.freeze(mask)
        optimizer.zero_grad()
        output = model(inputs)
        if isinstance(output, Output):
            assert (output.name, int(output.more["twice"][1])) == ("logits", 3)
            assert torch.equal(output.more["twice"][0], 2 * output.logits)
            output = output.logits
        loss = output.square().mean()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()], flops


def batches():
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(4, 3, 6, 6, generator=generator) for _ in SHARES]


def worker(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    halves = [batch[2 * rank : 2 * rank + 2] for batch in batches()]
    for gradient in ("exact", "cut"):
        model = DistributedDataParallel(build())
        torch.save(train(model, halves, gradient), f"{folder}/{gradient}{rank}.pt")
    wrapped = DistributedDataParallel(Wrapped(*build()))
    torch.save(train(wrapped, halves, "exact"), f"{folder}/wrapped{rank}.pt")
    distributed.barrier()  # gloo aborts a process that leaves while another still talks to it
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_ranks_stay_equal_and_equal_to_one_process(tmp_path):
    start_workers(worker, (str(tmp_path),), 2)
    for gradient in ("exact", "cut"):
        (one, flops), (two, _) = (torch.load(tmp_path / f"{gradient}{rank}.pt") for rank in (0, 1))
        alone, whole = train(build(), batches(), gradient)
        for first, second, single in zip(one, two, alone, strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, single, rtol=1e-4, atol=1e-5)
        assert [2 * count for count in flops] == whole
        assert whole[3] == 0 < whole[4] < whole[0]
    for rank in (0, 1):  # in a data class, as bare
        bare, wrapped = (torch.load(tmp_path / f"{n}{rank}.pt") for n in ("exact", "wrapped"))
        assert all(map(torch.equal, bare[0], wrapped[0]))
        assert bare[1] == wrapped[1]
