"""What test_lightning.py fits, and a process of such a fit, which may be killed in it.

`python lightning_fit.py FOLDER begin|go-on PROCESSES OPTIMIZER`: `begin` fits undisturbed and
writes what came out; then it fits again, says so within the fourth epoch, and waits there until it
is killed. `go-on` fits from the checkpoint that this has left, and writes what came out.
"""

import logging
import signal
import sys
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

import neq
from harness.vision import torchvision

torchvision()  # Lightning imports it, and it does not load on every torch
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402, F401

from neq.integrations.lightning import NeuronFreezerCallback  # noqa: E402

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

THEIRS = [  # warnings of Lightning
    "ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:Total length of `DataLoader` across ranks is zero",
    "ignore:.*LeafSpec.* is deprecated:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:.*Checkpoint directory .* exists and is not empty",
]
EPOCHS, KILLED = 6, 3
SAMPLES, BATCH = 64, 16
generator = torch.Generator().manual_seed(5)
X = torch.randn(96, 4, generator=generator)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
VALIDATION = TensorDataset(X[SAMPLES:], Y[SAMPLES:])


class Order(Sampler):
    """Another order in each epoch, the same whoever asks."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return SAMPLES

    def __iter__(self):
        drawn = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(SAMPLES, generator=drawn).tolist())


class Net(LightningModule):
    """`through`: whether training goes through `forward`, or around it."""

    def __init__(self, optimizer="Adam", width=8, through=True):
        super().__init__()
        torch.manual_seed(0)
        first, norm = nn.Linear(4, width), nn.BatchNorm1d(width)
        self.body = nn.Sequential(first, norm, nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 3)
        self.optimizer, self.through = optimizer, through

    def forward(self, inputs):
        return self.head(self.body(inputs))

    def training_step(self, batch, _index):
        inputs, labels = batch
        outputs = self(inputs) if self.through else self.head(self.body(inputs))
        return nn.functional.cross_entropy(outputs, labels)

    def validation_step(self, batch, _index):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, sync_dist=True)

    def configure_optimizers(self):
        if self.optimizer == "Adam":
            return torch.optim.Adam(self.parameters(), 1e-2, weight_decay=1e-2)
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)


def loaders():
    training = DataLoader(TensorDataset(X[:SAMPLES], Y[:SAMPLES]), BATCH, sampler=Order())
    return training, DataLoader(VALIDATION, 8)


def freezing(**options):
    return NeuronFreezerCallback(neq.AtEquilibrium(eps=0.05), exclude=["head"], **options)


def quiet(*callbacks, kind=Trainer, **settings):
    """A Trainer that prints nothing and writes nothing."""
    usual = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return kind(callbacks=[*callbacks], **usual | settings)


def came_out(net, trainer, callback):
    """Weights, optimizer's state, mask and readings."""
    return {
        "weights": net.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict(),
        "frozen": callback.freezer.frozen,
        "velocity": callback.freezer.reading.velocity,
        "epoch": callback.freezer.epoch,
    }


def fitted(net=None, callback=None, *more, data=None, ckpt_path=None, **settings):
    net, callback = net or Net(), callback or freezing()
    trainer = quiet(callback, *more, **settings)
    trainer.fit(net, *(data or loaders()), ckpt_path=ckpt_path)
    return came_out(net, trainer, callback)


class Masks(Callback):
    """What is frozen in each epoch, and how often that was decided until then."""

    def __init__(self, callback):
        self.callback, self.seen = callback, {}

    def on_train_batch_end(self, trainer, *_):
        freezer = self.callback.freezer
        self.seen.setdefault(trainer.current_epoch, []).append((freezer.epoch, freezer.frozen))


class Tunes(LearningRateFinder):
    """In the middle of a fit, as its own documentation shows; the rate stays what it was."""

    def on_fit_start(self, *_):
        pass

    def on_train_epoch_start(self, trainer, net):
        if trainer.current_epoch == KILLED + 1:
            self.lr_find(trainer, net)


class Waits(Callback):
    """Within the epoch `KILLED`, until it is killed."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == KILLED:
            print("reached", flush=True)
            signal.pause()


def main(folder, what, processes, optimizer):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder, processes = Path(folder), int(processes)
    settings = {"devices": processes} | ({"strategy": "ddp"} if processes > 1 else {})

    def fit(*callbacks, **where):
        callback, net = freezing(), Net(optimizer)
        keeps = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
        trainer = quiet(callback, *callbacks, **settings | keeps)
        trainer.fit(net, *loaders(), **where)
        torch.save(came_out(net, trainer, callback), folder / f"{what}{trainer.global_rank}.pt")

    if what == "begin":
        fit()
        fit(ModelCheckpoint(folder, filename="last"), Waits())
    else:
        fit(ckpt_path=folder / "last.ckpt")


if __name__ == "__main__":
    main(*sys.argv[1:])
