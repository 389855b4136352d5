"""Real encoded pictures in VOC's, SBD's and COCO's layouts, through the loaders of the suites."""

import json

import numpy
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from torch.nn import functional

from harness.errors import UserError
from harness.run.preflight import preflight
from harness.run.trials import specs
from harness.suite import files
from harness.suite.config import Data, Recipe
from suites.segmentation import scenes
from suites.segmentation.data import coco, voc
from suites.segmentation.transforms import IGNORE, labelled, transforms

CPU = torch.device("cpu")


def options(root, validation_size=2, **arguments):
    return Data(load="a:b", root=str(root), validation_size=validation_size, arguments=arguments)


def recipe():
    optimizer = {"name": "SGD", "lr": 0.1}
    return Recipe(epochs=1, batch_size=2, precision="float32", optimizer=optimizer)


def save_image(path, size=(40, 32), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


def save_labels(path, label, size=(40, 32)):
    """A palette picture: a rectangle of `label` with VOC's border around it."""
    values = numpy.zeros(size[::-1], dtype=numpy.uint8)
    values[4:20, 4:24] = IGNORE
    values[6:18, 6:22] = label
    image = Image.fromarray(values, mode="P")
    image.putpalette([i % 256 for i in range(768)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return values


@pytest.fixture
def voc_tree(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for part, count in (("train", 6), ("val", 3)):
        names = [f"2007_{part}{i}" for i in range(count)]
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            save_image(root / "JPEGImages" / f"{name}.jpg")
            save_labels(root / "SegmentationClass" / f"{name}.png", i + 1)
    return tmp_path


def test_voc_s_labels_reach_the_trial_with_their_border(voc_tree):
    data = voc(options(voc_tree, base=32, size=24))
    opened = data.open(CPU, 0, recipe())
    seen = []
    for images, labels in opened.evaluate("test", 5):
        assert images.shape[0] == 1  # one by one, whole
        assert images.shape[2:] == labels.shape[1:] == (32, 40)
        seen.append(sorted(labels.unique().tolist()))
    assert seen == [[0, 1, 255], [0, 2, 255], [0, 3, 255]]
    for images, labels in opened.evaluate("validation", 2):
        assert images.shape == (2, 3, 24, 24)
        assert labels.shape == (2, 24, 24)
        assert labels.dtype == torch.uint8
    (forward, *_) = opened.train(0)
    assert forward.inputs.shape == (2, 3, 24, 24)
    assert set(forward.targets.unique().tolist()) <= {0, 1, 2, 3, 4, 5, 6, 255}


def test_what_a_crop_reaches_beyond_the_image_is_ignored():
    image = Image.new("RGB", (10, 10), (255, 255, 255))
    made = transforms(base=10, size=40)
    for kind in ("train_transform", "validation_transform"):
        torch.manual_seed(0)
        picture, labels = made[kind](*labelled(image, numpy.ones((10, 10)), 21, "x"))
        assert picture.shape == (3, 40, 40)
        inside = labels == 1
        assert 0 < inside.sum() < labels.numel()
        assert (labels[~inside] == IGNORE).all()
        assert (picture[:, inside] > 1.5).all()  # white, normalised
    whole, labels = made["test_transform"](*labelled(image, numpy.ones((10, 10)), 21, "x"))
    assert whole.shape == (3, 10, 10)
    assert (labels == 1).all()


@pytest.mark.parametrize("upright", [False, True])
def test_images_and_labels_move_together(upright):
    """The image says its label in every pixel: it must do so after every transform."""
    values = numpy.repeat(numpy.arange(20, dtype=numpy.uint8)[None], 20, 0)
    values = values.T.copy() if upright else values
    image = Image.fromarray(numpy.stack([10 * values] * 3, -1))
    drawn = transforms(base=20, size=16)["train_transform"]
    mean, std = 0.485, 0.229
    for seed in range(20):
        torch.manual_seed(seed)
        picture, labels = drawn(*labelled(image, values, 21, "x"))
        inside = labels != IGNORE
        shown = (picture[0][inside] * std + mean) * 255 / 10
        assert (shown - labels[inside].float()).abs().max() < 2  # interpolated and not


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda r: (r / "JPEGImages/2007_train0.jpg").unlink(), r"2007_train0\.jpg: No such file"),
        (lambda r: save_labels(r / "SegmentationClass/2007_val1.png", 1, (40, 30)), "40 × 30 for"),
        (lambda r: (r / "SegmentationClass/2007_val1.png").write_bytes(b"x"), "no picture"),
        (lambda r: (r / "ImageSets/Segmentation/val.txt").unlink(), "val.txt: No such file"),
        (lambda r: (r / "ImageSets/Segmentation/val.txt").write_text(""), "names no image"),
    ],
)
def test_voc_files_that_do_not_fit(voc_tree, spoil, message):
    spoil(voc_tree / "VOCdevkit" / "VOC2012")
    with pytest.raises(UserError, match=message):
        voc(options(voc_tree))


def test_labels_out_of_range_and_broken_pictures_are_named(voc_tree):
    root = voc_tree / "VOCdevkit" / "VOC2012"
    save_labels(root / "SegmentationClass/2007_val0.png", 33)
    Image.new("RGB", (40, 32)).save(root / "SegmentationClass/2007_val1.png")
    path = root / "JPEGImages/2007_val2.jpg"
    path.write_bytes(path.read_bytes()[:-40])
    test = voc(options(voc_tree)).test
    for index, message in enumerate(
        ("label 33 is none of 0 to 20 or 255", "a palette or grey picture, not RGB", "decoded")
    ):
        with pytest.raises(UserError, match=message):
            test[index]


def test_sbd_s_masks_are_added_but_not_those_of_voc_s_lists(voc_tree):
    root = voc_tree / "benchmark_RELEASE" / "dataset"
    names = ["2008_a", "2007_train1", "2007_val0", "2008_b"]
    for i, name in enumerate(names):
        save_image(root / "img" / f"{name}.jpg")
        (root / "cls").mkdir(exist_ok=True)
        labels = numpy.full((32, 40), i + 7, dtype=numpy.uint8)
        savemat(root / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": labels, "Boundaries": []}})
    (root / "train_noval.txt").write_text("\n".join(names))
    data = voc(options(voc_tree, sbd=True))
    assert data.name == "VOC 2012 with SBD"
    assert len(data.train) == 6 + 2
    assert list(data.train.labels)[6:] == ["2008_a", "2008_b"]
    assert (data.train[6][1] == 7).all()
    assert (data.train[7][1] == 10).all()
    (root / "cls" / "2008_b.mat").write_bytes(b"no")
    with pytest.raises(UserError, match=r"2008_b\.mat or its image can't be read"):
        data.train[7]
    (root / "train_noval.txt").unlink()
    with pytest.raises(UserError, match=r"SBD's masks are not there .*sbd=false"):
        voc(options(voc_tree, sbd=True))


def coco_file(images, objects):
    categories = [1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72, 88]
    return {
        "images": [
            {"id": i, "file_name": f"{i:012}.jpg", "width": 60, "height": 50} for i in images
        ],
        "annotations": [
            {
                "id": n,
                "image_id": image,
                "category_id": category,
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
            }
            for n, (image, category, (left, top, right, bottom)) in enumerate(objects, start=1)
        ],
        "categories": [{"id": i, "name": str(i)} for i in categories],
    }


TRAIN = [
    (1, 17, (0, 0, 40, 40)),  # a cat
    (2, 1, (10, 0, 50, 40)),  # a person and a dog that overlap
    (2, 18, (40, 0, 60, 40)),
    (3, 88, (0, 0, 50, 50)),  # nothing of VOC's
    (4, 5, (0, 0, 10, 10)),  # too small
    (5, 72, (0, 0, 50, 50)),
    (6, 7, (0, 0, 50, 50)),
]


@pytest.fixture
def coco_tree(tmp_path):
    parts = {"train2017": coco_file(range(1, 7), TRAIN), "val2017": coco_file([7, 8], [])}
    (tmp_path / "annotations").mkdir()
    for part, content in parts.items():
        write(tmp_path, part, content)
        for image in content["images"]:
            save_image(tmp_path / part / image["file_name"], (60, 50))
    return tmp_path


def write(root, part, content):
    (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(content))


def test_coco_s_objects_become_labels(coco_tree):
    data = coco(options(coco_tree, base=50, size=32))
    assert list(data.train.labels) == [f"{i:012}.jpg" for i in (1, 2, 5, 6)]
    assert len(data.test) == 2  # all of them, whatever they show
    _, cat = data.train[0]
    assert (cat[:40, :40] == 8).all()
    assert (cat[42:, 42:] == 0).all()
    _, both = data.train[1]
    assert (both[:39, 11:39] == 15).all()
    assert (both[:39, 41:49] == IGNORE).all()
    assert (both[:39, 51:60] == 12).all()
    assert (data.train[2][1][:49, :49] == 20).all()
    assert (data.train[3][1][:49, :49] == 19).all()
    opened = data.open(CPU, 0, recipe())
    assert next(opened.train(0)).inputs.shape == (2, 3, 32, 32)


def test_crowds_are_labelled_by_their_runs(coco_tree):
    """Uncompressed runs, column by column: nothing, then a person to the end."""
    content = coco_file([1], TRAIN[1:2])
    crowd = {"size": [50, 60], "counts": [1000, 2000]}
    content["annotations"][0] |= {"image_id": 1, "iscrowd": 1, "segmentation": crowd}
    write(coco_tree, "train2017", content)
    _, labels = coco(options(coco_tree, 0)).train[0]
    assert (labels[:, :20] == 0).all()
    assert (labels[:, 20:] == 15).all()


def changed(content, **values):
    return {**content, **values}


@pytest.mark.parametrize(
    "content, message",
    [
        (coco_file([1, 99], TRAIN[:1]), r"names 1 images that are not in .*000099\.jpg"),
        (coco_file([1], TRAIN[:2]), "annotation 2 is of an image that is not listed"),
        (changed(coco_file([1], TRAIN[:1]), categories=[]), "its categories are not COCO's"),
        (coco_file([3], TRAIN[3:4]), "no image shows enough"),
        (changed(coco_file([1], []), images=[{"id": 1}]), "not COCO's instance annotations"),
        ([1, 2], "not COCO's instance annotations"),
    ],
)
def test_annotations_that_do_not_fit(coco_tree, content, message):
    write(coco_tree, "train2017", content)
    with pytest.raises(UserError, match=message) as caught:
        coco(options(coco_tree))
    assert "\n" not in str(caught.value)


def test_coco_files_that_are_not_there(coco_tree):
    broken = coco_file([1], TRAIN[:1])
    broken["annotations"][0]["segmentation"] = "nonsense"
    write(coco_tree, "train2017", broken)
    with pytest.raises(UserError, match=r"annotation 1 of .* can't be read"):
        coco(options(coco_tree, 0)).train[0]
    save_image(coco_tree / "train2017" / f"{1:012}.jpg", (50, 50))
    write(coco_tree, "train2017", coco_file([1], TRAIN[:1]))
    with pytest.raises(UserError, match=r"labels of 60 × 50 for an image of 50 × 50"):
        coco(options(coco_tree, 0)).train[0]
    path = coco_tree / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(UserError, match="not COCO's instance annotations"):
        coco(options(coco_tree, 0))
    path.unlink()
    with pytest.raises(UserError, match=r"instances_train2017\.json: no such file; get train2017"):
        coco(options(coco_tree, 0))


@pytest.mark.slow
@pytest.mark.parametrize(
    "suite, tree", [("segmentation", "coco_tree"), ("segmentation-voc", "voc_tree")]
)
def test_the_suites_read_these_trees(suite, tree, request):
    settings = [
        f"data.root={request.getfixturevalue(tree)}",
        "data.arguments={base=32, size=32}",
        "data.validation_size=2",
        "model.build=model:light",
        "model.arguments={classes=21, width=4}",
        "model.exclude=['classifier.high_classifier']",
        "model.input=[3, 32, 32]",
        "model.weights=''",
        "model.weights_into=''",
        "recipe.lr_factors={classifier=10.0}",
        "recipe.batch_size=2",
        "resources.cpus=1",
    ]
    trials = specs(suite, settings, "baseline,neq", "0")
    preflight(trials)
    assert trials[0].metric == "mean IoU"
    with pytest.raises(UserError, match="the model has 20 classes, the task 21"):
        preflight(specs(suite, [*settings, "model.arguments.classes=20"], "neq", "0"))


@pytest.mark.slow
def test_scenes_of_digits():
    data = scenes.load(Data(load="a:b", validation_size=5))
    assert (len(data.train), len(data.test)) == (scenes.TRAIN, scenes.TEST)
    assert data.train.labels.unique().tolist() == list(range(11))
    images, labels = data.train.read(torch.arange(50)).float(), data.train.labels[:50]
    ink, ground = labels > 0, labels == 0
    bright = images.amax(1)
    assert bright[ground].max() <= 0.1 * 255 + 1
    assert bright[ink].min() > 0.3 * 0.5 * 255 - 1
    # A digit that nothing lies over is the picture of one with that label.
    known = torch.from_numpy(load_digits().target)[:1200]
    pictures = torch.from_numpy(load_digits().images)[:1200].float().unsqueeze(1) / 16
    size = scenes.DIGIT
    pictures = functional.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    shapes = pictures[:, 0] > scenes.INK
    shown = [{s.numpy().tobytes() for s in shapes[known == digit]} for digit in range(10)]
    found = 0
    for scene in labels:
        for label in scene[scene > 0].unique().tolist():
            windows = (scene == label).unfold(0, size, 1).unfold(1, size, 1).flatten(0, 1)
            whole = windows[windows.sum((1, 2)) == (scene == label).sum()]
            found += any(window.numpy().tobytes() in shown[label - 1] for window in whole)
    assert found > 20
    assert data.fingerprint() == scenes.load(Data(load="a:b", validation_size=5)).fingerprint()


def test_the_recipes_are_the_paper_s():
    suite, _ = files.load_suite("segmentation")
    recipe = suite.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.schedule) == (30, 32, "iteration")
    assert recipe.optimizer.arguments == {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
    assert recipe.lr_factors == {"aux_classifier": 10.0}
    poly = {"total_iters": 30, "power": 0.9}
    assert (recipe.scheduler.name, recipe.scheduler.arguments) == ("PolynomialLR", poly)
    assert suite.task_arguments["auxiliary"] == 0.5
    assert suite.data.validation_size == 92
    assert (suite.methods["neq"].eps, suite.methods["neq"].mu) == (2e-2, 0.5)
