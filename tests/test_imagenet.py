"""Real encoded pictures in ImageNet's two layouts, through the loaders of the suite."""

import io
import shutil

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from harness.errors import UserError
from harness.run.preflight import preflight
from harness.run.trials import specs
from harness.suite import files
from harness.suite.config import Data, Recipe
from suites.imagenet.data import MEAN, STD, load, transforms

CPU = torch.device("cpu")
CLASSES = ("n01", "n02", "n03")


def picture(value, size=(40, 30), kind="JPEG"):
    buffer = io.BytesIO()
    Image.fromarray(numpy.full((*size, 3), value, dtype=numpy.uint8)).save(buffer, kind)
    return buffer.getvalue()


def value_of(label, number):
    return 80 * label + 10 * number + 5


@pytest.fixture
def folder(tmp_path):
    """Three classes, four training and two validation images each, in train/ and val/."""
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                path = tmp_path / part / name / f"{name}_{number}.JPEG"
                path.write_bytes(picture(value_of(label, number)))
    return tmp_path


def shard(path, labels, column="image", encode=picture):
    rows = [{"bytes": encode(value_of(max(label, 0), 0)), "path": "x.JPEG"} for label in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: rows, "label": labels}), path, row_group_size=2)


@pytest.fixture
def hub(tmp_path):
    """The same classes in the hub's shards; its test part has no labels."""
    shard(tmp_path / "data/train-00000-of-00002.parquet", [0, 1, 2, 0, 1])
    shard(tmp_path / "data/train-00001-of-00002.parquet", [2, 2, 1, 0])
    shard(tmp_path / "data/validation-00000-of-00001.parquet", [2, 0, 1])
    shard(tmp_path / "data/test-00000-of-00001.parquet", [-1, -1])
    return tmp_path


def options(root, **arguments):
    arguments = {"classes": 3} | arguments
    return Data(load="a:b", root=str(root), validation_size=2, arguments=arguments)


def recipe():
    optimizer = {"name": "SGD", "lr": 0.1}
    return Recipe(epochs=1, batch_size=4, precision="float32", optimizer=optimizer)


def pixel(image, channel=0):
    """Back to 0 to 255, of the middle."""
    middle = image[channel, image.shape[1] // 2, image.shape[2] // 2]
    return float(middle * STD[channel] + MEAN[channel]) * 255


@pytest.mark.parametrize("layout", ["folder", "hub"])
def test_images_and_labels(layout, request):
    data = load(options(request.getfixturevalue(layout), size=16, resize=20))
    opened = data.open(CPU, 0, recipe())
    found = []
    for images, labels in opened.evaluate("test", 2):
        assert images.shape[1:] == (3, 16, 16)
        assert images.dtype == torch.float32
        found += [(int(label), pixel(image)) for image, label in zip(images, labels, strict=True)]
    for label, value in found:
        assert abs(value - 5) % 80 < 14  # JPEG, and the second image of a class
        assert int(value // 80) == label
    assert sorted({label for label, _ in found}) == [0, 1, 2]
    forwards = list(opened.train(0))
    assert sum(len(f.inputs) for f in forwards) == opened.size("train")
    assert forwards[0].inputs.shape[1:] == (3, 16, 16)


def test_the_hub_s_shards_are_copied_once_and_read_at_random(hub):
    data = load(options(hub))
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 2, 1, 0]
    (copy,) = hub.glob(".neqbench-train-*.arrow")
    changed = copy.stat().st_mtime_ns
    again = load(options(hub))
    assert copy.stat().st_mtime_ns == changed
    for index in (7, 0, 4):
        image, label = again.train[index]
        assert label == data.train.labels[index]
        assert abs(numpy.asarray(image).mean() - value_of(label, 0)) < 3
    assert again.fingerprint() == data.fingerprint()
    assert not list(hub.glob(".neqbench-*.part"))


def test_a_shard_that_changes_is_copied_anew(hub):
    load(options(hub))
    (old,) = hub.glob(".neqbench-train-*.arrow")
    shard(hub / "data/train-00000-of-00002.parquet", [2, 1, 0, 2, 1])
    assert load(options(hub)).train.labels.tolist()[:5] == [2, 1, 0, 2, 1]
    (copy,) = hub.glob(".neqbench-train-*.arrow")
    assert copy != old
    copy.write_bytes(copy.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\.neqbench-train-.*\.arrow is damaged; delete it"):
        load(options(hub))
    copy.unlink()
    assert load(options(hub)).train.labels.tolist()[:5] == [2, 1, 0, 2, 1]


def test_a_copy_is_enough_where_nothing_can_be_written(hub):
    load(options(hub))
    for lock in hub.glob(".neqbench-*.lock"):
        lock.unlink()
        lock.mkdir()  # as if it could not be made
    assert len(load(options(hub)).train) == 9
    shard(hub / "data/train-00000-of-00002.parquet", [0, 1])
    with pytest.raises(UserError, match=r"can't be copied there for reading at random"):
        load(options(hub))


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_pictures_of_other_modes_become_rgb(folder, mode):
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    path = folder / "train" / "n01" / "n01_0.JPEG"
    Image.new("L", (40, 30), 255).convert(mode).save(path, kind)
    image, _ = load(options(folder)).train[0]
    assert image.mode == "RGB"
    assert numpy.asarray(image).min() > 250


def test_augmentation_is_the_recipe_s():
    torch.manual_seed(0)
    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 255, (40, 50, 3), numpy.uint8))
    drawn, plain = transforms(16, 20, rand_augment=(2, 9), erase=1.0)
    first, second = (drawn(image, 3)[0] for _ in range(2))
    assert first.shape == second.shape == (3, 16, 16)
    assert not torch.equal(first, second)
    assert torch.equal(plain(image, 3)[0], plain(image, 3)[0])
    assert type(plain(image, 3)[0]) is torch.Tensor
    assert plain(image, 3)[1] == 3


