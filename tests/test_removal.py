"""Removal against networks that were built narrow, and against rows cut out by hand."""

import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from neq.pruning import RemovalError, dead_neurons, shrunk
from suites.lenet import LeNet5
from suites.resnet import ResNet, resnet32

IMAGE = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def kill(module, rows, bias=None):
    rows = list(rows)
    module.weight[rows] = 0
    if module.bias is not None:
        module.bias[rows] = 0.0 if bias is None else bias


@torch.no_grad()
def shaken(model, seed=0):
    """With norms that have seen something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -1, 1),
                (module.running_var, 0.5, 2),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.5, 0.5),
            ):
                tensor.uniform_(low, high, generator=generator)
    return model.eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def flops(model, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(inputs)
    return counter.get_total_flops()


def same(model, found, inputs):
    """By evaluating again, on inputs of its own."""
    with torch.no_grad():
        before = copy.deepcopy(model).eval().double()(inputs.double())
        after = copy.deepcopy(found.model).eval().double()(inputs.double())
    scale = float(before.abs().max())
    assert float((before - after).abs().max()) < 1e-6 * scale  # weights were rounded to float32
    assert found.difference_float64 < 1e-6 * scale
    assert found.difference < 1e-5 * scale


def half_dead_resnet32():
    """Half of the neurons of each layer: of a block's inside and, through all of a stage, outside,
    the same channels before and after the shortcuts that pad.
    """
    model = shaken(resnet32())
    stay = [range(4, 12)]
    for size in (16, 32):
        inside = [size // 2 + i for i in stay[-1]]
        stay.append([*range(size // 4), *inside, *range(3 * size // 2, 3 * size // 2 + size // 4)])
    pairs = [(model.conv1, model.bn1, stay[0])]
    for stage, rows in zip((model.layer1, model.layer2, model.layer3), stay, strict=True):
        for block in stage:
            pairs.append((block.conv2, block.bn2, rows))
            pairs.append((block.conv1, block.bn1, range(1, block.conv1.out_channels, 2)))
    inside = {b.bn1 for b in model.modules() if hasattr(b, "conv2")}
    for conv, norm, rows in pairs:
        dead = [i for i in range(conv.out_channels) if i not in set(rows)]
        kill(conv, dead)
        with torch.no_grad():
            norm.running_mean[dead] = 0.0
            # Outside a ReLU follows the sum alone: there a shift is summed up.
            norm.bias[dead] = -norm.bias[dead].abs() if norm in inside else 0.0
    return model


def test_a_resnet32_of_which_half_is_dead_becomes_the_dense_one_of_half_the_width():
    model = half_dead_resnet32()
    found, narrow = shrunk(model, IMAGE), ResNet(5, 8, 3, 10)
    assert found.stuck == ()
    assert found.dead == (16 + 10 * (16 + 32 + 64)) // 2
    shapes = {name: tensor.shape for name, tensor in found.model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in narrow.state_dict().items()}
    assert parameters(found.model) == parameters(narrow)
    assert flops(found.model, IMAGE) == flops(narrow, IMAGE)
    same(model, found, torch.randn(4, 3, 32, 32))
    assert found.difference < 1e-5


def test_rows_of_a_plain_network_are_those_that_were_cut_out_by_hand():
    model = LeNet5()
    kill(model.conv1, range(10))
    kill(model.conv2, range(5, 30))
    kill(model.fc1, range(250))
    found = shrunk(model, torch.randn(2, 1, 28, 28))
    assert found.removed == {
        "conv1": tuple(range(10)),
        "conv2": tuple(range(5, 30)),
        "fc1": tuple(range(250)),
    }
    columns = [c * 16 + i for c in (*range(5), *range(30, 50)) for i in range(16)]
    stay = [*range(5), *range(30, 50)]
    by_hand = {
        "conv1.weight": model.conv1.weight[10:],
        "conv2.weight": model.conv2.weight[stay][:, 10:],
        "conv2.bias": model.conv2.bias[stay],
        "fc1.weight": model.fc1.weight[250:][:, columns],
        "fc2.weight": model.fc2.weight[:, 250:],
        "fc2.bias": model.fc2.bias,
    }
    state = found.model.state_dict()
    for name, tensor in by_hand.items():
        assert torch.equal(state[name], tensor), name
    assert found.widths == {
        "conv1": (1, 10),
        "conv2": (10, 25),
        "fc1": (400, 250),
        "fc2": (250, 10),
    }
    assert (found.dead, found.stuck) == (285, ())


def test_a_constant_is_folded_into_the_bias_of_those_that_read_it():
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3))
    kill(model[0], [1, 3], bias=torch.tensor([0.7, -2.0]))
    found = shrunk(model, torch.randn(2, 4))
    said = torch.sigmoid(model[0].bias.detach()[[1, 3]])
    expected = model[2].bias + model[2].weight[:, [1, 3]] @ said
    torch.testing.assert_close(found.model[2].bias, expected)
    assert found.widths == {"0": (4, 3), "2": (3, 3)}
    same(model, found, torch.randn(9, 4))


@pytest.mark.parametrize("bias, norm", [(True, False), (False, True), (False, False)])
def test_a_constant_is_folded_into_a_convolution_without_padding(bias, norm):
    last = [nn.BatchNorm2d(5)] if norm else []
    model = shaken(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 3, bias=bias), *last
        )
    )
    kill(model[0], [0, 2, 4], bias=torch.tensor([0.3, 0.6, -0.2]))
    found = shrunk(model, IMAGE)
    assert found.widths == {"0": (3, 3), "2": (3, 5)}
    assert (found.model[2].bias is None) == norm  # a norm behind it takes the constant
    same(model, found, torch.randn(2, 3, 32, 32))


def padded():
    """A dead row says 0.3, one 0.6, one -0.2, which no one hears; the reader's borders are zero."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1))
    kill(model[0], [0, 2, 4], bias=torch.tensor([0.3, 0.6, -0.2]))
    return model


