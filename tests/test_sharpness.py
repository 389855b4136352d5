"""The top eigenvalue of a Hessian against all of them, and against scipy's Lanczos."""

import random

import numpy
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn
from torch.func import functional_call, grad, hessian, jvp
from torch.nn import functional

import neq
from neq.pruning import Masks

CLASSES = 3


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def batches(*sizes, shape=(4,), dtype=torch.float64):
    draw = torch.Generator().manual_seed(2)
    return [
        (
            torch.randn(size, *shape, generator=draw, dtype=dtype),
            torch.randint(CLASSES, (size,), generator=draw),
        )
        for size in sizes
    ]


def mean_loss(model, samples, loss=functional.cross_entropy):
    """Of all samples at once, as a function of the trainable parameters."""
    inputs = torch.cat([x for x, _ in samples])
    targets = torch.cat([y for _, y in samples])
    fixed = dict(model.named_buffers()) | dict(model.named_parameters())
    return lambda state: loss(functional_call(model, fixed | state, (inputs,)), targets)


def trainable(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def whole_hessian(model, samples, loss=functional.cross_entropy):
    """[parameters, parameters], from torch.func, in eval mode."""
    state = trainable(model)
    blocks = hessian(mean_loss(model.eval(), samples, loss))(state)
    rows = [
        torch.cat([blocks[a][b].reshape(state[a].numel(), -1) for b in state], 1) for a in state
    ]
    return torch.cat(rows)


class Bowl(nn.Module):
    """Σ curvature · p² / 2 for each sample: its Hessian is diagonal, and known."""

    def __init__(self, *curvature):
        super().__init__()
        self.p = nn.Parameter(torch.linspace(0.5, 1, len(curvature), dtype=torch.float64))
        self.curvature = torch.tensor(curvature, dtype=torch.float64)

    def forward(self, x):
        return x.sum(1) * 0 + (self.curvature * self.p**2).sum() / 2


def of_bowl(*curvature, **options):
    samples = [(torch.zeros(3, 2, dtype=torch.float64), None)]
    return neq.top_eigenvalue(Bowl(*curvature), samples, lambda out, _: out.mean(), **options)


def test_against_all_eigenvalues():
    """Batches of different sizes weigh by their samples."""
    model, samples = mlp(), batches(7, 2, 1)
    values = torch.linalg.eigvalsh(whole_hessian(model, samples))
    found = neq.top_eigenvalue(model, samples, functional.cross_entropy, tolerance=1e-8)
    assert found.value == pytest.approx(float(values[-1]), rel=1e-9)
    assert found.converged
    assert found.low <= values[-1] <= found.high
    assert found.high - found.low <= 2.1e-8 * found.value
    alike = whole_hessian(model, [*samples[:1], *samples[1:] * 4])
    assert float(torch.linalg.eigvalsh(alike)[-1]) != pytest.approx(found.value, rel=1e-3)


def test_the_interval_holds_an_eigenvalue_however_early_it_ends():
    model, samples = mlp(), batches(10)
    values = torch.linalg.eigvalsh(whole_hessian(model, samples))
    for iterations in range(1, 9):
        found = neq.top_eigenvalue(
            model, samples, functional.cross_entropy, iterations=iterations, tolerance=1e-12
        )
        assert ((found.low <= values) & (values <= found.high)).any()
        assert not found.converged
        assert found.iterations in (iterations, 2 * iterations)
    assert found.high - found.low > 0


@pytest.mark.parametrize(
    "curvature, top", [((-5, 2, 1), 2), ((-5, -2, -1), -1), ((1, 4, -3), 4), ((-4, 3.9, 0), 3.9)]
)
def test_the_largest_and_not_that_of_the_largest_magnitude(curvature, top):
    found = of_bowl(*curvature, tolerance=1e-6, iterations=3000)
    assert found.converged
    assert found.value == pytest.approx(top, rel=1e-6)


def test_a_saddle_of_a_model():
    """The mean loss turned round: what dominates is negative."""
    model, samples = mlp(), batches(10)

    def loss(outputs, targets):
        return -functional.cross_entropy(outputs, targets)

    values = torch.linalg.eigvalsh(whole_hessian(model, samples, loss))
    assert -values[0] > values[-1] > 0.01
    found = neq.top_eigenvalue(model, samples, loss, tolerance=1e-4, iterations=5000)
    assert found.value == pytest.approx(float(values[-1]), rel=1e-5)


def test_no_curvature_at_all():
    assert of_bowl(0, 0) == neq.Eigenvalue(0.0, 0.0, 0.0, True, 1)
    model, samples = nn.Linear(4, CLASSES), batches(3, dtype=torch.float32)
    assert neq.top_eigenvalue(model, samples, lambda out, _: out.mean()).value == 0


def test_two_of_one_magnitude_and_different_signs_do_not_converge():
    found = of_bowl(3, -3, generator=torch.Generator().manual_seed(3), iterations=50)
    if found.converged:  # it began on the negative side
        assert found.value == pytest.approx(3)
    else:
        assert found.low <= 3 <= found.high or found.low <= -3 <= found.high
    outcomes = {
        of_bowl(3, -3, generator=torch.Generator().manual_seed(n), iterations=50).converged
        for n in range(8)
    }
    assert False in outcomes


def test_what_is_kept_and_what_trains():
    """The eigenvalue of the block of the Hessian that is left."""
    model, samples = mlp(), batches(12)
    model[0].bias.requires_grad_(False)
    whole = whole_hessian(model, samples)
    masks = Masks(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[2] = False
    masks.set({"0": kept})  # which also makes these weights zero
    whole_now = whole_hessian(model, samples)
    left = torch.cat([kept.flatten(), torch.ones(len(whole) - kept.numel(), dtype=torch.bool)])
    wanted = float(torch.linalg.eigvalsh(whole_now[left][:, left])[-1])
    found = neq.top_eigenvalue(
        model, samples, functional.cross_entropy, kept=masks.kept, tolerance=1e-7
    )
    assert found.value == pytest.approx(wanted, rel=1e-9)
    everything = float(torch.linalg.eigvalsh(whole_now)[-1])
    assert wanted != pytest.approx(everything, rel=1e-4)
    dense = neq.top_eigenvalue(model, samples, functional.cross_entropy, tolerance=1e-7)
    assert dense.value == pytest.approx(everything, rel=1e-9)


def network():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(24, CLASSES),
    )


def images(count=40):
    return batches(count // 2, count - count // 2, shape=(2, 8, 8), dtype=torch.float32)


def trained(model, samples, steps=30):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        for x, y in samples:
            optimizer.zero_grad()
            functional.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
    return model, optimizer


def lanczos(model, samples, kept=None):
    """scipy's, with products in forward over reverse mode, in double precision."""
    model, samples = model.double().eval(), [(x.double(), y) for x, y in samples]
    state = trainable(model)
    masks = {f"{name}.weight": mask for name, mask in (kept or {}).items()}
    slope = grad(mean_loss(model, samples))
    sizes = [p.numel() for p in state.values()]

    def times(vector):
        parts = torch.from_numpy(vector).flatten().split(sizes)
        pairs = zip(state.items(), parts, strict=True)
        direction = {n: part.view(p.shape).double() * masks.get(n, 1) for (n, p), part in pairs}
        _, found = jvp(slope, (state,), (direction,))
        return torch.cat([(found[n] * masks.get(n, 1)).flatten() for n in state]).numpy()

    operator = LinearOperator((sum(sizes),) * 2, matvec=times, dtype=numpy.float64)
    start = numpy.random.default_rng(0).normal(size=sum(sizes))
    (value,) = eigsh(operator, 1, which="LA", v0=start, tol=1e-5, return_eigenvectors=False)
    return float(value)


@pytest.mark.slow
def test_float32_with_the_defaults_against_scipy():
    model, _ = trained(network(), images())
    found = neq.top_eigenvalue(model, images(), functional.cross_entropy)
    value = lanczos(model, images())
    assert value > 0.01
    assert found.converged
    assert found.value == pytest.approx(value, rel=0.01)
    fine = neq.top_eigenvalue(
        model.float(), images(), functional.cross_entropy, tolerance=1e-3, iterations=2000
    )
    assert fine.value == pytest.approx(value, rel=1e-4)


def everything(model):
    return {name: t.clone() for name, t in model.state_dict(keep_vars=False).items()}


def test_the_model_is_left_as_it_was():
    model, _ = trained(network(), images(), 2)
    model.train().zero_grad()
    model[1].eval()
    model[0].weight.grad = torch.full_like(model[0].weight, 2.0)
    calls = []
    model[0].weight.register_hook(calls.append)
    before, modes = everything(model), [m.training for m in model.modules()]
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    drawn = random.random(), numpy.random.rand(), torch.rand(3)
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    first = neq.top_eigenvalue(model, images(), functional.cross_entropy, iterations=3)
    assert (random.random(), numpy.random.rand()) == drawn[:2]
    assert torch.equal(torch.rand(3), drawn[2])
    assert all(torch.equal(t, before[name]) for name, t in everything(model).items())
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(model[0].weight.grad, torch.full_like(model[0].weight, 2.0))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "0.weight")
    assert all(p.requires_grad for p in model.parameters())
    assert not calls
    torch.rand(1)  # neither does it follow from the global stream
    again = neq.top_eigenvalue(model, images(), functional.cross_entropy, iterations=3)
    assert again == first
    other = torch.Generator().manual_seed(7)
    drawn = neq.top_eigenvalue(
        model, images(), functional.cross_entropy, iterations=3, generator=other
    )
    assert drawn != first


def test_frozen_neurons_curve_like_others():
    model, optimizer = trained(network(), images(), 3)
    plain = neq.top_eigenvalue(model, images(), functional.cross_entropy)
    freezer = neq.NeuronFreezer(model, optimizer, policy=neq.Everyone(), exclude=["8"])
    mask = torch.zeros(len(freezer.neurons), dtype=torch.bool)
    mask[:9] = True  # the first layer whole, and a part of the second
    mask[12:15] = True
    freezer.freeze(mask)
    assert neq.top_eigenvalue(model, images(), functional.cross_entropy) == plain
    before = everything(model)
    trained(model, images(), 1)
    assert torch.equal(before["0.weight"], model[0].weight)
    assert not torch.equal(before["8.weight"], model[8].weight)
    freezer.remove()


@pytest.mark.slow
def test_attention():
    """Whose usual kernels have no second derivative."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, CLASSES)).double()
    samples = batches(6, shape=(3, 8))
    found = neq.top_eigenvalue(model, samples, functional.cross_entropy, tolerance=1e-5)

    def slope(state):
        model.load_state_dict(state)
        model.zero_grad()
        (x, y), *_ = samples
        functional.cross_entropy(model.eval()(x), y).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    # Against differences of gradients, along the eigenvector that a longer iteration ends in.
    state = {name: t.clone() for name, t in model.state_dict().items()}
    count = sum(p.numel() for p in model.parameters())
    vector = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for _ in range(200):
        vector /= vector.norm()
        parts = vector.split([t.numel() for t in state.values()])
        pairs = list(zip(state.items(), parts, strict=True))
        ahead = {name: t + 1e-4 * part.view(t.shape) for (name, t), part in pairs}
        behind = {name: t - 1e-4 * part.view(t.shape) for (name, t), part in pairs}
        product = (slope(ahead) - slope(behind)) / 2e-4
        quotient, vector = float(vector @ product), product
    assert found.value == pytest.approx(quotient, rel=1e-4)


def test_half_precision_is_not_kept():
    model = network().bfloat16()
    samples = images()
    found = neq.top_eigenvalue(model, samples, functional.cross_entropy)
    full = neq.top_eigenvalue(model.float(), samples, functional.cross_entropy)
    assert found == full


def test_bad_input():
    model, samples = mlp(), batches(4)
    loss = functional.cross_entropy
    for options in ({"iterations": 0}, {"tolerance": 0.0}, {"tolerance": 1.0}):
        with pytest.raises(ValueError, match="iterations must be 1 or more"):
            neq.top_eigenvalue(model, samples, loss, **options)
    with pytest.raises(ValueError, match="at least one sample"):
        neq.top_eigenvalue(model, [], loss)
    with pytest.raises(ValueError, match=r"kept\['9'\] must be the mask of a layer"):
        neq.top_eigenvalue(model, samples, loss, kept={"9": torch.ones(5, 4, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"kept\['0'\] must be bool \[5, 4\], got torch.float32"):
        neq.top_eigenvalue(model, samples, loss, kept={"0": torch.ones(5, 4)})
    only = nn.Linear(4, CLASSES, bias=False).double()
    none = {"": torch.zeros(CLASSES, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"kept\[''\]"):
        neq.top_eigenvalue(only, samples, loss, kept=none)
    inside = nn.Sequential(only)
    with pytest.raises(ValueError, match="no trainable parameter is left"):
        neq.top_eigenvalue(inside, samples, loss, kept={"0": none[""]})
    with pytest.raises(ValueError, match="no trainable parameter"):
        neq.top_eigenvalue(only.requires_grad_(False), samples, loss)


def test_a_loss_that_is_no_number():
    found = of_bowl(float("nan"), 1)
    assert not found.converged
    assert found.value != found.value
    assert found.iterations == 1
