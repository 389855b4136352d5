"""`harness.verify`: what it proves of honest training, and that it sees what is not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import neq
from harness import VerificationError, count_flops, verify
from harness.vision import torchvision

LABELS = torch.tensor([0, 1, 2, 3, 0])


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


def images():
    return torch.randn(5, 3, 8, 8), LABELS


def vectors():
    return torch.randn(5, 8), LABELS


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(8 * 36, 16),
        nn.Dropout(),
        nn.Linear(16, 4),
    )


def mlp():
    return nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = mlp(), nn.Linear(4, 4)

    def forward(self, inputs):
        return self.head(checkpoint(self.body, inputs, use_reentrant=False))


class OncePerBatch(nn.Module):
    """A layer whose input is a table: it costs as much for one sample as for many."""

    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Linear(3, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("places", torch.randn(7, 3))

    def forward(self, inputs):
        return self.head(input=self.body(inputs) + self.table(input=self.places).relu().mean(0))


class Routed(nn.Module):
    """Samples go one way or the other by their values: what they cost is not that of the first."""

    def __init__(self):
        super().__init__()
        self.ways, self.head = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), nn.Linear(8, 4)

    def forward(self, inputs):
        outputs = torch.zeros_like(inputs)
        for number, way in enumerate(self.ways):
            mine = ((inputs[:, 0] > 0).float() == float(number)).nonzero().squeeze(1)
            outputs = outputs.index_copy(0, mine, way(inputs[mine]))
        return self.head(outputs)


class Casting(nn.Module):
    """With an autocast of its own, as Accelerate puts one around a model."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return self.body(inputs).float()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, inputs):
        return self.head(self.body(inputs.unsqueeze(1))[0][:, -1])


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.other = nn.Linear(8, 16), nn.Linear(16, 4), nn.Linear(16, 6)

    def forward(self, inputs):
        hidden = self.body(inputs).relu()
        return {"logits": self.head(hidden), "other": self.other(hidden)}


class FunctionToo(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.back = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, inputs):
        hidden = functional.linear(self.back(self.body(inputs).relu()), self.body.weight)
        return self.head(hidden.view(-1, 2, 8).sum(1))


def one_head(model, batch):
    return functional.cross_entropy(model(batch[0])["logits"], batch[1])


def with_products(model, batch):
    """A loss with products of its own, of outputs and of weights."""
    outputs = model(batch[0])
    similar, gram = outputs @ outputs.T, model[0].weight @ model[0].weight.T
    return functional.cross_entropy(similar, torch.arange(5)) + gram.pow(2).sum()


def freezer_of(model, share=0.5, whole=(), optimizer=None, batch=None, **options):
    """With half of the neurons frozen, after one step, so that the optimizer has a state."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 1e-2)
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for each in optimizers:
        each.step()
        each.zero_grad()
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone(), **options)
    mask = torch.rand(len(freezer.neurons)) < share
    for name in whole:
        mask[freezer.neurons.select([name])] = True
    freezer.freeze(mask)
    return freezer


def everything(freezer):
    """All that is to be as before, as copies."""
    states = [optimizer.state_dict() for optimizer in freezer.optimizers]
    gradients = [p.grad for p in freezer.model.parameters()]
    modes = [module.training for module in freezer.model.modules()]
    own = freezer.state_dict()
    return copy.deepcopy(
        (freezer.model.state_dict(), states, gradients, modes, own, torch.get_rng_state())
    )


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


class Assigning(nn.Module):
    """Its forward puts another buffer in place of the one that was there."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, inputs):
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return self.body(inputs)


