"""Selective layers against plain PyTorch: equal gradients for rows that train, no others."""

import copy
import io
import pickle

import pytest
import torch
from conftest import Net, random_batches, train_epoch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import neq
from neq.kernels import KERNELS, MULTIPLES, choose, everything
from neq.selective import Work, geometry, plain_type, select

# torch's own, once a process, where one side has to be padded more.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")

# (layer, input): every kind, with and without groups, padding that aten's kernels can't do.
LAYERS = {
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (3, 4, 5, 5)),
    "conv stride dilation": (
        lambda: nn.Conv2d(3, 6, (3, 2), stride=(2, 1), dilation=2, bias=False),
        (2, 3, 9, 8),
    ),
    "conv grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3, padding=1), (2, 6, 5, 5)),
    "conv depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 5, 5)),
    "conv depthwise x2": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 5)),
    "conv 1x1": (lambda: nn.Conv2d(5, 6, 1, stride=2), (3, 5, 5, 4)),
    "conv same": (lambda: nn.Conv2d(3, 6, 4, padding="same"), (2, 3, 6, 6)),
    "conv valid": (lambda: nn.Conv2d(3, 6, 3, padding="valid"), (2, 3, 6, 6)),
    "conv circular": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (2, 3, 6, 6)),
    "conv unbatched": (lambda: nn.Conv2d(3, 6, 3), (3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2), (3, 4, 9)),
    "conv1d reflect": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (3, 4, 9)),
    "conv1d unbatched": (lambda: nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 2, groups=2), (2, 2, 4, 4, 4)),
    "linear": (lambda: nn.Linear(5, 6), (4, 5)),
    "linear tokens": (lambda: nn.Linear(5, 6, bias=False), (2, 3, 5)),
    "linear vector": (lambda: nn.Linear(5, 6), (5,)),
    "batch norm": (lambda: nn.BatchNorm2d(6), (3, 6, 4, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(6), (5, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (3, 6, 4)),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 3, 6)),
}
MASKS = {
    "some": [0, 2, 3],
    "all but one": [0, 1, 2, 3, 4],
    "one": [5],
    "a whole group": [0, 1, 2, 3],
    "all": range(12),
}


def masked(layer, rows):
    mask = torch.zeros(len(layer.weight), dtype=torch.bool)
    mask[[row for row in rows if row < len(mask)]] = True
    return mask


def allowed(layer):
    shape = geometry(layer)
    if shape is None:
        return ["gather"]
    names = ["dense", "gather", "gather/8"] + ["swap", "swap/3"] * shape.swaps
    return (
        names
        + ["swap/last"] * (shape.swaps and len(shape.stride) == 2)
        + ["matmul"] * (shape.multiplies)
    )


def work_for(layer, mask, kernel, cut=False):
    shape = geometry(layer)
    if mask.all():
        return Work("skip", None, cut, shape)
    groups, inputs = (shape.groups, shape.groups * shape.weight[1]) if shape else (1, 1)
    if kernel == "dense":
        return Work(kernel, everything(mask, groups), cut, shape)
    return Work(kernel, choose(mask, groups, inputs, MULTIPLES.get(kernel, 1)), cut, shape)


def gradients(layer, x, weights):
    x = x.clone().requires_grad_()
    output = layer(x)
    (output * weights).sum().backward()
    return output.detach(), x.grad, [p.grad for p in layer.parameters()]


NORMS = ("batch norm", "batch norm 1d", "group norm", "layer norm")  # plain unless frozen whole


@pytest.mark.parametrize(
    "name, mask", [(n, m) for n in LAYERS for m in MASKS if m == "all" or n not in NORMS]
)
def test_rows_that_train_get_the_plain_gradient(name, mask):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    plain = build().double()
    mask = masked(plain, MASKS[mask])
    x = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn_like(plain(x))
    output, by_input, by_rows = gradients(plain, x, weights)
    for kernel in allowed(plain):
        layer = copy.deepcopy(plain)
        for p in layer.parameters():
            p.grad = None
        select(layer, work_for(layer, mask, kernel))
        ours = gradients(layer, x, weights)
        assert torch.equal(ours[0], output)
        torch.testing.assert_close(ours[1], by_input)
        for row, grad in zip(ours[2], by_rows, strict=True):
            if mask.all():
                assert row is None
            else:
                torch.testing.assert_close(row[~mask], grad[~mask])
                assert (row[mask] == 0).all()


@pytest.mark.parametrize("mask", ["some", "one", "all"])
@pytest.mark.parametrize("name", LAYERS)
def test_cut_is_the_plain_backward_of_a_masked_output_gradient(name, mask):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    plain = build().double()
    mask = masked(plain, MASKS[mask])
    x = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn_like(plain(x))
    keeps = (~mask).to(weights)
    if not isinstance(plain, (nn.Linear, nn.LayerNorm)):
        keeps = keeps.view(-1, *[1] * (weights.dim() - 1 - ("unbatched" not in name)))
    _, by_input, by_rows = gradients(copy.deepcopy(plain), x, weights * keeps)
    for kernel in ["dense"] if name in NORMS else {"dense", *allowed(plain)}:
        layer = copy.deepcopy(plain)
        select(layer, work_for(layer, mask, kernel, cut=True))
        if mask.all():
            assert not layer(x.clone().requires_grad_()).requires_grad
            continue
        ours = gradients(layer, x, weights)
        torch.testing.assert_close(ours[1], by_input)
        for row, grad in zip(ours[2], by_rows, strict=True):
            torch.testing.assert_close(row[~mask], grad[~mask])
            assert name in NORMS or (row[mask] == 0).all()


