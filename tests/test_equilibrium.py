import copy
import math

import pytest
import torch
from conftest import random_batches, train_epoch
from torch import nn

import neq
from neq.equilibrium import phi, snapshot
from neq.selective import plain_type

# Which axis of its output holds a layer's neurons, by PyTorch's documentation.
AXES = {
    nn.Conv1d: 1,
    nn.Conv2d: 1,
    nn.Conv3d: 1,
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 1,
    nn.GroupNorm: 1,
    nn.Linear: -1,
    nn.LayerNorm: -1,
}


def outputs_of(model, batches):
    """All outputs of every layer, stored: name → [samples, neurons, positions], float64."""
    model = copy.deepcopy(model).eval()
    stored = {}

    def keep(name, axis):
        def hook(_module, _args, output):
            values = output.detach().clone().double().movedim(axis, 1)
            stored.setdefault(name, []).append(values.reshape(*values.shape[:2], -1))

        return hook

    for name, module in model.named_modules():
        if plain_type(module) in AXES:
            module.register_forward_hook(keep(name, AXES[plain_type(module)]))
    with torch.no_grad():
        for inputs, *_ in batches:
            model(inputs)
    return {name: torch.cat(values) for name, values in stored.items()}


def cosine(a, b):
    norms = a.norm() * b.norm()
    if norms == 0:
        return 1.0 if a.norm() == b.norm() else 0.0
    return float(a @ b / norms)


def naive_phi(now, before, similarity):
    result = []
    for name in now:
        a, b = now[name], before[name]
        for i in range(a.shape[1]):
            if similarity == "dataset":
                result.append(cosine(a[:, i].flatten(), b[:, i].flatten()))
            else:
                samples = [cosine(a[n, i], b[n, i]) for n in range(len(a))]
                result.append(sum(samples) / len(samples))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("similarity", ["dataset", "sample"])
@pytest.mark.parametrize("recursion", ["paper", "reference"])
def test_readings_agree_with_stored_outputs(net, similarity, recursion):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    policy = neq.AtEquilibrium(eps=0.0, mu=0.5, recursion=recursion)
    freezer = neq.NeuronFreezer(net, optimizer, policy, similarity=similarity)
    validation, training = random_batches(2, 7, seed=1), random_batches(seed=2)
    freezer.update(validation)
    before = outputs_of(net, validation)
    last_phi, last_delta, velocity = None, None, None
    for epoch in range(4):
        train_epoch(net, optimizer, training)
        with torch.no_grad():
            net.conv.weight[3] = 0  # stays dead: its outputs are zero in every epoch
            net.conv.bias[3] = 0
        now = outputs_of(net, validation)
        expected = naive_phi(now, before, similarity)
        if recursion == "reference":
            last_phi = torch.ones_like(expected) if last_phi is None else last_phi
            last_delta = torch.zeros_like(expected) if last_delta is None else last_delta
            velocity = torch.zeros_like(expected) if velocity is None else velocity
        freezer.freeze(torch.zeros_like(freezer.frozen))
        freezer.update(validation)
        assert torch.allclose(freezer.reading.phi, expected, atol=1e-6, rtol=0)
        assert freezer.reading.phi[3] == 1.0
        if last_phi is not None:
            delta = expected - last_phi
            if recursion == "paper":
                velocity = delta if velocity is None else delta - 0.5 * velocity
            else:
                velocity = delta - last_delta + 0.5 * velocity
            last_delta = delta
            assert torch.allclose(freezer.reading.delta_phi, delta, atol=1e-6, rtol=0)
            assert torch.allclose(freezer.reading.velocity, velocity, atol=1e-6, rtol=0)
        else:
            assert epoch == 0
            assert freezer.reading.velocity.isnan().all()
        before, last_phi = now, expected


class _Channels(nn.Module):
    """Layers whose neurons lie on different axes, from [n, 3, 9] or [n, 3, 5, 5, 5]."""

    def __init__(self, volume):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3) if volume else nn.Conv1d(3, 4, 3)
        self.norm = nn.GroupNorm(2, 4) if volume else nn.BatchNorm1d(4)
        self.fc = nn.Linear(4, 6)
        self.ln = nn.LayerNorm(6)

    def forward(self, x):
        x = self.norm(self.conv(x)).flatten(2)
        return self.ln(self.fc(x.transpose(1, 2)))


@pytest.mark.parametrize("similarity", ["dataset", "sample"])
@pytest.mark.parametrize("shape", [(3, 9), (3, 5, 5, 5)])
def test_every_layer_s_neurons_are_found(similarity, shape):
    torch.manual_seed(0)
    model = _Channels(volume=len(shape) == 4)
    batches = [(torch.randn(4, *shape) + 3,), (torch.randn(5, *shape),)]
    before, then = snapshot(model), outputs_of(model, batches)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    values = phi(model, before, batches, neq.NeuronIndex(model), similarity)
    expected = naive_phi(outputs_of(model, batches), then, similarity)
    assert torch.allclose(values, expected, atol=1e-6, rtol=0)


