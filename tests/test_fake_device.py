"""Steps of trials on an accelerator that is none: no tensor lies elsewhere, and no step waits."""

import copy
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from unittest.mock import patch

import fake_device
import pytest
import torch
from torch import Tensor, nn
from trials import same, small

import neq
from harness.flops.costs import count_costs
from harness.suite.parts import build_model
from harness.train import assembly
from harness.train.loop import Loop
from harness.train.tuning import Tuning
from neq import compiled
from neq.kernels import Rows

SETTINGS = [
    "recipe.epochs=3",
    "methods.neq-group.eps=0.05",
    "methods.neq-budget.flops=0.6",
    "methods.random-layers.flops=0.5",
    "methods.random.keep=0.3",  # few enough for the kernels of some rows
    "methods.random-cut={kind='random', keep=0.3, gradient='cut'}",
    "methods.gradual={sparsity=0.5}",
    "methods.serene={lam=1e-3, twt=0.05, pwe=2}",
]
ADAMW = "recipe.optimizer={name='AdamW', lr=1e-2, weight_decay=0.1}"


@pytest.fixture(scope="module")
def apart():
    """Calls a function in a process that knows the device."""
    # Before any backward: it is then that torch counts its devices.
    with ProcessPoolExecutor(1, get_context("spawn"), fake_device.install) as pool:
        yield lambda function, *given: pool.submit(function, *given).result()


def train(spec, device, quiet, plant=None):
    """Train and decide as a trial does; (weights, neurons frozen in each epoch, test metric).

    `quiet`: a context for every step but the first, before which the data are moved.
    """
    work = assembly.assemble(spec, device, None, {"tuning": Tuning().to_json()})
    if plant is not None:
        work.model.register_forward_hook(plant)
    loop, frozen = Loop(work, spec.suite.recipe, spec.seed), []
    work.start()
    for epoch in range(spec.suite.recipe.epochs):
        frozen.append(int(work.begin_epoch()[0].sum()))
        steps = loop.steps(epoch)
        next(steps)
        with quiet():
            assert sum(1 for _ in steps) == work.batches.steps - 1
        work.evaluator.loss("validation")
        work.method.end_epoch(epoch)
    metric = work.evaluator.loss_and_metric("test")
    return {k: v.cpu() for k, v in work.model.state_dict().items()}, frozen, metric


def on_device(method, settings, plant=None):
    spec = small(method, *SETTINGS, *settings)
    parts = spec.suite.model
    model = build_model(parts.build, spec.folder, parts.arguments)
    costs = count_costs(model, parts.input, parts.unpublished)  # traced: not on such a device
    with patch.object(assembly, "count_costs", lambda *_: costs), fake_device.present() as device:
        weights, *rest = train(spec, device, fake_device.strict, plant)
        return {name: tensor.clone() for name, tensor in weights.items()}, *rest


def both(method, settings):
    spec = small(method, *SETTINGS, *settings)
    there = on_device(method, settings)
    here = train(spec, torch.device("cpu"), nullcontext)
    assert same(there, here)
    return there[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, settings",
    [
        ("baseline", []),
        ("neq", []),
        ("neq", [ADAMW]),
        ("neq-cut", []),
        ("random", []),
        ("random-cut", []),
        ("neq-group", []),
        ("neq-cka", []),
        ("neq-budget", []),
        ("random-layers", []),
        ("gradual", []),
        ("serene", []),
    ],
)
def test_no_step_waits_and_all_is_as_on_the_cpu(apart, method, settings):
    frozen = apart(both, method, settings)
    assert any(frozen) is (method not in ("baseline", "gradual", "serene"))


def reads_a_value(_module, _inputs, output):
    output.sum().item()


def asks_for_a_shape(_module, _inputs, output):
    output[output > 0]


def mixes(_module, _inputs, output):
    return output + torch.ones(output.shape)


def planted(plant):
    on_device("random", [], plant)


@pytest.mark.parametrize(
    "plant, error, words",
    [
        (reads_a_value, fake_device.WaitedError, "_local_scalar_dense"),
        (asks_for_a_shape, fake_device.WaitedError, "aten.index"),
        (mixes, RuntimeError, "expected all tensors on the device"),
    ],
)
def test_a_planted_fault_is_found(apart, plant, error, words):
    with pytest.raises(error, match=words):
        apart(planted, plant)


