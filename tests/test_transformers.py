"""Neurons freeze in the Trainer of transformers, also one that was killed and resumed."""

import copy
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from trainer_fit import Sentences, bert, freezing, padded, settings, trained, trainer_of
from transformers import BertForMaskedLM, Trainer, TrainerCallback
from trials import same, wait_for

import neq
from harness import verify
from neq.integrations.transformers import STATE

SCRIPT = Path(__file__).with_name("trainer_fit.py")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning"),
]


class Watch(TrainerCallback):
    """Compares the bits of frozen rows before and after each step, and looks at their gradients."""

    def __init__(self, callback):
        self.callback = callback
        self.frozen = self.moved = self.trained = self.graded = 0

    def rows(self):
        freezer = self.callback.freezer
        for layer in freezer.neurons.layers:
            for parameter in layer.parameters:
                yield parameter, freezer.frozen[layer.neurons]

    def on_pre_optimizer_step(self, args, state, control, **_):
        self.before = [parameter.detach().clone() for parameter, _ in self.rows()]
        for parameter, frozen in self.rows():
            if parameter.grad is not None:
                self.graded += int(parameter.grad[frozen].count_nonzero())

    def on_optimizer_step(self, args, state, control, **_):
        for (parameter, frozen), before in zip(self.rows(), self.before, strict=True):
            self.frozen += int(frozen.sum())
            self.moved += int((parameter[frozen] != before[frozen]).sum())
            self.trained += int((parameter[~frozen] != before[~frozen]).sum())

    def assert_frozen(self):
        assert self.frozen > 0
        assert self.trained > 0
        assert self.moved == self.graded == 0


def shares(trainer):
    return [(r["step"], r["frozen"]) for r in trainer.state.log_history if "frozen" in r]


