"""Linear CKA between two epochs, against stored outputs and numbers worked out by hand."""

import pytest
import torch
from conftest import random_batches
from test_equilibrium import outputs_of
from torch import nn

import neq
from neq import groups as neq_groups
from neq.cka import CkaSums
from neq.equilibrium import phi, snapshot


def naive_cka(x, y):
    """Of rows [n, d], by the Gram matrices of the rows (Kornblith et al., equation 3)."""
    x, y = (z - z.mean(0) for z in (x, y))
    k, m = x @ x.t(), y @ y.t()
    return float((k * m).sum() / (k.norm() * m.norm()))


def rows_of(stored):
    """[samples, neurons, positions] → [samples · positions, neurons]."""
    return stored.transpose(1, 2).reshape(-1, stored.shape[1])


def read(model, before, batches, width=1024):
    sums = CkaSums(neq.NeuronIndex(model), width)
    values = phi(model, before, batches, neq.NeuronIndex(model), "dataset", cka=sums)
    return sums.result(torch.device("cpu")), values, sums


def of_rows(now, before, width=1024):
    """κ of one linear layer with these outputs, [n, d]."""
    index = neq.NeuronIndex(nn.Linear(1, now.shape[1]))
    sums = CkaSums(index, width)
    sums.add(index.layers[0], before, now, len(now))
    return sums.result(torch.device("cpu"))


def disturbed(model, scale):
    before = snapshot(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=scale)
    return before


@pytest.mark.parametrize("width", [3, 4, 1024])
def test_values_agree_with_stored_outputs(net, width):
    batches = random_batches(2, 7, seed=1)
    then, before = outputs_of(net, batches), disturbed(net, 0.3)
    now, index = outputs_of(net, batches), neq.NeuronIndex(net)
    values, values_of_phi, sums = read(net, before, batches, width)
    flops = 0
    for name, part in index.items():
        x, y = rows_of(now[name]), rows_of(then[name])
        for start in range(0, x.shape[1], width):
            a, b = x[:, start : start + width], y[:, start : start + width]
            found = values[part][start : start + width]
            assert found.tolist() == pytest.approx([naive_cka(a, b)] * a.shape[1], abs=1e-6)
            flops += 2 * len(a) * 3 * a.shape[1] ** 2
    assert sums.flops == flops
    assert values.dtype == torch.float64
    assert values.min() < 0.9
    assert torch.equal(values_of_phi, phi(net, before, batches, index, "dataset"))


def test_values_by_hand():
    x, y = (torch.tensor([[1.0], [2], [3], [4]]), torch.tensor([[1.0], [3], [2], [4]]))
    assert of_rows(x, y).tolist() == pytest.approx([0.64])  # a correlation of 4/5, squared
    assert of_rows(x, 7 - 3 * y).tolist() == pytest.approx([0.64])
    cross = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])
    # Cxx = diag(2, 2), Cyy = diag(2, 0), Cxy = diag(2, 0): 4 / (√8 · 2)
    assert of_rows(cross, cross * torch.tensor([1.0, 0])).tolist() == pytest.approx([0.5**0.5] * 2)
    assert of_rows(cross[:, :1], cross[:, 1:]).tolist() == [0.0]


def test_a_rotation_or_a_shift_changes_phi_and_not_the_cka():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))
    before, last, x = snapshot(model), model[2], [torch.randn(40, 5, dtype=torch.float64)]
    with torch.no_grad():
        last.weight.copy_(rotation @ last.weight * 3)
        last.bias.copy_(rotation @ last.bias + 2)
    values, values_of_phi, _ = read(model, before, x)
    assert values.tolist() == pytest.approx([1.0] * 14, abs=1e-12)
    assert values_of_phi[8:].min() < 0.9
    assert (read(model, before, x, width=3)[0][8:] < 0.999).all()  # mixes the blocks' neurons
    with torch.no_grad():
        last.weight[0] *= 5  # no rotation any more
    assert (read(model, before, x)[0][8:] < 0.999).all()


@pytest.mark.parametrize("scale, varies", [(3e-7, False), (3e-6, True)])
def test_what_does_not_vary(scale, varies):
    """Around a mean of 1 the share of variance is scale²; below 1e-12 it is nothing."""
    signs = torch.tensor([1.0, -1, 1, -1, 1, 1, -1, -1], dtype=torch.float64).view(8, 1)
    faint, plain = 1 + scale * signs, 3 + signs.roll(1, 0)
    kappa = naive_cka(signs, signs.roll(1, 0))
    expected = (1.0, kappa) if varies else (1.0, 0.0)
    assert (of_rows(faint, faint).item(), of_rows(faint, plain).item()) == pytest.approx(
        expected, abs=1e-3
    )
    assert of_rows(plain, faint).item() == pytest.approx(expected[1], abs=1e-3)
    zeros = torch.zeros(8, 1)
    assert of_rows(zeros, zeros).item() == 1.0
    assert of_rows(zeros, plain).item() == of_rows(plain, zeros).item() == 0.0