def test_at_padded_borders_one_neuron_says_what_all_have_said():
    model = padded()
    found = shrunk(model, IMAGE)
    assert found.removed == {"0": (0, 4)}
    ((layer, neurons, reason),) = [(s.layer, s.neurons, s.reason) for s in found.stuck]
    assert (layer, neurons) == ("0", 1)
    assert "zero-padded borders of 2" in reason
    expected = model[2].weight[:, 2] + 0.5 * model[2].weight[:, 0]
    torch.testing.assert_close(found.model[2].weight[:, 1], expected)
    same(model, found, torch.randn(2, 3, 9, 9))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_other_paddings_are_of_the_constant_itself(mode):
    model = padded()
    model[2].padding_mode = mode
    model[2]._reversed_padding_repeated_twice = [1, 1, 1, 1]
    found = shrunk(model, IMAGE)
    assert found.removed == {"0": (0, 2, 4)}
    same(model, found, torch.randn(2, 3, 9, 9))


class Residual(nn.Module):
    def __init__(self, *, by_function=False):
        super().__init__()
        self.entry, self.inside = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 1)
        self.pad, self.by_function = nn.ZeroPad3d((0, 0, 0, 0, 1, 1)), by_function
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.entry(x)
        wide = functional.pad(x, (0, 0, 0, 0, 1, 1)) if self.by_function else self.pad(x)
        return self.head((wide + self.inside(x)).mean((2, 3)))


def test_what_a_sum_joins_goes_together_or_not_at_all():
    model = Residual()
    kill(model.entry, [0, 1])
    kill(model.inside, [0, 1, 3])  # of which 0 is joined with nothing, 1 with entry's 0
    found = shrunk(model, IMAGE)
    assert found.removed == {"entry": (0,), "inside": (0, 1)}
    assert found.model.pad.padding == (0, 0, 0, 0, 0, 1)
    assert {(s.layer, s.neurons, s.reason) for s in found.stuck} == {
        ("entry", 1, "it is joined with neurons that live, of inside"),
        ("inside", 1, "it is joined with neurons that live, of entry"),
    }
    same(model, found, torch.randn(2, 3, 8, 8))


def test_a_function_that_pads_can_not_be_made_narrower():
    model = Residual(by_function=True)
    kill(model.entry, [0])
    kill(model.inside, [0, 1])
    found = shrunk(model, IMAGE)
    assert found.removed == {}
    assert {s.reason for s in found.stuck} == {
        "a function pads its channels; nn.ZeroPad3d can be made narrower"
    }


