"""Neurons freeze in Lightning's Trainer: real fits, killed and gone on with."""

import copy
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from lightning_fit import (
    EPOCHS,
    KILLED,
    THEIRS,
    Callback,
    Masks,
    MixedPrecision,
    ModelCheckpoint,
    Net,
    Tunes,
    came_out,
    fitted,
    freezing,
    loaders,
    quiet,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from trials import same

import neq
from harness import verify
from neq.integrations.lightning import NeuronFreezerCallback

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]
SCRIPT = Path(__file__).with_name("lightning_fit.py")


def start(folder, what, processes, optimizer):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    usual = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if processes > 1:
        usual |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    arguments = [sys.executable, str(SCRIPT), str(folder), what, str(processes), optimizer]
    ranks = [{"LOCAL_RANK": str(rank)} if processes > 1 else {} for rank in range(processes)]
    return [
        subprocess.Popen(arguments, env=usual | rank, stdout=subprocess.PIPE, text=True)
        for rank in ranks
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "optimizer"), [(1, "SGD"), (2, "Adam")])
def test_a_fit_killed_and_gone_on_with_ends_as_one_undisturbed(tmp_path, processes, optimizer):
    for process in start(tmp_path, "begin", processes, optimizer):
        with process:
            while "reached" not in (line := process.stdout.readline()):
                assert line, "it has ended early"
            os.kill(process.pid, signal.SIGKILL)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["epoch"] == KILLED - 1
    frozen = checkpoint["callbacks"]["NeuronFreezerCallback"]["freezer"]["frozen"]
    assert 0 < frozen.sum() < len(frozen)
    for process in start(tmp_path, "go-on", processes, optimizer):
        with process:
            process.communicate()
        assert not process.returncode
    for rank in range(processes):
        whole, resumed = (torch.load(tmp_path / f"{x}{rank}.pt") for x in ("begin", "go-on"))
        assert same(whole, resumed)
        assert whole["epoch"] == EPOCHS
        assert 0 < whole["frozen"].sum() < len(whole["frozen"])


def test_the_same_in_one_process_from_every_checkpoint(tmp_path):
    """Taken at the end of validation, of an epoch, and after an epoch's last step."""
    whole = {}
    for name, how in {
        "validation": {"monitor": "loss"},
        "epoch": {"save_on_train_epoch_end": True},
        "step": {"every_n_train_steps": 4},
    }.items():
        kept = ModelCheckpoint(
            tmp_path,
            filename=f"{name}-{{step}}",
            save_top_k=-1,
            auto_insert_metric_name=False,
            **how,
        )
        callback = freezing()
        masks = Masks(callback)
        found = fitted(None, callback, masks, kept, enable_checkpointing=True)
        whole = whole or found
        assert same(whole, found)
        decided = {epoch: {n for n, _ in seen} for epoch, seen in masks.seen.items()}
        assert decided == {epoch: {epoch + 1} for epoch in range(EPOCHS)}
        callback = freezing()
        masks = Masks(callback)
        path = tmp_path / f"{name}-12.ckpt"
        assert same(fitted(None, callback, masks, ckpt_path=path), whole)
        assert {epoch: {n for n, _ in seen} for epoch, seen in masks.seen.items()} == {
            epoch: {epoch + 1} for epoch in range(3, EPOCHS)
        }


