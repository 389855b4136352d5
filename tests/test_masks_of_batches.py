"""Masks of padding, wherever a model is told of them, and what is said where they can't be used."""

import pytest
import torch
from conftest import start_workers
from token_models import Encoder, Encoding
from torch import distributed, nn

import neq
from harness.flops.costs import count_costs
from harness.flops.inputs import parse_inputs
from neq.cka import CkaSums
from neq.equilibrium import phi, snapshot

LENGTHS = torch.tensor([3, 5, 7])
MASK = torch.arange(7) < LENGTHS[:, None]
IDS = torch.randint(20, (3, 7), generator=torch.Generator().manual_seed(0))
GARBAGE = torch.where(MASK, IDS, (IDS + 7) % 20)


def moved(model):
    torch.manual_seed(1)
    model.double()
    before = snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, before, neq.NeuronIndex(model)


class Told(nn.Module):
    """It is told of padding, and has no use for it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.linear = nn.Linear(8, 8)
        self.by_head = nn.LayerNorm(4)
        self.out = nn.Linear(8, 3)

    def forward(self, ids, attention_mask=None, padding_mask=None, key_padding_mask=None):
        x = self.linear(self.embedding(ids))
        n, length, _ = x.shape
        heads = self.by_head(x.view(n, length, 2, 4).transpose(1, 2))
        return self.out(heads.transpose(1, 2).reshape(n, length, 8))


def both_ways(batches_of, forward=None, model=Told, similarity="dataset"):
    """phi and CKA with either content of the padding, and of each sample cut to its length."""
    found = []
    for batches in (
        [batches_of(IDS, MASK)],
        [batches_of(GARBAGE, MASK)],
        [
            batches_of(IDS[i : i + 1, :n], MASK[i : i + 1, :n])
            for i, n in enumerate(LENGTHS.tolist())
        ],
    ):
        torch.manual_seed(0)
        net, before, index = moved(model())
        sums = CkaSums(index, width=4)
        values = phi(net, before, batches, index, similarity, sums, forward)
        found.append(torch.cat([values, sums.result(torch.device("cpu")).nan_to_num(2)]))
    return found


@pytest.mark.parametrize("similarity", ["dataset", "sample"])
@pytest.mark.parametrize(
    "batches_of, forward",
    [
        (lambda x, m: (x, m), lambda model, b: model(b[0], attention_mask=b[1])),
        (lambda x, m: (x, m), lambda model, b: model(b[0], b[1].long())),
        (lambda x, m: [x.t(), ~m], lambda model, b: model(b[0].t(), padding_mask=b[1])),
        (
            lambda x, m: {"a": {"ids": x, "attention_mask": m}},
            lambda model, batch: model(**batch["a"]),
        ),
        (lambda x, m: {"x": x, "m": m}, lambda model, b: model(b["x"], attention_mask=b["m"])),
        (lambda x, m: {"ids": x, "padding_mask": ~m}, None),
        (lambda x, m: {"ids": x, "padding_mask": (~m).long()}, None),
        (lambda x, m: {"ids": x, "attention_mask": m[:, None, None].float()}, None),
        (lambda x, m: {"ids": x, "attention_mask": (1 - m.double()) * -1e4}, None),
        (lambda x, m: {"ids": x, "attention_mask": torch.where(m, 0.0, -torch.inf)}, None),
    ],
)
def test_padding_does_not_count_however_a_model_is_told(batches_of, forward, similarity):
    padded, garbage, alone = both_ways(batches_of, forward, similarity=similarity)
    assert torch.allclose(padded, garbage, rtol=0, atol=1e-12)
    assert torch.allclose(padded, alone, rtol=0, atol=1e-10)


def test_each_call_has_its_own_mask():
    """Of a batch in two calls, the second of which is not told of any."""

    def forward(model, batch):
        model(batch[0][:2], batch[1][:2])
        model(batch[0][2:])

    padded, garbage, alone = both_ways(
        lambda x, m: (x, m), lambda model, b: forward(model, b) if len(b[0]) > 1 else model(*b)
    )
    assert torch.allclose(padded, garbage, rtol=0, atol=1e-12)
    assert torch.allclose(padded[:19], alone[:19], rtol=0, atol=1e-10)


def test_a_padding_mask_of_floats_is_none():
    model, before, index = moved(Told())
    batch = {"ids": IDS, "padding_mask": MASK.float()}
    everywhere = phi(model, before, [IDS], index, "dataset")
    assert torch.equal(phi(model, before, [batch], index, "dataset"), everywhere)


@pytest.mark.parametrize(
    "second, is_mask",
    [
        (MASK, True),
        (MASK.long(), True),
        (MASK.flip(1).int(), True),
        (torch.tensor([[0, 1, 0, 0, 1, 0, 1]] * 3), False),
        (torch.tensor([[0, 1, 0, 0, 1, 0, 1]] * 3).bool(), True),
        (torch.ones(3, 7).long(), False),
        (MASK.float(), False),
    ],
)
def test_what_is_a_mask_in_a_tuple(second, is_mask):
    model, before, index = moved(Told())
    if is_mask:
        with pytest.raises(ValueError, match="seems to hold the model's attention_mask"):
            phi(model, before, [(IDS, second)], index, "dataset")
    else:
        expected = phi(model, before, [IDS], index, "dataset")
        assert torch.equal(phi(model, before, [(IDS, second)], index, "dataset"), expected)


def test_a_forward_that_forgets_the_model_is_told():
    model, before, index = moved(Told())
    other = Told().double()
    for forward in (lambda model, batch: other(batch), lambda model, batch: None):
        with pytest.raises(ValueError, match="forward= did not call the model that it was given"):
            phi(model, before, [IDS], index, "dataset", forward=forward)


class Classed(Told):
    """With a class token in front."""

    def forward(self, ids, attention_mask=None):
        return super().forward(torch.cat([ids[:, :1], ids], 1))


def test_positions_that_no_mask_has_are_named():
    model, before, index = moved(Classed())
    with pytest.warns(UserWarning, match="padding counts in layers linear, by_head, out") as found:
        phi(model, before, [{"ids": IDS, "attention_mask": MASK}] * 2, index, "dataset")
    assert len(found) == 1
    nothing = {"ids": IDS, "attention_mask": torch.ones(3, 7)}
    phi(model, before, [nothing], index, "dataset")  # without a warning


def worker(rank, world, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model = Encoder()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Budget(neq.AtEquilibrium(), flops=0.9))
    try:
        freezer.update(["text"] if rank else [Encoding(input_ids=IDS)])
    except (TypeError, ValueError) as error:
        torch.save(f"{type(error).__name__}: {error}", f"{folder}/{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_bad_batch_of_one_rank_stops_all(tmp_path):
    start_workers(worker, (2, str(tmp_path)), 2)
    assert "another process can't read" in torch.load(tmp_path / "0.pt")
    assert "must begin with a tensor, not str" in torch.load(tmp_path / "1.pt")


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, t):
        return self.linear(x) * t[:, None]


@pytest.mark.parametrize("text", ["4,t:int64:", "4,int64:", "x:4,t:float32:"])
def test_one_number_per_sample(text):
    found = parse_inputs(text)
    assert found.parts[1].shape == ()
    assert str(found) == text
    assert parse_inputs("4,t:").parts[1].dtype == torch.float32
    made = found.zeros(2)
    assert [*made.args, *made.kwargs.values()][1].shape == (2,)
    assert count_costs(Timed(), found.zeros(2)).forward() == 2 * 4 * 3
