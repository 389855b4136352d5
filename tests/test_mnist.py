import gzip
import struct
from pathlib import Path

import numpy
import pytest
import torch

from harness.errors import UserError
from harness.run.trials import specs
from harness.suite import files, parts
from harness.suite.config import Data
from suites.lenet import LeNet5, LeNet300
from suites.mnist.data import download, download_fashion, load, load_fashion

REAL = Path(__file__).parents[2] / "shared/data/mnist"
IMAGES, LABELS = "images-idx3-ubyte", "labels-idx1-ubyte"


def idx(values):
    """An IDX file's content: magic, sizes, values."""
    values = numpy.asarray(values, dtype=numpy.uint8)
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()


def pictures(count, size=(28, 28)):
    """Picture i is i in every pixel but the first of its second row, which is 255."""
    values = numpy.arange(count, dtype=numpy.uint8).repeat(size[0] * size[1])
    values = values.reshape(count, *size)
    values[:, 1, 0] = 255
    return values


def write(root, packed=True, folder="MNIST", counts=(20, 10)):
    """All four files, packed or not; labels are i % 10."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part, count in zip(("train", "t10k"), counts, strict=True):
        for kind, values in ((IMAGES, pictures(count)), (LABELS, numpy.arange(count) % 10)):
            content = idx(values)
            path = raw / f"{part}-{kind}{'.gz' * packed}"
            path.write_bytes(gzip.compress(content) if packed else content)
    return raw


def options(root, **more):
    return Data(load="data:load", root=str(root), **{"validation_size": 5} | more)


@pytest.mark.parametrize("packed", [True, False])
def test_the_files_are_read_as_they_lie(tmp_path, packed):
    raw = write(tmp_path, packed)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    folders = (raw, raw.parent, tmp_path)
    for path in folders:
        path.chmod(0o555)
    download(options(tmp_path))
    images = load(options(tmp_path))
    for path in folders:
        path.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert (images.name, images.padding, images.flip) == ("MNIST", 0, False)
    assert (len(images.train), len(images.test)) == (20, 10)
    read = images.train.read(torch.tensor([3, 17]))
    assert read.shape == (2, 1, 28, 28)
    assert read.dtype == torch.uint8
    assert read[:, 0, 0, 1].tolist() == [3, 17]
    assert read[:, 0, 1, 0].tolist() == [255, 255]
    assert images.train.labels[[3, 17]].tolist() == [3, 7]
    assert images.train.labels.dtype == torch.int64


def test_unpacked_files_come_first(tmp_path):
    write(tmp_path, packed=True, counts=(20, 10))
    write(tmp_path, packed=False, counts=(30, 10))
    assert len(load(options(tmp_path)).train) == 30


def test_fashion_lies_in_a_folder_of_its_own(tmp_path):
    write(tmp_path)
    write(tmp_path, folder="FashionMNIST", counts=(40, 10))
    images = load_fashion(options(tmp_path))
    assert (images.name, len(images.train)) == ("Fashion-MNIST", 40)
    assert (images.mean, images.std) == ((0.2860,), (0.3530,))


def packed(values):
    return gzip.compress(idx(values))


@pytest.mark.parametrize(
    "kind, content, message",
    [
        (IMAGES, None, "missing, and so is t10k-images-idx3-ubyte.gz; add it"),
        (LABELS, None, "missing, and so is t10k-labels-idx1-ubyte.gz; add it"),
        (IMAGES, packed(pictures(10))[:-20], "truncated, damaged"),
        (IMAGES, b"no gzip", "truncated, damaged"),
        (LABELS, b"", "no IDX file of unsigned bytes in 1 dimension;"),
        (LABELS, packed(pictures(10)), "no IDX file of unsigned bytes in 1 dimension;"),
        (IMAGES, packed(range(10)), "no IDX file of unsigned bytes in 3 dimensions;"),
        (IMAGES, gzip.compress(b"\0\0\x0d" + idx(pictures(10))[3:]), "no IDX file of unsigned"),
        (IMAGES, gzip.compress(b"\0\0\x08\x03\0\0"), "no IDX file of unsigned"),
        (IMAGES, gzip.compress(idx(pictures(10))[:-1]), "7839 values, and .* 10 × 28 × 28;"),
        (LABELS, gzip.compress(idx(range(10)) + b"\0"), "11 values, and its header says 10;"),
        (LABELS, packed([]), "0 values, and its header says 0;"),
        (IMAGES, packed(pictures(10, (28, 29))), "images are 29 × 28, not 28 × 28;"),
        (LABELS, packed([10] * 10), "label 10 is not one of 0 to 9;"),
        (LABELS, packed(range(9)), "9 labels for 10 images;"),
    ],
    ids=map(str, range(15)),  # packed bytes hold the time, and test processes must agree on names
)
def test_damage_is_said_with_its_file(tmp_path, kind, content, message):
    path = write(tmp_path) / f"t10k-{kind}.gz"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(options(tmp_path))
    assert str(path.with_suffix("")) in str(caught.value)
    assert f"delete {tmp_path / 'MNIST'} to download it again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unpacked_file_is_checked_too(tmp_path):
    path = write(tmp_path, packed=False) / f"train-{IMAGES}"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=f"{path}: 15675 values, and its header says 20"):
        load(options(tmp_path))


@pytest.mark.parametrize(
    "get, folder",
    [
        (load, "MNIST"),
        (download, "MNIST"),
        (load_fashion, "FashionMNIST"),
        (download_fashion, "FashionMNIST"),
    ],
)
def test_a_download_without_network_is_one_line(tmp_path, monkeypatch, vision, get, folder):
    from torchvision import datasets

    monkeypatch.setattr(getattr(datasets, folder), "mirrors", ["http://127.0.0.1:9/"])
    root = tmp_path / "new"
    message = rf"can.t be downloaded .* into {folder}/raw there, .*--set data.root"
    with pytest.raises(UserError, match=message) as caught:
        get(options(root))
    assert "\n" not in str(caught.value)
    assert not (root / folder).exists()


def test_what_is_downloaded_is_read(tmp_path, monkeypatch, vision):
    from torchvision import datasets

    monkeypatch.setattr(datasets.MNIST, "download", lambda self: write(Path(self.root), False))
    root = tmp_path / "new"
    assert len(load(options(root)).train) == 20
    assert {path.name for path in root.iterdir()} <= {"MNIST", ".download.lock"}


@pytest.mark.skipif(not REAL.is_dir(), reason="the real MNIST is not on this machine")
def test_the_real_images_are_torchvision_s(tmp_path, vision):
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for path in sorted((REAL / "MNIST/raw").glob("*.gz")):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    images = load(options(REAL))
    for split, train in ((images.train, True), (images.test, False)):
        theirs = MNIST(str(tmp_path), train=train)
        assert torch.equal(split.labels, theirs.targets)
        assert torch.equal(split.read(torch.arange(len(split)))[:, 0], theirs.data)
    assert (len(images.train), len(images.test)) == (60_000, 10_000)
    pixels = images.train.read(torch.arange(60_000)) / 255
    assert float(pixels.mean()) == pytest.approx(images.mean[0], abs=1e-4)
    assert float(pixels.std()) == pytest.approx(images.std[0], abs=1e-4)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_the_lenets_have_their_published_size():
    pixels = torch.rand(3, 1, 28, 28)
    for model, size in ((LeNet300(), 266_610), (LeNet5(), 431_080)):
        assert parameters(model) == size
        assert model(pixels).shape == (3, 10)
    assert [name for name, _ in LeNet300().named_children()] == ["fc1", "fc2", "fc3"]
    assert [name for name, _ in LeNet5().named_children()] == ["conv1", "conv2", "fc1", "fc2"]


def test_narrower_lenets():
    pixels = torch.rand(2, 1, 28, 28)
    assert LeNet5([3, 4], hidden=5, classes=7)(pixels).shape == (2, 7)
    dense = LeNet300([6, 5], inputs=16, classes=3)
    assert dense(torch.rand(2, 1, 4, 4)).shape == (2, 3)
    assert parameters(dense) == 17 * 6 + 7 * 5 + 6 * 3


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: LeNet300([300]),
            "LeNet300: hidden must be 2 whole numbers from 1 on, .* got 300$",
        ),
        (lambda: LeNet300([]), "LeNet300: hidden .* such as 300, 100; got none$"),
        (lambda: LeNet300([300, 0]), "LeNet300: hidden .* got 300, 0$"),
        (lambda: LeNet5((6, 16, 120)), "LeNet5: channels must be 2 .*20, 50; got 6, 16, 120$"),
        (lambda: LeNet5((-1, 50)), "LeNet5: channels .* got -1, 50$"),
        (lambda: LeNet5(hidden=0), "LeNet5: hidden must be 1 whole number from 1 on, .* got 0$"),
        (lambda: LeNet5(hidden=2.5), "LeNet5: hidden .* got 2.5$"),
    ],
)
def test_wrong_widths_are_one_line(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "name, folder, size",
    [
        ("mnist-lenet300", "MNIST", 266_610),
        ("mnist-lenet5", "MNIST", 431_080),
        ("fashion-mnist-lenet5", "FashionMNIST", 431_080),
    ],
)
def test_the_suites_read_their_data_and_build_their_model(tmp_path, name, folder, size):
    write(tmp_path, folder=folder)
    settings = [f"data.root={tmp_path}", "data.validation_size=5"]
    suite, place = files.load_suite(name, settings)
    data = parts.load_part(suite.data.load, place)(suite.data)
    assert len(data.train) == 20
    assert callable(parts.load_part(suite.data.download, place))
    model = parts.build_model(suite.model.build, place, suite.model.arguments)
    assert parameters(model) == size
    assert suite.model.exclude[0] == list(dict(model.named_children()))[-1]
    assert "scaled, not the paper's" in suite.title
    assert len(specs(name, settings, "baseline")) == 3