class Saves(Callback):
    """When the fourth epoch begins."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_start(self, trainer, _net):
        if trainer.current_epoch == KILLED and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("place", [0, 1])
def test_an_epoch_that_has_just_begun_is_decided_on_once(tmp_path, place):
    """Whether the checkpoint was taken before this callback's turn or after it; from such a one
    Lightning goes on with an epoch of no batches.
    """
    callback, saves = freezing(), Saves(tmp_path / "begun.ckpt")
    whole = Masks(callback)
    trainer = quiet(callback, whole)
    trainer.callbacks.insert(place, saves)
    trainer.fit(Net(), *loaders())
    callback = freezing()
    resumed = Masks(callback)
    fitted(None, callback, resumed, ckpt_path=saves.path)
    expected, found = whole.seen[KILLED][0], resumed.seen[KILLED + 1][0]
    assert found[0] == expected[0] == KILLED + 1
    assert torch.equal(found[1], expected[1])


def test_within_an_epoch_its_mask_goes_on(tmp_path):
    callback = freezing()
    masks = Masks(callback)
    kept = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=5)
    fitted(None, callback, masks, kept, enable_checkpointing=True)
    expected = masks.seen[3][0]
    assert expected[1].any()
    callback = freezing()
    masks = Masks(callback)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's, on loaders that begin anew
        fitted(None, callback, masks, ckpt_path=tmp_path / "step=15.ckpt")
    for epoch, frozen in masks.seen[3]:
        assert epoch == expected[0] == 4
        assert torch.equal(frozen, expected[1])
    assert callback.freezer.epoch == EPOCHS


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_more_epochs_after_the_end(tmp_path, precision):
    whole = fitted(precision=precision)
    callback = freezing()
    trainer, net = quiet(callback, max_epochs=3, precision=precision), Net()
    trainer.fit(net, *loaders())
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    assert trainer.progress_bar_metrics["frozen"] == trainer.callback_metrics["frozen"] > 0
    assert callback.freezer.frozen.double().mean() == pytest.approx(
        float(trainer.callback_metrics["frozen"])
    )
    assert type(net.body[0]) is nn.Linear  # plain again
    path = tmp_path / "three.ckpt"
    assert same(fitted(precision=precision, ckpt_path=path), whole)


class Proves(Callback):
    """In each epoch: what `verify` finds, and the FLOPs of a backward of the loop's own."""

    def __init__(self, callback):
        self.callback, self.proofs, self.counter = callback, [], None

    def on_train_batch_start(self, trainer, net, batch, index):
        if index == 0:
            before = copy.deepcopy(net.state_dict())
            loss = nn.CrossEntropyLoss()
            proof = verify(self.callback.freezer, batch, lambda m, b: loss(m(b[0]), b[1]))
            self.proofs.append(proof)
            assert same(before, net.state_dict())

    def on_before_backward(self, *_):
        self.counter = FlopCounterMode(display=False)
        self.counter.__enter__()

    def on_after_backward(self, *_):
        self.counter.__exit__(None, None, None)
        proof = self.proofs[-1]
        assert self.counter.get_total_flops() == proof.measured == proof.counted


@pytest.mark.slow
def test_frozen_rows_are_proven_and_cost_nothing():
    callback = freezing()
    proves = Proves(callback)
    found = fitted(None, callback, proves, gradient_clip_val=0.1)
    assert same(found, fitted(gradient_clip_val=0.1))
    shares = [proof.measured / proof.dense for proof in proves.proofs]
    assert shares[0] == 1 > max(shares[2:])
    assert len(shares) == EPOCHS


class TwoOptimizers(Net):
    automatic_optimization = False

    def configure_optimizers(self):
        body = torch.optim.Adam(self.body.parameters(), 1e-2)
        return [body, torch.optim.SGD(self.head.parameters(), 0.1, momentum=0.9)]

    def training_step(self, batch, index):
        loss, optimizers = super().training_step(batch, index), self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


class Uncounted(Net):
    """Steps that Lightning doesn't count."""

    automatic_optimization = False

    def training_step(self, batch, index):
        loss, optimizer = super().training_step(batch, index), self.optimizers(False)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Accumulates(Net):
    """Over the end of an epoch."""

    automatic_optimization = False
    backwards = 0

    def training_step(self, batch, index):
        self.manual_backward(super().training_step(batch, index) / 6)
        self.backwards += 1
        if self.backwards % 6 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Uncounted, Accumulates])
def test_every_epoch_is_decided_on_whatever_steps_are_counted(kind):
    callback = freezing()
    masks = Masks(callback)
    found = fitted(kind(), callback, masks)
    assert {epoch: {n for n, _ in seen} for epoch, seen in masks.seen.items()} == {
        epoch: {epoch + 1} for epoch in range(EPOCHS)
    }
    assert kind is Accumulates or same(found, fitted())


def scaled():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))