class Dropping(nn.Module):
    """A layer that is left out at random, by torch's random stream."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = mlp()

    def forward(self, inputs):
        inputs = self.first(inputs)
        return self.head(inputs if torch.rand(()) < 0.5 else self.second(inputs))


MODELS = {
    "a buffer assigned": (Assigning, vectors, cross_entropy, {}),
    "a layer left out at random": (Dropping, vectors, cross_entropy, {}),
    "CNN": (cnn, images, cross_entropy, {}),
    "CNN, a layer whole": (cnn, images, cross_entropy, {"whole": ["6"]}),
    "CNN, cut": (cnn, images, cross_entropy, {"gradient": "cut", "whole": ["3"]}),
    "statistics held": (cnn, images, cross_entropy, {"hold_statistics": True}),
    "nobody": (mlp, vectors, cross_entropy, {"share": 0}),
    "everybody": (mlp, vectors, cross_entropy, {"share": 2}),
    "checkpointing": (Checkpointed, vectors, cross_entropy, {}),
    "its own autocast": (Casting, vectors, cross_entropy, {}),
    "once per batch": (OncePerBatch, vectors, cross_entropy, {}),
    "routed": (Routed, vectors, cross_entropy, {}),
    "an output without use": (TwoHeads, vectors, one_head, {}),
    "a loss with products": (mlp, vectors, with_products, {}),
    "a weight that a function uses": (FunctionToo, vectors, cross_entropy, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_honest_training_is_proven_and_left_as_it_was(name):
    torch.manual_seed(0)
    build, batch, loss, options = MODELS[name]
    freezer, batch = freezer_of(build(), **options), batch()
    before = everything(freezer)
    proof = verify(freezer, batch, loss)
    assert same(everything(freezer), before)
    assert proof.counted == proof.measured
    assert not proof.uncounted
    assert (proof.measured == proof.dense) == (name == "nobody")
    assert proof.samples == 5
    assert [part.name for part in proof.layers] == [*freezer.neurons]
    assert sum(part.frozen for part in proof.layers) == int(freezer.frozen.sum())
    assert any(part.moved for part in proof.layers) == (name != "everybody")
    for part in proof.layers:
        assert part.planned == part.computed
        assert part.planned in (None, freezer.plan[part.name].rows)
        assert part.moved <= part.neurons - part.frozen
    assert max(map(len, str(proof).splitlines())) <= 80
    assert verify(freezer, batch, loss) == proof  # nor is anything left that would be found later


def test_measured_is_what_pytorch_counts_in_one_s_own_backward():
    torch.manual_seed(0)
    model, batch = mlp(), vectors()
    freezer = freezer_of(model, whole=["2"])
    proof = verify(freezer, batch, cross_entropy)
    loss = cross_entropy(model, batch)
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert proof.measured == counter.get_total_flops() < proof.dense
    assert proof.dense == 2 * 5 * (8 * 16 + 2 * 16 * 16 + 2 * 16 * 4)
    assert [part.computed for part in proof.layers if part.name == "2"] == [0]


def test_several_optimizers_and_gradients_that_are_there():
    torch.manual_seed(0)
    model, batch = cnn(), images()
    first = torch.optim.SGD(model[:4].parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    second = torch.optim.Adam(model[4:].parameters(), 0.01)
    freezer = freezer_of(model, optimizer=[first, second])
    cross_entropy(model, batch).backward()
    model[0].eval()
    before = everything(freezer)
    assert verify(freezer, batch, cross_entropy).layers[-1].moved
    assert same(everything(freezer), before)
    for optimizer in (first, second):
        optimizer.step()
    freezer.update([batch])  # the steps that were taken back do not count as somebody's


def test_rows_that_move_afterwards_are_still_found():
    """The steps that were taken back do not pass for weights that somebody has swapped."""
    model, batch = mlp(), vectors()
    freezer = freezer_of(model, whole=["2"])
    cross_entropy(model, batch).backward()
    freezer.optimizers[0].step()
    verify(freezer, batch, cross_entropy)
    with torch.no_grad():
        model[2].weight.mul_(0.9)
    with pytest.raises(ValueError, match="rows moved while they were frozen, in layer 2: "):
        freezer.update([batch])


def test_as_the_readme_has_it():
    torch.manual_seed(0)
    model, (images, labels), criterion = mlp(), vectors(), nn.CrossEntropyLoss()
    freezer = freezer_of(model)

    def loss(model, batch):
        images, labels = batch
        return criterion(model(images), labels)

    proof = verify(freezer, (images, labels), loss)
    assert str(proof).startswith(" layer")
    assert count_flops(model, images, freezer).backward.executed * 5 == proof.measured


def test_an_optimizer_without_a_state_has_none_afterwards():
    model, batch = mlp(), vectors()
    optimizer = torch.optim.Adam(model.parameters())
    freezer = neq.NeuronFreezer(model, optimizer, neq.Everyone())
    freezer.freeze(torch.arange(36) % 2 == 0)
    verify(freezer, batch, cross_entropy)
    assert not optimizer.state


def test_compiled_and_wrapped_models(tmp_path):
    torch.manual_seed(0)
    model, batch = mlp(), vectors()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        for wrapped in (torch.compile(model, backend="eager"), DistributedDataParallel(model)):
            freezer = freezer_of(wrapped)
            assert verify(freezer, batch, cross_entropy).measured
            freezer.remove()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("build", [mlp, cnn, Casting])
def test_half_precision(build):
    torch.manual_seed(0)
    inputs, labels = images() if build is cnn else vectors()
    freezer = freezer_of(build())
    with torch.autocast("cpu", torch.bfloat16):
        cross_entropy(freezer.model, (inputs, labels))  # autocast keeps the weights that it casts
        proof = verify(freezer, (inputs, labels), cross_entropy)
        count = count_flops(freezer.model, inputs, freezer)
    assert proof.counted == proof.measured == 5 * count.backward.executed < proof.dense


def test_a_model_in_half_precision():
    batch, half = vectors(), freezer_of(mlp().bfloat16())
    assert verify(half, (batch[0].bfloat16(), batch[1]), cross_entropy).measured


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_transformer_with_padding_and_labels():
    torchvision()
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=32, vocab_size=60)
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    words = torch.arange(36).view(3, 12)
    mask = torch.ones_like(words)
    mask[1, 5:] = 0
    batch = transformers.BatchEncoding(
        {"input_ids": words, "attention_mask": mask, "labels": torch.tensor([0, 1, 1])}
    )
    freezer = freezer_of(model, whole=["bert.encoder.layer.0.attention.self.query"])
    proof = verify(freezer, batch, lambda model, batch: model(**batch).loss)
    assert proof.counted == proof.measured < proof.dense
    hidden = freezer_of(transformers.BertModel(config))
    del batch["labels"]
    loss = lambda model, batch: model(**batch).last_hidden_state.pow(2).mean()  # noqa: E731
    proof = verify(hidden, batch, loss)  # of two outputs
    assert (proof.layers[-1].name, proof.layers[-1].moved) == ("pooler.dense", 0)


def test_what_is_not_counted_is_said():
    torch.manual_seed(0)
    proof = verify(freezer_of(Recurrent()), vectors(), cross_entropy)
    assert proof.uncounted == ["aten::lstm"]
    assert "Not counted, so that FLOPs were not compared: aten::lstm." in str(proof)
    assert proof.layers[0].computed == proof.layers[0].planned
    proof = verify(freezer_of(FunctionToo(), whole=["body"]), vectors(), cross_entropy)
    assert proof.uncounted == ["layer body, frozen whole though a function uses its weight, too"]


def another_optimizer(freezer):
    other = torch.optim.SGD(freezer.model.parameters(), 0.1)
    for parameter in freezer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    other.step()


def decay_by_hand(freezer):
    def decay(*_):
        with torch.no_grad():
            freezer.model[2].weight.mul_(0.999)

    freezer.optimizers[0].register_step_post_hook(decay)


def hooks_lost(freezer):
    for hook in freezer._hooks:
        hook.remove()


def plain_class(freezer):
    freezer.model[2].__class__ = nn.Linear


def other_plan(freezer):
    freezer._gradients.plan["2"] = neq.LayerPlan("gather", 4, False)


def gradients_by_hand(freezer):
    def add(parameter):
        parameter.grad += 1

    freezer.model[2].weight.register_post_accumulate_grad_hook(add)


def stray_product(freezer):
    freezer.model[2].weight.register_hook(lambda gradient: gradient @ torch.eye(16))


def no_rate(freezer):
    freezer.optimizers[0].param_groups[0]["lr"] = 0.0


def state_runs_on(freezer):
    optimizer = freezer.optimizers[0]
    optimizer.register_step_post_hook(
        lambda *_: optimizer.state[freezer.model[0].weight]["step"].add_(1)
    )


SABOTAGE = {
    another_optimizer: "rows moved while they were frozen, in layers 0, 2, 4: give NeuronFreezer",
    decay_by_hand: r"frozen rows have moved in a step, in layer 2 \(8 of 8\)$",
    hooks_lost: r"frozen rows have moved in a step, in layers 2 \(8 of 8\), 4 \(2 of 2\)$",
    plain_class: r"were computed than planned, in layer 2 \(16 computed, 8 planned\)$",
    other_plan: r"were computed than planned, in layer 2 \(8 computed, 4 planned\)$",
    gradients_by_hand: "frozen rows have a gradient, in layer 2$",
    stray_product: r"over 5 samples took 10,432 FLOPs by PyTorch's counter, and 2,240 are counted$",
    no_rate: "no row has moved in a step, of those that train either: the learning rate is 0 or",
    state_runs_on: "the optimizer's state has moved for what is frozen whole, in layer 0$",
}


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda sabotage: sabotage.__name__)
def test_what_is_not_as_promised_is_one_line(sabotage):
    torch.manual_seed(0)
    timings = neq.Timings()
    freezer = freezer_of(mlp(), share=-1, timings=timings)
    mask = torch.arange(36) % 2 == 0
    mask[:16] = True  # the first layer, whole
    freezer.freeze(mask)
    batch = vectors()
    verify(freezer, batch, cross_entropy)
    sabotage(freezer)
    before = everything(freezer)
    with pytest.raises(VerificationError, match=SABOTAGE[sabotage]) as raised:
        verify(freezer, batch, cross_entropy)
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, AssertionError)
    assert same(everything(freezer), before)


@pytest.mark.parametrize(
    "loss, message",
    [
        (lambda model, batch: model(batch[0]), r"of one number that your loop .*, not \[5, 4\]$"),
        (lambda model, batch: 3.0, "must call the model once, and calls it 0 times"),
        (lambda model, batch: model(batch[0]).sum().item(), "calls backward.. on, not float$"),
        (lambda model, batch: (model(batch[0]) + model(batch[0])).sum(), "calls it 2 times"),
        (lambda model, batch: model(batch[0]).detach().sum(), "the loss needs no gradient"),
        (
            lambda model, batch: model(batch[0]).detach().sum() + model[0].weight.sum(),
            "does not depend on what the model returns",
        ),
    ],
)
def test_wrong_losses_are_told(loss, message):
    with pytest.raises(ValueError, match=message):
        verify(freezer_of(mlp()), vectors(), loss)


def test_a_batch_without_samples_is_told():
    with pytest.raises(ValueError, match="the batch has no sample"):
        verify(freezer_of(mlp()), vectors(), lambda model, batch: model(batch[0][:0]).sum())
