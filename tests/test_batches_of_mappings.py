"""Deciding on dictionaries, keywords and token ids; what a mask leaves out does not count."""

from collections import OrderedDict, namedtuple
from types import MappingProxyType

import pytest
import torch
from conftest import start_workers
from token_models import Encoder, Encoding, Heads, Padded, dictionary
from torch import distributed, nn
from torch.nn import functional

import neq
from neq.cka import CkaSums
from neq.equilibrium import phi, snapshot
from neq.pruning.entropy import psp_entropy

LENGTHS = torch.tensor([3, 5, 7])
CPU = torch.device("cpu")


def left_in(positions=7):
    return torch.arange(positions) < LENGTHS[:, None]


def token_ids(positions=7, seed=0):
    return torch.randint(20, (3, positions), generator=torch.Generator().manual_seed(seed))


def moved(model, dtype=torch.float64):
    """The model after some training, what it was before, and its index."""
    torch.manual_seed(1)
    model.to(dtype)
    before = snapshot(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model, before, neq.NeuronIndex(model)


def each_alone(batch):
    """The samples of a batch, each cut to its own length."""
    return [
        {name: part[i : i + 1, :length] for name, part in batch.items()}
        for i, length in enumerate(LENGTHS.tolist())
    ]


@pytest.mark.parametrize("similarity", ["dataset", "sample"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_does_not_count(similarity, dtype):
    model, before, index = moved(Encoder())
    padded = {"input_ids": token_ids(), "attention_mask": left_in().to(dtype)}
    values, kappas = [], []
    for batches in ([padded], each_alone(padded)):
        sums = CkaSums(index, width=4)
        values.append(phi(model, before, batches, index, similarity, sums))
        kappas.append(sums.result(CPU))
    assert torch.allclose(*values, rtol=0, atol=1e-12)
    assert not values[0].isnan().any()
    assert torch.allclose(*kappas, rtol=0, atol=1e-10, equal_nan=True)
    assert kappas[0].isnan().nonzero().squeeze(1).tolist() == [*range(len(index))][index["head"]]
    everywhere = phi(model, before, [{"input_ids": token_ids()}], index, similarity)
    assert (values[0] - everywhere).abs().max() > 0.1


@pytest.mark.parametrize("similarity", ["dataset", "sample"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("added", [False, True])
def test_torch_s_own_masks_name_what_is_left_out(similarity, batch_first, added):
    model, before, index = moved(Padded(batch_first))
    x = torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    left_out = ~left_in()
    mask = torch.zeros(3, 7).double().masked_fill(left_out, -torch.inf) if added else left_out
    padded = {"src": x, "src_key_padding_mask": mask}

    def laid(batch):
        src = batch["src"] if batch_first else batch["src"].transpose(0, 1).contiguous()
        return batch | {"src": src}

    one = phi(model, before, [laid(padded)], index, similarity)
    alone = phi(model, before, [laid(part) for part in each_alone(padded)], index, similarity)
    assert torch.allclose(one, alone, rtol=0, atol=1e-12)
    assert not one.isnan().any()


def test_a_sample_of_nothing_but_padding_is_none():
    model, before, index = moved(nn.Sequential(OrderedDict(input=nn.Linear(4, 3))))
    x = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0] * 5, [1] * 5])

    def forward(model, batch):
        model(batch["x"])

    for similarity in ("dataset", "sample"):
        some, all_but_one = (
            phi(model, before, [batch], index, similarity, forward=forward)
            for batch in (
                {"x": x, "attention_mask": mask},
                {"x": x[::2], "attention_mask": mask[::2]},
            )
        )
        assert torch.equal(some, all_but_one)
    nobody = {"x": x, "attention_mask": torch.zeros(3, 5).bool()}
    assert phi(model, before, [nobody], index, "sample", forward=forward).isnan().all()


def test_the_positions_of_long_samples_are_drawn_as_if_there_were_no_padding():
    model, before, index = moved(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3)))
    lengths = [300, 400]
    x = torch.randn(2, 500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    mask = torch.arange(500) < torch.tensor(lengths)[:, None]
    alone = [{"x": x[i : i + 1, :n]} for i, n in enumerate(lengths)]
    kappas = []
    for batches in ([{"x": x, "attention_mask": mask}], alone):
        sums = CkaSums(index, width=8)
        phi(
            *(model, before, batches, index, "dataset", sums),
            forward=lambda model, batch: model(batch["x"]),
        )
        kappas.append(sums.result(CPU))
        assert int(sums._sums["0"].rows) == 2 * 256
    assert torch.allclose(*kappas, rtol=0, atol=1e-12)


def test_an_image_beside_tokens_has_no_positions():
    """Its height is that of the mask by chance."""
    model, before, index = moved(nn.Sequential(nn.Conv2d(2, 3, 1)))
    x = torch.randn(3, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def forward(model, batch):
        return model(batch["x"])

    masked = {"x": x, "attention_mask": left_in()}
    assert torch.equal(
        phi(model, before, [masked], index, "dataset", forward=forward),
        phi(model, before, [x], index, "dataset"),
    )


Pair = namedtuple("Pair", "inputs labels")
NAMED = {"input_ids": token_ids(), "attention_mask": left_in().long()}


@pytest.mark.parametrize(
    "batch, forward",
    [
        (dict(NAMED), None),
        (Encoding(NAMED), None),
        (MappingProxyType(NAMED), None),
        ((NAMED, torch.zeros(3)), None),
        ([Encoding(NAMED), torch.zeros(3)], None),
        (Pair(NAMED, torch.zeros(3)), None),
        (Encoding(NAMED), lambda model, b: model(b.input_ids, b.attention_mask)),
        ((NAMED, [None, "labels"]), lambda model, batch: model(**batch[0])),
    ],
)
def test_batches_of_all_kinds_are_the_same(batch, forward):
    model, before, index = moved(Encoder(dictionary))
    expected = phi(model, before, [NAMED], index, "sample")
    assert torch.equal(phi(model, before, [batch], index, "sample", forward=forward), expected)


def test_an_own_forward_gets_the_model_and_the_batch():
    """Not a copy, with each state in turn: it may call parts of it."""
    model, before, index = moved(Encoder())
    seen = []

    def forward(given, batch):
        assert given is model
        assert not given.training
        assert not torch.is_grad_enabled()
        seen.append(given.up.weight.detach().clone())
        assert [type(part) for part in batch] == [str, dict]
        return given.up(given.embedding(batch[1]["ids"]))

    values = phi(model, before, [("a", {"ids": token_ids()})], index, "dataset", forward=forward)
    assert torch.equal(seen[0], before["up.weight"])
    assert torch.equal(seen[1], model.up.weight)
    with torch.no_grad():
        now = model.up(model.embedding(token_ids()))
        x = functional.embedding(token_ids(), before["embedding.weight"])
        then = functional.linear(x, before["up.weight"], before["up.bias"])
    expected = torch.cosine_similarity(now.flatten(0, 1), then.flatten(0, 1), dim=0)
    assert torch.allclose(values[index["up"]], expected)
    assert values[index["query"]].isnan().all()  # nobody has called it


def test_half_precision_is_raised_and_integers_are_left():
    seen = []

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x, ids, flags, nested, plain):
            seen.append([x.dtype, ids.dtype, flags.dtype, nested["deep"][0].dtype, plain])
            return self.linear(x)

    model, before, index = moved(Watching(), torch.float32)
    batch = {
        "x": torch.ones(2, 2, dtype=torch.bfloat16),
        "ids": torch.ones(2, dtype=torch.int32),
        "flags": torch.ones(2, dtype=torch.bool),
        "nested": MappingProxyType({"deep": [torch.ones(2, dtype=torch.float16)]}),
        "plain": "text",
    }
    phi(model, before, [batch], index, "dataset")
    assert seen == [[torch.float32, torch.int32, torch.bool, torch.float32, "text"]] * 2
    assert batch["nested"]["deep"][0].dtype == torch.float16  # the loader's own is as it was


@pytest.mark.parametrize(
    "model, batch, error, message",
    [
        (
            Heads(),
            (torch.zeros(2, 3, 4, 4), torch.zeros(2)),
            TypeError,
            r"'vector'\): .* pass forward=",
        ),
        (
            Encoder(),
            {"input_ids": token_ids(), "labels": token_ids()},
            TypeError,
            "'labels'.* forward=",
        ),
        (Encoder(), {}, ValueError, "no tensor whose first axis is samples"),
        (Encoder(), {"input_ids": "text"}, ValueError, "no tensor whose first axis is samples"),
        (Encoder(), {1: token_ids()}, TypeError, "keywords must be strings"),
        (Encoder(), torch.tensor(1), ValueError, "no tensor whose first axis is samples"),
        (Encoder(), (), TypeError, "must begin with a tensor, not NoneType"),
        (Encoder(), ((token_ids(), token_ids()), 0), TypeError, "not tuple, or with a mapping"),
        (Encoder(), "text", TypeError, "must begin with a tensor, not str"),
        (
            Encoder(),
            (token_ids(), left_in(), torch.zeros(3)),
            ValueError,
            "seems to hold the model's attention_mask",
        ),
    ],
)
def test_what_can_not_be_read_is_said_plainly(model, batch, error, message):
    index = neq.NeuronIndex(model)
    with pytest.raises(error, match=message) as raised:
        phi(model, snapshot(model), [batch], index, "dataset")
    assert "\n" not in str(raised.value)


def test_a_single_mapping_is_no_iterable_of_batches():
    freezer = freezer_of(Encoder(), neq.AtEquilibrium())
    with pytest.raises(TypeError, match="put it into a list"):
        freezer.update(NAMED)
    assert freezer.epoch == 0


def test_errors_of_the_model_are_its_own():
    class Failing(nn.Linear):
        def forward(self, x):
            raise TypeError("mine")

    model = nn.Sequential(nn.Linear(2, 2), Failing(2, 2))
    with pytest.raises(TypeError, match=r"^mine$"):
        phi(model, snapshot(model), [torch.ones(1, 2)], neq.NeuronIndex(model), "dataset")


def test_labels_in_a_tuple_are_no_mask():
    """Of ones alone, of other shapes, or beside a model that knows no mask."""
    model, before, index = moved(Encoder())
    expected = phi(model, before, [token_ids()], index, "dataset")
    for second in (torch.ones(3, 7), torch.tensor([0, 1, 1]), token_ids(seed=1)):
        assert torch.equal(phi(model, before, [(token_ids(), second)], index, "dataset"), expected)
    model, before, index = moved(nn.Linear(7, 2))
    phi(model, before, [(torch.ones(3, 7).double(), left_in())], index, "dataset")


def freezer_of(model, policy):
    return neq.NeuronFreezer(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)


def test_a_freezer_reads_mappings():
    torch.manual_seed(0)
    model = Encoder(dictionary).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.AtEquilibrium(eps=10))
    freezer.update([Encoding(NAMED)])
    before = snapshot(model)
    functional.cross_entropy(model(**NAMED)["logits"], torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    freezer.update([Encoding(NAMED)])
    expected = phi(model, before, [NAMED], neq.NeuronIndex(model), "dataset")
    assert torch.equal(freezer.reading.phi, expected)
    freezer.update([token_ids()], forward=lambda model, ids: model(ids, NAMED["attention_mask"]))
    assert freezer.frozen.all()


def test_flops_are_counted_on_a_mapping():
    """By hand: of each sample, with 7 positions and 8 channels."""
    linear = 4 * 7 * 8 * 8 + 2 * 7 * 8 * 16  # three projections and the convolution; up, down
    forward = 2 * 2 * (linear + 8 * 3 + 2 * 7 * 7 * 8)
    model = Encoder()
    index = neq.NeuronIndex(model)
    labelled = (Encoding(NAMED) | {"attention_mask": torch.ones(3, 7)}, torch.zeros(3))

    def discarding(model, batch):
        model(**batch)

    for example, how in (
        (NAMED, None),
        (labelled, None),
        (token_ids(), None),
        (NAMED, discarding),
    ):
        # Everything trains, the embedding included: each product has two gradients.
        assert neq.RequiredFlops.count(model, example, index, how).dense == 2 * forward
    head = nn.Linear(3, 2).double()  # counted in float32
    wide = torch.zeros(4, 3, dtype=torch.float64)
    assert neq.RequiredFlops.count(head, wide, neq.NeuronIndex(head)).dense == 2 * 2 * 3 * 2
    with pytest.raises(ValueError, match="the batch has none"):
        neq.RequiredFlops.count(model, {"input_ids": token_ids()[:0]}, index)


@pytest.mark.parametrize("how", [None, lambda model, batch: model(batch["input_ids"])])
def test_a_budget_counts_on_the_first_sample(how):
    model = Encoder()
    freezer = freezer_of(model, neq.Budget(neq.AtEquilibrium(), flops=0.9))
    state = torch.get_rng_state()
    empty = {name: part[:0] for name, part in NAMED.items()}
    freezer.update(iter([empty, NAMED]), forward=how)
    assert torch.equal(torch.get_rng_state(), state)
    index = neq.NeuronIndex(model)
    assert freezer.neurons.flops.dense == neq.RequiredFlops.count(model, NAMED, index).dense
    freezer.update([NAMED], forward=how)
    assert not freezer.reading.phi.isnan().any()
    with pytest.raises(ValueError, match="needs one validation batch"):
        freezer_of(model, neq.Budget(neq.AtEquilibrium(), flops=0.9)).update([empty])


def decided(rank=0, world=1):
    """What a policy with a budget reads and counts; rank 0 has no sample."""
    torch.manual_seed(0)
    model = Encoder().double()
    freezer = freezer_of(model, neq.Budget(neq.AtEquilibrium(), flops=0.9))
    share = [] if rank < world - 1 else [Encoding(NAMED)]
    freezer.update(share)
    with torch.no_grad():
        model.query.weight.mul_(-1)
    freezer.update(share)
    return freezer.neurons.flops.dense, freezer.reading.phi


def worker(rank, world, folder):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.save(decided(rank, world), f"{folder}/{rank}.pt")
    distributed.barrier()  # gloo aborts a process that leaves while another still talks to it
    distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_rank_without_samples_counts_on_another_s(tmp_path):
    start_workers(worker, (2, str(tmp_path)), 2)
    flops, values = decided()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found[0] == flops
        assert torch.equal(found[1], values)


def test_kernels_are_timed_on_a_mapping(monkeypatch):
    monkeypatch.setattr("neq.timings.SECONDS", 0.0)
    model = Encoder()
    assert neq.measure(model, NAMED).layers.keys() == neq.measure(model, token_ids()).layers.keys()


def test_a_hessian_and_an_entropy_of_mappings():
    model = Encoder(lambda logits, hidden: logits)
    labels = torch.tensor([0, 1, 1])
    given = {"iterations": 3, "loss": functional.cross_entropy}
    by_name = {"input_ids": token_ids()}
    one, other = (
        neq.top_eigenvalue(model, [(inputs, labels)], **given) for inputs in (token_ids(), by_name)
    )
    assert one == other
    padded = neq.top_eigenvalue(model, [(NAMED, labels)], **given)
    assert padded.value != one.value
    with pytest.raises(TypeError, match=r"needs batches \(inputs, targets\), not dict"):
        neq.top_eigenvalue(model, [by_name | {"labels": labels}], **given)
    model.up = model.down = nn.Identity()  # they see samples and positions in one axis
    model.down = nn.Linear(8, 8)
    of = {"exclude": ["down"]}
    one, other = (psp_entropy(model, [(x, labels)], **of) for x in (token_ids(), by_name))
    assert torch.equal(one.by_class["query"].nan_to_num(), other.by_class["query"].nan_to_num())
    with pytest.raises(ValueError, match="counts every position"):
        psp_entropy(model, [(NAMED, labels)], **of)
