"""PSP-entropy against loops over samples, in plain Python."""

import copy
import math
import random

import numpy as np
import pytest
import torch
from conftest import random_batches
from torch import nn

from neq.pruning import psp_entropy


class Potentials(nn.Module):
    """Layers in every relation to a BatchNorm; `keep` is called with each potential, at once."""

    def __init__(self):
        super().__init__()
        self.normed = nn.Conv2d(2, 4, 3, bias=False)  # the BatchNorm's output
        self.bn = nn.BatchNorm2d(4)
        self.before = nn.Conv2d(4, 4, 1)  # its own: an activation comes between, in place
        self.after = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)  # two calls: with BatchNorm, without
        self.last = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.tokens = nn.Linear(16, 5)  # of four tokens each
        self.head = nn.Linear(5, 3)
        self.drop = nn.Dropout(0.5)
        self.keep = None

    def forward(self, x):
        def of(name, potential):
            if self.keep:
                self.keep(name, potential.detach().clone())
            return potential

        x = self.act(of("normed", self.bn(self.normed(x))))
        x = self.after(self.act(of("before", self.before(x))))
        x = self.act(of("shared", self.last(self.shared(x))))
        x = self.act(of("shared", self.shared(self.drop(x))))
        x = self.act(of("tokens", self.tokens(x.flatten(2))).mean(1))
        return of("head", self.head(x))


def build(seed=0):
    torch.manual_seed(seed)
    model = Potentials()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() == 1 else 0.7)
        if name == "bn.weight" or name == "last.weight":
            nn.init.ones_(parameter)
        if name == "after.weight":
            nn.init.constant_(parameter, -1.0)
    for module in (model.bn, model.after, model.last):
        nn.init.normal_(module.running_mean, std=0.5)
        nn.init.uniform_(module.running_var, 0.5, 2)
    return model


AXIS = {"tokens": -1, "head": -1}  # of a sample's potential


def naive(model, samples, granularity):
    """Layer name → [classes][units], sample by sample, call by call."""
    model = copy.deepcopy(model).eval()
    on, seen = {}, {}
    for x, label in samples:
        found = []
        model.keep = lambda name, potential, found=found: found.append((name, potential[0]))
        with torch.no_grad():
            model(x[None])
        for name, potential in found:
            rows = potential.movedim(AXIS.get(name, 0), 0).flatten(1 - (potential.dim() == 1))
            rows = rows.view(len(rows), -1).tolist()
            if granularity == "channel":
                rows = [[sum(row) / len(row)] for row in rows]
            bits = [value > 0 for row in rows for value in row]
            counts = on.setdefault(name, [[0] * len(bits) for _ in range(3)])[int(label)]
            counts[:] = [n + bit for n, bit in zip(counts, bits, strict=True)]
            seen.setdefault(name, [0, 0, 0])[int(label)] += 1
    return {
        name: [
            [entropy(n / total) for n in row]
            for row, total in zip(on[name], seen[name], strict=True)
        ]
        for name in on
    }


def entropy(share):
    p = min(max(share, 1e-4), 0.9999)
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def labelled(count=40, seed=0):
    ((x, labels),) = random_batches(1, count, classes=3, shape=(2, 6, 6), seed=seed)
    return x + 2 * x[:, :1, :1, :1], labels  # samples differ as wholes, too


def batched(x, labels, *sizes):
    return list(zip(x.split(sizes), labels.split(sizes), strict=True))


def tables(found):
    return {name: table.tolist() for name, table in found.by_class.items()}