def test_neurons_that_nobody_reads_go_and_then_those_that_only_they_read():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        model[4].weight[:, [2, 3]] = 0  # nobody reads rows 2 and 3 of the second layer,
        model[2].weight[:, 1] = 0
        model[2].weight[[2, 3], 1] = 1.0  # which alone read row 1 of the first
    found = shrunk(model, torch.randn(2, 4))
    assert found.removed == {"0": (1,), "2": (2, 3)}
    assert (found.dead, found.stuck) == (0, ())
    same(model, found, torch.randn(9, 4))


def test_a_layer_keeps_one_neuron_and_outputs_stay():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    kill(model[0], range(5))
    kill(model[2], [1])
    found = shrunk(model, torch.randn(2, 4))
    assert found.widths == {"0": (4, 1), "2": (1, 3)}
    assert {(s.layer, s.reason) for s in found.stuck} == {
        ("0", "a layer keeps one neuron"),
        ("2", "it is an output of the model"),
    }
    same(model, found, torch.randn(9, 4))


def test_depthwise_convolutions_become_narrower_with_what_they_filter():
    model = shaken(
        nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 1),
        )
    )
    kill(model[0], [0, 1])  # what they filter is no constant at the borders, if the norm shifts it
    kill(model[3], [4, 5])
    with torch.no_grad():
        model[1].running_mean[[0, 1]] = 0
        model[1].bias[0], model[1].bias[1] = -0.1, 0.4
    found = shrunk(model, IMAGE)
    assert found.removed == {"0": (0, 4, 5), "3": (0, 4, 5)}
    assert [(s.layer, s.neurons) for s in found.stuck] == [("0", 1)]
    assert (found.model[3].groups, found.model[3].in_channels) == (5, 5)
    assert found.widths == {"0": (3, 5), "3": (5, 5), "6": (5, 4)}
    same(model, found, torch.randn(2, 3, 9, 9))


ACROSS = "computes across channels, or can't be made narrower"


class Across(nn.Module):
    def __init__(self, norm, groups=1):
        super().__init__()
        self.entry, self.norm = nn.Conv2d(3, 8, 1), norm
        self.exit = nn.Conv2d(8, 4, 1, groups=groups)

    def forward(self, x):
        return self.exit(self.norm(self.entry(x)))


@pytest.mark.parametrize(
    "model, reason",
    [
        (
            Across(nn.GroupNorm(2, 8)),
            "GroupNorm computes across channels, or can't be made narrower",
        ),
        (Across(nn.Identity(), groups=2), "a convolution with groups"),
    ],
)
def test_what_computes_across_channels_is_said(model, reason):
    kill(model.entry, [0, 1])
    found = shrunk(model, IMAGE)
    assert found.removed == {}
    assert [(s.layer, s.neurons, s.reason) for s in found.stuck] == [("entry", 2, reason)]
    same(model, found, torch.randn(2, 3, 9, 9))


