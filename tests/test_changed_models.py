"""Models that are not the ones any more that a freezer was made for, or not whole."""

import pytest
import torch
from conftest import random_batches
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.utils import parametrizations, prune

import neq


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def backward(net, dtype=torch.float32):
    (inputs, targets), *_ = random_batches(1)
    nn.functional.cross_entropy(net(inputs.to(dtype)).float(), targets).backward()


def freeze(freezer):
    freezer.freeze(torch.arange(len(freezer.frozen)) < 4)


def grown(net):
    net[3].weight = nn.Parameter(torch.randn(6, 128))
    net[3].bias = nn.Parameter(torch.zeros(6))


def grown_in_place(net):
    net[3].weight.data, net[3].bias.data = torch.randn(6, 128), torch.zeros(6)


def replaced(place, layer):
    def change(net):
        net[place] = layer

    return change


def assigned(net):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)


def tied(net):
    net.append(nn.Linear(128, 4))
    net[4].weight = net[3].weight


def converted(net):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        net.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def without_bias(net):
    net[3].bias = None


CHANGES = {
    "grown": (grown, "layer 3 had 4 neurons and has 6"),
    "grown in place": (grown_in_place, "layer 3 had 4 neurons and has 6"),
    "a larger one": (replaced(3, nn.Linear(128, 6)), "layer 3 had 4 neurons and has 6"),
    "the same shape": (replaced(3, nn.Linear(128, 4)), "layer 3 has been replaced"),
    "inputs": (replaced(0, nn.Conv2d(5, 8, 3)), "layer 0 had 3 inputs and has 5"),
    "kernel": (
        replaced(0, nn.Conv2d(3, 8, 5)),
        r"layer 0 had weights of shape \[8, 3, 3, 3\] and has \[8, 3, 5, 5\]",
    ),
    "another kind": (replaced(3, nn.Identity()), "layer 3 has been replaced"),
    "gone": (lambda net: net.pop(3), "layer 3 is gone"),
    "new": (lambda net: net.append(nn.LayerNorm(4)), "layer 4 is new"),
    "new in place of none": (replaced(1, nn.BatchNorm2d(8)), "layer 1 is new"),
    "assigned": (assigned, "layer 0 has other parameters than it had"),
    "converted": (converted, "layer 0 has other parameters than it had"),
    "bias": (without_bias, "layer 3 has other parameters than it had"),
    "weight norm": (
        lambda net: parametrizations.weight_norm(net[3]),
        "layer 3 can't freeze any more, since its weight is parametrised",
    ),
    "pruned": (
        lambda net: prune.l1_unstructured(net[3], "weight", amount=0.5),
        "layer 3 can't freeze any more, since its weight is parametrised",
    ),
    "tied": (tied, "layer 3 can't freeze any more, since its parameters are shared"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_refused(net, change):
    freezer = neq.NeuronFreezer(net, sgd(net), neq.FreezeAfter(1))
    freezer.update()
    freeze(freezer)
    backward(net)
    before, (make, message) = freezer.frozen, CHANGES[change]
    make(net)
    for call in (freezer.update, lambda: freeze(freezer)):
        with pytest.raises(ValueError, match=f"^{message}.*: make a new freezer$"):
            call()
    assert freezer.epoch == 1
    assert torch.equal(freezer.frozen, before)
    freezer.remove()
    assert type(net[0]) is nn.Conv2d
    made = neq.NeuronFreezer(net, sgd(net), neq.FreezeAfter(1))
    made.update()
    made.update()


@pytest.mark.parametrize("policy", [neq.Everyone(), neq.AtEquilibrium()])
def test_a_layer_of_another_name_is_the_same_unless_outputs_are_compared(net, policy):
    freezer = neq.NeuronFreezer(net, sgd(net), policy)
    batches = [torch.randn(2, 3, 6, 6)]
    freezer.update(batches)
    net[3] = nn.Sequential(net[3])
    freeze(freezer)
    if policy.needs_velocity:
        with pytest.raises(ValueError, match=r"^layer 3 is called 3\.0 now: make a new freezer$"):
            freezer.update(batches)
    else:
        freezer.update(batches)


def test_what_else_changes_does_not_matter(net):
    freezer = neq.NeuronFreezer(net, sgd(net), neq.AtEquilibrium())
    batches = [torch.randn(2, 3, 6, 6)]
    freezer.update(batches)
    freeze(freezer)
    net[1] = nn.GELU()
    net.append(nn.Identity())
    net.append(nn.PReLU())  # never was one that freezes
    net.eval()
    freezer.update(batches)


def as_double(net):
    net.double()
    return torch.float64


def as_bfloat(net):
    net.to(torch.bfloat16)
    return torch.bfloat16


def to_and_fro(net):
    net.half()
    net.float()
    return torch.float32


def laid_out(net):
    net.to(memory_format=torch.channels_last)
    return torch.float32


def swapped(net):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return as_double(net)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("convert", [as_double, as_bfloat, to_and_fro, laid_out, swapped])
def test_cast_models_go_on_working(net, convert):
    optimizer = sgd(net)
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone())
    freeze(freezer)
    backward(net)
    optimizer.step()
    optimizer.zero_grad()
    dtype = convert(net)
    for state in optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
    before = net[0].weight[:4].detach().clone()
    for step in (optimizer.step, freezer.update, lambda: freeze(freezer), optimizer.step):
        backward(net, dtype)
        step()
    assert torch.equal(net[0].weight[:4], before)
    net[0].weight.data[0] += 1  # from then on its rows are watched again
    with pytest.raises(ValueError, match="rows moved while they were frozen, in layer 0"):
        freezer.update()


@pytest.mark.parametrize(
    "layer, name",
    [
        (nn.LazyLinear(4), "1"),
        (nn.LazyConv2d(4, 3), "1"),
        (nn.LazyBatchNorm2d(), "1"),
        (nn.LazyBatchNorm2d(affine=False), "1"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "1.1"),
    ],
    ids=str,
)
def test_layers_without_a_size_yet(layer, name):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), layer)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"^layer {name} has no size yet: run one forward first"):
        neq.NeuronFreezer(model, optimizer)
    model(torch.randn(2, 3, 6, 6))
    neq.NeuronFreezer(model, sgd(model)).update()


