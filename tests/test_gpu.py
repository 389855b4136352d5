"""What only a GPU can show: the promises that hold on a CPU, kept by its kernels and precisions."""

import copy
import shutil
import warnings
from contextlib import contextmanager
from functools import cache

import pyarrow.parquet as pq
import pytest
import torch
from conftest import random_batches
from oracle import counted_by_torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trials import assert_same_results, small

import neq
from harness import parallel
from harness.flops.costs import count_costs
from harness.run.attempt import attempt
from harness.run.executors import Inline
from harness.run.replays import Replays
from harness.storage.provenance import Slot
from harness.storage.schema import EpochRecord
from harness.train.assembly import assemble
from harness.train.compiling import start_anew
from harness.train.kept import kept_for_backward
from harness.train.loop import Loop
from harness.train.tuning import Tuning, autocast, numerics
from harness.vision import torchvision
from neq import compiled
from neq.kernels import candidates, rows_for
from neq.required import BATCH
from neq.selective import assign, geometry
from neq.work import Work

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
DEVICE = "cuda"
SLOT = Slot(gpu=True, sharing=1)
OPTIMIZERS = {
    "fused SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=5e-4, fused=True),
    "foreach SGD": lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=5e-4, nesterov=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
}


@pytest.fixture
def exact():
    """Deterministic convolutions, and no TF32."""
    with numerics("float32"):
        yield


def drawn(neurons, share=0.5, seed=0):
    """Some neurons of every kind of layer, one layer as a whole."""
    mask = torch.rand(len(neurons), generator=torch.Generator().manual_seed(seed)) < share
    mask[next(part for _, part in neurons.items())] = True
    return mask


def frozen_rows(freezer):
    """(parameter, its frozen rows) of all layers with any."""
    for layer in freezer.neurons.layers:
        rows = freezer.frozen[layer.neurons].nonzero().squeeze(1).to(DEVICE)
        yield from ((p, rows) for p in layer.parameters if len(rows))