@pytest.mark.parametrize("name", ["conv", "conv grouped", "conv1d", "linear tokens"])
@pytest.mark.parametrize("cut", [False, True])
def test_gradcheck(name, cut):
    torch.manual_seed(0)
    build, shape = LAYERS[name]
    layer = build().double()
    if cut:  # not the gradient of any function, unless frozen rows have none to pass on
        with torch.no_grad():
            layer.weight[0] = 0
    select(layer, work_for(layer, masked(layer, [0]), "gather", cut))
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("kernel", KERNELS)
def test_channels_last_stays_channels_last(kernel):
    torch.manual_seed(0)
    layout = torch.channels_last
    plain = nn.Conv2d(4, 8, 1 if kernel == "matmul" else 3, padding=0 if kernel == "matmul" else 1)
    plain = plain.to(memory_format=layout)
    x = torch.randn(3, 4, 5, 5).to(memory_format=layout)
    weights = torch.randn(3, 8, 5, 5).to(memory_format=layout)
    theirs = gradients(copy.deepcopy(plain), x, weights)
    layer, mask = copy.deepcopy(plain), masked(plain, [1, 4, 5])
    select(layer, work_for(layer, mask, kernel))
    ours = gradients(layer, x, weights)
    assert ours[0].is_contiguous(memory_format=layout)
    assert ours[1].is_contiguous(memory_format=layout)
    assert ours[2][0].stride() == theirs[2][0].stride()
    torch.testing.assert_close(ours[1], theirs[1])
    torch.testing.assert_close(ours[2][0][~mask], theirs[2][0][~mask])


def freeze(model, mask, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone(), **options)
    freezer.freeze(mask)
    return freezer


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


@pytest.mark.parametrize("frozen", [[0], range(12)])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_only_what_autograd_grad_asks_for_is_computed(name, frozen):
    build, shape = LAYERS[name]
    layer = build()
    work = work_for(layer, masked(layer, frozen), "gather")
    x = torch.randn(shape, requires_grad=True)
    flops = []
    for chosen in (None, work):
        select(layer, chosen)
        output = layer(x).sum()
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(output, x)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0
    if work.rows is not None:
        (weight,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        select(layer, None)
        (plain,) = torch.autograd.grad(layer(x).sum(), layer.weight)
        torch.testing.assert_close(weight[1:], plain[1:])


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


@pytest.mark.parametrize("frozen", [[1], range(12)])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_may_be_changed_in_place(name, frozen):
    build, shape = LAYERS[name]
    layer = build()
    x = torch.randn(shape, requires_grad=True)
    freeze(layer, masked(layer, frozen))
    output = layer(x)
    output *= torch.randn_like(output)
    output.sum().backward()
    assert x.grad.abs().sum() > 0


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


def test_padding_that_was_assigned_later():
    plain = nn.Conv2d(3, 8, 3, padding=1)
    plain.padding = plain.dilation = (2, 2)
    layer, mask = copy.deepcopy(plain), masked(plain, [0, 3])
    select(layer, work_for(layer, mask, "gather"))
    x = torch.randn(2, 3, 8, 8)
    weights = torch.randn(2, 8, 8, 8)
    ours, theirs = gradients(layer, x, weights), gradients(plain, x, weights)
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("name", ["conv", "linear", "linear tokens"])
def test_an_empty_batch(name):
    build, shape = LAYERS[name]
    layer = build()
    select(layer, work_for(layer, masked(layer, [0]), "gather"))
    x = torch.randn(0, *shape[1:], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert (layer.weight.grad == 0).all()


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


def test_many_gradients_at_once_and_forward_mode():
    layer = nn.Linear(3, 4)
    select(layer, work_for(layer, masked(layer, [0]), "gather"))
    output = layer(torch.randn(2, 3))
    (rows,) = torch.autograd.grad(
        output, layer.weight, torch.eye(8).view(8, 2, 4), is_grads_batched=True
    )
    assert rows.shape == (8, 4, 3)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.randn(2, 3), torch.randn(2, 3))
        assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None


def test_complex_layers_are_not_supported():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4, dtype=torch.complex64))
    assert neq.NeuronIndex(model).unsupported == {"1": "its parameters are complex"}


def test_a_compiled_model_computes_densely(net):
    compiled = torch.compile(net)
    mask = some(net)
    freezer = freeze(compiled, mask, torch.optim.SGD(net.parameters(), lr=0.1))
    assert {part.kernel for part in freezer.plan.values()} == {"dense"}
    assert type(net.conv) is nn.Conv2d
    with pytest.raises(ValueError, match="not compiled"):
        neq.NeuronFreezer(compiled, torch.optim.SGD(net.parameters(), lr=0.1), gradient="cut")
