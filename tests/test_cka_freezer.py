"""A freezer that decides by CKA: velocities, states, warnings, and several gloo workers."""

import copy
import io
import warnings

import pytest
import torch
from conftest import Net, random_batches, start_workers, train_epoch
from test_cka import naive_cka, rows_of
from test_equilibrium import outputs_of
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import neq


def build(model, policy=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    policy = policy or neq.GroupEquilibrium(5e-3, reading="cka")
    return optimizer, neq.NeuronFreezer(model, optimizer, policy, exclude=["fc2"])


def epochs(model, optimizer, freezer, numbers, samples=40):
    masks = []
    for epoch in numbers:
        torch.manual_seed(epoch)
        train_epoch(model, optimizer, random_batches(seed=epoch))
        freezer.update(random_batches(1, samples, seed=99))
        masks.append(freezer.frozen.clone())
    return masks


def test_velocity_follows_the_recursion_and_decides_alone(net):
    batches, policy = random_batches(1, 40, seed=99), neq.GroupEquilibrium(5e-3, reading="cka")
    optimizer, freezer = build(net, policy)
    freezer.update(batches)
    last, velocity, sizes = None, None, set()
    for epoch in range(5):
        before = outputs_of(net, batches)
        epochs(net, optimizer, freezer, [epoch])
        now = outputs_of(net, batches)
        values = [naive_cka(rows_of(now[n]), rows_of(before[n])) for n in freezer.neurons]
        values = torch.tensor(values, dtype=torch.float64)
        if last is not None:
            velocity = values - last - (0 if velocity is None else 0.5 * velocity)
            v = torch.stack([freezer.cka.velocity[p].max() for _, p in freezer.neurons.items()])
            assert torch.allclose(v, velocity, rtol=0, atol=1e-6)
            for (name, part), value in zip(freezer.neurons.items(), velocity, strict=True):
                still = abs(value) < 5e-3 and name != "fc2"
                assert freezer.frozen[part].tolist() == [bool(still)] * (part.stop - part.start)
            sizes.add(int(freezer.frozen.sum()))
        last = values
    assert len(sizes) > 1


def test_resumed_equals_uninterrupted(net):
    other = copy.deepcopy(net)
    optimizer, freezer = build(net)
    freezer.update(random_batches(1, 40, seed=99))
    epochs(net, optimizer, freezer, range(3))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (net, optimizer, freezer)], buffer)
    kept = freezer.state_dict()["cka"]["phi"]
    kept_before = kept.clone()
    through = epochs(net, optimizer, freezer, range(3, 6))
    assert torch.equal(kept, kept_before)  # a copy
    buffer.seek(0)
    resumed = (other, *build(other))
    for part, state in zip(resumed, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    again = epochs(*resumed, range(3, 6))
    assert any(0 < mask.sum() < len(mask) for mask in through)
    assert all(torch.equal(a, b) for a, b in zip(through, again, strict=True))
    for name in ("phi", "delta_phi", "velocity"):
        assert torch.equal(getattr(freezer.cka, name), getattr(resumed[2].cka, name))
        assert torch.equal(getattr(freezer.reading, name), getattr(resumed[2].reading, name))


def warnings_of(model, batches, **arguments):
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    policy = neq.GroupEquilibrium(1e9, reading="cka", recursion="reference")
    freezer = neq.NeuronFreezer(model, optimizer, policy, **arguments)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for number in range(4):
            freezer.update(batches[number % len(batches)])
    assert not freezer.frozen.any()
    return [str(one.message) for one in seen]


def test_one_warning_where_it_is_undefined_everywhere():
    layers = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))
    (message,) = warnings_of(layers, [[torch.randn(7, 3)]])
    assert "CKA is undefined in every layer" in message
    # Samples for one of two layers are enough to say nothing, unless that is excluded.
    optimizer = torch.optim.SGD(layers.parameters(), 0.01)
    policy = neq.GroupEquilibrium(reading="cka")
    freezer = neq.NeuronFreezer(layers, optimizer, policy)
    for _ in range(3):
        freezer.update([torch.randn(8, 3)])
    assert freezer.cka.phi.isnan().tolist() == [True] * 8 + [False] * 4
    (message,) = warnings_of(layers, [[torch.randn(8, 3)]], exclude=["1"])


def test_one_warning_where_no_product_was_taken():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x * self.scale

    assert len(warnings_of(Apart(), [[torch.randn(8, 3)]])) == 1


def shares(rank, world):
    (x, _), *_ = random_batches(1, size=41, seed=5)
    ends = [0, 3, 41] if world == 2 else [0, 30, 30, 41]  # with three, one of them has nothing
    return list((x if world == 1 else x[ends[rank] : ends[rank + 1]]).double().split(8))


def readings(rank=0, world=1):
    """κ, FLOPs and masks of three epochs; every rank trains on the same batches."""
    torch.manual_seed(0)
    model = Net().double()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    policy = neq.GroupEquilibrium(0.03, groups=3, reading="cka")
    freezer = neq.NeuronFreezer(wrapped, optimizer, policy)
    seen = []
    freezer.update(shares(rank, world))
    for epoch in range(3):
        train_epoch(model, optimizer, [(x.double(), y) for x, y in random_batches(seed=epoch)])
        freezer.update(shares(rank, world))
        seen.append((freezer.cka.phi, freezer.frozen.clone(), freezer.cka_flops))
    return seen


def worker(rank, world, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store{world}", world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(readings(rank, world), f"{folder}/{world}{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_values_do_not_depend_on_the_number_of_workers(tmp_path, world):
    start_workers(worker, (world, str(tmp_path)), world)
    alone = readings()
    assert 0 < alone[-1][1].sum() < len(alone[-1][1])
    for rank in range(world):
        found = torch.load(tmp_path / f"{world}{rank}.pt")
        for (kappa, mask, flops), (kappa_1, mask_1, flops_1) in zip(found, alone, strict=True):
            torch.testing.assert_close(kappa, kappa_1, rtol=0, atol=1e-9, equal_nan=True)
            assert torch.equal(mask, mask_1)
            assert flops == flops_1 > 0
