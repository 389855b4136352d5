"""What a callback for the Trainer of transformers refuses, and how it is said."""

import sys

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from trainer_fit import POLICY, Sentences, bert, freezing, trained, trainer_of
from transformers import TrainerCallback

import neq
from neq.integrations.transformers import NeuronFreezerCallback


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Sentences(8, 2))


class Endless:
    def __getitem__(self, place):
        raise NotImplementedError


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "line"),
    [
        (None, "there is no eval set: give the trainer one, or pass validation_batches="),
        (Stream(), r"the eval set \(Stream\) is iterable, .* give one with a length"),
        (Endless(), r"the eval set \(Endless\) is iterable, .* give one with a length"),
        (Sentences(0, 1), "the eval set is empty: give one with samples"),
        (
            {"news": Sentences(4, 1), "books": Sentences(4, 1)},
            r"several eval sets \(news, books\): .*=trainer.get_eval_dataloader\('news'\)",
        ),
    ],
)
def test_eval_sets_that_nobody_can_decide_on(tmp_path, data, line):
    trainer = trainer_of(tmp_path)
    trainer.eval_dataset = data
    freezing(trainer)
    with pytest.raises(ValueError, match=line) as raised:
        trainer.train()
    assert "\n" not in str(raised.value)
    assert type(trainer.model.classifier) is nn.Linear  # no freezer is left at work


@pytest.mark.slow
def test_policies_that_look_at_no_sample_need_no_eval_set(tmp_path):
    trainer = trainer_of(tmp_path, num_train_epochs=2)
    trainer.eval_dataset = None
    callback = freezing(trainer, neq.Random(keep=0.5))
    trainer.train()
    assert bool(callback.freezer.frozen.any())


def test_one_of_several_eval_sets(tmp_path):
    sets = {"news": Sentences(4, 1), "books": Sentences(4, 2)}
    trainer = trainer_of(tmp_path, eval_dataset=sets, num_train_epochs=3)
    callback = freezing(trainer, validation_batches=trainer.get_eval_dataloader("books"))
    trainer.train()
    assert bool(callback.freezer.frozen.any())


@pytest.mark.parametrize(
    ("options", "error", "line"),
    [
        ({"exclude": ["clasifier"]}, ValueError, "no layer is called 'clasifier'; layers: bert"),
        ({"exlude": ["classifier"]}, TypeError, "unexpected keyword argument 'exlude'"),
        ({"similarity": "cosine"}, ValueError, "similarity must be 'dataset' or 'sample'"),
        ({"samples": 0}, ValueError, "samples must be at least 1, got 0"),
        ({"validation_batches": iter(())}, ValueError, "can be read only once: give a list"),
        ({"validation_batches": {"input_ids": 1}}, TypeError, "one batch where an iterable"),
    ],
)
def test_options_are_refused_before_the_training(tmp_path, options, error, line):
    trainer = trainer_of(tmp_path)
    with pytest.raises(error, match=line):
        NeuronFreezerCallback(trainer, POLICY, **options)
    assert type(trainer.model.classifier) is nn.Linear


@pytest.mark.slow
def test_it_wants_the_trainer_that_it_is_added_to(tmp_path):
    with pytest.raises(TypeError, match="trainer must be the Trainer, not SmallestVelocity"):
        NeuronFreezerCallback(POLICY)
    with pytest.raises(TypeError, match=r"policy must be one such as .*AtEquilibrium"):
        NeuronFreezerCallback(trainer_of(tmp_path), neq.AtEquilibrium)
    one, other = trainer_of(tmp_path), trainer_of(tmp_path)
    other.add_callback(NeuronFreezerCallback(one))
    with pytest.raises(ValueError, match="one NeuronFreezerCallback, which was made for it"):
        other.train()
    freezing(one)
    freezing(one)
    with pytest.raises(ValueError, match="one NeuronFreezerCallback, which was made for it"):
        one.train()


@pytest.mark.slow
def test_checkpoints_of_others(tmp_path):
    trained(tmp_path / "one", num_train_epochs=2)
    checkpoint = tmp_path / "one" / "checkpoint-12"
    with pytest.raises(ValueError, match="frozen by the policy SmallestVelocity, not FreezeAfter"):
        trained(tmp_path / "other", neq.FreezeAfter(1), checkpoint)
    plain = trainer_of(tmp_path / "plain", num_train_epochs=3)
    plain.train(resume_from_checkpoint=str(checkpoint))  # which leaves the state where it was
    none = "holds no state of a NeuronFreezer .* neurons freeze as in a training that begins"
    with pytest.warns(UserWarning, match=none):
        _, callback = trained(tmp_path / "new", resume=tmp_path / "plain" / "checkpoint-18")
    assert callback.freezer.epoch == 1


def test_a_grad_scaler_refuses_a_step_of_nobody(tmp_path):
    class Scales(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu")

    model = bert()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)
    trainer = trainer_of(tmp_path, model)
    freezing(trainer, neq.FreezeAfter(1), exclude=[])
    trainer.add_callback(Scales())
    line = r"an optimizer \(AdamW\) holds is frozen \(layers bert.* more\), .* in bf16$"
    with pytest.raises(ValueError, match=line):
        trainer.train()


def test_what_transformers_needs_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "neq.integrations.transformers")
    with pytest.raises(ImportError, match=r"transformers is not installed: .*neqbench\[transf"):
        __import__("neq.integrations.transformers")
