"""A loop with Accelerate, as docs/integrations.md has it, on a tiny BERT.

`python accelerate_fit.py FOLDER CALLS`: train there, and wait for being killed in the model's
forward of that number.
"""

import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from trainer_fit import Sentences, bert, padded

import neq
from neq.integrations.validation import validation_batches

POLICY = neq.SmallestVelocity(keep=0.5)


def train(folder, epochs=4, calls=None, watch=lambda freezer: None, **options):
    """Everything that the loop has at its end."""
    data, held_out = Sentences(24, 1), Sentences(20, 2)
    set_seed(0)
    model = bert()
    if calls is not None:
        hold_at(model, calls, folder)

    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)
    loader = DataLoader(data, batch_size=4, shuffle=True, collate_fn=padded)

    accelerator = Accelerator(
        gradient_accumulation_steps=2,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # to resume exactly
        **options,
    )
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    freezer = neq.NeuronFreezer(model, optimizer, POLICY, exclude=["classifier"])
    accelerator.register_for_checkpointing(freezer)
    # Not prepared: this process's own share of the samples, without any repeated.
    decide_on = validation_batches(DataLoader(held_out, collate_fn=padded), samples=50)
    if saved := sorted(folder.glob("epoch-*")):
        accelerator.load_state(saved[-1])
    for epoch in range(freezer.epoch, epochs):
        loader.set_epoch(epoch)
        freezer.update(decide_on)
        watch(freezer)
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.save_state(folder / "new")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (folder / "new").rename(folder / f"epoch-{epoch:04}")
    return accelerator, model, optimizer, freezer


def hold_at(model, calls, folder):
    """Write a file at that call of the model in training, and wait there."""
    count = iter(range(1, calls + 1))

    def hook(module, _args):
        if module.training and next(count) == calls:
            (folder / "held").touch()
            time.sleep(600)

    model.register_forward_pre_hook(hook)


if __name__ == "__main__":
    train(Path(sys.argv[1]), calls=int(sys.argv[2]), cpu=True)
