"""Shrinking against the same training with the weights shrunk one by one."""

import copy

import pytest
import torch
from conftest import random_batches
from torch import nn
from torch.nn.utils import clip_grad_norm_

from neq.pruning import NeuronSensitivity, Shrink

LAM = 0.1
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}
KINDS = ["gradient", "none", "lower", "exact", "local"]
SHRUNK = ("conv", "entry", "head")


class Small(nn.Module):
    """In doubles, so that sums agree."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.entry = nn.Linear(16, 5)
        self.ln = nn.LayerNorm(5)
        self.head = nn.Linear(5, 3)
        self.unused = nn.Linear(3, 2)
        self.double()

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        # Times 4: some sensitivities are above 1.
        return 4 * self.head(self.act(self.ln(self.entry(x.flatten(1)))))


def small():
    torch.manual_seed(3)
    return Small()


def two(name="sgd"):
    """A model with its optimizer, and the same again."""
    first, second = small(), small()
    return (
        first,
        OPTIMIZERS[name](first.parameters()),
        second,
        OPTIMIZERS[name](second.parameters()),
    )


def batches(count=4):
    found = random_batches(count, size=6, classes=3, shape=(2, 4, 4))
    return [(x.double(), targets) for x, targets in found]


def shrink_of(model, optimizer, kind, lam=LAM, **options):
    if kind in ("gradient", "none"):
        return None, Shrink(model, optimizer, kind, lam, **options)
    sensitivity = NeuronSensitivity(model, kind)
    return sensitivity, Shrink(model, optimizer, sensitivity, lam, **options)


def by_definition(model, x, kind):
    """Logits, and S of the rows of each layer by its definition."""
    outputs = {}
    handles = [
        getattr(model, name).register_forward_hook(
            lambda _m, _a, out, name=name: outputs.update({name: out})
        )
        for name in SHRUNK
    ]
    logits = model(x)
    for handle in handles:
        handle.remove()
    found = {}
    for name, z in outputs.items():
        rows = [0, *range(2, z.dim())]
        if kind == "local":
            found[name] = (z.mean(rows) > 0).double()
            continue
        seeds = [logits.sum()] if kind == "lower" else [y.sum() for y in logits.unbind(1)]
        total = sum(torch.autograd.grad(y, z, retain_graph=True)[0].abs() for y in seeds)
        found[name] = total.sum(rows) / len(seeds if kind == "exact" else logits[0]) / len(x)
    return logits, found


def shrunk(weight, s, lam=LAM):
    """Weight by weight."""
    pairs = zip(weight.flatten().tolist(), s.expand_as(weight).flatten().tolist(), strict=True)
    values = [w - lam * max(0.0, 1 - each) * w for w, each in pairs]
    return torch.tensor(values, dtype=weight.dtype).view_as(weight)


def naive_step(model, optimizer, x, targets, kind, *, clip=None):
    """A step, and then the definition; returns all S."""
    optimizer.zero_grad()
    if kind in ("gradient", "none"):
        logits = model(x)
    else:
        logits, rows = by_definition(model, x, kind)
    nn.functional.cross_entropy(logits, targets).backward()
    layers = {name: getattr(model, name).weight for name in SHRUNK}
    if kind == "gradient":
        s = {name: weight.grad.abs() for name, weight in layers.items()}
    elif kind == "none":
        s = {name: torch.zeros_like(weight) for name, weight in layers.items()}
    else:
        s = {n: rows[n].view(-1, *[1] * (w.dim() - 1)) for n, w in layers.items()}
    if clip:
        clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    for name, weight in layers.items():
        weight.data.copy_(shrunk(weight.data, s[name]))
    return torch.cat([each.flatten() for each in s.values()])


def step(model, optimizer, sensitivity, x, targets, *before):
    optimizer.zero_grad()
    logits = model(x)
    if sensitivity is not None:
        sensitivity.add(logits)
    nn.functional.cross_entropy(logits, targets).backward()
    for each in before:
        each()
    optimizer.step()


def same(model, other, rtol=1e-6):
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_against_weight_by_weight(name, kind):
    """Norms and biases too are as in the other training, where nothing touches them."""
    model, optimizer, other, plain = two(name)
    sensitivity, _ = shrink_of(model, optimizer, kind)
    seen = []
    for x, targets in batches():
        seen.append(naive_step(other, plain, x, targets, kind))
        step(model, optimizer, sensitivity, x, targets)
        same(model, other)
    seen = torch.cat(seen)
    assert kind == "none" or (seen.min() < 0.9 and seen.max() >= 1)
    assert torch.equal(model.unused.weight, small().unused.weight)  # no gradient


def test_active_and_exclude():
    model, optimizer, other, plain = two()
    _, shrink = shrink_of(model, optimizer, "gradient", exclude=["head", "conv"])
    assert shrink.active
    ((x, targets),) = batches(1)
    for active in (False, True):
        shrink.active = active
        step(model, optimizer, None, x, targets)
        step(other, plain, None, x, targets)
        for name, a in model.state_dict().items():
            changed = active and name == "entry.weight"
            assert torch.equal(a, other.state_dict()[name]) == (not changed)


def test_what_was_added_while_inactive_is_not_of_the_next_step():
    model, optimizer, other, plain = two()
    sensitivity, shrink = shrink_of(model, optimizer, "lower")
    first, second = batches(2)
    shrink.active = False
    step(model, optimizer, sensitivity, *first)
    step(other, plain, None, *first)
    shrink.active = True
    naive_step(other, plain, *second, "lower")
    step(model, optimizer, sensitivity, *second)
    same(model, other)


@pytest.mark.parametrize("kind", ["gradient", "lower"])
@pytest.mark.parametrize("early", [True, False])
def test_read_before_clipping(kind, early):
    model, optimizer, other, plain = two()
    sensitivity, shrink = shrink_of(model, optimizer, kind)
    for x, targets in batches():
        naive_step(other, plain, x, targets, kind, clip=0.05)
        before = [shrink.read] if early else []
        before.append(lambda: clip_grad_norm_(model.parameters(), 0.05))
        step(model, optimizer, sensitivity, x, targets, *before)
    if early or kind == "lower":
        same(model, other)
    else:
        assert not torch.allclose(model.head.weight, other.head.weight, atol=1e-3)


@pytest.mark.parametrize("kind", ["gradient", "none", "lower"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [True, False])
def test_under_a_grad_scaler(kind, fused, clip):
    """As unscaled; a step that is skipped for an infinite gradient changes nothing, ever."""
    model, other = (small().float() for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, fused=fused)
    plain = torch.optim.SGD(other.parameters(), lr=0.02, momentum=0.9)
    sensitivity, shrink = shrink_of(model, optimizer, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, (x, targets) in enumerate(batches(5)):
        inf = float("inf") if number == 2 else 1
        statistics = copy.deepcopy(model.bn.state_dict())
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        logits = model(x.float())
        if sensitivity is not None:
            sensitivity.add(logits)
        scaler.scale(nn.functional.cross_entropy(logits, targets) * inf).backward()
        if clip or kind == "lower":
            scaler.unscale_(optimizer)
            shrink.read()
        if clip:
            clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        if number == 2:
            model.bn.load_state_dict(statistics)
            assert all(map(torch.equal, model.state_dict().values(), before.values()))
        else:
            naive_step(other, plain, x.float(), targets, kind, clip=0.5 if clip else None)
            same(model, other, rtol=1e-4)
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("kind", KINDS)
def test_microbatches_are_one_batch(kind):
    model, optimizer, other, plain = two()
    model.bn.eval(), other.bn.eval()
    sensitivity, _ = shrink_of(model, optimizer, kind)
    for x, targets in batches():
        naive_step(other, plain, x, targets, kind)
        optimizer.zero_grad()
        for part in (slice(0, 2), slice(2, 6)):
            logits = model(x[part])
            if sensitivity is not None:
                sensitivity.add(logits)
            (nn.functional.cross_entropy(logits, targets[part]) * len(logits) / 6).backward()
        optimizer.step()
        same(model, other)


def test_what_is_insensitive_has_a_half_life():
    """0.693 / lam steps, whatever the learning rate; the bias does not move."""
    for lam in (0.002, 0.01):
        model = nn.Linear(2, 2)
        before = copy.deepcopy(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        Shrink(model, optimizer, "gradient", lam)
        for _ in range(round(0.693 / lam)):
            optimizer.zero_grad()
            model(torch.zeros(1, 2)).mul(0).sum().backward()
            optimizer.step()
        torch.testing.assert_close(model.weight, before["weight"] / 2, rtol=0.01, atol=0)
        assert torch.equal(model.bias, before["bias"])


def test_weights_without_a_gradient_are_left_alone():
    model = small()
    model.entry.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    sensitivity, _ = shrink_of(model, optimizer, "lower")
    ((x, targets),) = batches(1)
    step(model, optimizer, sensitivity, x, targets)
    for name in ("entry.weight", "unused.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert not torch.equal(model.conv.weight, before["conv.weight"])


def test_remove():
    model, optimizer, other, plain = two("adam")
    shrink_of(model, optimizer, "none")[1].remove()
    for batch in batches(2):
        step(model, optimizer, None, *batch)
        step(other, plain, None, *batch)
    same(model, other, rtol=0)


def test_wrong_arguments():
    model, optimizer, *_ = two()
    for lam in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="lam must be at least 0 and below 1"):
            Shrink(model, optimizer, "none", lam)
    with pytest.raises(ValueError, match="must be a NeuronSensitivity, 'gradient' or 'none'"):
        Shrink(model, optimizer, "weights", LAM)
    with pytest.raises(ValueError, match="no linear or convolution layer"):
        Shrink(model.ln, optimizer, "none", LAM)
    with pytest.raises(ValueError, match="no layer is called 'tail'"):
        Shrink(model, optimizer, "none", LAM, exclude=["tail"])