@pytest.fixture
def mesh(tmp_path):
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


WHOLE = "NeuronFreezer needs whole parameters, and .* is sharded .* use DistributedDataParallel"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_sharded_models_are_refused(net, mesh):
    def part(net):
        fully_shard(net[0], mesh=mesh)
        return net

    sharded = [
        lambda net: fully_shard(net, mesh=mesh),
        lambda net: torch.compile(fully_shard(net, mesh=mesh)),
        lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu")),
        lambda net: FullyShardedDataParallel(
            net, device_id=torch.device("cpu"), use_orig_params=True
        ),
        lambda net: parallelize_module(net, mesh, {"1": ColwiseParallel()}),
        part,
    ]
    for shard in sharded:
        model = shard(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(4, 4)))
        with pytest.raises(ValueError, match=WHOLE):
            neq.NeuronFreezer(model, torch.optim.SGD(model.parameters(), lr=0.1))
    freezer = neq.NeuronFreezer(net, sgd(net), neq.Everyone())
    freezer.update()
    fully_shard(net, mesh=mesh)
    with pytest.raises(ValueError, match=WHOLE):
        freezer.update()


def test_whole_models_in_wrappers_are_not_refused(net, mesh):
    wrapped = nn.parallel.DistributedDataParallel(net)
    freezer = neq.NeuronFreezer(wrapped, sgd(net), neq.Everyone())
    freezer.update()
    freeze(freezer)
    freezer.update()