def remove(path):
    return lambda root: shutil.rmtree(root / path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (remove("val/n02"), "train/n02 is in one part and not the other"),
        (remove("train/n03"), "val/n03 is in one part and not the other"),
        (lambda r: [p.unlink() for p in (r / "train/n01").iterdir()], "found no valid file .* n01"),
        (remove("val"), "no folder val and no parquet files"),
        (remove("train"), "no folder train and no parquet files; get ILSVRC2012"),
    ],
)
def test_folders_that_are_not_there(folder, spoil, message):
    spoil(folder)
    with pytest.raises(UserError, match=message):
        load(options(folder))


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda d: (d / "train-00001-of-00002.parquet").unlink(), "1 of 2 train shards are there"),
        (lambda d: (d / "validation-00000-of-00001.parquet").unlink(), "no validation-"),
        (
            lambda d: shard(d / "validation-00000-of-00001.parquet", [0, 1]),
            "train/class 2 is in one part",
        ),
        (lambda d: shard(d / "validation-00000-of-00001.parquet", [-1]), "labels below 0"),
        (lambda d: shard(d / "train-00000-of-00002.parquet", [0], column="photo"), "columns image"),
        (lambda d: (d / "train-00000-of-00002.parquet").write_bytes(b"PAR1"), "truncated, damaged"),
    ],
)
def test_shards_that_are_spoilt(hub, spoil, message):
    spoil(hub / "data")
    with pytest.raises(UserError, match=message) as caught:
        load(options(hub))
    assert "\n" not in str(caught.value)
    assert not list(hub.glob(".neqbench-*.part"))


def test_a_picture_that_is_none(folder):
    broken = folder / "train" / "n01" / "n01_0.JPEG"
    broken.write_bytes(broken.read_bytes()[:100])
    files = load(options(folder))
    with pytest.raises(UserError, match=r"n01_0\.JPEG cannot be decoded .* replace it"):
        files.train[0]


def test_a_broken_row_of_a_shard_is_named(hub):
    shard(hub / "data/train-00000-of-00002.parquet", [0, 1], encode=lambda v: picture(v)[:60])
    data = load(options(hub))
    with pytest.raises(UserError, match=r"image 1 of train-\*\.parquet below .* cannot be decoded"):
        data.train[1]


def settings(root, classes):
    return [
        f"data.root={root}",
        "data.arguments={size=32, resize=40, classes=3}",
        "data.validation_size=2",
        "model.input=[3, 32, 32]",
        f"model.arguments.num_classes={classes}",
        "recipe.batch_size=4",
        "resources.cpus=1",
    ]


@pytest.mark.slow
def test_the_suite_accepts_what_fits_and_says_what_does_not(folder):
    trials = specs("imagenet", settings(folder, 3), "baseline,neq", "0")
    preflight(trials)
    assert trials[0].data_name == "ImageNet"
    with pytest.raises(UserError, match="labels from 0 to 2 do not fit the model's 2 classes"):
        preflight(specs("imagenet", settings(folder, 2), "baseline", "0"))
    with pytest.raises(UserError, match=r"images of 3 classes, and not of 1000; .*classes=3"):
        specs("imagenet", [f"data.root={folder}"], "baseline", "0")
    too_many = [*settings(folder, 3), "recipe.batch_size=11"]
    with pytest.raises(UserError, match="batch_size is 11, and there are 10 images to train on"):
        preflight(specs("imagenet", too_many, "baseline", "0"))
    other = [*settings(folder, 3), "model.input=[3, 40, 40]"]
    with pytest.raises(UserError, match=r"input is \[3, 40, 40\], the training images are"):
        preflight(specs("imagenet", other, "baseline", "0"))


def test_weights_of_another_architecture_are_found_before_anything_runs(folder, vision, tmp_path):
    torch.save(vision.models.resnet34(num_classes=3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="belongs to another architecture"):
        preflight(
            specs("imagenet", [*settings(folder, 3), f"model.weights={tmp_path}/w.pt"], "neq")
        )


def test_the_recipes_are_the_paper_s():
    suite, _ = files.load_suite("imagenet")
    recipe = suite.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.forward_batch) == (90, 256, 128)
    assert recipe.optimizer.arguments == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert recipe.scheduler.arguments == {"step_size": 30, "gamma": 0.1}
    assert suite.data.validation_size == 1281
    swin, _ = files.load_suite("imagenet-swin")
    recipe = swin.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.forward_batch) == (30, 128, 64)
    assert (recipe.optimizer.name, recipe.optimizer.arguments["lr"]) == ("AdamW", 5e-6)
    assert recipe.optimizer.arguments["weight_decay"] == 1e-8
    warm, cosine = recipe.scheduler.arguments["schedulers"]
    assert (warm["total_iters"], cosine["T_max"], recipe.schedule) == (5, 25, "iteration")
    mixed = {"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "classes": 1000}
    assert swin.task_arguments == mixed
    assert swin.data.arguments["erase"] == 0.25
    assert swin.model.weights == "timm:swin_base_patch4_window7_224.ms_in22k"
    assert swin.model.arguments["model_name"] == "swin_base_patch4_window7_224"