def rows_on_the_cpu():
    with patch.object(Rows, "to", lambda rows, _device: rows):
        on_device("random", [])


def test_rows_that_stayed_on_the_cpu_are_found(apart):
    with pytest.raises(RuntimeError, match="expected all tensors on the device"):
        apart(rows_on_the_cpu)


LAYERS = {
    "conv": (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 5), (2, 6, 5, 5)),
    "linear": (nn.Linear(4, 6), (3, 4), (3, 6)),
}


def operators(name, gradient, kernel, frozen):
    """What the operators of graphs do for a layer on the device, in strict mode."""
    plain, given, got = LAYERS[name]
    with fake_device.present() as device:
        layer = copy.deepcopy(plain).to(device)
        inputs, above = torch.randn(given).to(device), torch.randn(got).to(device)
        timings = neq.Timings({"": {"dense": {6: 1.0}, kernel: {6: 0.1}}})
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        freezer = neq.NeuronFreezer(layer, optimizer, gradient=gradient, timings=timings)
        freezer.freeze(torch.arange(6) < frozen)
        work, weight = layer._neq_traced.handle, layer.weight
        with fake_device.strict(), torch.no_grad():
            compiled._weight_gradient(above, inputs, work, weight.shape, weight.stride())
            if gradient == "cut":
                compiled._input_gradient(above, inputs, weight, work)


@pytest.mark.parametrize("kernel, frozen", [("dense", 0), ("dense", 3), ("gather", 3)])
@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize("name", LAYERS)
def test_operators_of_compiled_layers_do_not_wait(apart, name, gradient, kernel, frozen):
    apart(operators, name, gradient, kernel, frozen)


WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "cpu": lambda x: x.cpu(),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "to the device": lambda x: torch.ones(2).to(x.device),
    "made from a list": lambda x: torch.tensor([1.0], device=x.device),
    "equal": lambda x: torch.equal(x, x),
    "copy": lambda x: x.copy_(torch.ones(3, 2)),
}


def waits(name):
    with fake_device.present() as device:
        x = torch.ones(3, 2, device=device)
        WAITS[name](x)  # outside of steps it may
        with fake_device.strict():
            (x @ x.t()).sum().mul(2.0).add_(torch.tensor(1.0))
            WAITS[name](x)


@pytest.mark.parametrize("name", WAITS)
def test_what_makes_the_host_wait_is_refused_inside_steps_alone(apart, name):
    with pytest.raises(fake_device.WaitedError):
        apart(waits, name)


def moved_while_frozen():
    """Whether frozen rows and statistics were held; the steps there do not wait."""
    torch.manual_seed(0)
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone(), hold_statistics=True)
    other = torch.optim.SGD(net.parameters(), 0.0)
    mask = torch.arange(20) % 3 == 0
    freezer.freeze(mask)
    before = [net[0].weight[mask[:8]].detach().clone(), net[1].running_mean[mask[8:16]]]

    def step(images):
        net(images).square().sum().backward()
        optimizer.step()
        other.step()  # is looked at
        optimizer.zero_grad()

    step(torch.randn(4, 3, 6, 6))
    with fake_device.present() as device:
        net.to(device)
        images = torch.randn(4, 3, 6, 6).to(device)
        step(images)
        for _ in range(2):
            freezer.update()
            freezer.freeze(mask)
            with fake_device.strict():
                step(images)
                step(images)
        after = [net[0].weight.detach().cpu()[mask[:8]], net[1].running_mean.cpu()[mask[8:16]]]
    return all(map(torch.equal, before, after))


def test_a_model_is_moved_there_while_rows_are_frozen(apart):
    assert apart(moved_while_frozen)


def made_and_moved():
    with fake_device.present() as device:
        x = torch.arange(6.0, device=device).view(2, 3)
        values = x.cpu()
        return type(x) is Tensor, x.device.type, x.t().is_contiguous(), values


def test_tensors_say_that_they_lie_there(apart):
    plain, kind, contiguous, values = apart(made_and_moved)
    assert (plain, kind, contiguous) == (False, fake_device.NAME, False)
    assert type(values) is Tensor
    assert torch.equal(values, torch.arange(6.0).view(2, 3))