def assert_same(one, other):
    """Weights, optimizer, mask and reading of (trainer, callback) pairs are equal bit for bit."""
    weights = other[0].model.state_dict()
    for name, value in one[0].model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    states = [pair[0].optimizer.state_dict()["state"] for pair in (one, other)]
    assert states[0].keys() == states[1].keys()
    for place, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][place][name]))
    assert torch.equal(one[1].freezer.frozen, other[1].freezer.frozen)
    phi = [pair[1].freezer.reading.phi.nan_to_num(-7) for pair in (one, other)]
    assert torch.equal(*phi)
    assert shares(one[0]) == shares(other[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed training, its callback, and what a step showed in its last epoch."""
    trainer = trainer_of(tmp_path_factory.mktemp("whole"))
    callback = freezing(trainer)
    proofs = []

    class Prove(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            if state.global_step == 18:
                batch = padded([trainer.train_dataset[i] for i in range(4)])
                proofs.append(verify(callback.freezer, batch, lambda m, b: m(**b).loss))

    trainer.add_callback(Prove())
    trainer.train()
    return trainer, callback, proofs


def test_frozen_rows_stand_still_and_are_not_computed(whole):
    trainer, callback, (proof,) = whole
    assert sum(layer.frozen for layer in proof.layers) == int(callback.freezer.frozen.sum()) > 0
    assert all(layer.moved <= layer.neurons - layer.frozen for layer in proof.layers)
    assert proof.measured == proof.counted < proof.dense
    share = float(callback.freezer.frozen.double().mean())
    assert shares(trainer) == [(0, 0.0), (6, 0.0), (12, share), (18, share)]
    assert callback.freezer.epoch == 4


@pytest.mark.slow
@pytest.mark.parametrize(("event", "step"), [("on_step_end", 15), ("on_save", 12)])
def test_killed_and_resumed_it_is_the_same(tmp_path, whole, event, step):
    """Within an epoch, and between the Trainer's saving and its telling that it has saved."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, "-W", "ignore", SCRIPT, tmp_path, event, str(step)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            wait_for(lambda: (tmp_path / "held").exists() or process.poll() is not None)
        finally:
            process.kill()
        assert process.wait() == -9, process.stderr.read()
    saved = torch.load(tmp_path / "checkpoint-12" / "optimizer.pt", weights_only=True)
    before = saved["param_groups"][0][STATE]["state"]
    assert before["epoch"] == 2
    trainer = trainer_of(tmp_path)
    callback = freezing(trainer)
    watch = Watch(callback)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 24
    watch.assert_frozen()
    assert_same((trainer, callback), whole[:2])


@pytest.mark.slow
def test_resumed_at_any_step_it_is_the_same(tmp_path):
    """Within the first epoch, within one that freezes, and at an epoch's end."""
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    one = trained(tmp_path / "one", num_train_epochs=8, **options)
    for step in (2, 14, 18):
        checkpoint = tmp_path / "one" / f"checkpoint-{step}"
        other = trained(tmp_path / "other", resume=checkpoint, num_train_epochs=8, **options)
        assert_same(one, other)


@pytest.mark.slow
def test_resumed_within_an_epoch_the_optimizer_ends_the_same(tmp_path):
    """Weight decay gives frozen rows momentum, which a checkpoint holds."""
    recipe = {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1}
    options = recipe | {"save_strategy": "steps", "save_steps": 2}
    trained(tmp_path / "one", **options)
    trained(tmp_path / "other", resume=tmp_path / "one" / "checkpoint-20", **options)
    one, other = (
        torch.load(tmp_path / name / "checkpoint-24" / "optimizer.pt", weights_only=True)["state"]
        for name in ("one", "other")
    )
    assert same(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"optim": "adafactor"},
        {"optim": "sgd", "optim_args": "momentum=0.9", "max_grad_norm": 0.05},
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.1},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_total_limit": 2},
        {"torch_compile": True, "torch_compile_backend": "eager", "num_train_epochs": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_rows_stand_still_however_the_trainer_steps(tmp_path, options):
    trainer = trainer_of(tmp_path, **options)
    callback = freezing(trainer)
    watch = Watch(callback)
    trainer.add_callback(watch)
    trainer.train()
    watch.assert_frozen()


@pytest.mark.slow
def test_everything_may_be_frozen(tmp_path):
    trainer = trainer_of(tmp_path)
    callback = freezing(trainer, neq.FreezeAfter(1), exclude=[])
    trainer.train()
    assert bool(callback.freezer.frozen.all())
    assert trainer.state.global_step == 24


@pytest.mark.slow
def test_deciding_leaves_no_trace(tmp_path):
    """Of a policy under which nobody freezes, collating at random included."""

    def masked(items):
        batch = padded(items)
        chosen = torch.rand(batch["input_ids"].shape) < 0.3
        tokens = batch["input_ids"]
        labels = tokens.masked_fill(~chosen, -100)
        return batch | {"input_ids": tokens.masked_fill(chosen, 29), "labels": labels}

    plain = trainer_of(tmp_path / "plain", bert(BertForMaskedLM), masked)
    plain.train()
    deciding = trainer_of(tmp_path / "deciding", bert(BertForMaskedLM), masked)
    callback = freezing(deciding, neq.AtEquilibrium(eps=0), exclude=[])
    deciding.train()
    assert not callback.freezer.reading.phi.isnan().all()
    weights = deciding.model.state_dict()
    assert all(torch.equal(v, weights[n]) for n, v in plain.model.state_dict().items())

    class Draw(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            torch.rand(1)

    resumed = trainer_of(tmp_path / "resumed", bert(BertForMaskedLM), masked)
    resumed.callback_handler.callbacks.insert(0, Draw())
    other = freezing(resumed, neq.AtEquilibrium(eps=0), exclude=[])
    resumed.train(resume_from_checkpoint=str(tmp_path / "deciding" / "checkpoint-12"))
    assert_same((deciding, callback), (resumed, other))


def test_deciding_is_done_in_single_precision(tmp_path):
    """Accelerate puts an autocast around the model's forward."""
    trainer = trainer_of(tmp_path, bf16=True, num_train_epochs=2)
    freezing(trainer)
    seen = set()

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            layer = model.bert.encoder.layer[0].output.dense
            layer.register_forward_hook(lambda m, _, out: seen.add((m.training, out.dtype)))

    trainer.add_callback(Look())
    trainer.train()
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}


def test_padding_does_not_count(tmp_path):
    """Read one by one, without any padding, the samples give the same reading."""
    trainer = trainer_of(tmp_path, num_train_epochs=2)
    callback = freezing(trainer, neq.AtEquilibrium(eps=0), samples=5)
    snapshots = []

    class Keep(TrainerCallback):
        def on_epoch_begin(self, args, state, control, model, **_):
            snapshots.append({n: t.clone() for n, t in model.state_dict().items()})

    trainer.add_callback(Keep())
    trainer.train()
    model = bert()
    model.load_state_dict(snapshots[0])
    by_hand = neq.NeuronFreezer(model, torch.optim.SGD(model.parameters()))
    alone = [padded([trainer.eval_dataset[place]]) for place in (0, 4, 8, 12, 16)]
    by_hand.update(alone)
    model.load_state_dict(snapshots[1])
    by_hand.update(alone)
    torch.testing.assert_close(callback.freezer.reading.phi, by_hand.reading.phi)


def test_the_model_is_plain_afterwards(tmp_path):
    trainer = trainer_of(tmp_path, num_train_epochs=1)
    callback = freezing(trainer)
    with pytest.raises(RuntimeError, match="optimizer is not made yet: there is a freezer from"):
        _ = callback.freezer
    kinds = [type(module) for module in trainer.model.modules()]
    trainer.train()
    assert [type(module) for module in trainer.model.modules()] == kinds
    trainer.save_model(str(tmp_path / "saved"))
    assert "eval_loss" in trainer.evaluate()
    assert STATE not in trainer.optimizer.state_dict()["param_groups"][0]
    first = callback.freezer
    trainer.train()  # again: with a freezer of its own
    assert callback.freezer is not first
    assert callback.freezer.epoch == 1


class Interrupt(TrainerCallback):
    """As by Ctrl-C, in the epoch after the second checkpoint."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 15:
            raise KeyboardInterrupt


def interrupted(folder):
    trainer = trainer_of(folder)
    callback = freezing(trainer)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.pop_callback(Interrupt)
    return trainer, callback


@pytest.mark.slow
def test_after_an_interrupt_it_goes_on(tmp_path, whole):
    trainer, callback = interrupted(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert_same((trainer, callback), whole[:2])


@pytest.mark.slow
def test_after_an_interrupt_another_trainer_begins_anew(tmp_path):
    """As in a notebook whose cells are run again: nobody stays frozen by the old callback."""
    model = interrupted(tmp_path)[0].model
    gc.collect()
    assert not any("_neq_" in name for name in vars(copy.deepcopy(model)))
    trainer = trainer_of(tmp_path, model, num_train_epochs=1)
    freezing(trainer, neq.Everyone())
    weights = [p for p in model.bert.encoder.parameters() if p.dim() > 1]
    before = [p.detach().clone() for p in weights]
    trainer.train()
    for weight, then in zip(weights, before, strict=True):
        assert bool((weight != then).any(1).all())


def test_models_are_made_anew_where_the_trainer_makes_them(tmp_path):
    """As hyperparameter searches do."""
    trainer = Trainer(
        args=settings(tmp_path, num_train_epochs=3),
        model_init=lambda: bert(),
        train_dataset=Sentences(24, 1),
        eval_dataset=Sentences(20, 2),
        data_collator=padded,
    )
    callback = freezing(trainer)
    found = []
    for _ in range(2):
        trainer.train()
        found.append((trainer.model, callback.freezer.frozen))
    assert found[0][0] is not found[1][0]
    assert bool(found[0][1].any())
    assert torch.equal(found[0][1], found[1][1])


class Convolutional(nn.Module):
    """Takes no labels: its Trainer's loss does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Embedding(30, 8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
        )

    def forward(self, input_ids):
        return self.layers(input_ids).mean(1)


class WithLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **_):
        logits = model(inputs["input_ids"])
        loss = nn.functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


def test_a_model_that_takes_no_labels(tmp_path):
    trainer = trainer_of(tmp_path, Convolutional(), kind=WithLoss, remove_unused_columns=False)
    callback = freezing(trainer, exclude=[])
    trainer.train()
    assert bool(callback.freezer.frozen.any())


@pytest.mark.slow
def test_two_processes_have_one_mask_and_resume(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(
        [*command, SCRIPT, tmp_path], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    first = ranks[0][0]
    assert bool(first["frozen"].any())
    for state in (ranks[0][1], *ranks[1]):
        assert state["steps"] == first["steps"] == 12
        assert torch.equal(state["frozen"], first["frozen"])
        for name, value in first["weights"].items():
            assert torch.equal(state["weights"][name], value), name
        for place, moments in first["optimizer"].items():
            for name, value in moments.items():
                assert torch.equal(state["optimizer"][place][name], value)
