"""A Trainer of transformers with a tiny BERT: what the tests train, also as a process of its own.

`python trainer_fit.py FOLDER EVENT STEP`: train there, and wait for being killed at that step's
EVENT. Under torchrun, `trainer_fit.py FOLDER`: an undisturbed training and a resumed one.
"""

import sys
import time
from pathlib import Path

import torch
from torch import distributed
from torch.utils.data import Dataset

import neq
from harness.vision import torchvision

transformers = torchvision("transformers")  # which imports torchvision where it is installed
POLICY = neq.SmallestVelocity(keep=0.5)


class Sentences(Dataset):
    """Sequences of 4 to 12 tokens in three classes."""

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(4, 13, (count,), generator=generator).tolist()
        self.items = [torch.randint(1, 30, (n,), generator=generator) for n in lengths]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, place):
        tokens = self.items[place]
        return {"input_ids": tokens, "labels": int(tokens.sum() % 3)}


def padded(items):
    """A batch with an attention mask, as long as the longest of its sequences."""
    rows = [item["input_ids"] for item in items]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.tensor([item["labels"] for item in items])
    return {"input_ids": tokens, "attention_mask": (tokens > 0).long(), "labels": labels}


def bert(kind=transformers.BertForSequenceClassification, **options):
    """With dropout, as it comes."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"vocab_size": 30, "intermediate_size": 32, "max_position_embeddings": 16}
    torch.manual_seed(0)
    return kind(transformers.BertConfig(**sizes | more | {"num_labels": 3} | options))


def settings(folder, **options):
    """Four epochs of six steps, with a checkpoint after each."""
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    recipe = {"num_train_epochs": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    every = {"output_dir": str(folder), "save_strategy": "epoch", "seed": 3}
    return transformers.TrainingArguments(**quiet | recipe | every | options)


def trainer_of(
    folder, model=None, collate=padded, eval_dataset=None, kind=transformers.Trainer, **options
):
    evaluated = Sentences(20, 2) if eval_dataset is None else eval_dataset
    return kind(
        bert() if model is None else model,
        settings(folder, **options),
        train_dataset=Sentences(24, 1),
        eval_dataset=evaluated,
        data_collator=collate,
    )


def freezing(trainer, policy=POLICY, **options):
    """The callback, added to the trainer."""
    from neq.integrations.transformers import NeuronFreezerCallback

    callback = NeuronFreezerCallback(trainer, policy, **{"exclude": ["classifier"]} | options)
    trainer.add_callback(callback)
    return callback


def trained(folder, policy=POLICY, resume=None, **options):
    """A Trainer that has trained, and its callback."""
    trainer = trainer_of(folder, **options)
    callback = freezing(trainer, policy)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer, callback


class Hold(transformers.TrainerCallback):
    """Writes a file at an event of a step, and waits there."""

    def __init__(self, folder, event, step):
        self.folder, self.step = folder, step
        setattr(self, event, self.held)

    def held(self, args, state, control, **_):
        if state.global_step == self.step:
            (self.folder / "held").touch()
            time.sleep(600)


def in_parallel(folder):
    """Train on two processes, once at a stretch and once from the second epoch's checkpoint on."""
    states = []
    for name, checkpoint in (("whole", None), ("resumed", folder / "whole" / "checkpoint-6")):
        trainer = trainer_of(folder / name)
        callback = freezing(trainer)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        states.append(
            {
                "weights": trainer.model.state_dict(),
                "optimizer": trainer.optimizer.state_dict()["state"],
                "frozen": callback.freezer.frozen,
                "steps": trainer.state.global_step,
            }
        )
    torch.save(states, folder / f"rank{distributed.get_rank()}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if len(sys.argv) == 2:
        in_parallel(folder)
    else:
        trainer = trainer_of(folder)
        trainer.callback_handler.callbacks.insert(0, Hold(folder, sys.argv[2], int(sys.argv[3])))
        freezing(trainer)
        trainer.train()