@pytest.mark.parametrize("granularity", ["channel", "unit"])
def test_against_loops(granularity):
    """Also from other batches, one of them empty, and around half precision."""
    model, (x, labels) = build(), labelled()
    found = psp_entropy(model, [(x, labels)], granularity=granularity)
    expected = naive(model, list(zip(x, labels, strict=True)), granularity)
    assert tables(found).keys() == expected.keys()
    for name, table in expected.items():
        assert found.by_class[name].dtype == torch.float64
        for row, values in zip(found.by_class[name].tolist(), table, strict=True):
            assert row == pytest.approx(values)
        assert len({round(v, 6) for row in table for v in row}) > 3  # not all alike
        totals = [sum(column) for column in zip(*table, strict=True)]
        assert found.neurons(name).tolist() == pytest.approx(totals)
        assert found.layer(name) == pytest.approx(sum(totals) / len(totals))
    assert found.missing == ()
    assert tables(
        psp_entropy(model, batched(x, labels, 1, 0, 17, 22), granularity=granularity)
    ) == (tables(found))
    with torch.autocast("cpu", torch.bfloat16):
        inside = psp_entropy(model, [(x, labels)], granularity=granularity)
    assert tables(inside) == tables(found)


def test_by_hand_and_clamped():
    """Potentials x and −1 and 1: on for one of two, never, always."""
    model = nn.Linear(1, 3)
    model.weight.data = torch.tensor([[1.0], [0.0], [0.0]])
    model.bias.data = torch.tensor([0.0, -1.0, 1.0])
    x = torch.tensor([[2.0], [-2.0], [1.0], [1.0], [1.0], [-1.0], [0.0]])
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 2])
    found = psp_entropy(model, [(x, labels)])
    surely = entropy(0.0)
    quarter = 0.25 * 2 + 0.75 * math.log2(4 / 3)
    assert surely == pytest.approx(0.0001 * math.log2(1e4) + 0.9999 * math.log2(1 / 0.9999))
    rows = [[1, surely, surely], [quarter, surely, surely], [surely, surely, surely]]
    for row, expected in zip(found.by_class[""].tolist(), rows, strict=True):
        assert row == pytest.approx(expected)
    assert found.survivors[""].tolist() == [True, False, False]
    assert found.layer("") == found.mean() == pytest.approx(1 + quarter + surely)


@pytest.mark.parametrize("granularity", ["channel", "unit"])
def test_means_are_over_survivors(granularity):
    model, (x, labels) = build(), labelled()
    with torch.no_grad():
        model.normed.weight[1] = 0
        model.tokens.weight[0, :9] = 0  # one that is left in part
        model.tokens.weight[2:] = 0
        model.before.weight[:] = 0
    found = psp_entropy(model, [(x, labels)], granularity=granularity, exclude=["shared"])
    expected = naive(model, list(zip(x, labels, strict=True)), granularity)
    alive = {"normed": [0, 2, 3], "before": [], "tokens": [0, 1], "head": [0, 1, 2]}
    assert list(found.by_class) == list(alive)
    everyone = []
    for name, neurons in alive.items():
        totals = [sum(column) for column in zip(*expected[name], strict=True)]
        each = len(totals) // len(model.get_submodule(name).weight)
        values = [v for n in neurons for v in totals[n * each : (n + 1) * each]]
        assert int(found.survivors[name].sum()) == len(values)
        if values:
            assert found.layer(name) == pytest.approx(sum(values) / len(values))
        else:
            assert math.isnan(found.layer(name))
        everyone += values
    assert found.mean() == pytest.approx(sum(everyone) / len(everyone))


def test_a_missing_class():
    model, (x, labels) = build(), labelled()
    found = psp_entropy(model, [(x[labels != 1], labels[labels != 1])])
    whole = psp_entropy(model, [(x, labels)])
    assert found.missing == (1,)
    assert math.isnan(found.mean())
    for name, table in found.by_class.items():
        assert math.isnan(found.layer(name))
        assert bool(table[1].isnan().all())
        assert torch.equal(table[[0, 2]], whole.by_class[name][[0, 2]])


