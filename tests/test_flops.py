import copy

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from oracle import counted_by_torch
from torch import nn
from torch.nn import functional
from trials import slow

import neq
from harness.flops.costs import count_costs
from harness.suite import files
from harness.suite.parts import build_model
from suites.resnet import resnet8, resnet32

# The four set-ups of the paper: dense backward FLOPs by its convention.
PUBLISHED = {
    "cifar10": 138_937_600,
    "imagenet": 3_638_081_536,
    "imagenet-swin": 30_280_413_184,
    "segmentation": 305_056_481_600,
}
LARGE = ("imagenet-swin", "segmentation")


def freeze_layers(model, costs, chosen):
    """A mask of whole layers; the same layers of `model` lose requires_grad."""
    mask = torch.zeros(len(costs.neurons), dtype=torch.bool)
    modules = dict(model.named_modules())
    for name in chosen:
        mask[costs.neurons[name]] = True
        modules[name].requires_grad_(False)
    return mask & costs.called


@pytest.mark.parametrize("name", ["cifar10", "imagenet", *map(slow, LARGE)])
def test_the_published_models(name):
    suite, folder = files.load_suite(name)
    parts = suite.model
    model, shape = build_model(parts.build, folder, parts.arguments), parts.input
    costs = count_costs(model, shape, parts.unpublished)
    nothing = torch.zeros(len(costs.neurons), dtype=torch.bool)
    assert costs.backward(nothing).paper == PUBLISHED[name]
    model.to("meta")  # PyTorch's counter reads shapes only
    backward = costs.backward(nothing)
    forward, dense = counted_by_torch(model, shape, mapping={})
    assert (costs.forward(), backward.dense, backward.required) == (forward, dense, dense)
    assert backward.executed == dense
    names = list(costs.neurons)
    chosen = names[: len(names) // 3] + names[len(names) // 2 :: 5]
    mask = freeze_layers(model, costs, chosen)
    assert costs.backward(mask).required == counted_by_torch(model, shape)[1] < dense


def test_batch_norm_and_convolution_agree_with_fvcore_in_eval_mode():
    by_operator = FlopCountAnalysis(resnet32().eval(), torch.zeros(1, 3, 32, 32))
    by_operator.unsupported_ops_warnings(False)
    count = by_operator.by_operator()
    assert 2 * (count["conv"] + count["batch_norm"] + count["linear"]) == 138_937_600


class _Apply(nn.Module):
    """`run(self, x)` as the forward of the given modules."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


def add_in_place(m, x):
    y = m.a(x)
    y += x
    return m.b(y)


def attend(m, x):
    q, k, v = m.a(x).chunk(3, -1)
    return functional.scaled_dot_product_attention(q, k, v)


def attend_with_weights(m, x):
    mask = torch.zeros(x.shape[1], x.shape[1])
    return m.a(x, x, x, need_weights=True, attn_mask=mask)[0]


MODELS = {
    "in-place on a view": (nn.Sequential(nn.Linear(4, 6), nn.ReLU(True), nn.Linear(6, 3)), (5, 4)),
    "+= on a view": (_Apply(add_in_place, a=nn.Linear(4, 4), b=nn.Linear(4, 3)), (5, 4)),
    "fused attention": (_Apply(attend, a=nn.Linear(8, 24)), (5, 8)),
    "packed attention": (
        _Apply(attend_with_weights, a=nn.MultiheadAttention(8, 2, batch_first=True)),
        (5, 8),
    ),
    "encoder layer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (5, 8)),
    "grouped": (
        nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(True), nn.Conv2d(8, 8, 3, groups=8)),
        (4, 8, 8),
    ),
    "transposed": (
        nn.Sequential(
            nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2), nn.Conv2d(6, 4, 1)
        ),
        (4, 8, 8),
    ),
    "1d": (nn.Sequential(nn.Conv1d(4, 8, 3), nn.Conv1d(8, 8, 3, groups=2, dilation=2)), (4, 20)),
    "3d": (nn.Sequential(nn.Conv3d(2, 4, 3), nn.Conv3d(4, 4, 2, groups=2)), (2, 6, 6, 6)),
    "a weight in a function": (
        _Apply(
            lambda m, x: functional.conv2d(m.a(x), m.b.weight),
            a=nn.Conv2d(3, 4, 3),
            b=nn.Conv2d(4, 5, 3),
        ),
        (3, 8, 8),
    ),
    "batch on the right": (
        _Apply(lambda m, x: m.a(x).t() @ torch.relu(m.b(x)), a=nn.Linear(4, 3), b=nn.Linear(4, 4)),
        (4,),
    ),
    "a matrix on the left": (
        _Apply(lambda m, x: m.b.weight @ m.a(x), a=nn.Linear(4, 6), b=nn.Linear(5, 7)),
        (5, 4),
    ),
    "einsum": (
        _Apply(
            lambda m, x: torch.einsum("bnd,bmd->bnm", m.a(x), m.b(x)),
            a=nn.Linear(13, 17),
            b=nn.Linear(13, 17),
        ),
        (29, 13),
    ),
    "biases only": (nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
}
MODELS["biases only"][0].requires_grad_(False)
for name, parameter in MODELS["biases only"][0].named_parameters():
    parameter.requires_grad_(name.endswith("bias"))


@pytest.mark.parametrize("name", MODELS)
def test_every_product_is_counted_as_torch_executes_it(name):
    model, shape = MODELS[name]
    model = copy.deepcopy(model)
    costs = count_costs(model, shape)
    nothing = torch.zeros(len(costs.neurons), dtype=torch.bool)
    forward, dense = counted_by_torch(model, shape)
    backward = costs.backward(nothing)
    assert (costs.forward(), backward.dense, backward.required) == (forward, dense, dense)
    called = [name for name in costs.neurons if name not in costs.uncalled]
    for frozen in [called[:1], called[1:], called] if called else []:
        some = copy.deepcopy(model)
        mask = freeze_layers(some, costs, frozen)
        if any(p.requires_grad for p in some.parameters()):
            assert costs.backward(mask).required == counted_by_torch(some, shape)[1]


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", slow("vit_b_32"), slow("swin_t"), "shufflenet_v2_x0_5"]
)
def test_torchvision_s_models(vision, name):
    model = getattr(vision.models, name)()
    costs = count_costs(model, (3, 224, 224))
    forward, dense = counted_by_torch(model, (3, 224, 224))
    backward = costs.backward(torch.zeros(len(costs.neurons), dtype=torch.bool))
    assert (costs.forward(), backward.dense, backward.required) == (forward, dense, dense)


def test_a_vector_and_a_recurrent_layer():
    pooled = _Apply(lambda m, x: m.a(x) @ m.b.weight[0], a=nn.Linear(4, 6), b=nn.Linear(6, 1))
    assert count_costs(pooled, (5, 4)).forward() == 2 * (5 * 4 * 6 + 5 * 6)
    recurrent = _Apply(lambda m, x: m.b(m.a(x)[0]), a=nn.LSTM(4, 6), b=nn.Linear(6, 2))
    assert count_costs(recurrent, (5, 4)).uncounted == ["aten::lstm"]


def live_and_detached(m, x):
    return m.b(m.a(x)) + 0 * m.b(m.a(2 * x).detach())


def test_a_discarded_call_of_a_layer_that_is_also_used():
    model = _Apply(live_and_detached, a=nn.Linear(4, 4), b=nn.Linear(4, 3))
    forward, dense = counted_by_torch(model, (5, 4))
    costs = count_costs(model, (5, 4))
    backward = costs.backward(torch.zeros(7, dtype=torch.bool))
    assert (costs.forward(), backward.dense, backward.required) == (forward, dense, dense)


@pytest.mark.parametrize(
    "equation, products",
    [
        ("bnd,de,ef->bnf", 7 * 13 * 11 + 7 * 11 * 3),
        ("bnd,de,ef", 7 * 13 * 11 + 7 * 11 * 3),
        ("bnd,de,ef->bn", 7 * 13 * 11 + 7 * 11),
        ("bnd->bdn", 0),
    ],
)
def test_einsum_of_several_operands(equation, products):
    others = [torch.randn(13, 11), torch.randn(11, 3)][: equation.count(",")]
    model = _Apply(lambda m, x: torch.einsum(equation, m.a(x), *others), a=nn.Linear(4, 13))
    assert count_costs(model, (7, 4)).forward() == 2 * (7 * 4 * 13 + products)


def test_the_einsum_rule_takes_ellipses():
    model = _Apply(
        lambda m, x: torch.einsum("...nd, ...md -> ...nm", m.a(x), m.a(x)), a=nn.Linear(3, 5)
    )
    assert count_costs(model, (2, 7, 3)).forward() == 2 * (2 * 2 * 7 * 3 * 5 + 2 * 7 * 7 * 5)


def test_deciding_costs_what_the_eval_forward_costs():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra = nn.Linear(4, 4), nn.Linear(4, 9)

        def forward(self, x):
            y = self.body(x)
            return (y, self.extra(y)) if self.training else y

    costs = count_costs(Head(), (4,))
    assert costs.forward() == 2 * (16 + 36)
    assert costs.overhead() == 2 * 2 * 16


class _Branches(nn.Module):
    """A frozen branch that runs last, a token that enters late, a layer used twice, one unused."""

    def __init__(self):
        super().__init__()
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 6, bias=False)
        self.twice = nn.Linear(6, 6)
        self.after_token = nn.Linear(6, 6)
        self.token = nn.Parameter(torch.zeros(6))
        self.unused = nn.Linear(6, 6)
        self.lost = nn.Linear(6, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        self.lost(x)
        h = self.twice(self.twice(self.left(x)))
        late = self.after_token(self.right(x).detach() + self.token)
        mixed, _ = self.attention(late, h, h)
        return mixed @ h.transpose(1, 2)


@pytest.mark.parametrize(
    "frozen",
    [[], ["left"], ["left", "twice"], ["twice"], ["after_token"], ["left", "twice", "after_token"]],
)
def test_reachability_in_a_branched_graph(frozen):
    torch.manual_seed(0)
    model = _Branches()
    costs = count_costs(model, (5, 6))
    mask = freeze_layers(model, costs, frozen)
    assert costs.backward(mask).required == counted_by_torch(model, (5, 6))[1]
    lost = 2 * 5 * 6 * 6  # a product that nobody uses: fvcore's trace drops it
    assert costs.forward() == counted_by_torch(model, (5, 6))[0] - lost
    assert costs.dense_only.keys() >= {"unused", "attention", "attention.out_proj", ""}
    assert not costs.called[costs.neurons["unused"]].any()


def test_a_class_token_keeps_the_first_input_gradient(vision):
    model = vision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )
    costs = count_costs(model, (3, 32, 32))
    everything = costs.called.clone()
    frozen = costs.backward(everything)
    # Position table and class token train: the gradient must come all the way down to them.
    qkv = [name for name in costs.neurons if name.endswith("mlp.0")]
    mask = everything.clone()
    mask[costs.neurons[qkv[0]]] = False
    assert frozen.required > 0.4 * frozen.dense
    assert costs.backward(mask).required - frozen.required == 2 * 17 * 16 * 32
    assert costs.backward(mask).paper - frozen.paper == 2 * 17 * 16 * 32
    outside = 2 * (17 * 16 * 16 * 3 + 17 * 16 * 16)  # in_proj and out_proj of each attention
    assert frozen.paper == 2 * outside


def test_rows_count_by_the_row():
    """A layer with k of n rows frozen costs what a layer of n − k outputs costs in dW."""
    costs = count_costs(resnet8(), (1, 16, 16))
    name = "layer3.0.conv2"
    part = costs.neurons[name]
    nothing = torch.zeros(len(costs.neurons), dtype=torch.bool)
    some = nothing.clone()
    some[part.start : part.start + 13] = True
    before, after = costs.backward(nothing), costs.backward(some)
    one_row = 2 * 64 * 3 * 3 * 4 * 4  # input channels, kernel, positions
    assert before.required - after.required == 13 * one_row
    assert before.paper - after.paper == 13 * one_row
    assert after.dense == before.dense
    bn = nothing.clone()
    bn[costs.neurons["layer3.0.bn2"]] = True
    assert costs.backward(bn).required == before.required
    assert before.paper - costs.backward(bn).paper == 2 * 2 * 64 * 4 * 4


def test_a_convolution_with_bias_and_groups():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.Conv2d(8, 8, 3, groups=8))
    costs = count_costs(model, (4, 6, 6))
    backward = costs.backward(torch.zeros(16, dtype=torch.bool))
    first, second = 8 * 36 * 2 * 9, 8 * 16 * 9  # multiply-accumulates
    assert costs.forward() == 2 * (first + second)
    assert backward.dense == 2 * first + 4 * second  # no gradient with respect to the image
    assert backward.paper == 2 * (first + 8 * 36 + second + 8 * 16)


def test_layer_norm_and_linear_bias_by_the_papers_rule():
    costs = count_costs(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)), (7, 3))
    backward = costs.backward(torch.zeros(10, dtype=torch.bool))
    assert backward.paper == 2 * (7 * 3 * 5 + 2 * 7 * 5)


def test_parameters_that_the_user_froze_cost_no_gradient():
    model = resnet8()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    costs = count_costs(model, (1, 16, 16))
    backward = costs.backward(torch.zeros(len(costs.neurons), dtype=torch.bool))
    assert backward.dense == backward.required == 2 * 64 * 10
    assert backward.dense == counted_by_torch(model, (1, 16, 16))[1]


def test_totals_layers_and_deciding():
    model = resnet8()
    costs = count_costs(model, (1, 16, 16))
    mask = neq.Random(0.4).frozen(1, costs.neurons, torch.empty(0))
    one, many = costs.backward(mask), costs.backward(mask, 1150)
    assert (many.dense, many.paper, many.required) == tuple(
        1150 * v for v in (one.dense, one.paper, one.required)
    )
    layers = costs.layers(mask, 1150)
    assert sum(b.required for _, b in layers.values()) == many.required
    assert sum(f for f, _ in layers.values()) == costs.forward(1150)
    assert costs.overhead(50) == 2 * 50 * costs.forward()
    assert one.required <= one.dense


def test_measuring_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).eval()
    state, stream = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    count_costs(model, (4,))
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not model.training
    assert not model[0]._forward_hooks
