"""Selective layers inside graphs of torch.compile: the work of eager ones, and few graphs."""

import copy
import pickle

import pytest
import torch
from test_frozen_models import some
from test_selective import LAYERS, MASKS, freeze, masked
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, vmap
from torch.utils.flop_counter import FlopCounterMode

import neq
from harness.flops.costs import count_costs
from harness.flops.oracle import Rules
from neq import compiled
from neq.gradients import _choose_work
from neq.kernels import Kept
from neq.selective import assign, prepare

SIZES = {"rtol": 1e-4, "atol": 1e-5}
# torch's own, once a process, where one side has to be padded more.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

KINDS = ["conv same", "conv grouped", "conv1d reflect", "conv unbatched", "linear tokens"]
KINDS += ["batch norm", "group norm", "layer norm"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    compiled._functions.clear()
    counters.clear()
    # A graph too many is an error, not a silent return to eager.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


def gradients(model, inputs, weights):
    """Output, and gradients of input and parameters; None where there is none."""
    x = inputs.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    if output.requires_grad:
        (output * weights).sum().backward()
    return output.detach(), x.grad, [p.grad for p in model.parameters()]


def none_is_zero(gradient, like):
    return torch.zeros_like(like) if gradient is None else gradient


@pytest.mark.slow
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_does_in_a_graph_what_it_does_in_eager_mode(kind, cut):
    build, shape = LAYERS[kind]
    eager = build()
    layer = copy.deepcopy(eager)
    for one in (eager, layer):
        prepare(one, cut)
    call = torch.compile(layer, backend="aot_eager", fullgraph=True)
    (place,) = neq.NeuronIndex(layer).layers
    inputs = torch.randn(shape)
    weights = torch.randn_like(eager(inputs))
    for rows in ([], *MASKS.values()):
        mask = masked(layer, rows)
        for one in (eager, layer):
            assign(one, _choose_work(place, mask, cut, neq.Timings()))
        wanted, found = (gradients(one, inputs, weights) for one in (eager, call))
        torch.testing.assert_close(found[0], wanted[0], **SIZES)
        by_input = (none_is_zero(g, inputs) for g in (found[1], wanted[1]))
        torch.testing.assert_close(*by_input, **SIZES)
        for mine, plain in zip(found[2], wanted[2], strict=True):
            if not mask.all():
                torch.testing.assert_close(mine[~mask], plain[~mask], **SIZES)
    # With cut a layer frozen whole ends the gradient: another graph.
    assert graphs() == 1 + cut


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, weight_decay=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "gradient", "autocast"),
    [("sgd", "exact", False), ("adamw", "exact", True), ("adamw", "cut", False)],
)
def test_ten_masks_of_rows_are_one_graph(net, optimizer, gradient, autocast):
    net.drop.p = 0.0
    eager = copy.deepcopy(net)
    call = torch.compile(net, backend="aot_eager")
    train_under_ten_masks(net, call, eager, OPTIMIZERS[optimizer], gradient, autocast)
    assert graphs() == 1


def train_under_ten_masks(net, call, eager, build, gradient, autocast=False):
    """Two steps under each; after each the eager model becomes like `net`, which `call` calls."""
    optimizers = [build(model.parameters()) for model in (net, eager)]
    freezers = [
        neq.NeuronFreezer(model, optimizer, neq.Everyone(), gradient=gradient)
        for model, optimizer in zip((call, eager), optimizers, strict=True)
    ]
    sizes = {"rtol": 2e-2, "atol": 2e-3} if autocast else SIZES
    for number in range(10):
        mask = some(net, 0.08 * number, seed=number)
        for layer in freezers[0].neurons.layers:  # no layer whole: that may be another graph
            mask[layer.neurons.start] = False
        for freezer in freezers:
            freezer.freeze(mask)
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        for step in range(2):
            torch.manual_seed(10 * number + step)
            inputs = torch.randn(4, 3, 6, 6)
            for model, optimizer in zip((call, eager), optimizers, strict=True):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    loss = model(inputs).float().square().mean()
                loss.backward()
            for mine, plain in zip(net.parameters(), eager.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, plain.grad, **sizes)
            for optimizer in optimizers:
                optimizer.step()
            eager.load_state_dict(net.state_dict())
        for layer in freezers[0].neurons.layers:
            frozen = mask[layer.neurons]
            for name, parameter in layer.module.named_parameters():
                was = before[f"{layer.name}.{name}"]
                assert torch.equal(parameter[frozen], was[frozen])
                assert not torch.equal(parameter[~frozen], was[~frozen])