def test_the_model_is_left_as_it_was():
    model, (x, labels) = build(), labelled()
    model.train()
    model.after.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    psp_entropy(model, [(x, labels)])
    with pytest.raises(ValueError, match="labels must be"):
        psp_entropy(model, [(x, labels), (x, labels + 3)])
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == streams[1:]
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_buffer_that_an_evaluation_changes_is_left_as_it_was(net):
    psp_entropy(net, random_batches())
    assert int(net.fc2.calls) == 0


def test_wrapped_and_excluded():
    model, batches = build(), [labelled()]
    whole = tables(psp_entropy(model, batches))
    found = tables(psp_entropy(nn.DataParallel(model), batches, exclude=["head", "normed"]))
    assert found == {n: t for n, t in whole.items() if n not in ("head", "normed")}


@pytest.mark.parametrize(
    "between, stands_in",
    [(nn.Identity(), True), (nn.Hardtanh(), False), (nn.Hardtanh(inplace=True), False)],
)
def test_a_norm_stands_in_where_it_gets_the_very_output(between, stands_in):
    """The layer is on for one of two samples of each class, its norm for all."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), between, nn.BatchNorm1d(2))
    model[0].weight.data.fill_(1.0)
    model[2].bias.data.fill_(5.0)
    found = psp_entropy(model, [(torch.tensor([[2.0], [-2.0]] * 2), torch.tensor([0, 0, 1, 1]))])
    expected = entropy(1.0) if stands_in else 1.0
    assert found.by_class["0"].tolist() == [pytest.approx([expected] * 2)] * 2


class Later(nn.Module):
    """The norm follows the first of two calls, after the second."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Linear(1, 2, bias=False), nn.BatchNorm1d(2)

    def forward(self, x):
        first, second = self.layer(x), self.layer(torch.full_like(x, -1.0))
        return self.norm(first) + second


def test_a_norm_stands_in_for_its_own_call():
    """On in the first call, off in the second."""
    model = Later()
    model.layer.weight.data.fill_(1.0)
    model.norm.bias.data.fill_(5.0)
    found = psp_entropy(model, [(torch.tensor([[2.0], [-2.0]] * 2), torch.tensor([0, 0, 1, 1]))])
    assert found.by_class["layer"].tolist() == [[1.0, 1.0], [1.0, 1.0]]


class Returns(nn.Module):
    def __init__(self, result):
        super().__init__()
        self.layer, self.result = nn.Linear(4, 3), result

    def forward(self, x):
        return self.result(self.layer(x))


X, LABELS = torch.zeros(2, 4), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "batches, message",
    [
        ([X], r"needs batches \(inputs, labels int64 \[samples\]\)"),
        ([(X,)], "needs batches"),
        ([(X, LABELS.float())], "needs batches"),
        ([(X, torch.zeros(2, 3, dtype=torch.int64))], "needs batches"),
        ([(X, [0, 1])], "needs batches"),
        ([(X, LABELS + 2)], "labels must be 0 to 2, the classes of the model"),
        ([(X, LABELS - 1)], "labels must be 0 to 2"),
        ([(X, LABELS[:1])], "label"),
        ([], "at least one sample"),
        ([(X[:0], LABELS[:0])], "at least one sample"),
    ],
)
def test_wrong_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        psp_entropy(nn.Linear(4, 3), batches)


def test_wrong_models_and_arguments():
    batches = [(X, LABELS)]
    for result in (lambda y: y[:, :, None, None], lambda y: {"out": y}, lambda y: (y, y)):
        with pytest.raises(ValueError, match=r"needs a model that returns logits \[n, classes\]"):
            psp_entropy(Returns(result), batches)
    with pytest.raises(ValueError, match="granularity must be 'channel' or 'unit'"):
        psp_entropy(nn.Linear(4, 3), batches, granularity="neuron")
    with pytest.raises(ValueError, match="no layer is called 'tail'"):
        psp_entropy(nn.Sequential(nn.Linear(4, 3)), batches, exclude=["tail"])
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        psp_entropy(nn.Sequential(nn.Linear(4, 3)), batches, exclude=["0"])
