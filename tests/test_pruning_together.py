"""Pruning on two gloo workers against one process with all the samples."""

import pytest
import torch
from conftest import start_workers
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from neq.parallel import add_up
from neq.pruning import MagnitudePruner, NeuronSensitivity, Shrink, psp_entropy

SHARES = (slice(0, 5), slice(5, 8))  # of a batch of eight: unequal ones
HALVES = (slice(0, 4), slice(4, 8))
SENSITIVITIES = ("lower", "exact", "local", "gradient")


def build():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.ReLU(True),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.Flatten(),
        nn.Linear(128, 4),
    ).eval()  # whose output for a sample does not depend on the others


def batches(count=4):
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(8, 3, 6, 6, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(count)
    ]


def sensitivities(part):
    """Over two microbatches of each process."""
    found = {}
    for kind in SENSITIVITIES[:3]:
        for positions in ("sum", "mean"):
            model = build()
            sensitivity = NeuronSensitivity(model, kind, positions=positions)
            for x, _ in batches(2):
                sensitivity.add(model(x[part]))
            found[kind, positions] = dict(sensitivity.take())
    return found


def trained(wrap, part):
    """Weights after a few steps, by what shrinks."""
    found = {}
    for kind in SENSITIVITIES:
        model = wrap(build())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        neurons = None if kind == "gradient" else NeuronSensitivity(model, kind)
        Shrink(model, optimizer, neurons or "gradient", 0.2)
        for x, targets in batches():
            optimizer.zero_grad()
            logits = 4 * model(x[part])
            if neurons is not None:
                neurons.add(logits)
            nn.functional.cross_entropy(logits, targets[part]).backward()
            optimizer.step()
        found[kind] = [p.detach().clone() for p in model.parameters()]
    return found


def entropies(part):
    """Of samples of which a process does not have every class."""
    found = {}
    for granularity in ("channel", "unit"):
        samples = [(x[part], targets[part]) for x, targets in batches(1)]
        entropy = psp_entropy(build(), samples, granularity=granularity)
        found[granularity] = entropy.by_class, entropy.survivors, entropy.missing
    return found


def bisected(part):
    """A search whose loss is that of all samples."""
    found, whole = {}, build()
    for units in ("weights", "neurons"):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = MagnitudePruner(model, optimizer, units=units, exclude=["7"])

        def loss(model=model):
            total = torch.zeros(2, dtype=torch.float64)
            for x, _ in batches():
                targets = whole(x[part]).argmax(1)
                each = nn.functional.cross_entropy(model(x[part]), targets, reduction="sum")
                total += torch.tensor([float(each), len(targets)])
            summed, samples = add_up(total).tolist()
            return summed / samples

        result = pruner.bisect(loss, 0.02)
        found[units] = result, pruner.state_dict(), model.state_dict()
    return found


def everything(rank=None):
    part, half = (slice(0, 8), slice(0, 8)) if rank is None else (SHARES[rank], HALVES[rank])
    wrap = DistributedDataParallel if rank is not None else lambda model: model
    return sensitivities(part), trained(wrap, half), entropies(part), bisected(part)


def worker(rank, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save(everything(rank), f"{folder}/{rank}.pt")
    distributed.barrier()  # gloo aborts a process that leaves while another still talks to it
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of both workers, and of one process."""
    folder = tmp_path_factory.mktemp("together")
    start_workers(worker, (str(folder),), 2)
    both = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return list(zip(*both, everything(), strict=True))


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.slow
def test_sensitivities(found):
    one, two, alone = found[0]
    for key, layers in alone.items():
        for name, values in layers.items():
            assert torch.equal(one[key][name], two[key][name])
            torch.testing.assert_close(one[key][name], values, rtol=1e-4, atol=1e-6)
            assert values.unique().numel() > 1 or name == "7" or key[0] == "local"
    assert 0 < sum(float(values.sum()) for values in alone["local", "sum"].values()) < 20


def test_training(found):
    one, two, alone = found[1]
    for kind, parameters in alone.items():
        for first, second, single in zip(one[kind], two[kind], parameters, strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, single, rtol=1e-4, atol=1e-5)
    weights = [parameters[0] for parameters in alone.values()]
    for i, a in enumerate(weights):  # each shrinks otherwise
        assert not any(torch.allclose(a, b, rtol=1e-3) for b in weights[:i])


def test_entropies(found):
    one, two, alone = found[2]
    for granularity, (by_class, survivors, missing) in alone.items():
        for tables, alive, none in (one[granularity], two[granularity]):
            assert none == missing == ()
            for name, values in by_class.items():
                torch.testing.assert_close(tables[name], values)
                assert torch.equal(alive[name], survivors[name])
    _, targets = batches(1)[0]
    assert any(len(targets[part].unique()) < 4 for part in SHARES)


def test_bisections(found):
    one, two, alone = found[3]
    for units, (result, masks, weights) in alone.items():
        assert one[units][0] == two[units][0]
        assert (one[units][0].threshold, one[units][0].evaluations) == (
            result.threshold,
            result.evaluations,
        )
        assert one[units][0].loss == pytest.approx(result.loss)
        for both in (one[units], two[units]):
            assert masks.keys() == both[1].keys()
            assert all(torch.equal(both[1][name], mask) for name, mask in masks.items())
            assert all(torch.equal(both[2][name], value) for name, value in weights.items())
        assert result.threshold > 0
        assert result.emptied is None
