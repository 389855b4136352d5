"""Equilibrium over several gloo workers, each with its share of the validation set."""

import pytest
import torch
from conftest import Net, random_batches, start_workers, train_epoch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import neq


def untrained(dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return model, optimizer


def readings(samples, similarity, rank=0, world=1):
    """Readings and masks of three epochs; every rank trains on the same batches."""
    dtype = torch.float32 if samples > 2 else torch.float64  # two values round away too much
    model, optimizer = untrained(dtype)
    wrapped = DistributedDataParallel(model) if world > 1 else model
    policy = neq.AtEquilibrium(eps=0.05)
    freezer = neq.NeuronFreezer(wrapped, optimizer, policy, similarity=similarity)
    (images, _), *_ = random_batches(1, size=samples, seed=5)
    share = list(images[rank::world].to(dtype).split(8))
    seen = []
    freezer.update(share)
    for epoch in range(3):
        batches = [(x.to(dtype), y) for x, y in random_batches(seed=epoch)]
        train_epoch(model, optimizer, batches)
        if rank:  # as if it had trained on other samples: only rank 0's statistics count
            model.bn.running_mean += rank
        freezer.update(share)
        seen.append((freezer.reading.phi, freezer.reading.velocity, freezer.frozen.clone()))
    return seen


def worker(rank, world, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for samples in (61, 2):
        for similarity in ("dataset", "sample"):
            found = readings(samples, similarity, rank, world)
            torch.save(found, f"{folder}/{samples}{similarity}{rank}.pt")
    if rank == 1:  # a mask of one's own is not kept: rank 0's holds
        torch.manual_seed(1)
    freezer = neq.NeuronFreezer(Net(), torch.optim.SGD([torch.zeros(1)], 0.1), Own(rank))
    freezer.update()
    freezer.update()
    assert freezer.frozen.sum() == 1
    distributed.barrier()  # gloo aborts a process that leaves while another still talks to it
    distributed.destroy_process_group()


class Own:
    needs_velocity = False

    def __init__(self, rank):
        self.rank = rank

    def frozen(self, epoch, neurons, velocity):
        mask = torch.zeros(len(neurons), dtype=torch.bool)
        mask[: self.rank + 1] = True
        return mask


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_reading_does_not_depend_on_the_number_of_workers(tmp_path, world):
    start_workers(worker, (world, str(tmp_path)), world)
    for samples in (61, 2):  # with three workers, one of them has none of two
        for similarity in ("dataset", "sample"):
            alone = readings(samples, similarity)
            assert 0 < alone[-1][2].sum() < len(alone[-1][2])
            for rank in range(world):
                found = torch.load(tmp_path / f"{samples}{similarity}{rank}.pt")
                for (phi, velocity, mask), (phi_1, velocity_1, mask_1) in zip(
                    found, alone, strict=True
                ):
                    close = {"rtol": 0, "atol": 1e-6, "equal_nan": True}
                    torch.testing.assert_close(phi, phi_1, **close)
                    torch.testing.assert_close(velocity, velocity_1, **close)
                    assert torch.equal(mask, mask_1)
