import io
import pickle
from hashlib import md5
from pathlib import Path

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import harness.data
import harness.errors
import harness.tasks
import harness.vision
from harness.data.memory import Images, Split, crop
from harness.errors import UserError
from harness.suite import files, parts
from harness.suite.config import Data, Recipe
from suites.cifar10.data import BINARIES, load

REAL = Path(__file__).parents[2] / "shared/data/cifar10"
CPU = torch.device("cpu")


def images_of(count, size=6, **options):
    """Image i is constant: i in every pixel, label i % 10."""
    pixels = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, size, size)
    split = Split(torch.arange(count) % 10, lambda indices: pixels[indices].contiguous())
    return Images(
        name="counted",
        train=split,
        test=split,
        mean=(0.0,),
        std=(1 / 255,),
        padding=0,
        flip=False,
        options=Data(load="a:b", **{"validation_size": 5} | options),
    )


def recipe(batch_size, **settings):
    optimizer = {"name": "SGD", "lr": 0.1}
    values = {"epochs": 1, "precision": "float32", "optimizer": optimizer} | settings
    return Recipe(batch_size=batch_size, **values)


def numbers(batches):
    return [int(image[0, 0, 0].round()) for forward in batches for image in forward.inputs]


def evaluated(batches, part):
    loaded = batches.evaluate(part, 7)
    return [int(image[0, 0, 0].round()) for images, _ in loaded for image in images]


def test_crop_cuts_each_image_s_own_window():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 7, 5), generator=generator, dtype=torch.uint8)
    corners = torch.randint(2 * 2 + 1, (20, 2), generator=generator)
    cut = crop(images, 2, corners)
    assert cut.shape == images.shape
    assert cut.dtype == torch.uint8
    for i, (top, left) in enumerate(corners.tolist()):
        padded = numpy.pad(images[i].numpy(), ((0, 0), (2, 2), (2, 2)))
        assert (cut[i].numpy() == padded[:, top : top + 7, left : left + 5]).all()


def test_the_validation_part_is_taken_out_of_the_training_set():
    opened = images_of(40, train_size=30).open(CPU, seed=0, recipe=recipe(7))
    train, validation = numbers(opened.train(0)), evaluated(opened, "validation")
    assert (len(train), len(validation)) == (25, 5)
    assert not set(train) & set(validation)
    assert evaluated(opened, "test") == list(range(40))
    assert [opened.size(part) for part in ("train", "validation", "test")] == [25, 5, 40]
    other = images_of(40, train_size=30).open(CPU, seed=1, recipe=recipe(7))
    assert evaluated(other, "validation") == validation
    moved = images_of(40, train_size=30, split_seed=1).open(CPU, seed=0, recipe=recipe(7))
    assert evaluated(moved, "validation") != validation


def test_order_depends_on_seed_and_epoch_and_not_on_the_global_stream():
    first = images_of(40).open(CPU, seed=3, recipe=recipe(8))
    again = images_of(40).open(CPU, seed=3, recipe=recipe(8))
    torch.manual_seed(1)
    order = numbers(first.train(2))
    state = torch.get_rng_state()
    assert numbers(again.train(2)) == order
    assert torch.equal(torch.get_rng_state(), state)
    assert numbers(first.train(3)) != order
    assert numbers(images_of(40).open(CPU, seed=4, recipe=recipe(8)).train(2)) != order
    assert all((f.targets == f.inputs[:, 0, 0, 0].round() % 10).all() for f in first.train(0))


def test_augmentation_crops_flips_and_normalises():
    images = images_of(40)
    ramp = torch.arange(36, dtype=torch.uint8).view(1, 1, 6, 6).expand(40, 1, 6, 6)
    split = Split(torch.zeros(40, dtype=torch.int64), lambda indices: ramp[indices])
    augmented = Images(
        name="ramp",
        train=split,
        test=split,
        mean=(0.5,),
        std=(0.25,),
        padding=1,
        flip=True,
        options=images.options,
    ).open(CPU, seed=0, recipe=recipe(40))
    plain = (ramp[0].float() / 255 - 0.5) / 0.25
    assert torch.allclose(next(augmented.evaluate("test", 40))[0][0], plain, atol=1e-5)
    black = (0.0 - 0.5) / 0.25
    padded = torch.nn.functional.pad(plain, [1] * 4, value=black)
    windows = [padded[:, t : t + 6, le : le + 6] for t in range(3) for le in range(3)]
    allowed = torch.stack([w for window in windows for w in (window, window.flip(-1))])
    batch = next(augmented.train(0)).inputs
    distance = (batch[:, None] - allowed[None]).abs().amax((2, 3, 4))
    nearest = distance.argmin(1)
    assert distance.min(1).values.max() < 1e-5
    assert len(nearest.unique()) > 10  # 35 images over 18 variants


def test_fingerprints_follow_the_content_and_not_the_place():
    base = images_of(40).fingerprint()
    assert images_of(40, root="elsewhere").fingerprint() == base
    assert images_of(41).fingerprint() != base
    relabelled = images_of(40)
    labels = relabelled.train.labels.clone()
    labels[7] = 3
    for split in (Split(labels, relabelled.train.read), Split(relabelled.train.labels, brighter)):
        changed = images_of(40)
        object.__setattr__(changed, "train", split)
        assert changed.fingerprint() != base


def brighter(indices):
    return images_of(40).train.read(indices) + 1


