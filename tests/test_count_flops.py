"""`harness.count_flops`, held against PyTorch's own counter in real passes of models."""

import copy
from dataclasses import asdict

import pytest
import torch
import transformers
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import neq
from harness import count_flops
from harness.flops.oracle import Rules
from harness.vision import torchvision
from neq.calls import tensors

models = torchvision().models
IDS = torch.arange(24).view(2, 12)
TOKENS = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
WORDS = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def images(size, samples=2):
    return torch.randn(samples, 3, size, size)


def of_timm(name, **arguments):
    import timm  # which imports torchvision: `torchvision()` comes first

    return timm.create_model(name, num_classes=10, **arguments)


def vit():
    config = transformers.ViTConfig(**SIZES, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config)


def distilbert():
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    return transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(**sizes, **WORDS)
    )


def gpt2():
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **WORDS))


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **WORDS))


def llama():
    config = transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


MODELS = {
    "torchvision ResNet": (lambda: models.resnet18(num_classes=10), lambda: images(32)),
    "torchvision MobileNet": (
        lambda: models.mobilenet_v3_small(num_classes=10),
        lambda: images(32),
    ),
    "torchvision Swin": (
        lambda: models.SwinTransformer([4, 4], 16, [1, 1], [2, 4], [4, 4], num_classes=10),
        lambda: images(32),
    ),
    "torchvision ViT": (
        lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10),
        lambda: images(32),
    ),
    "timm ViT": (
        lambda: of_timm("vit_tiny_patch16_224", img_size=32, depth=2),
        lambda: images(32),
    ),
    "timm mixer": (
        lambda: of_timm("mixer_s32_224", img_size=64),
        lambda: images(64),
    ),
    "BERT with labels": (bert, lambda: TOKENS | {"labels": torch.tensor([0, 1])}),
    "DistilBERT": (distilbert, lambda: TOKENS),
    "GPT-2": (gpt2, lambda: TOKENS),
    "Llama, grouped queries": (llama, lambda: TOKENS),
    "transformers ViT": (vit, lambda: {"pixel_values": images(32)}),
}


def seen_by_torch(model, example, mapping):
    """(forward, backward) of one sample; {}: by PyTorch's rules alone."""
    model.train().zero_grad()
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
        output = model(**example) if isinstance(example, dict) else model(example)
    losses = [t.sum() for t in tensors(output) if t.requires_grad]
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        torch.stack(losses).sum().backward()
    return forward.get_total_flops() / 2, backward.get_total_flops() / 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_counts_are_those_of_pytorch(name):
    torch.manual_seed(0)
    build, example = MODELS[name]
    model, example = build(), example()
    rules, count = Rules(), count_flops(model, example)
    assert (count.forward, count.backward.executed) == seen_by_torch(model, example, rules.mapping)
    assert count.backward.executed == count.backward.dense == count.backward.required
    assert not count.uncounted
    if not rules.needed:
        assert (count.forward, count.backward.executed) == seen_by_torch(model, example, {})

    freezer = neq.NeuronFreezer(model, torch.optim.SGD(model.parameters(), 0.1), neq.Everyone())
    freezer.freeze(torch.rand(count.neurons) < 0.6)
    half = count_flops(model, example, freezer)
    assert half.backward.executed == seen_by_torch(model, example, Rules().mapping)[1]
    assert half.backward.executed <= half.backward.dense == count.backward.dense
    # Of GPT-2 only norms may freeze: its layers are a class of the library's own.
    assert (half.backward.executed == half.backward.dense) == (name == "GPT-2")
    assert half.backward == count_flops(model, example, freezer.frozen).backward
    freezer.remove()

    parameters = list(model.parameters())
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)
    fixed = count_flops(model, example)
    found = fixed.forward, fixed.backward.executed
    assert found == seen_by_torch(model, example, Rules().mapping)
    assert fixed.backward.executed == fixed.backward.dense < count.backward.dense
    for counted in (count, half, fixed):
        rows = counted.frame()
        assert rows["forward"].sum() == counted.forward
        assert rows["backward_executed"].sum() == counted.backward.executed
        assert (rows.drop(columns="kind") >= 0).all(axis=None)
    assert not count_flops(model.requires_grad_(False), example).backward.executed


