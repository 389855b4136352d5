"""What a fit in Lightning's Trainer decides on, and what is refused."""

import importlib
import random
import re
import sys

import numpy
import pytest
import torch
from lightning_fit import (
    EPOCHS,
    THEIRS,
    VALIDATION,
    LightningModule,
    ModelCheckpoint,
    Net,
    X,
    Y,
    fitted,
    freezing,
    loaders,
    quiet,
)
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from trials import same

import neq
from neq.integrations.lightning import NeuronFreezerCallback

pytestmark = [pytest.mark.filterwarnings(each) for each in THEIRS]


class Mappings(Net):
    def forward(self, pixels):
        return super().forward(pixels)

    def training_step(self, batch, index):
        return super().training_step((batch["pixels"], batch["labels"]), index)

    def validation_step(self, batch, index):
        pass


@pytest.mark.slow
def test_batches_are_mappings_or_whatever_forward_takes():
    rows = [{"pixels": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    training, _ = loaders()
    data = DataLoader(rows[:64], 16, sampler=training.sampler), DataLoader(rows[64:], 8)
    expected = fitted()
    assert same(fitted(Mappings(), data=data), expected)
    by_hand = freezing(forward=lambda net, batch: net(batch["pixels"]))
    assert same(fitted(Mappings(), by_hand, data=data), expected)


@pytest.mark.slow
def test_it_decides_on_so_many_samples_of_the_validation_data():
    """Whatever is validated on: at equal distances, or those that are given."""
    expected = fitted(None, freezing(validation_batches=[VALIDATION[:][0][::4]]))
    settings = [
        {},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": 4, "num_sanity_val_steps": 0},
    ]
    for more in settings:
        assert same(fitted(None, freezing(samples=8), **more), expected)
    assert not same(fitted(None, freezing(samples=3)), expected)
    given = freezing(validation_batches=DataLoader(TensorDataset(VALIDATION[:][0][::4]), 8))
    assert same(fitted(None, given, data=loaders()[:1]), expected)


def test_samples_are_in_the_precision_of_the_trainer():
    callback = freezing()
    found = fitted(None, callback, precision="64-true")
    assert found["weights"]["head.weight"].dtype == torch.float64
    assert callback.freezer.frozen.any()


class NoForward(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def training_step(self, batch, index):
        return self.net.training_step(batch, index)

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return self.net.configure_optimizers()


def test_a_module_without_forward_is_told_how_to_say_it():
    def callback(**options):
        return NeuronFreezerCallback(neq.AtEquilibrium(eps=0.05), exclude=["net.head"], **options)

    line = r"NoForward has no forward .* forward=lambda module, batch: module.net\(batch\[0\]\)$"
    for given in ({}, {"validation_batches": [X[:4]]}):
        with pytest.raises(ValueError, match=line):
            quiet(callback(**given)).fit(NoForward(), *loaders())
    mended = callback(forward=lambda module, batch: module.net(batch[0]))
    quiet(mended).fit(NoForward(), *loaders())
    assert mended.freezer.frozen.any()
    needless = NeuronFreezerCallback(neq.Random(0.5), exclude=["net.head"])
    quiet(needless, max_epochs=2).fit(NoForward(), *loaders())


class Noisy(Dataset):
    """Validation samples with noise, of all three random streams."""

    def __len__(self):
        return len(VALIDATION)

    def __getitem__(self, place):
        sample, label = VALIDATION[place]
        noise = random.random() + torch.randn(4) + numpy.random.randn()
        return sample + noise.float(), label


def test_data_that_draw_are_the_same_in_each_process(tmp_path):
    data = loaders()[0], DataLoader(Noisy(), 8)
    settings = {"data": data, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    kept = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole = fitted(None, None, kept, enable_checkpointing=True, **settings)
    for seed in (1, 2):
        net = Net()
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        assert same(fitted(net, ckpt_path=tmp_path / "epoch=2.ckpt", **settings), whole)


def test_a_policy_without_velocity_needs_no_validation_data():
    callback = NeuronFreezerCallback(neq.Random(0.5), exclude=["head"])
    fitted(None, callback, data=loaders()[:1])
    assert callback.freezer.frozen.sum() == 12


class Iterates(IterableDataset):
    def __iter__(self):
        return iter(VALIDATION)


class Several(Net):
    def validation_step(self, batch, index, dataloader_idx=0):
        pass


@pytest.mark.parametrize(
    ("net", "validation", "words"),
    [
        (Net, [], "there is no eval set: give the trainer one, or pass validation_batches"),
        (Net, [DataLoader(Iterates(), 4)], "(Iterates) is iterable"),
        (Net, [DataLoader(TensorDataset(X[:0], Y[:0]), 4)], "the eval set is empty"),
        (Several, [[DataLoader(VALIDATION, 4)] * 2], "there are 2 validation loaders"),
    ],
)
def test_validation_data_that_can_t_be_decided_on(net, validation, words):
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        fitted(net(), data=(loaders()[0], *validation))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"excludes": ["head"]}, TypeError),
        ({"exclude": "head"}, ValueError),
        ({"similarity": "both"}, ValueError),
        ({"gradient": "none"}, ValueError),
        ({"timings": 3}, TypeError),
        ({"flops": 3}, TypeError),
        ({"samples": 0}, ValueError),
        ({"policy": neq.AtEquilibrium}, TypeError),
        ({"validation_batches": iter([X])}, ValueError),
        ({"validation_batches": {"x": X}}, TypeError),
    ],
)
def test_wrong_options_are_refused_at_once(options, error):
    with pytest.raises(error) as caught:
        NeuronFreezerCallback(**options)
    assert "\n" not in str(caught.value)


def test_checkpoints_of_others(tmp_path):
    path = tmp_path / "mine.ckpt"
    trainer = quiet(freezing(), max_epochs=3)
    trainer.fit(Net(), *loaders())
    trainer.save_checkpoint(path)
    other = NeuronFreezerCallback(neq.Random(0.5))
    with pytest.raises(ValueError, match=r"mine.ckpt: .* by the policy AtEquilibrium, not Random"):
        fitted(None, other, ckpt_path=path)

    class Renamed(Net):
        strict_loading = False

        def __init__(self):
            super().__init__()
            self.trunk = self.body
            del self.body
            self.through = True

        def forward(self, inputs):
            return self.head(self.trunk(inputs))

    with pytest.raises(ValueError, match=r"mine.ckpt: .* a model with other layers or sizes"):
        fitted(Renamed(), ckpt_path=path)
    with pytest.raises(
        RuntimeError, match=r"mine.ckpt is of another model \(size mis.*\): fit"
    ) as e:
        fitted(Net(width=9), ckpt_path=path)
    assert "\n" not in str(e.value)
    trainer = quiet(max_epochs=3)
    trainer.fit(Net(), *loaders())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback = freezing()
    with pytest.warns(UserWarning, match=r"plain.ckpt holds no state of a NeuronFreezerCallback"):
        fitted(None, callback, ckpt_path=tmp_path / "plain.ckpt")
    assert callback.freezer.epoch == EPOCHS - 3


def test_without_lightning_it_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "neq.integrations.lightning")
    with pytest.raises(ImportError, match=r"lightning is not installed: .*neqbench\[lightning\]"):
        importlib.import_module("neq.integrations.lightning")
