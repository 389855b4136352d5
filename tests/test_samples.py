"""Samples decoded one by one, in this process or in loader processes."""

import random
from unittest.mock import patch

import numpy
import pytest
import torch
from PIL import Image

from harness.data import streamed
from harness.data.streamed import Samples
from harness.errors import UserError
from harness.suite.config import Data, Recipe

CPU = torch.device("cpu")


class Numbered:
    """Image i is constant: i in every pixel; its label is i % 3."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, broken
        self.labels = torch.arange(count) % 3

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise UserError(f"image {index} is broken")
        return Image.new("RGB", (4, 4), (index, index, index)), index % 3


def noisy(image, label):
    """Draws from all three global streams."""
    noise = torch.rand(()) + random.random() + numpy.random.rand()
    return plain(image, label)[0] + noise / 10, label


def plain(image, label):
    return torch.from_numpy(numpy.asarray(image).copy()).permute(2, 0, 1).float(), label


def numbered(count=20, broken=(), **options):
    return Samples(
        name="numbered",
        train=Numbered(count, broken),
        test=Numbered(7),
        train_transform=noisy,
        validation_transform=plain,
        options=Data(load="a:b", **{"validation_size": 5} | options),
    )


def recipe(batch_size):
    optimizer = {"name": "SGD", "lr": 0.1}
    return Recipe(epochs=1, batch_size=batch_size, precision="float32", optimizer=optimizer)


def epoch(number=0, loaders=0, seed=0, batch_size=6, data=None):
    opened = (data or numbered()).open(CPU, seed, recipe(batch_size), loaders=loaders)
    return [(f.inputs, f.targets) for f in opened.train(number)]


def same(first, second):
    return all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(first, second, strict=True)
    )


def test_loader_processes_change_nothing():
    assert same(epoch(), epoch(loaders=2))
    opened = numbered().open(CPU, 0, recipe(6), loaders=2)
    alone = numbered().open(CPU, 0, recipe(6))
    for part in ("validation", "test"):
        assert same(list(opened.evaluate(part, 3)), list(alone.evaluate(part, 3)))


def test_a_sample_depends_on_seed_epoch_and_index_alone():
    first = epoch()
    assert same(first, epoch())
    assert not same(first, epoch(number=1))
    assert not same(first, epoch(seed=1))
    together = {int(x[0, 0, 0]): x for inputs, _ in first for x in inputs}
    for inputs, _ in epoch(batch_size=15):
        for image in inputs:
            assert torch.equal(together[int(image[0, 0, 0])], image)


def test_global_streams_are_left_alone():
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    epoch()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()


def test_labels_belong_to_their_images():
    for inputs, targets in numbered().open(CPU, 0, recipe(6)).evaluate("test", 3):
        assert torch.equal(inputs[:, 0, 0, 0].long() % 3, targets)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_sample_is_evaluated_by_one_worker(world):
    seen = []
    for rank in range(world):
        with (
            patch.object(streamed, "rank", lambda rank=rank: rank),
            patch.object(streamed, "workers", lambda: world),
        ):
            opened = numbered().open(CPU, 0, recipe(6))
            seen += [int(x[0, 0, 0]) for images, _ in opened.evaluate("test", 2) for x in images]
    assert sorted(seen) == list(range(7))


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_sample_that_can_t_be_read_is_one_line(loaders):
    broken = numbered(broken=range(20))
    with pytest.raises(UserError, match=r"^image \d+ is broken$"):
        epoch(data=broken, loaders=loaders)


def test_test_images_may_have_sizes_of_their_own():
    class Sized(Numbered):
        def __getitem__(self, index):
            return Image.new("RGB", (4 + index, 4)), 0

    data = Samples(
        name="sized",
        train=Numbered(10),
        test=Sized(5),
        train_transform=plain,
        validation_transform=plain,
        test_transform=plain,
        options=Data(load="a:b", validation_size=3),
    )
    opened = data.open(CPU, 0, recipe(2))
    widths = [images.shape for images, _ in opened.evaluate("test", 4)]
    assert widths == [(1, 3, 4, 4 + i) for i in range(5)]
    assert [len(images) for images, _ in opened.evaluate("validation", 2)] == [2, 1]


def test_fingerprints_follow_the_content():
    base = numbered().fingerprint()
    assert numbered(root="elsewhere").fingerprint() == base
    assert numbered(21).fingerprint() != base
    brighter = numbered()
    brighter.train.labels[3] += 1
    assert brighter.fingerprint() != base
    with patch.object(Numbered, "__getitem__", lambda *_: (Image.new("RGB", (4, 4)), 0)):
        assert numbered().fingerprint() != base


def test_few_and_none():
    opened = numbered().open(CPU, 0, recipe(2), most=2)
    assert [opened.size(part) for part in ("train", "validation", "test")] == [2, 2, 2]
    nothing = numbered(validation_size=0).open(CPU, 0, recipe(2))
    assert list(nothing.evaluate("validation", 4)) == []


class Raising(Numbered):
    def __getitem__(self, index):
        raise KeyError("somewhere")


def raising(image, label):
    raise ZeroDivisionError("here")


def uneven(image, label):
    return torch.zeros(3, 4, 4 + random.randint(0, 9)), label


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize(
    "source, transform, message",
    [
        (
            Raising,
            plain,
            r"^sample \d+ can't be read: KeyError: 'somewhere' \(test_samples.py, line",
        ),
        (Numbered, raising, r"^the transform of sample \d+ failed: ZeroDivisionError: here \(test"),
        (Numbered, uneven, r"^transformed images differ in size: \[3, 4, \d+\] and \[3, 4, \d+\];"),
    ],
)
def test_what_a_user_s_parts_raise_is_one_line(source, transform, message, loaders):
    data = Samples(
        name="x",
        train=source(20),
        test=Numbered(7),
        train_transform=transform,
        validation_transform=plain,
        options=Data(load="a:b", validation_size=2),
    )
    with pytest.raises(UserError, match=message):
        epoch(data=data, loaders=loaders)