@pytest.fixture
def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
    )


def test_numbers_by_hand(small):
    """A convolution of 8 × 8 places and a product, of one sample; nothing lies before the first."""
    convolution, product = 2 * 64 * 8 * 27, 2 * 512 * 10
    count = count_flops(small, images(8, samples=5))
    assert count.forward == count.evaluation == convolution + product
    assert count.backward.dense == convolution + 2 * product
    assert count.overhead == 2 * count.forward
    assert (count.neurons, count.frozen, count.fixed) == (18, 0, 0)
    assert count.parameters == count.trainable == 8 * 28 + 513 * 10
    frozen = torch.zeros(18, dtype=torch.bool)
    frozen[:6] = True  # six of the convolution's
    half = count_flops(small, (images(8),), frozen)
    assert half.backward.executed == convolution // 4 + 2 * product
    assert (half.frozen, half.trainable) == (6, count.parameters - 6 * 28)
    small[0].requires_grad_(False)
    head = count_flops(small, images(8, samples=1))
    assert head.backward.dense == product  # its weight's: below it nothing trains
    assert (head.fixed, head.trainable) == (8, 513 * 10)
    assert head.frame().loc["0", "fixed"] == 8
    assert not head.layers["0"].backward.executed
    assert list(head.frame().index) == ["0", "3", "outside of layers"]


def test_whatever_trains_somewhere_in_the_middle_is_reached(small):
    small[3].requires_grad_(False)
    count = count_flops(small, images(8))
    assert (
        count.backward.executed == 2 * 64 * 8 * 27 + 2 * 512 * 10
    )  # dW of the one, dX of the other


def test_the_model_is_left_as_it_was(small, tmp_path):
    small[0].eval()
    before, stream = copy.deepcopy(small.state_dict()), torch.get_rng_state()
    small[0].weight.grad = torch.ones_like(small[0].weight)
    expected = count_flops(small, images(8)).backward
    stream = torch.get_rng_state()
    half = copy.deepcopy(small).half()
    assert count_flops(half, images(8).half()).backward == expected
    assert count_flops(torch.compile(small, backend="eager"), images(8)).backward == expected
    torch.set_rng_state(stream)
    example = images(8)
    stream = torch.get_rng_state()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(small)
        assert count_flops(wrapped, example).backward == expected
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(torch.get_rng_state(), stream)
    assert [module.training for module in small] == [False, True, True, True]
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert bool((small[0].weight.grad == 1).all())
    assert small[3].weight.grad is None


def test_under_a_freezer_the_model_is_counted_as_it_is(small):
    freezer = neq.NeuronFreezer(small, torch.optim.SGD(small.parameters(), 0.1), neq.Everyone())
    freezer.freeze(torch.ones(18, dtype=torch.bool))
    assert count_flops(small, images(8)).backward.executed == 2 * 64 * 8 * 27 + 4 * 512 * 10
    assert not count_flops(small, images(8), freezer).backward.executed
    freezer.remove()
    freezer = neq.NeuronFreezer(
        small, torch.optim.SGD(small.parameters(), 0.1), neq.Everyone(), gradient="cut"
    )
    freezer.freeze(torch.arange(18) >= 8)  # the last layer, whole: nothing flows through it
    assert not count_flops(small, images(8), freezer).backward.executed
    assert count_flops(small, images(8), freezer.frozen).backward.executed
    assert count_flops(small, images(8), freezer).layers["3"].kind == "Linear"


def test_it_can_be_read(small):
    lines = str(count_flops(small, images(8))).splitlines()
    assert max(map(len, lines)) <= 80
    assert "backward, executed" in str(lines)
    assert count_flops(small, images(8))._repr_html_().startswith("<table")


