"""ImageNet, or any images in one folder for each class, or the hub's parquet shards of them.

Below the root either train/<class>/*.JPEG and val/<class>/*.JPEG, or train-*.parquet and
validation-*.parquet, or default/train/0000.parquet and default/validation/0000.parquet. The data
can't be downloaded without an account: see `WHERE`.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from harness.data import Data, Samples, Source, Transform
from harness.errors import UserError
from harness.paths import check_link, files_below, is_folder, lost_link, passed_over
from harness.vision import torchvision
from suites import hub
from suites.pictures import decode

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TEXTS = ("readme", "license", "makefile")  # without an ending, and yet no class
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHERE = (
    "get ILSVRC2012 from image-net.org and unpack it to train/<class>/ and val/<class>/, or the "
    "parquet files of ILSVRC/imagenet-1k from the hub, and point --set data.root=… at them"
)


class ClassFolders:
    """Pictures in one folder for each class, or below it, in torchvision's order.

    Hidden files and folders are no pictures and no classes, nor is what other programs leave there.
    """

    def __init__(self, root: Path, part: str) -> None:
        folder = root / part
        self.classes = _classes(folder)
        inside = [files_below(folder / name, ENDINGS) for name in self.classes]
        empty = [name for name, files in zip(self.classes, inside, strict=True) if not files]
        if empty or not inside:
            what = f"for the classes {', '.join(empty[:3])}" if empty else "nor a class folder"
            raise UserError(
                f"{folder}: found no valid file {what}; pictures end in {', '.join(ENDINGS)}; add "
                "some, or remove the folder"
            )
        self._files = [file for files in inside for file in files]
        self.labels = torch.tensor([n for n, files in enumerate(inside) for _ in files])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path = self._files[index]
        return decode(Path(path), path), int(self.labels[index])


def _classes(folder: Path) -> list[str]:
    """The names of the class folders.

    Raises UserError for a folder that can't be read, and for a link that can't be followed and
    could be one to a class or to a picture.
    """
    if not is_folder(folder):
        return []
    try:
        there = [path for path in sorted(folder.iterdir()) if not passed_over(path.name)]
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from None
    for path in there:
        wanted = path.suffix.lower() in ("", *ENDINGS) and path.name.lower() not in TEXTS
        if wanted and path.is_symlink():
            check_link(path)
    return [path.name for path in there if is_folder(path)]


class Shards:
    """Rows of the hub's parquet files."""

    def __init__(self, root: Path, part: str) -> None:
        self._rows, self._where = hub.encoded(root, part), f"{part}-*.parquet below {root}"
        self.labels = self._rows.labels
        if int(self.labels.min()) < 0:
            raise UserError(f"{self._where}: labels below 0; this part has no labels")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = decode(self._rows[index], f"image {index} of {self._where}")
        return image, int(self.labels[index])


def load(options: Data) -> Samples:
    """Training and validation images of ILSVRC2012, the latter to test on.

    `options.arguments`: how many `classes` there must be (1000), and those of `transforms`. Raises
    UserError where images or classes are missing.
    """
    root, arguments = Path(options.root), dict(options.arguments)
    train: Source
    test: Source
    pictures = all(_classes(root / part) for part in ("train", "val"))
    if any(hub.shards(root, part, called=pictures) for part in ("train", "validation")):
        train, test = Shards(root, "train"), Shards(root, "validation")
        names = [sorted({f"class {n}" for n in s.labels.tolist()}) for s in (train, test)]
    else:
        train, test = _folders(root)
        names = [train.classes, test.classes]
    _check_classes(root, names, arguments.pop("classes", 1000))
    augmented, plain = transforms(**arguments)
    return Samples(
        name="ImageNet",
        train=train,
        test=test,
        train_transform=augmented,
        validation_transform=plain,
        options=options,
    )


def _folders(root: Path) -> tuple[ClassFolders, ClassFolders]:
    for part in ("train", "val"):
        if not is_folder(root / part):
            raise UserError(lost_link(root / part) or _missing(root, part))
    return ClassFolders(root, "train"), ClassFolders(root, "val")


def _missing(root: Path, part: str) -> str:
    parquet = files_below(root, [".parquet"]) if root.is_dir() else []
    if parquet:
        return (
            f"{root}: no folder {part}, and of the parquet files, such as {parquet[0]}, no name or "
            "folder says that they are of train or validation: call them train-….parquet and "
            "validation-….parquet, or put them into folders of that name"
        )
    return f"{root}: no folder {part} and no parquet files; {WHERE}"


def _check_classes(root: Path, names: list[list[str]], expected: int) -> None:
    train, test = names
    only = [f"train/{name}" for name in sorted({*train} - {*test})]
    only += [f"val/{name}" for name in sorted({*test} - {*train})]
    if only:
        verb = "are" if len(only) > 1 else "is"
        more = f" and {len(only) - 3} more" if len(only) > 3 else ""
        raise UserError(
            f"{root}: {', '.join(only[:3])}{more} {verb} in one part and not the other: add them "
            "there, or take them out here"
        )
    if len(train) != expected:
        raise UserError(
            f"{root}: images of {len(train)} classes, and not of {expected}; add the others, or "
            f"say --set data.arguments.classes={len(train)}"
        )


def transforms(
    size: int = 224,
    resize: int = 256,
    rand_augment: tuple[int, int] | None = None,
    erase: float = 0.0,
    interpolation: str = "bilinear",
) -> tuple[Transform, Transform]:
    """(with augmentation, without): images become float32 [3, size, size].

    Beside crop and flip: `rand_augment` (operations, magnitude from 0 to 30), and `erase`, the
    probability of a random rectangle.
    """
    v2 = torchvision("torchvision.transforms.v2")
    how = v2.InterpolationMode(interpolation)
    tensor = [
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
        v2.ToPureTensor(),
    ]
    drawn: list[Any] = [
        v2.RandomResizedCrop(size, interpolation=how),
        v2.RandomHorizontalFlip(),
    ]
    if rand_augment:
        operations, magnitude = rand_augment
        drawn.append(v2.RandAugment(operations, magnitude, interpolation=how))
    erased = [v2.RandomErasing(erase, value="random")] if erase else []
    plain = v2.Compose([v2.Resize(resize, interpolation=how), v2.CenterCrop(size), *tensor])
    return v2.Compose([*drawn, *tensor, *erased]), plain