class CountsOnWidths(nn.Module):
    """Its forward knows how wide the first layer is; the others it can do without."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        return self.c(torch.relu(self.b(torch.relu(self.a(x)) * self.a.out_features)))


def test_what_does_not_agree_is_taken_back_and_the_rest_goes():
    model = CountsOnWidths()
    kill(model.a, [0])
    kill(model.b, [1, 2])
    found = shrunk(model, torch.randn(2, 4))
    assert found.removed == {"b": (1, 2)}
    ((layer, reason),) = [(s.layer, s.reason) for s in found.stuck]
    assert layer == "a"
    assert reason.startswith("outputs would differ by ")
    same(model, found, torch.randn(9, 4))


def test_the_model_is_left_as_it_was_and_the_copy_is_like_it():
    model = LeNet5().half().train()
    model.conv2.eval()
    model.conv1.weight.requires_grad_(False)
    kill(model.conv1, range(10))
    model.fc2.weight.grad = torch.ones_like(model.fc2.weight)
    before = copy.deepcopy(model.state_dict())
    found = shrunk(model, torch.randn(2, 1, 28, 28).half())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert torch.equal(model.fc2.weight.grad, torch.ones_like(model.fc2.weight))
    assert (model.training, model.conv2.training) == (True, False)
    assert (found.model.training, found.model.conv2.training) == (True, False)
    assert {tensor.dtype for tensor in found.model.state_dict().values()} == {torch.float16}
    assert not found.model.conv1.weight.requires_grad
    assert found.model.conv2.weight.requires_grad
    assert type(found.model) is LeNet5


def test_several_inputs_and_whole_numbers():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.a = nn.Embedding(9, 4), nn.Linear(4, 6)
            self.b = nn.Linear(6, 2)

        def forward(self, words, scale):
            return self.b(torch.relu(self.a(self.words(words).mean(1))) * scale)

    model = Words()
    kill(model.a, [1, 2], bias=torch.tensor([0.5, -0.5]))
    found = shrunk(model, (torch.arange(6).view(2, 3), torch.rand(2, 1)))
    # Scaled by an input, a constant is none.
    assert found.removed == {"a": (2,)}
    assert [s.reason for s in found.stuck] == ["what b reads of it is no constant"]


class Peculiar(nn.Module):
    """Its forward does what `kind` says."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        if self.kind == "in place":
            x.sub_(0.5).mul_(2)
        hidden = torch.relu(self.a(x))
        if self.kind == "gate":  # hardly ever shut
            hidden = hidden * functional.hardsigmoid(4 + x.mean(1, keepdim=True))
        if self.kind == "largest":
            hidden = hidden + 0 * hidden.amax(1, keepdim=True)
        outputs = self.b(hidden)
        if self.kind == "labels":
            return outputs, outputs.argmax(1)
        if self.kind == "infinite":
            return outputs.masked_fill(outputs < 0, -torch.inf), torch.log(x)
        return outputs


@pytest.mark.parametrize("kind", ["in place", "labels", "infinite", "plain"])
def test_forwards_that_do_more(kind):
    model, example = Peculiar(kind), torch.rand(2, 4)
    kill(model.a, [1, 2], bias=torch.tensor([0.5, -0.5]))
    before = example.clone()
    found = shrunk(model, example)
    assert torch.equal(example, before)
    assert (found.removed, found.stuck) == ({"a": (1, 2)}, ())
    assert 0 <= found.difference < 1e-6
    assert 0 <= found.difference_float64 < 1e-6


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("gate", "what b reads of it is no constant"),
        ("largest", "torch's Amax may compute across channels"),
    ],
)
def test_what_is_a_constant_on_the_example_alone(kind, reason):
    model = Peculiar(kind)
    kill(model.a, [1], bias=torch.tensor([0.5]))
    found = shrunk(model, torch.randn(2, 4))
    assert found.removed == {}
    assert [s.reason for s in found.stuck] == [reason]


def test_parametrised_weights():
    model = LeNet5()
    prune.random_structured(model.conv2, "weight", 0.5, dim=0)
    with pytest.raises(RemovalError, match=r"'conv2' is parametrised: .*prune\.remove"):
        shrunk(model, torch.randn(2, 1, 28, 28))
    prune.remove(model.conv2, "weight")
    assert len(shrunk(model, torch.randn(2, 1, 28, 28)).removed["conv2"]) >= 24


def test_dead_neurons_are_counted():
    model = LeNet5()
    kill(model.conv2, range(5))
    assert dead_neurons(model) == {"conv1": 0, "conv2": 5, "fc1": 0, "fc2": 0}


def test_nothing_to_remove():
    model = LeNet5()
    found = shrunk(model, torch.randn(2, 1, 28, 28))
    assert (found.removed, found.dead, found.stuck) == ({}, 0, ())
    assert (found.difference, found.difference_float64) == (0.0, 0.0)
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_model_that_can_not_be_traced():
    class Detached(LeNet5):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    with pytest.raises(RemovalError, match="torch-pruning can't trace the model: "):
        shrunk(Detached(), torch.randn(2, 1, 28, 28))


def test_a_model_that_can_not_be_evaluated():
    with pytest.raises(
        RemovalError, match=r"can't be evaluated on the example, or not in float64: Runtime"
    ):
        shrunk(LeNet5(), torch.randn(2, 3, 28, 28))


def test_without_torch_pruning(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match=r"pip install 'neqbench\[pruning\]'"):
        shrunk(LeNet5(), torch.randn(2, 1, 28, 28))