def test_fewer_than_two_rows_for_each_neuron_are_not_enough():
    torch.manual_seed(0)
    x, y = torch.randn(7, 4), torch.randn(7, 4)
    assert of_rows(x, y).isnan().all()
    assert not of_rows(torch.cat([x, x[:1]]), torch.cat([y, y[:1]])).isnan().any()
    parts = of_rows(torch.randn(7, 5), torch.randn(7, 5), width=3)  # blocks of 3 and of 2
    assert not parts.isnan().any()
    parts = of_rows(torch.randn(5, 5), torch.randn(5, 5), width=3)
    assert parts.isnan().tolist() == [True] * 3 + [False] * 2


class Odd(nn.Module):
    """One layer is called on as many rows as the gate says, one for some batches, one never."""

    def __init__(self):
        super().__init__()
        self.gate, self.few, self.seldom, self.unused = (nn.Linear(2, k) for k in (1, 2, 3, 2))
        self.gate.weight.data.copy_(torch.tensor([[1.0, 0.0]]))

    def forward(self, x):
        gate = self.gate(x)[:, 0]
        if (gate > 0).all():
            self.seldom(x)
        return self.few(x[gate > 0])


def test_layers_not_called_or_of_other_shapes_are_undefined_and_train():
    """Even where other batches have rows enough."""
    torch.manual_seed(0)
    model = Odd()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = neq.GroupEquilibrium(1e9, reading="cka", recursion="reference")
    freezer = neq.NeuronFreezer(model, optimizer, policy)
    near, far = torch.randn(40, 2).abs() + 0.1, torch.randn(40, 2).abs() + 9
    model.gate.bias.data.fill_(0.0)
    freezer.update([far, near])
    model.gate.bias.data.fill_(-0.5)  # the gate closes for some samples of the second batch
    freezer.update([far, near])
    assert freezer.cka.phi.isnan().tolist() == [False] + [True] * 7
    assert freezer.frozen.tolist() == [True] + [False] * 7
    freezer.update([far, near])
    assert freezer.frozen.tolist() == [True] * 6 + [False] * 2


@pytest.mark.slow
def test_at_most_256_positions_of_each_sample_count():
    """Which ones is found by changing one at a time; they are the same in each batch."""
    layer, other = (neq.NeuronIndex(nn.ModuleDict({n: nn.Conv1d(1, 2, 1)})) for n in "ab")

    def kappa(index, now, before):
        sums = CkaSums(index, 1024)
        for x, y in zip(now, before, strict=True):
            sums.add(index.layers[0], y, x, len(x))
        return sums.result(torch.device("cpu"))[0].item(), sums.flops

    def drawn(index):
        plain = kappa(index, [now], [before])[0]
        found = []
        for place in range(300):
            changed = now.clone()
            changed[1, :, place] += torch.tensor([3.0, -1.0])
            if kappa(index, [changed], [before])[0] != plain:
                found.append(place)
        return found

    generator = torch.Generator().manual_seed(0)
    now, before = torch.randn(2, 3, 2, 300, generator=generator, dtype=torch.float64)
    torch.manual_seed(1)
    found = drawn(layer)
    assert len(found) == 256
    value, flops = kappa(layer, [now], [before])
    assert flops == 2 * (3 * 256) * 3 * 2**2
    expected = naive_cka(*(rows_of(z[:, :, found]) for z in (now, before)))
    assert value == pytest.approx(expected, abs=1e-12)
    split = kappa(layer, now.split([1, 2]), before.split([1, 2]))
    assert split == (pytest.approx(value, abs=1e-12), flops)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert drawn(layer) == found != drawn(other)
    assert torch.equal(torch.get_rng_state(), state)


def test_how_the_samples_lie_in_batches_does_not_matter(net):
    (x, _), *_ = random_batches(1, 24, seed=1)
    before = disturbed(net, 0.2)
    whole, _, sums = read(net, before, [x])
    parts, _, others = read(net, before, x.split([1, 16, 7]))
    assert torch.allclose(whole, parts, rtol=0, atol=1e-6)  # the outputs are float32
    net.double()
    before = {n: t.double() if t.is_floating_point() else t for n, t in before.items()}
    whole = read(net, before, [x.double()])[0]
    assert torch.allclose(whole, read(net, before, x.double().split([1, 16, 7]))[0], atol=1e-12)
    assert sums.flops == others.flops


def test_wide_layers_are_read_in_blocks_that_all_must_stand_still(monkeypatch):
    assert neq.GroupEquilibrium(reading="cka").width == 1024
    assert neq.GroupEquilibrium(reading="cka", groups=2000).width == 1024
    assert neq.GroupEquilibrium(reading="cka", groups=16).width == 16
    monkeypatch.setattr(neq_groups, "WIDEST", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.GroupEquilibrium(1e-3, reading="cka"))
    x = [torch.randn(30, 3)]
    model[1].weight.data.zero_()
    freezer.update(x)
    for step in (0.1, 0.5, 2.0):
        model[0].weight.data[6] += step  # in the second block of the first layer
        freezer.update(x)
    v = freezer.cka.velocity
    assert (v[:4].abs() < 1e-9).all()
    assert (v[4:8].abs() > 1e-3).all()
    assert freezer.frozen.tolist() == [False] * 8 + [True] * 5
    assert freezer.cka_flops == 2 * 30 * 3 * (4**2 + 4**2 + 4**2 + 1)