@pytest.mark.parametrize(
    "example, frozen, message",
    [
        (torch.randn(0, 3, 8, 8), None, "the example has no sample"),
        (3, None, "the example has no tensor with an axis of samples"),
        ({}, None, "the example has no tensor with an axis of samples"),
        (
            torch.randn(2, 5),
            None,
            r"does not run on two copies .*, of \[2, 5\] \(RuntimeError: ",
        ),
        (
            {"pictures": torch.randn(2, 3, 8, 8)},
            None,
            "does not run on two copies .*, of .*TypeErr",
        ),
        (
            torch.randn(2, 3, 8, 8),
            torch.zeros(18),
            r"frozen must be bool \[18\], got torch.float32",
        ),
        (
            torch.randn(2, 3, 8, 8),
            torch.zeros(3).bool(),
            r"frozen must be bool \[18\], got .* \[3\]",
        ),
        (torch.randn(2, 3, 8, 8), 0.5, "frozen must be a mask or a NeuronFreezer, not float"),
    ],
)
def test_wrong_input_is_one_line(small, example, frozen, message):
    with pytest.raises(ValueError, match=message) as raised:
        count_flops(small, example, frozen)
    assert "\n" not in str(raised.value)


def test_a_freezer_of_another_model_is_told(small):
    other = nn.Linear(3, 2)
    freezer = neq.NeuronFreezer(other, torch.optim.SGD(other.parameters(), 0.1))
    with pytest.raises(ValueError, match="the freezer belongs to a model with other layers"):
        count_flops(small, images(8), freezer)


class LowRank(nn.Module):
    """A layer that is fixed, and a product of two small ones that train beside it."""

    def __init__(self, fixed):
        super().__init__()
        self.fixed = fixed.requires_grad_(False)
        self.down = nn.Linear(fixed.in_features, 2, bias=False)
        self.up = nn.Linear(2, fixed.out_features, bias=False)

    def forward(self, inputs):
        return self.fixed(inputs) + self.up(self.down(inputs))


def test_a_backward_of_adapters_is_not_twice_the_forward():
    """Of a fixed layer only the input gradient, and that only where an adapter lies before it."""
    adapted = nn.Sequential(LowRank(nn.Linear(64, 64)), nn.ReLU(), LowRank(nn.Linear(64, 10)))
    count = count_flops(adapted, torch.randn(3, 64))
    layers = count.layers
    assert layers["0.fixed"].backward.executed == 0
    assert layers["2.fixed"].backward.executed == layers["2.fixed"].forward == 2 * 640
    first = 2 * 64 * 2 + 2 * 2 * (2 * 64)  # down: its weight's; up: both
    second = 2 * 2 * (64 * 2) + 2 * 2 * (2 * 10) + 2 * 640
    assert count.backward.executed == count.backward.dense == first + second < count.forward
    assert (count.fixed, count.trainable) == (74, 64 * 2 + 2 * 64 + 64 * 2 + 2 * 10)


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.ReLU(), "the model has no parameters: there is nothing that trains or stands still"),
        (nn.LSTM(4, 4), "the model has no convolution, linear or normalisation layer to count"),
    ],
)
def test_a_model_with_nothing_to_count_is_told(model, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        count_flops(model, torch.randn(2, 3, 4))


def test_a_model_that_is_fixed_whole_has_no_backward(small):
    count = count_flops(small.requires_grad_(False), images(8))
    assert count.forward
    assert not any(asdict(count.backward)[name] for name in ("dense", "required", "executed"))
    assert (count.fixed, count.trainable) == (18, 0)


def test_counts_are_the_same_without_gradients(small):
    expected = count_flops(small, images(8)).backward
    with torch.no_grad():
        assert count_flops(small, images(8)).backward == expected
    with torch.inference_mode():
        assert count_flops(small, images(8)).backward == expected


def test_an_example_that_needs_a_gradient_is_told(small):
    with pytest.raises(ValueError, match=r"the example needs a gradient, .*: detach it"):
        count_flops(small, images(8).requires_grad_())
