"""Data as users have them: pictures of any depth, links, what other programs leave between them."""

import io
import struct
import warnings
import zlib

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from harness import paths
from harness.errors import UserError
from harness.suite.config import Data
from suites import pictures
from suites.archives import fetch
from suites.cifar10 import data as cifar10
from suites.imagenet.data import load
from suites.pictures import decode, decode_labels

RAMP = numpy.linspace(0, 40000, 40 * 30).reshape(30, 40)
SIXTEEN = RAMP.astype(numpy.uint16)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(values, bits, colour):
    """Written by hand: Pillow writes neither 16 bits in colour nor 2 or 4 in grey."""
    wide = values.reshape(len(values), -1)
    if bits < 8:
        shifted = [numpy.unpackbits(row.astype(numpy.uint8)[:, None], 1)[:, -bits:] for row in wide]
        rows = [numpy.packbits(row).tobytes() for row in shifted]
    else:
        rows = [row.astype(">u2" if bits == 16 else "u1").tobytes() for row in wide]
    size = struct.pack(">II", values.shape[1], values.shape[0])
    chunks = {
        b"IHDR": size + bytes([bits, colour, 0, 0, 0]),
        b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


BIG_ENDIAN = Image.frombytes("I;16B", (40, 30), SIXTEEN.astype(">u2").tobytes())
DEEP = {
    "png": encoded(Image.fromarray(SIXTEEN), "PNG"),
    "tiff": encoded(Image.fromarray(SIXTEEN), "TIFF"),
    "tiff, big-endian": encoded(BIG_ENDIAN, "TIFF"),
    "pgm": b"P5 40 30 65535\n" + SIXTEEN.astype(">u2").tobytes(),
    "colour": png(numpy.stack([SIXTEEN] * 3, -1), 16, 2),
    "alpha": png(numpy.stack([SIXTEEN] * 3 + [SIXTEEN], -1), 16, 6),
    "grey, alpha": png(numpy.stack([SIXTEEN, SIXTEEN], -1), 16, 4),
}


@pytest.mark.parametrize("kind", DEEP)
def test_sixteen_bits_become_eight(kind):
    image = decode(DEEP[kind], kind)
    assert image.mode == "RGB"
    expected = numpy.stack([SIXTEEN // 256] * 3, -1)
    assert (numpy.asarray(image) == expected).all()
    assert numpy.abs(numpy.asarray(image) - numpy.stack([RAMP / 257] * 3, -1)).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_sixteen_bits_that_pillow_opens_as_32(kind):
    """As older versions of it do with every PNG of 16 bits."""
    image = Image.fromarray(SIXTEEN.astype(numpy.int32))
    image.format = kind
    assert (numpy.asarray(pictures._in_rgb(image))[..., 0] == SIXTEEN // 256).all()


@pytest.mark.parametrize(
    "values, spread",
    [
        (RAMP.astype(numpy.int32), "0 and 40000"),
        ((RAMP / 40000).astype(numpy.float32), "0 and 1"),
        (RAMP.astype(numpy.float32), "0 and 40000"),
        (RAMP.astype(numpy.float32) - 9, "-9 and"),
        (numpy.full((3, 3), numpy.nan, numpy.float32), "nan and nan"),
    ],
)
def test_grey_values_without_a_white_are_refused(values, spread):
    data = encoded(Image.fromarray(values), "TIFF")
    with pytest.raises(UserError, match=f"x.tif cannot be decoded .*between {spread}") as caught:
        decode(data, "x.tif")
    assert "\n" not in str(caught.value)


EIGHT = (RAMP / 40000 * 255).astype(numpy.uint8)


@pytest.mark.parametrize("kind", [numpy.int32, numpy.float32, numpy.uint8])
def test_grey_values_of_eight_bits_stay(kind):
    image = decode(encoded(Image.fromarray(EIGHT.astype(kind)), "TIFF"), "x")
    assert (numpy.asarray(image) == EIGHT[..., None]).all()


def test_a_palette_with_transparency_keeps_its_colours():
    image = Image.fromarray(EIGHT).convert("P")
    data = encoded(image, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(data, "x")
    assert (numpy.asarray(found) == EIGHT[..., None]).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_labels_stay_as_they_are_stored(bits, tmp_path):
    values = (numpy.arange(64) % min(2**bits, 21)).reshape(8, 8)
    (tmp_path / "x.png").write_bytes(png(values, bits, 0))
    assert (numpy.asarray(decode_labels(tmp_path / "x.png")) == values).all()


def test_labels_in_32_bits_stay_and_in_real_numbers_are_refused(tmp_path):
    values = (numpy.arange(64) % 21).reshape(8, 8)
    path = tmp_path / "x.tif"
    path.write_bytes(encoded(Image.fromarray(values.astype(numpy.int32)), "TIFF"))
    assert (numpy.asarray(decode_labels(path)) == values).all()
    path.write_bytes(encoded(Image.fromarray(values.astype(numpy.float32)), "TIFF"))
    with pytest.raises(UserError, match=r"x\.tif .*palette or grey picture, not F"):
        decode_labels(path)


def test_what_is_no_picture_is_said_without_an_address():
    with pytest.raises(UserError, match=r"^row 3 cannot be decoded \(it is no picture\); replace"):
        decode(b"nothing", "row 3")


def options(root, classes=2):
    arguments = {"classes": classes, "size": 8, "resize": 8}
    return Data(load="a:b", root=str(root), validation_size=1, arguments=arguments)


@pytest.fixture
def classes(tmp_path):
    """Two classes of two pictures each; every picture's grey value is its own."""
    for value, (part, name, number) in enumerate(
        (part, name, number) for part in ("train", "val") for name in "ab" for number in (0, 1)
    ):
        (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
        picture = Image.new("L", (8, 8), 10 * value)
        picture.save(tmp_path / part / name / f"{number}.PNG")
    return tmp_path


def shown(source):
    return [
        (int(numpy.asarray(image)[0, 0, 0]), label)
        for image, label in map(source.__getitem__, range(len(source)))
    ]


WHOLE = [(0, 0), (10, 0), (20, 1), (30, 1)], [(40, 0), (50, 0), (60, 1), (70, 1)]


def both(root, **more):
    data = load(options(root, **more))
    return shown(data.train), shown(data.test)


def test_what_other_programs_leave_is_no_class_and_no_picture(classes):
    left = [".ipynb_checkpoints", "__MACOSX", "@eaDir", "lost+found", ".Trash-1000"]
    for name in left:
        for place in ("train", "val/a", "train/b/"):
            (classes / place / name).mkdir()
            Image.new("L", (8, 8), 200).save(classes / place / name / "x.png")
    for name in ("Thumbs.db", ".DS_Store", "._0.PNG", "desktop.ini", "notes.txt"):
        for place in ("train", "train/a", "val/b"):
            (classes / place / name).write_bytes(b"no picture")
    assert both(classes) == WHOLE


def test_pictures_come_in_torchvision_s_order(classes, vision):
    for place in ("a/b", "a/b-c", "a/b/c", "a/B"):
        (classes / "train" / place).mkdir(parents=True)
        for name in ("2.png", "10.png"):
            Image.new("L", (8, 8)).save(classes / "train" / place / name)
    mine = load(options(classes)).train
    theirs = vision.datasets.ImageFolder(str(classes / "train"))
    assert list(zip(mine._files, mine.labels.tolist(), strict=True)) == theirs.samples


def test_classes_that_differ_are_named(classes):
    for name in "cdefg":
        (classes / "train" / name).mkdir()
        Image.new("L", (8, 8)).save(classes / "train" / name / "x.png")
    with pytest.raises(
        UserError, match="train/c, train/d, train/e and 2 more are in one"
    ) as caught:
        load(options(classes))
    assert "image-net" not in str(caught.value)


@pytest.mark.parametrize("linked", ["", "train", "train/a", "train/a/0.PNG"])
def test_links_are_followed(classes, tmp_path_factory, linked):
    elsewhere = tmp_path_factory.mktemp("disk") / "moved"
    root = classes
    if linked:
        (classes / linked).rename(elsewhere)
        (classes / linked).symlink_to(elsewhere)
    else:
        root = elsewhere
        root.symlink_to(classes)
    assert both(root) == WHOLE


def test_links_in_a_circle_end(classes):
    (classes / "train" / "a" / "up").symlink_to(classes / "train" / "a")
    (classes / "train" / "b" / "deep").mkdir()
    (classes / "train" / "b" / "deep" / "up").symlink_to("../../b")
    (classes / "train" / "b" / "itself").symlink_to("itself")
    assert both(classes) == WHOLE


@pytest.mark.parametrize("place", ["train/c", "train/a/2.png", "val"])
def test_a_link_to_nothing_is_named(classes, place):
    if (classes / place).exists():
        (classes / place).rename(classes / "away")
    (classes / place).symlink_to("/no/such/disk")
    with pytest.raises(UserError, match=f"{place} is a link to /no/such/disk, which is not there"):
        load(options(classes))


def test_nothing_is_fetched_into_a_link_to_nothing(tmp_path):
    (tmp_path / "data").symlink_to("/no/such/disk")
    with pytest.raises(UserError, match="data is a link to /no/such/disk, which is not there"):
        fetch(tmp_path / "data" / "cifar10", "folder", None, "get it")


def picture(value, size=(32, 32)):
    return encoded(Image.new("RGB", size, (value, value, value)), "PNG")


def table(values, image="image", label="label", plain=False):
    images = [picture(10 * value) for value in values]
    column = images if plain else [{"bytes": each, "path": "x.png"} for each in images]
    return pa.table({image: column, label: [value % 2 for value in values]})


def write(path, values, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(values, **columns), path)


LAYOUTS = {
    "converted": ("default/train/0000", "default/train/0001", "default/validation/0000"),
    "converted, at the root": ("train/0000", "train/0001", "validation/0000"),
    "first part alone": ("x/partial-train/0000", "x/partial-train/0001", "x/validation/0000"),
    "older": ("plain_text/toy-train-00000-of-00002", "plain_text/toy-train-00001-of-00002", "val"),
    "named": ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-0"),
    "short": ("training_0", "training_1", "dev"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_hub_s_layouts(tmp_path, layout):
    for name, values in zip(LAYOUTS[layout], [(0, 1, 2), (3,), (4, 5)], strict=True):
        write(tmp_path / f"{name}.parquet", values)
    write(tmp_path / "default/test/0000.parquet", (6, 7))
    (tmp_path / ".cache").mkdir()
    write(tmp_path / ".cache/train/0000.parquet", (9,))
    assert both(tmp_path) == ([(0, 0), (10, 1), (20, 0), (30, 1)], [(40, 0), (50, 1)])


def test_shards_that_are_linked(tmp_path, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    write(disk / "train/0000.parquet", (0, 1))
    write(disk / "blob", (4, 5))
    (tmp_path / "default").symlink_to(disk)
    (tmp_path / "again").symlink_to(disk)  # the same: not read twice
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "0000.parquet").symlink_to(disk / "blob")
    assert both(tmp_path) == ([(0, 0), (10, 1)], [(40, 0), (50, 1)])
    (disk / "blob").unlink()
    with pytest.raises(UserError, match=r"0000.parquet is a link to .*blob, which is not there"):
        load(options(tmp_path))


@pytest.mark.parametrize(
    "columns",
    [
        {"image": "img"},
        {"label": "labels"},
        {"image": "jpg", "label": "cls", "plain": True},
        {"image": "images", "label": "fine_label"},
        {"plain": True},
    ],
)
def test_columns_of_other_names(tmp_path, columns):
    write(tmp_path / "train-0.parquet", (0, 1), **columns)
    write(tmp_path / "validation-0.parquet", (4, 5), **columns)
    assert both(tmp_path) == ([(0, 0), (10, 1)], [(40, 0), (50, 1)])
    (tmp_path / "validation-0.parquet").rename(tmp_path / "test-0.parquet")
    found = cifar10.load(Data(load="a:b", root=str(tmp_path), validation_size=1))
    assert found.train.labels.tolist() == [0, 1]
    assert found.test.read(torch.tensor([1]))[0, 0, 0, 0] == 50


def test_columns_that_are_not_known_are_listed(tmp_path):
    write(tmp_path / "train-0.parquet", (0, 1), image="photo")
    write(tmp_path / "validation-0.parquet", (4, 5))
    wanted = (
        r"without the columns image \(bytes.* label \(whole.* there are photo \(struct.*, label"
    )
    with pytest.raises(UserError, match=wanted) as caught:
        load(options(tmp_path))
    assert "damaged" not in str(caught.value)
    assert "\n" not in str(caught.value)
    named = table((0, 1)).set_column(1, "label", pa.array(["cat", "dog"]))
    pq.write_table(named, tmp_path / "train-0.parquet")
    with pytest.raises(UserError, match=r"there are image \(.*\), label \(string\)"):
        load(options(tmp_path))


def test_rows_without_a_picture_or_a_label(tmp_path):
    write(tmp_path / "validation-0.parquet", (4, 5))
    whole = table((0, 1))
    paths_alone = pa.array([{"bytes": picture(0), "path": "x"}, {"bytes": None, "path": "x"}])
    for spoilt in (
        whole.set_column(0, "image", paths_alone),
        whole.set_column(1, "label", pa.array([1, None])),
    ):
        pq.write_table(spoilt, tmp_path / "train-0.parquet")
        with pytest.raises(UserError, match=r"train-0\.parquet: truncated, damaged or incomplete"):
            load(options(tmp_path))


@pytest.mark.parametrize(
    "names, message",
    [
        (["a/train/0000", "b/train/0000", "a/val/0000"], "several data sets, as a/train/0000"),
        (["train/0000", "train/0002", "val/0000"], "train: 0001.parquet is not there"),
        (["train/0000"], "no validation-"),
        (["part-0", "part-1"], "such as .*part-0.parquet, no name or folder says"),
        ([f"{x}/train-00000-of-00001" for x in "ab"] + ["val"], "several data sets"),
    ],
)
def test_shards_that_do_not_belong_together(tmp_path, names, message):
    for name in names:
        write(tmp_path / f"{name}.parquet", (0, 1))
    with pytest.raises(UserError, match=message) as caught:
        load(options(tmp_path))
    assert "image-net" not in str(caught.value)


def test_pictures_come_before_parquet_that_is_not_called_so(classes):
    """What else lies beside them, such as a table of the pictures."""
    write(classes / "train" / "metadata.parquet", (0, 1))
    write(classes / "val" / "metadata.parquet", (0, 1))
    assert both(classes) == WHOLE


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="gone: No such file"):
        paths.files_below(tmp_path / "gone", [".png"])
