"""Sensitivities of neurons and weights against loops over samples, classes and positions."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from neq.pruning import (
    NeuronSensitivity,
    Preactivations,
    neuron_sensitivity,
    parameter_sensitivity,
)


class Twice(nn.Module):
    """One layer called twice, in-place activations, groups, dilation, a shortcut."""

    def __init__(self, inplace):
        super().__init__()
        self.entry = nn.Conv2d(2, 4, 3, padding=2, dilation=2)
        self.shared = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.act = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.act(self.entry(x))
        x = self.act(self.shared(x)) + x
        x = self.act(self.shared(x))
        return self.head(x.mean((2, 3)))


class Line(nn.Module):
    """A convolution in one dimension, and one that gets a single sample without a batch axis."""

    def __init__(self, inplace):
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.act = nn.ReLU(inplace=inplace)
        self.token = nn.Linear(6, 5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = torch.stack([self.act(self.conv(sample)) for sample in x])
        return self.head(self.act(self.token(x)).sum(1))


def inputs(kind):
    torch.manual_seed(1)
    return torch.randn(5, 2, 6, 6) if kind is Twice else torch.randn(5, 2, 8)


def outputs_of(model, x):
    """Logits, and by layer the outputs of its calls, as leaves of nothing in place."""
    found = {}

    def hook(name):
        return lambda _m, _a, out: found.setdefault(name, []).append(out)

    named = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    }
    handles = [m.register_forward_hook(hook(n)) for n, m in named.items()]
    logits = model(x)
    for handle in handles:
        handle.remove()
    return logits, found, named


def naive(model, x, kind, positions):
    """Sample by sample, class by class, with torch.autograd.grad to each output."""
    result, counts = {}, {}
    named = outputs_of(model, x)[2]
    for sample in x:
        logits, found, _ = outputs_of(model, sample[None])
        classes = logits.shape[1]
        for name, outs in found.items():
            for out in outs:
                neurons = named[name].weight.shape[0]
                axis = 1 if out.dim() == 4 else (0 if "conv" in name else out.dim() - 1)
                seeds = [logits.sum()] if kind == "lower" else list(logits[0])
                total = torch.zeros(neurons)
                for y in seeds if kind != "local" else []:
                    (g,) = torch.autograd.grad(y, out, retain_graph=True, allow_unused=True)
                    if g is not None:
                        total += g.abs().movedim(axis, 0).reshape(neurons, -1).sum(1) / classes
                if kind == "local":
                    total += out.detach().movedim(axis, 0).reshape(neurons, -1).sum(1)
                result[name] = result.get(name, 0) + total
                counts[name] = counts.get(name, 0) + out.numel() // neurons
    for name in result:
        if kind == "local":
            result[name] = (result[name] > 0).float()
        else:
            result[name] = result[name] / (counts[name] if positions == "mean" else len(x))
    return result


@pytest.mark.parametrize("kind", ["exact", "lower", "local"])
@pytest.mark.parametrize("positions", ["sum", "mean"])
@pytest.mark.parametrize("net", [Twice, Line])
def test_neurons_against_loops(net, kind, positions):
    torch.manual_seed(0)
    model = net(inplace=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=1.0 if "bias" in name else 0.5)
    plain = net(inplace=False)
    plain.load_state_dict(model.state_dict())
    x = inputs(net)
    recorded = Preactivations(model, values=kind == "local")
    logits = model(x)
    found = neuron_sensitivity(logits, recorded.calls, kind, positions)
    expected = naive(plain, x, kind, positions)
    assert found.keys() == expected.keys()
    assert "unused" not in found
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-6)
    assert any(float(v.min()) < float(v.max()) for v in found.values())
    logits.sum().backward()  # the graph is still there


def test_the_lower_bound_is_below_the_exact_one_everywhere():
    torch.manual_seed(0)
    for trial in range(20):
        model = Twice(inplace=trial % 2 == 0)
        recorded = Preactivations(model)
        logits = model(torch.randn(4, 2, 6, 6))
        lower = neuron_sensitivity(logits, recorded.calls, "lower")
        exact = neuron_sensitivity(logits, recorded.calls, "exact")
        for name in exact:
            assert bool((lower[name] <= exact[name] * (1 + 1e-5) + 1e-9).all())
        assert any(bool((lower[n] < 0.9 * exact[n]).any()) for n in exact)


def test_by_hand():
    """y = (2 z, −1 z) of one neuron z = 3 x: exact (2 + 1) / 2, lower |2 − 1| / 2."""
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(inplace=True), nn.Linear(1, 2))
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[2.0], [-1.0]]))
    x = torch.tensor([[1.0], [1.0], [-5.0], [1.0]])  # one of four is off
    for kind, expected in (("exact", 1.5 * 3 / 4), ("lower", 0.5 * 3 / 4), ("local", 0.0)):
        sensitivity = NeuronSensitivity(model, kind)
        sensitivity.add(model(x))
        assert float(sensitivity.take()["0"]) == pytest.approx(expected)
        sensitivity.remove()


@pytest.mark.parametrize("kind", ["exact", "lower", "local"])
@pytest.mark.parametrize("positions", ["sum", "mean"])
def test_microbatches_are_one_batch(kind, positions):
    torch.manual_seed(0)
    model, x = Twice(inplace=True), inputs(Twice)
    sensitivity = NeuronSensitivity(model, kind, positions=positions)
    sensitivity.add(model(x))
    whole = sensitivity.take()
    for part in (x[:2], x[2:]):
        sensitivity.add(model(part))
        with torch.no_grad():
            model(x)  # an evaluation in between
    parts = sensitivity.take()
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values)
    assert float(whole["unused"].abs().max()) == 0
    sensitivity.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_under_autocast():
    torch.manual_seed(0)
    model, x = Twice(inplace=True), inputs(Twice)
    sensitivity = NeuronSensitivity(model)
    sensitivity.add(model(x))
    whole = sensitivity.take()
    with torch.autocast("cpu", torch.bfloat16):
        sensitivity.add(model(x))
    half = sensitivity.take()
    for name, values in whole.items():
        assert half[name].dtype == torch.float32
        torch.testing.assert_close(half[name], values, rtol=0.1, atol=0.02)


def test_no_gradient_of_a_parameter_is_computed():
    """By torch's counter: of three products back, the one through the middle layer alone."""
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)
    )
    recorded = Preactivations(model)
    logits = model(torch.randn(10, 8))
    with FlopCounterMode(display=False) as counter:
        neuron_sensitivity(logits, recorded.calls)
    assert counter.get_total_flops() == 2 * 10 * (16 * 32 + 32 * 4)
    assert all(p.grad is None for p in model.parameters())


def test_weights():
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).square().sum().backward()
    weight, bias = parameter_sensitivity(model.parameters())
    assert torch.equal(weight, model.weight.grad.abs())
    assert torch.equal(bias, model.bias.grad.abs())
    assert parameter_sensitivity(copy.deepcopy(nn.Linear(1, 1)).parameters()) == [None, None]


def test_wrong_arguments():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="kind must be one of exact, lower, local"):
        NeuronSensitivity(model, "upper")
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        NeuronSensitivity(nn.BatchNorm1d(2))
    sensitivity = NeuronSensitivity(model)
    model(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"needs logits \[samples, classes, …\]"):
        sensitivity.add({"out": 1})
    recorded = Preactivations(model)
    with pytest.raises(ValueError, match="values=True"):
        neuron_sensitivity(model(torch.randn(2, 3)), recorded.calls, "local")
