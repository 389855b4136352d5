"""Models with frozen neurons against plain PyTorch ones: what trains ends alike."""

import copy
import io
import pickle

import pytest
import torch
from conftest import Net, random_batches, train_epoch
from test_selective import freeze
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq.selective import plain_type


def some(model, share=0.6, seed=0):
    size = len(neq.NeuronIndex(model))
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(net, dtype):
    net.eval()  # no dropout
    plain = copy.deepcopy(net)
    mask = some(net)
    freeze(net, mask)
    x = torch.randn(8, 3, 6, 6)  # float32, as data are
    for model in (net, plain):
        with torch.autocast("cpu", dtype=dtype):
            model(x).float().square().mean().backward()
    ours, theirs = dict(net.named_modules()), dict(plain.named_modules())
    for name, part in neq.NeuronIndex(plain).items():
        trains = ~mask[part]
        if trains.any():
            row, grad = ours[name].weight.grad[trains], theirs[name].weight.grad[trains]
            assert row.dtype == torch.float32
            torch.testing.assert_close(row, grad, rtol=0.05, atol=0.02 * float(grad.abs().max()))


def kept(model, x):
    """Bytes that a forward keeps for the backward, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    del output
    return sum(storages.values())


def chain():
    return nn.Sequential(
        *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(6))
    )


def test_inputs_that_nothing_needs_are_not_kept(vision):
    x = torch.randn(4, 8, 16, 16)
    model = chain()
    dense = kept(model, x)
    prefix = torch.zeros(48, dtype=torch.bool)
    prefix[:40] = True
    freezer = freeze(model, prefix)
    assert kept(model, x) < dense / 3  # the frozen prefix keeps nothing
    convolution = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    dense = kept(convolution, x)
    freezer = freeze(convolution, torch.tensor([False] * 8 + [True] * 16))
    assert kept(convolution, x) == x.nbytes < dense  # only what the first layer needs
    freezer.remove()
    assert kept(convolution, x) == dense
    transformer = vision.models.VisionTransformer(32, 8, 2, 4, 64, 256, num_classes=10)
    images = torch.randn(2, 3, 32, 32)
    dense = kept(transformer, images)
    neurons = neq.NeuronIndex(transformer)
    freeze(transformer, ~neurons.select(["heads"]))
    assert kept(transformer, images) < 0.8 * dense


def test_a_backward_with_everything_frozen(net):
    freeze(net, torch.ones(len(neq.NeuronIndex(net)), dtype=torch.bool))
    output = net(torch.randn(4, 3, 6, 6))
    assert output.requires_grad
    output /= 2  # what follows may work in place
    with FlopCounterMode(display=False) as counter:
        output.sum().backward()
    assert counter.get_total_flops() == 0
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_an_epoch_ends_in_the_weights_of_plain_layers_with_zeroed_gradients(make):
    torch.manual_seed(0)
    net = Net()
    net.drop = nn.Identity()
    net.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)  # before a norm its gradient is noise
    plain = copy.deepcopy(net)
    mask = some(net)
    mask[neq.NeuronIndex(net)["grouped"]] = True
    optimizer, other = make(net.parameters()), make(plain.parameters())
    freeze(net, mask, optimizer)
    still = {
        p: (mask[layer.neurons], p.detach().clone())
        for layer in neq.NeuronIndex(plain).layers
        for p in layer.parameters
    }
    for inputs, targets in random_batches(6):
        train_epoch(net, optimizer, [(inputs, targets)])
        other.zero_grad()
        nn.functional.cross_entropy(plain(inputs), targets).backward()
        for p, (frozen, _) in still.items():
            p.grad[frozen] = 0
        other.step()
        with torch.no_grad():
            for p, (frozen, values) in still.items():
                p[frozen] = values[frozen]
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_gradients_accumulate(net):
    net.eval()
    plain, mask = copy.deepcopy(net), some(net)
    freeze(net, mask)
    for model in (net, plain):
        for inputs, _ in random_batches(3):
            model(inputs).square().sum().backward()
    for ours, theirs in zip(net.conv.parameters(), plain.conv.parameters(), strict=True):
        torch.testing.assert_close(ours.grad[~mask[:8]], theirs.grad[~mask[:8]])
        assert (ours.grad[mask[:8]] == 0).all()


def test_a_penalty_on_the_weights_leaves_frozen_rows_alone(net):
    mask = some(net)
    freeze(net, mask)
    penalty = sum(p.square().sum() for p in net.parameters())
    (net(torch.randn(4, 3, 6, 6)).sum() + penalty).backward()
    for layer in neq.NeuronIndex(net).layers:
        for p in layer.parameters:
            frozen = mask[layer.neurons]
            assert p.grad is None if frozen.all() else (p.grad[frozen] == 0).all()
            assert frozen.all() or p.grad[~frozen].abs().sum() > 0


def test_a_frozen_model_is_the_same_model(net):
    names, kinds = list(net.state_dict()), [type(m) for m in net.modules()]
    freezer = freeze(net, some(net))
    assert list(net.state_dict()) == names
    assert [plain_type(m) for m in net.modules()] == kinds
    assert repr(net) == repr(Net())
    assert neq.NeuronIndex(net).unsupported == {}
    x = torch.randn(4, 3, 6, 6)
    net.eval()
    for twin in (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        torch.load(_saved(net), weights_only=False),
    ):
        assert [type(m) for m in twin.modules()] == kinds
        assert torch.equal(twin(x), net(x))
    freezer.remove()
    assert [type(m) for m in net.modules()] == kinds
    assert not net._forward_hooks


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


def test_function_transforms_see_the_plain_layer():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    freeze(net, some(net))
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(values, sample):
        return torch.func.functional_call(net, values, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, torch.randn(4, 3, 6, 6))
    assert (each["0.weight"].flatten(2).abs().sum((0, 2)) > 0).all()


def test_a_layer_called_once_and_twice_in_turns():
    """Frozen rows are zero after each backward, however many gradients came together."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    mask = torch.zeros(32, dtype=torch.bool)
    mask[[0, 1, 17]] = True
    freeze(net, mask, optimizer, timings=neq.Timings({"0": {"dense": {16: 1.0}}}))
    for step in range(20):
        optimizer.zero_grad()
        x = torch.randn(4, 8, 6, 6)
        loss = net(x).square().sum() + (net(x + 1).sum() if step % 2 else 0)
        loss.backward()
        assert (net[0].weight.grad[:2] == 0).all()
        assert (net[1].weight.grad[1] == 0).all()
        optimizer.step()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_a_graph_used_twice(net, reentrant):
    net.eval()
    plain, mask = copy.deepcopy(net), some(net)
    freeze(net, mask)
    x = torch.randn(4, 3, 6, 6, requires_grad=True)
    for model in (net, plain):
        output = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        output.backward(retain_graph=not reentrant)
        if not reentrant:
            output.backward()
    frozen = mask[:8]
    torch.testing.assert_close(net.conv.weight.grad[~frozen], plain.conv.weight.grad[~frozen])
    assert (net.conv.weight.grad[frozen] == 0).all()


def test_a_weight_that_its_owner_does_not_train(net):
    net.conv.weight.requires_grad_(False)
    mask = some(net)
    freeze(net, mask)
    net(torch.randn(4, 3, 6, 6)).sum().backward()
    assert net.conv.weight.grad is None
    assert (net.conv.bias.grad[mask[:8]] == 0).all()
    assert net.conv.bias.grad[~mask[:8]].abs().sum() > 0


def test_complex_layers_are_not_supported():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, dtype=torch.complex64))
    assert neq.NeuronIndex(model).unsupported == {"1": "its parameters are complex"}