def test_under_a_grad_scaler_an_optimizer_has_something_to_step():
    whole = NeuronFreezerCallback(neq.FreezeAfter(2), exclude=["head"])
    fitted(None, whole, plugins=[scaled()], max_epochs=3)  # one optimizer also holds the head
    assert whole.freezer.frozen.any()
    line = r"an optimizer \(Adam\) holds is frozen \(layers body.0, body.1, body.3\), .* in bf16$"
    with pytest.raises(ValueError, match=line):
        fitted(TwoOptimizers(), whole, plugins=[scaled()], max_epochs=3)
    fitted(TwoOptimizers(), whole, max_epochs=3)


@pytest.mark.parametrize("through", [True, False])
@pytest.mark.parametrize("kind", [Net, TwoOptimizers])
def test_with_everything_frozen_a_fit_goes_on_and_moves_nothing(kind, through):
    states = []

    class Keeps(Callback):
        def on_train_epoch_end(self, _trainer, net):
            states.append([p.detach().clone() for p in net.parameters()])

    callback = NeuronFreezerCallback(neq.FreezeAfter(2))
    fitted(kind(through=through), callback, Keeps(), max_epochs=4)
    assert not all(map(torch.equal, states[0], states[1]))
    assert all(map(torch.equal, states[1], states[3]))
    assert callback.freezer.frozen.all()


def test_a_loss_that_needs_no_gradient_is_still_the_user_s_error():
    class Detached(Net):
        def training_step(self, batch, index):
            return super().training_step(batch, index).detach()

    with pytest.raises(RuntimeError, match="does not require grad"):
        fitted(Detached())


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.filterwarnings("ignore")  # Lightning's own, of a fit within a fit
def test_a_search_for_a_learning_rate_within_a_fit_leaves_the_mask(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)  # where it keeps a checkpoint meanwhile
    callback, net = freezing(), Net()
    net.lr = 1e-2
    masks = Masks(callback)
    trainer = quiet(callback, masks)
    trainer.callbacks.insert(place, Tunes(num_training_steps=5, update_attr=False))
    trainer.fit(net, *loaders())
    assert {epoch: {n for n, _ in seen} for epoch, seen in masks.seen.items()} == {
        epoch: {epoch + 1} for epoch in range(EPOCHS)
    }
    assert callback.freezer.frozen.any()


@pytest.mark.slow
def test_each_fit_begins_anew_and_a_failed_one_leaves_a_plain_model():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 13:
                raise ZeroDivisionError

    callback, net = freezing(), Net()
    with pytest.raises(RuntimeError, match=r"^no training has begun yet: .* trainer\.fit\(\)$"):
        _ = callback.freezer
    quiet(callback).validate(net, loaders()[1], verbose=False)
    assert callback.state_dict() == {}
    with pytest.raises(ZeroDivisionError):
        fitted(net, callback, Fails())
    failed = callback.freezer
    assert failed.epoch == 4
    assert failed.frozen.any()
    assert type(net.body[0]) is nn.Linear
    copied = copy.deepcopy(callback)
    assert same(fitted(None, callback), fitted())
    assert callback.freezer is not failed
    assert copied.freezer.epoch == 4


@pytest.mark.slow
def test_the_mirror_package_s_trainer_takes_it(tmp_path):
    mirror = pytest.importorskip("pytorch_lightning")

    class Mirrored(mirror.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.forward = self.net.forward

        def training_step(self, batch, index):
            return self.net.training_step(batch, index)

        def validation_step(self, batch, index):
            pass

        def configure_optimizers(self):
            return self.net.configure_optimizers()

    def fit(epochs, **where):
        callback, net = (
            NeuronFreezerCallback(neq.AtEquilibrium(0.05), exclude=["net.head"]),
            Mirrored(),
        )
        trainer = quiet(callback, kind=mirror.Trainer, max_epochs=epochs)
        trainer.fit(net, *loaders(), **where)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return came_out(net.net, trainer, callback)

    whole = fit(EPOCHS)
    fit(KILLED)
    assert same(fit(EPOCHS, ckpt_path=tmp_path / f"{KILLED}.ckpt"), whole)
    assert same(whole, fitted())
