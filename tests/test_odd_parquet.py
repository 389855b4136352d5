"""Parquet files of images as other programs write them: columns, types and names."""

import decimal
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from harness.errors import UserError
from harness.suite.config import Data
from suites import hub
from suites.imagenet.data import load


def picture(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def images(count):
    return [{"bytes": picture(10 * n), "path": f"{n}.png"} for n in range(count)]


def write(path, labels, image="image", label="label", **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {image: more.pop("images", images(len(labels))), label: labels, **more}
    pq.write_table(pa.table(columns), path)
    return path


def read(path, usual="image"):
    table = pa.Table.from_batches(hub.rows(path, usual), hub.SCHEMA)
    return table["image"].to_pylist(), table["label"].to_pylist()


def refused(path):
    with pytest.raises(UserError) as caught:
        list(hub.rows(path, "image"))
    assert "\n" not in str(caught.value)
    assert "damaged" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


WHOLE = {
    "float": pa.array([0.0, 1.0, 7.0]),
    "float32": pa.array([0.0, 1.0, 7.0], pa.float32()),
    "digits": pa.array(["0", "1", "7"]),
    "decimal": pa.array([decimal.Decimal(n) for n in (0, 1, 7)]),
    "dictionary": pa.array([0, 1, 7]).dictionary_encode(),
    "unsigned": pa.array([0, 1, 7], pa.uint8()),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_labels_that_are_whole_by_their_values(tmp_path, kind):
    path = write(tmp_path / "train-0.parquet", WHOLE[kind])
    assert read(path) == ([picture(0), picture(10), picture(20)], [0, 1, 7])


def test_yes_and_no_are_labels(tmp_path):
    path = write(tmp_path / "train-0.parquet", [True, False, True])
    assert read(path)[1] == [1, 0, 1]


@pytest.mark.parametrize(
    "labels, said",
    [
        ([0.0, 1.5], r"label (double) holds what is no whole number ("),
        ([0.0, float("nan")], r"label (double) holds what is no whole number ("),
        ([decimal.Decimal("1.5")], r"holds what is no whole number ("),
        (pa.array([2**63], pa.uint64()), r"label (uint64) holds what is no whole number ("),
        (["0", "cat"], "there are image (struct<bytes: binary, path: string>), label (string)"),
    ],
)
def test_labels_that_are_not_whole(tmp_path, labels, said):
    assert said in refused(write(tmp_path / "train-0.parquet", labels))


def test_whole_numbers_come_before_what_can_be_read_so(tmp_path):
    more = {"class_id": [3, 4], "category": [5, 6]}
    path = write(tmp_path / "train-0.parquet", ["0", "1"], **more)
    assert read(path)[1] == [3, 4]


@pytest.mark.parametrize(
    "names", [("Image", "Label"), ("IMG", "CLASS_ID"), ("image", "Target"), ("pixel_values", "cls")]
)
def test_names_in_any_case(tmp_path, names):
    path = write(tmp_path / "train-0.parquet", [2, 3], image=names[0], label=names[1])
    assert read(path) == ([picture(0), picture(10)], [2, 3])


def test_of_two_names_the_one_in_small_letters(tmp_path):
    path = write(tmp_path / "train-0.parquet", [2, 3], Label=[0, 0], LABEL=[1, 1])
    assert read(path)[1] == [2, 3]


EMPTY = {
    "null": pa.array([{"bytes": None, "path": "a"}] * 2),
    "typed": pa.array(
        [{"bytes": None, "path": "a"}] * 2, pa.struct({"bytes": pa.binary(), "path": pa.string()})
    ),
    "path alone": pa.array([{"path": "a"}] * 2),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_paths_are_no_pictures(tmp_path, kind):
    path = write(tmp_path / "train-0.parquet", [0, 1], images=EMPTY[kind])
    assert "image holds paths, not pictures; save it with the pictures embedded" in refused(path)


def shards(root, names, part="train"):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.parquet").touch()
    return hub.complete(root, part, hub.shards(root, part))


@pytest.mark.parametrize(
    "names, message",
    [
        (["full/train/0000", "small/train/0002"], "as full/train/0000.parquet and small/train/0"),
        (["full/train/a", "small/train/b"], "several data sets"),
        (["full/train_a", "small/train_b"], "several data sets"),
        (["train/0000", "small/train/0001"], "several data sets"),
        (["x/toy-train-00000-of-00002", "y/toy-train-00001-of-00002"], "several data sets"),
        (["x/train-00000-of-00001", "y/train-00001-of-00002"], "several data sets"),
        (["train/0", "train/2"], "train: 1.parquet is not there"),
        (["train/1", "train/2", "train/4"], "train: 3.parquet is not there"),
        (["train/000", "train/001", "train/003"], "train: 002.parquet is not there"),
        (["train/00000", "train/00002"], "train: 00001.parquet is not there"),
        (["train/00002"], "train: 00001.parquet is not there"),
        (["train/000000", "train/000002"], "train: 000001.parquet is not there"),
        (["train/0001"], "train: 0000.parquet is not there"),
    ],
)
def test_shards_that_do_not_belong_together(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        shards(tmp_path, names)


@pytest.mark.parametrize(
    "names",
    [
        [f"train/{n}" for n in range(12)],
        [f"train/{n}" for n in range(1, 12)],
        ["train/00001", "train/00002"],
        ["train/20240131", "train/20240201"],
        ["train/1700000000"],
        ["default/train/a/0000", "default/train/b/0001"],
        ["default/train/0000", "default/train/extra"],
        ["train_a", "train_b"],
        ["x/train-00000-of-00002", "y/train-00001-of-00002"],
        ["train-00000-of-00002-a1", "train-00001-of-00002-b2"],
    ],
)
def test_shards_that_belong_together(tmp_path, names):
    assert {str(path.relative_to(tmp_path)) for path in shards(tmp_path, names)} == {
        f"{name}.parquet" for name in names
    }


def options(root):
    arguments = {"classes": 1, "size": 8, "resize": 8}
    return Data(load="a:b", root=str(root), validation_size=1, arguments=arguments)


@pytest.fixture
def classes(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        for name in ("0.png", "1.png"):
            (tmp_path / part / "a" / name).write_bytes(picture(0))
    return tmp_path


@pytest.mark.parametrize("name", ["README", "README.md", "notes.txt", "labels.csv", "LICENSE"])
def test_a_lost_link_to_a_text_stops_nothing(classes, name):
    for place in ("train", "val", "train/a"):
        (classes / place / name).symlink_to("/no/such/disk")
    assert len(load(options(classes)).train) == 2


@pytest.mark.parametrize("name", ["b", "n0123", "b.JPEG", "a/2.png"])
def test_a_lost_link_to_a_class_or_a_picture_stops(classes, name):
    (classes / "train" / name).symlink_to("/no/such/disk")
    with pytest.raises(UserError, match=f"{name} is a link to /no/such/disk, which is not there"):
        load(options(classes))