@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gradient", ["exact", "cut"])
def test_frozen_rows_keep_their_bits_and_the_others_move(net, optimizer, precision, gradient):
    layout = torch.channels_last if gradient == "cut" else torch.contiguous_format
    model = net.to(DEVICE).to(memory_format=layout)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    scaler = torch.amp.GradScaler(DEVICE, 2.0**8, enabled=precision == "fp16")
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone(), gradient=gradient)
    batches = [(x.to(DEVICE).to(memory_format=layout), y.to(DEVICE)) for x, y in random_batches(6)]
    for number, (inputs, targets) in enumerate(batches):
        if number == 2:  # moments are there by now
            freezer.freeze(drawn(freezer.neurons))
            before = [p.index_select(0, rows) for p, rows in frozen_rows(freezer)]
            everything = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with autocast(DEVICE, precision):
            loss = nn.functional.cross_entropy(model(inputs), targets)
        scaler.scale(loss).backward()
        if number >= 2:
            grads = [p.grad[rows] for p, rows in frozen_rows(freezer) if p.grad is not None]
            assert grads
            assert not any(g.any() for g in grads)
        scaler.step(optimizer)
        scaler.update()
    after = [p.index_select(0, rows) for p, rows in frozen_rows(freezer)]
    assert len(before) > 6
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), everything, strict=True)]
    assert sum(moved) >= len(moved) - 2  # all but the first layer's weight and bias
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:TensorFloat32")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own, before its first one
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("gradient", ["exact", "cut"])
def test_compiled_layers_do_what_eager_ones_do(net, gradient, mode, exact):
    start_anew()
    net.drop.p = 0.0
    net.to(DEVICE)
    eager = copy.deepcopy(net)
    call = torch.compile(net, mode=mode)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, 0.9) for m in (net, eager)]
    freezers = [
        neq.NeuronFreezer(model, optimizer, neq.Everyone(), gradient=gradient)
        for model, optimizer in zip((call, eager), optimizers, strict=True)
    ]
    for number, (inputs, _) in enumerate(random_batches(12)):
        mask = drawn(freezers[0].neurons, seed=number // 3)
        mask[[part.start for _, part in freezers[0].neurons.items()]] = False
        for freezer in freezers:
            freezer.freeze(mask)
        for model, optimizer in zip((call, eager), optimizers, strict=True):
            torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            model(inputs.to(DEVICE)).square().mean().backward()
        for mine, plain in zip(net.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-3, atol=1e-4)
        for optimizer in optimizers:
            optimizer.step()
        eager.load_state_dict(net.state_dict())
    assert compiled.graphs() == 1


LAYERS = {
    "3 × 3": (lambda: nn.Conv2d(16, 24, 3, padding=1), (4, 16, 9, 9)),
    "1 × 1": (lambda: nn.Conv2d(16, 24, 1, bias=False), (4, 16, 9, 9)),
    "strided": (lambda: nn.Conv2d(16, 24, 3, 2, 1), (4, 16, 9, 9)),
    "grouped": (lambda: nn.Conv2d(16, 32, 3, groups=4), (4, 16, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), (4, 16, 9, 9)),
    "linear": (lambda: nn.Linear(16, 24), (8, 16)),
}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("precision, far", [("float32", 1e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("name", LAYERS)
def test_kernels_compute_the_rows_of_the_dense_gradient(name, precision, far):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer, inputs = build().to(DEVICE), torch.randn(shape, device=DEVICE, requires_grad=True)
    form, dtype = geometry(layer), torch.bfloat16 if precision == "bf16" else torch.float32
    frozen = torch.arange(len(layer.weight)) % 3 == 1

    def gradients():
        inputs.grad = None
        layer.zero_grad()
        with autocast(DEVICE, precision):
            loss = layer(inputs).float().sin().sum()
        loss.backward()
        return [inputs.grad, *(p.grad for p in layer.parameters())]

    wanted = gradients()
    for gradient in wanted[1:]:
        gradient[frozen.to(DEVICE)] = 0
    for kernel in ["dense", *candidates(form, inputs, dtype)]:
        assign(layer, Work(kernel, rows_for(kernel, frozen, form), False, form))
        for found, right in zip(gradients(), wanted, strict=True):
            assert (found - right).norm() < far * right.norm(), kernel


MODELS = {
    "resnet18": (lambda models: models.resnet18(), (3, 64, 64)),
    "mobilenet": (lambda models: models.mobilenet_v3_small(), (3, 64, 64)),
    "transformer": (lambda models: models.VisionTransformer(32, 8, 2, 4, 64, 128), (3, 32, 32)),
}


@cache
def counted(name):
    build, shape = MODELS[name]
    model = build(torchvision("torchvision.models"))
    return model, shape, count_costs(model, shape)


@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_what_is_executed(name, precision, gradient):
    model, shape, costs = counted(name)
    model = copy.deepcopy(model).to(DEVICE)
    with autocast(DEVICE, precision):
        timings = neq.measure(model, torch.randn(BATCH, *shape, device=DEVICE))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    freezer = neq.NeuronFreezer(
        model, optimizer, neq.Everyone(), gradient=gradient, timings=timings
    )
    for share in (0.0, 0.7):
        mask = drawn(freezer.neurons, share) & costs.called & torch.tensor(share > 0)
        freezer.freeze(mask)
        with autocast(DEVICE, precision):
            _, measured = counted_by_torch(model, shape)
        backward = costs.backward(mask, BATCH, freezer.plan)
        assert measured * BATCH == backward.executed
        assert backward.required <= backward.executed <= backward.dense


@pytest.mark.parametrize("method", ["baseline", "neq", "neq-cut", "neq-group"])
def test_a_trial_goes_on_to_the_same_bits(tmp_path, method):
    spec = small(method, "methods.neq-group.eps=0.05", "recipe.epochs=4")
    ours, theirs = str(tmp_path / "ours"), str(tmp_path / "theirs")
    records = list(attempt(spec, ours, SLOT))
    assert [type(r) for r in records[1:]] == [EpochRecord] * 4, records[-1]
    shutil.copytree(tmp_path / "ours/digits/tuning", tmp_path / "theirs/digits/tuning")
    broken_off = attempt(spec, theirs, SLOT)
    assert [next(broken_off) for _ in range(3)]
    broken_off.close()
    assert len(list(attempt(spec, theirs, SLOT))) == 5
    assert_same_results(spec, ours, theirs)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_trial_in_half_precision(tmp_path, precision):
    spec = small("random", f"recipe.precision={precision}", "recipe.epochs=2")
    events = list(attempt(spec, str(tmp_path), SLOT))
    last = events[-1]
    assert isinstance(last, EpochRecord), last
    assert 0 < last.frozen_neurons < last.total_neurons
    assert last.peak_memory_bytes > 0
    (trial,) = pq.read_table(tmp_path / "digits/trials").to_pylist()
    assert trial["gpu"] == torch.cuda.get_device_name()


def test_masks_are_replayed(tmp_path):
    spec = small("random", "recipe.epochs=2")
    assert isinstance(list(attempt(spec, str(tmp_path), SLOT))[-1], EpochRecord)
    (told,) = Inline().afterwards(Replays(1.0), [spec], str(tmp_path), print)
    assert told.well
    (row,) = pq.read_table(tmp_path / "digits/replays").to_pylist()
    assert row["device"] == torch.cuda.get_device_name()
    assert row["plans"] == row["plans_measured"] == 2
    assert row["activation_bytes"] <= row["activation_bytes_plain"]


@contextmanager
def no_waiting():
    """Inside, the host must not wait for the device."""
    try:
        with warnings.catch_warnings(action="ignore"):  # it is said to be a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_seen():
    with pytest.raises(RuntimeError, match="synchroni"), no_waiting():
        torch.ones(1, device=DEVICE).item()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("method", ["baseline", "neq", "neq-cut", "random", "random-layers"])
def test_no_step_waits_for_the_device(method, precision):
    spec = small(method, f"recipe.precision={precision}", "methods.random-layers.flops=0.5")
    work = assemble(spec, torch.device(DEVICE, 0), None, {"tuning": Tuning().to_json()})
    loop = Loop(work, spec.suite.recipe, spec.seed)
    work.start()
    for epoch in range(3):
        steps = loop.steps(epoch)
        next(steps)  # before it, order and crops of the epoch are moved there
        with no_waiting():
            taken = sum(1 for _ in steps)
        assert taken == work.batches.steps - 1
        work.method.end_epoch(epoch)


def test_frozen_layers_take_less_memory(vision):
    """What lies on the device between forward and backward, and what is counted of it."""
    model = vision.models.resnet18().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    inputs = torch.randn(32, 3, 96, 96, device=DEVICE)

    def kept(mask):
        freezer.freeze(mask)
        optimizer.zero_grad()
        before = torch.cuda.memory_allocated()
        with kept_for_backward(model) as counted:
            _held = model(inputs)
        return torch.cuda.memory_allocated() - before, counted.total

    nothing = torch.zeros(len(freezer.neurons), dtype=torch.bool)
    layers = [part for _, part in freezer.neurons.items()]
    most = nothing.clone()
    most[: layers[round(0.9 * len(layers))].start] = True
    kept(nothing)  # the first forward also allocates what stays
    for mask in (nothing, most):
        allocated, counted = kept(mask)
        own = counted - (inputs.nbytes if mask is nothing else 0)  # was there before
        assert own == pytest.approx(allocated, rel=0.1)
    assert kept(most)[0] < 0.2 * kept(nothing)[0]


@pytest.mark.usefixtures("exact")
def test_one_rank_under_nccl_trains_as_without(net, tmp_path, monkeypatch):
    for backend in ("GLOO", "NCCL"):
        monkeypatch.setenv(f"{backend}_SOCKET_IFNAME", "lo")
    batches = [(x.to(DEVICE), y.to(DEVICE)) for x, y in random_batches(6)]
    net.drop.p = 0.0

    def trained(wrap):
        model = copy.deepcopy(net).to(DEVICE)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4)
        freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
        wrapped = wrap(model)
        masks = [None, drawn(freezer.neurons), torch.ones(len(freezer.neurons)) > 0]
        for mask, (inputs, targets) in zip(masks * 2, batches, strict=True):
            freezer.freeze(torch.zeros(len(freezer.neurons)) > 0 if mask is None else mask)
            before = [p.index_select(0, rows) for p, rows in frozen_rows(freezer)]
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(inputs), targets).backward()
            optimizer.step()
            after = [p.index_select(0, rows) for p, rows in frozen_rows(freezer)]
            assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        return list(model.parameters())

    alone = trained(lambda model: model)
    torch.distributed.init_process_group(
        parallel.backend(gpu=True), init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        together = trained(lambda model: DistributedDataParallel(model, device_ids=[0]))
    finally:
        torch.distributed.destroy_process_group()
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)