def test_digits_are_scikit_learn_s():
    from sklearn.datasets import load_digits

    suite, folder = files.load_suite("digits")
    digits = parts.load_part(suite.data.load, folder)(suite.data)
    bunch = load_digits()
    counts = numpy.bincount(bunch.target)
    labels = torch.cat([digits.train.labels, digits.test.labels])
    assert (labels.bincount().numpy() == counts).all()
    images = torch.cat([digits.train.read(torch.arange(1200)), digits.test.read(torch.arange(597))])
    assert images.shape == (1797, 1, 16, 16)
    assert images.dtype == torch.uint8
    means = sorted(float(image.float().mean()) for image in images)
    expected = sorted(float(image.mean()) * 255 / 16 for image in bunch.images)
    assert means == pytest.approx(expected, abs=3)


def png(value, size=(32, 32)):
    buffer = io.BytesIO()
    Image.fromarray(numpy.full((*size, 3), value, dtype=numpy.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path, values, labels=None, encode=png):
    encoded = [{"bytes": encode(v), "path": None} for v in values]
    labels = [v % 10 for v in values] if labels is None else labels
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": encoded, "label": labels}), path)


@pytest.fixture
def hub(tmp_path):
    """Two training shards and a test shard in the hub's layout."""
    write_shard(tmp_path / "plain_text/train-00000-of-00002.parquet", range(20))
    write_shard(tmp_path / "plain_text/train-00001-of-00002.parquet", range(20, 40))
    write_shard(tmp_path / "plain_text/test-00000-of-00001.parquet", range(100, 110))
    return tmp_path


def options(root, **more):
    return Data(load="data:load", root=str(root), **{"validation_size": 5} | more)


def test_the_hub_s_parquet_layout(hub):
    images = load(options(hub))
    assert images.name == "CIFAR-10"
    assert len(images.train.labels) == 40
    read = images.train.read(torch.tensor([3, 25]))
    assert read.shape == (2, 3, 32, 32)
    assert read[:, 0, 0, 0].tolist() == [3, 25]
    assert images.train.labels[[3, 25]].tolist() == [3, 5]
    opened = images.open(CPU, 0, recipe(8))
    assert [opened.size(part) for part in ("train", "validation", "test")] == [35, 5, 10]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-50]), "truncated, damaged"),
        (lambda p: p.write_bytes(b""), "truncated, damaged"),
        (lambda p: pq.write_table(pa.table({"image": [1]}), p), "without the columns img"),
        (lambda p: pq.write_table(pa.table({"img": [1], "label": [1]}), p), "without the columns"),
        (lambda p: write_shard(p, [1], labels=[12]), "labels must be 0 to 9"),
        (lambda p: p.unlink(), r"no test-\*.parquet"),
        (lambda p: write_shard(p, [1], encode=lambda v: png(v)[:60]), "cannot be decoded"),
        (lambda p: write_shard(p, [1], encode=lambda v: None), "truncated, damaged"),
        (lambda p: write_shard(p, [1], encode=lambda v: png(v, (8, 9))), "is 9 × 8, not 32 × 32"),
    ],
)
def test_spoilt_parquet_is_said_with_its_place(hub, spoil, message):
    spoil(hub / "plain_text/test-00000-of-00001.parquet")
    with pytest.raises(UserError, match=message) as caught:
        load(options(hub)).fingerprint()
    assert str(hub) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def binaries(tmp_path, monkeypatch, vision):
    """torchvision's layout with ten images a file, and their MD5 sums in place of the real ones."""
    from torchvision.datasets import CIFAR10

    folder = tmp_path / BINARIES
    folder.mkdir()
    sums = {}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for start, name in zip(range(0, 60, 10), names, strict=True):
        data = numpy.arange(start, start + 10, dtype=numpy.uint8).repeat(3072).reshape(10, 3072)
        content = pickle.dumps({"data": data, "labels": list(range(10))})
        (folder / name).write_bytes(content)
        sums[name] = md5(content).hexdigest()
    meta = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    meta_entry = CIFAR10.meta | {"md5": md5(meta).hexdigest()}
    monkeypatch.setattr(CIFAR10, "meta", meta_entry)
    return tmp_path


def test_torchvision_s_layout(binaries):
    images = load(options(binaries))
    assert (len(images.train.labels), len(images.test.labels)) == (50, 10)
    assert images.train.read(torch.tensor([7, 33]))[:, 2, 31, 31].tolist() == [7, 33]
    assert images.test.read(torch.tensor([4]))[0, 0, 0, 0] == 54
    (binaries / BINARIES / "data_batch_3").write_bytes(b"short")
    with pytest.raises(UserError, match=r"missing or damaged.*delete the folder"):
        load(options(binaries))


def test_a_download_without_network_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, vision):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    root = tmp_path / "new"
    with pytest.raises(UserError, match=r"can.t be downloaded .*--set data.root"):
        load(options(root))
    assert not (root / BINARIES).exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the real CIFAR-10 is not on this machine")
def test_the_real_images():
    images = load(options(REAL, train_size=300))
    assert images.name == "CIFAR-10 (JPEG)"
    assert images.train.labels.bincount().tolist() == [5000] * 10
    assert images.test.labels.bincount().tolist() == [1000] * 10
    opened = images.open(CPU, 0, recipe(100))
    batch = torch.cat([inputs for inputs, _ in opened.evaluate("test", 500)])
    assert batch.mean().abs() < 0.1  # the usual mean and spread fit these images
    assert batch.std() == pytest.approx(1.0, abs=0.1)


def test_the_names_that_suites_import():
    """README and import strings of users' own suites."""
    names = {"Data", "Images", "Samples", "Source", "Split", "Transform"}
    assert names == set(harness.data.__all__)
    assert all(hasattr(harness.data, name) for name in names)
    assert issubclass(harness.errors.UserError, Exception)
    assert harness.vision.torchvision().__name__ == "torchvision"
    assert {"Classification", "Segmentation", "Task"} <= set(vars(harness.tasks))