class Shared(nn.Module):
    """A function uses a weight as well: compiled code adds the two gradients in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3))) + self.fc.weight.square().sum(1)


@pytest.mark.slow
def test_with_the_default_backend():
    torch.manual_seed(0)
    net = Shared()
    eager, call = copy.deepcopy(net), torch.compile(net)
    train_under_ten_masks(net, call, eager, OPTIMIZERS["sgd"], "exact")
    assert graphs() == 1


@pytest.mark.slow
def test_layers_whole_from_the_entrance_on_are_one_graph_for_each_set(net):
    net.drop.p = 0.0
    call = torch.compile(net, backend="aot_eager")
    freezer = freeze(call, some(net, 0))
    inputs = torch.randn(4, 3, 6, 6)

    def graphs_after(*names):
        freezer.freeze(freezer.neurons.select(names))
        net.zero_grad()
        call(inputs).sum().backward()
        for name, layer in net.named_modules():
            if name in freezer.neurons:
                assert (layer.weight.grad is None) == (name in names)
        return graphs()

    assert graphs_after() == 1
    assert graphs_after("grouped", "fc1") == 1  # in the middle: the gradient passes them
    assert graphs_after("conv") == 2
    assert graphs_after("conv", "bn") == 3
    assert graphs_after("conv", "bn", "fc2") == 3
    assert graphs_after("conv") == 3
    assert graphs_after() == 3


@pytest.mark.slow
def test_there_is_always_room_for_another_set():
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7)))
    call = torch.compile(net, backend="eager")
    freezer = freeze(call, some(net, 0))
    costs = count_costs(net, (4,))
    for _ in range(2):
        for last in range(len(net) + 1):
            mask = freezer.neurons.select(list(freezer.neurons)[:last])
            freezer.freeze(mask)
            executed = costs.backward(mask, 2, freezer.plan).executed
            assert backward_flops(call, (4,)) == executed
            assert compiled.graphs() <= compiled.GRAPHS
    assert graphs() > 8  # dynamo's own limit of a function


def backward_flops(call, shape=(3, 6, 6)):
    """What PyTorch counts in a compiled backward, which the first one compiles."""
    for _ in range(2):
        loss = call(torch.randn(2, *shape)).sum()
        with FlopCounterMode(display=False, custom_mapping=Rules().mapping) as counter:
            loss.backward()
    return counter.get_total_flops()


MASKED = {"rows": [], "a middle layer": ["grouped"], "the entrance": ["conv", "bn"], "all": None}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["compile", "torch.compile"])
@pytest.mark.parametrize("gradient", ["exact", "cut"])
def test_what_is_counted_is_executed(net, gradient, how):
    net.drop.p = 0.0
    costs = count_costs(net, (3, 6, 6))
    call = net
    if how == "compile":
        net.compile(backend="eager")
    else:
        call = torch.compile(net, backend="aot_eager")
    freezer = freeze(call, some(net, 0), gradient=gradient)
    for names in MASKED.values():
        mask = some(net) | freezer.neurons.select(names or ())
        mask = torch.ones_like(mask) if names is None else mask
        mask[freezer.neurons["fc2"]] = names is None
        freezer.freeze(mask)
        counted = costs.backward(mask, 2, freezer.plan)
        assert backward_flops(call) == counted.executed
        for name in names or ():
            norm = name == "bn" and gradient == "exact"
            assert freezer.plan[name].kernel == ("dense" if norm else "skip")
    assert counted.executed == 0
    assert counters["frames"]["ok"] > 0  # dynamo did compile it


def test_the_freezer_may_come_before_the_compiler_and_go(net):
    net.drop.p = 0.0
    plain = copy.deepcopy(net)
    mask = some(net)
    mask[8:16] = True  # the first normalisation layer as a whole
    freezer = freeze(net, mask)
    assert freezer.plan["bn"].kernel == "skip"
    call = torch.compile(net, backend="aot_eager")
    inputs = torch.randn(4, 3, 6, 6)
    for _ in range(2):
        net.zero_grad()
        call(inputs).square().sum().backward()
        assert (net.conv.weight.grad[mask[:8]] == 0).all()
        freezer.freeze(mask)
        assert freezer.plan["bn"].kernel == "dense"  # it was seen to be compiled
        net.eval()(inputs)
        net.train()
    assert graphs() == 1
    freezer.remove()
    net.zero_grad()
    call(inputs).square().sum().backward()
    plain.load_state_dict(net.state_dict())
    plain(inputs).square().sum().backward()
    torch.testing.assert_close(net.conv.weight.grad, plain.conv.weight.grad, **SIZES)
    assert type(net.conv) is nn.Conv2d


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])  # eager: dynamo sees the backward, too
def test_a_compiled_step_freezes_the_rows(net, backend):
    net.drop.p = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    freezer = freeze(net, some(net, 0), optimizer)
    inputs = torch.randn(4, 3, 6, 6)

    @torch.compile(backend=backend)
    def step():
        optimizer.zero_grad()
        loss = net(inputs).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(2):  # the optimizer has no momentum at first
        step()
    known = graphs()
    for seed in range(4):
        mask = some(net, 0.5, seed)
        for layer in freezer.neurons.layers:
            mask[layer.neurons.start] = False
        freezer.freeze(mask)
        before = net.grouped.weight.detach().clone()
        step()
        frozen = mask[freezer.neurons["grouped"]]
        assert torch.equal(net.grouped.weight[frozen], before[frozen])
        assert not torch.equal(net.grouped.weight[~frozen], before[~frozen])
    assert graphs() == known


def test_a_backward_does_the_work_of_its_forward(net):
    net.drop.p = 0.0
    call = torch.compile(net, backend="aot_eager")
    nobody = some(net, 0)
    freezer = freeze(call, nobody)
    mask = nobody.clone()
    mask[:4] = True
    for now, later in ((nobody, mask), (mask, nobody)):
        freezer.freeze(now)
        loss = call(torch.randn(4, 3, 6, 6)).square().sum()
        freezer.freeze(later)
        net.zero_grad()
        loss.backward()
        assert (net.conv.weight.grad[:3] == 0).all()  # by the work, or cleared afterwards
        assert net.conv.weight.grad[4:].abs().sum() > 0
    kept = len(compiled._works)
    for _ in range(3):
        freezer.freeze(mask)
    assert len(compiled._works) == kept  # and no work outlives its use


def test_deciding_compiles_nothing_and_reads_the_same(net):
    eager = copy.deepcopy(net)
    batches = [torch.randn(6, 3, 6, 6)]
    readings, costs = [], []
    net.fc1.compile(backend="aot_eager")
    for model in (torch.compile(net, backend="aot_eager"), eager):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        freezer = neq.NeuronFreezer(model, optimizer, neq.Budget(neq.AtEquilibrium(), 0.5))
        for _ in range(3):
            freezer.update(batches)
            with torch.no_grad():
                for number, parameter in enumerate(model.parameters()):
                    parameter.add_(0.01 * (number + 1))
        readings.append(freezer.reading.phi)
        costs.append(freezer.neurons.flops.rows)
    assert torch.equal(*readings)
    assert torch.equal(*costs)
    assert graphs() == 0


@pytest.mark.slow
def test_kernels_are_timed_compiled(net):
    call = torch.compile(net, backend="aot_eager")
    inputs = torch.randn(2, 3, 6, 6)
    state = torch.get_rng_state()
    timings = neq.measure(call, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert timings.layers.keys() == neq.measure(net, inputs).layers.keys()
    assert graphs() == 2 * len(timings.layers)  # one for each gradient
    assert compiled.graphs() == 0  # and none is kept


def test_transforms_and_export_see_plain_layers():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    plain = copy.deepcopy(net)
    freeze(net, some(net))
    inputs = torch.randn(2, 3, 6, 6)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def per_sample(model):
        def loss(values, x):
            return functional_call(model, values, (x[None],)).square().sum()

        return lambda: vmap(grad(loss), (None, 0))(parameters, inputs)

    found = torch.compile(per_sample(net), backend="aot_eager")()
    torch.testing.assert_close(found, per_sample(plain)(), **SIZES)
    for strict in (False, True):
        exported = torch.export.export(net, (inputs,), strict=strict)
        assert not any("neq" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.slow
def test_batches_of_any_size(net):
    net.drop.p = 0.0
    eager = copy.deepcopy(net)
    call = torch.compile(net, backend="aot_eager", dynamic=True)
    for model in (call, eager):
        freeze(model, some(net))
    for size in (4, 3, 7):
        inputs = torch.randn(size, 3, 6, 6)
        found = []
        for model in (call, eager):
            model.zero_grad()
            model(inputs).square().sum().backward()
            found.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*found, **SIZES)
    assert graphs() == 1


@pytest.mark.parametrize("kernel", ["dense", "gather"])
def test_operators_are_what_they_say(kernel):
    layer = nn.Conv2d(4, 6, 3, padding=1)
    (place,) = neq.NeuronIndex(layer).layers
    seconds = {"dense": {6: 2.0}, kernel: {6: 2.0 if kernel == "dense" else 0.1}}
    work = _choose_work(place, masked(layer, [0, 2, 3]), True, neq.Timings({"": seconds}))
    handle = compiled.handle(work)
    gradient, inputs = torch.randn(2, 6, 5, 5), torch.randn(2, 4, 5, 5)
    size, stride = list(layer.weight.shape), list(layer.weight.stride())
    weight = layer.weight.detach()
    which = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (torch.ops.neq.weight_gradient, (gradient, inputs, handle, size, stride)),
        (torch.ops.neq.input_gradient, (gradient, inputs, weight, handle)),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=which)


def test_a_compiled_evaluation_is_one_graph(net):
    call = torch.compile(net, backend="eager")
    freezer = freeze(call, some(net, 0))
    call.eval()
    with torch.no_grad():
        call(torch.randn(4, 3, 6, 6))
        known = graphs()
        for seed in range(10):
            freezer.freeze(some(net, 0.2, seed))
            call(torch.randn(4, 3, 6, 6))
    assert graphs() == known


def test_blocks_that_share_their_code_stay_compiled():
    net = nn.Sequential(*(nn.Linear(3 + i, 4 + i) for i in range(6)))
    for layer in net:
        layer.compile(backend="eager")
    freezer = freeze(net, some(net, 0))
    for whole in ((), ("3",), ("2",), ("2", "3"), ("4",), ("1", "3")):
        freezer.freeze(freezer.neurons.select(whole))
        net(torch.randn(2, 3)).sum().backward()
        assert graphs() == 6


def test_copies_of_compiled_layers_are_plain(net):
    inputs = torch.randn(4, 3, 6, 6)
    net.eval()
    net.conv.compile(backend="eager")
    freeze(net, some(net))
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert type(copied.conv) is nn.Conv2d
        nn.init.zeros_(copied.conv.weight)
        nn.init.ones_(copied.conv.bias)
        assert (copied.conv(inputs) == 1).all()


def test_freezing_under_inference_mode(net):
    call = torch.compile(net, backend="aot_eager")
    freezer = freeze(call, some(net, 0))
    with torch.inference_mode():
        freezer.freeze(some(net))
    call(torch.randn(4, 3, 6, 6)).sum().backward()
    assert (net.fc2.weight.grad[freezer.frozen[freezer.neurons["fc2"]]] == 0).all()


def test_what_is_removed_leaves_the_next_freezer_alone(net):
    mask = some(net)
    first = freeze(net, some(net, 0))
    second = freeze(net, mask)
    first.remove()
    net(torch.randn(4, 3, 6, 6)).sum().backward()
    assert (net.conv.weight.grad[mask[:8]] == 0).all()
    second.remove()
    assert type(net.conv) is nn.Conv2d
    first, second = (freeze(net, mask) for _ in range(2))
    second.remove()
    first.remove()
    assert type(net.conv) is nn.Conv2d
    assert not any("neq" in name for name in vars(net.conv))


def test_memory_is_given_away_before_others_may_take_it(monkeypatch):
    kept, seen = Kept(), []
    detach = torch.Tensor.detach

    def watched(tensor):
        seen.append(list(kept._last))
        return detach(tensor)

    monkeypatch.setattr(torch.Tensor, "detach", watched)
    with torch.no_grad():
        kept.give(torch.zeros(2, 2))
    assert seen == [[]]
    assert kept._last


@pytest.mark.parametrize("compile_it", [False, True])
def test_gradients_that_are_written_to_are_not_seen_again(compile_it):
    net = nn.Linear(16, 16, bias=False)
    mask = masked(net, range(10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    call = torch.compile(net, backend="aot_eager") if compile_it else net
    freeze(call, mask, optimizer)
    for _ in range(3):
        call(torch.randn(4, 16)).square().sum().backward()
        assert (net.weight.grad[mask] == 0).all()
        assert (net.weight.grad[~mask] != 0).all()
        net.weight.grad.data.add_(1.0)  # without a new version
        optimizer.step()
        optimizer.zero_grad()