def test_sums_are_float64():
    """A neuron whose outputs are large and nearly constant: float32 sums would lose its phi."""
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.fill_(3000.0)
    x = torch.linspace(-1, 1, 20000).view(1, -1, 1).repeat(50, 1, 1)
    before = snapshot(layer)
    with torch.no_grad():
        layer.weight.fill_(-30.0)
    a, b = (x * w + 3000.0 for w in (torch.tensor(1.0), torch.tensor(-30.0)))
    exact = cosine(a.double().flatten(), b.double().flatten())
    value = phi(layer, before, [x], neq.NeuronIndex(layer), "dataset")
    assert 1 - exact > 1e-5
    assert float(value) == pytest.approx(exact, abs=1e-9)


def test_a_layer_that_the_data_route_elsewhere_is_undefined():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(2, 1)
            self.few = nn.Linear(2, 2)
            self.sometimes = nn.Linear(2, 3)

        def forward(self, x):
            open_ = self.gate(x)[:, 0] > 0
            if open_.any():
                self.sometimes(x)
            return self.few(x[open_])

    model = Routed()
    with torch.no_grad():
        model.gate.weight.fill_(1.0)
        model.gate.bias.fill_(0.0)
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    before = snapshot(model)
    with torch.no_grad():
        model.gate.bias.fill_(-5.0)
    values = phi(model, before, [x], neq.NeuronIndex(model), "dataset")
    assert values.isnan().tolist() == [False] + [True] * 5


def test_sequence_first_outputs_are_one_sample():
    """[positions, samples, neurons]: samples can't be told apart, so the batch counts as one."""

    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(x.transpose(0, 1))

    torch.manual_seed(0)
    model = Transposed()
    x, before = torch.randn(4, 5, 3), snapshot(model)
    old = model(x).detach().double().reshape(-1, 2)
    with torch.no_grad():
        model.fc.weight.add_(0.5)
    new = model(x).detach().double().reshape(-1, 2)
    expected = [cosine(old[:, i], new[:, i]) for i in range(2)]
    for similarity in ("dataset", "sample"):
        values = phi(model, before, [x], neq.NeuronIndex(model), similarity)
        assert values.tolist() == pytest.approx(expected, abs=1e-6)


def test_buffers_may_appear_and_grow():
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(2, 2)
            self.register_buffer("positions", None)
            self.register_buffer("seen", torch.zeros(0))

        def forward(self, x):
            self.positions = torch.arange(len(x)) if self.positions is None else self.positions
            self.seen = torch.zeros(len(x))
            return self.fc(x)

    model = Cache()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer)
    for size in (3, 4, 5):
        freezer.update([torch.randn(size, 2)])
        model(torch.randn(size, 2))
    assert not freezer.reading.phi.isnan().any()


def test_a_model_may_use_torch_s_older_precision_flags():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            with torch.backends.cudnn.flags(enabled=True):
                assert not torch.backends.cuda.matmul.allow_tf32
                return self.fc(x)

    model = Careful()
    allowed = torch.backends.cudnn.allow_tf32
    values = phi(model, snapshot(model), [torch.ones(2, 3)], neq.NeuronIndex(model), "dataset")
    assert values.tolist() == pytest.approx([1.0] * 3)
    assert torch.backends.cudnn.allow_tf32 == allowed


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_deciding_does_not_follow_the_matmul_precision(precision):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    before, index, x = snapshot(model), neq.NeuronIndex(model), torch.randn(32, 64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    plain = phi(model, before, [x], index, "dataset")
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(phi(model, before, [x], index, "dataset"), plain)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_recursions_by_hand():
    values = [0.5, 0.9, 0.8, 0.8]
    paper, reference = neq.Reading.undefined(1), neq.Reading.undefined(1)
    # paper: delta nan, 0.4, -0.1, 0; v = nan, 0.4, -0.1 - 0.2, 0 + 0.15
    # reference: delta -0.5, 0.4, -0.1, 0; u = -0.5, 0.9 - 0.25, -0.5 + 0.325, 0.1 - 0.0875
    by_hand = [(math.nan, -0.5), (0.4, 0.65), (-0.3, -0.175), (0.15, 0.0125)]
    for value, (v, u) in zip(values, by_hand, strict=True):
        phi_now = torch.tensor([value], dtype=torch.float64)
        paper = paper.advance(phi_now, mu=0.5, recursion="paper")
        reference = reference.advance(phi_now, mu=0.5, recursion="reference")
        assert float(paper.velocity) == pytest.approx(v, nan_ok=True)
        assert float(reference.velocity) == pytest.approx(u)


def test_a_zero_output_is_alike_to_zero_and_unlike_anything_else():
    layer = nn.Linear(2, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]))
    before = snapshot(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [-3.0, 0.0]]))
    values = phi(layer, before, [torch.ones(4, 2)], neq.NeuronIndex(layer), "dataset")
    assert values.tolist() == [1.0, 0.0, -1.0]


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 2)

    def forward(self, x):
        return self.used(self.used(x))


def test_calls_are_concatenated_and_a_layer_not_called_is_nan_and_trains():
    torch.manual_seed(0)
    model = _Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.AtEquilibrium(eps=1e9))
    x = torch.randn(5, 3)

    def both():
        first = model.used(x).detach().double()
        return torch.cat([first, model.used(first.float()).detach().double()])

    freezer.update([x])
    before = both()
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        freezer.update([x])
        after = both()
        expected = torch.nn.functional.cosine_similarity(before, after, dim=0)
        assert torch.allclose(freezer.reading.phi[:3], expected, atol=1e-6)
        before = after
    assert freezer.reading.phi[3:].isnan().all()
    assert freezer.frozen.tolist() == [True] * 3 + [False] * 2
