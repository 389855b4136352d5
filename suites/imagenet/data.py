"""ImageNet, or any images in one folder for each class, or the hub's parquet shards of them.

Below the root either train/<class>/*.JPEG and val/<class>/*.JPEG, or train-*.parquet and
validation-*.parquet. The data can't be downloaded without an account: see `WHERE`.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from harness.data import Data, Samples, Source, Transform
from harness.errors import UserError, one_line
from harness.vision import torchvision
from suites import hub
from suites.pictures import decode

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WHERE = (
    "get ILSVRC2012 from image-net.org and unpack it to train/<class>/ and val/<class>/, or the "
    "parquet files of ILSVRC/imagenet-1k from the hub, and point --set data.root=… at them"
)


class ClassFolders:
    """torchvision's ImageFolder with errors that name the picture."""

    def __init__(self, root: Path, part: str) -> None:
        datasets = torchvision("torchvision.datasets")
        try:
            self._files = datasets.ImageFolder(str(root / part))
        except FileNotFoundError as error:
            raise UserError(f"{root / part}: {one_line(error)}; {WHERE}") from None
        self.classes: list[str] = self._files.classes
        self.labels = torch.tensor(self._files.targets)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self._files.samples[index]
        return decode(Path(path), path), label


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
    if hub.shards(root, "train") or hub.shards(root, "validation"):
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
        if not (root / part).is_dir():
            raise UserError(f"{root}: no folder {part} and no parquet files; {WHERE}")
    return ClassFolders(root, "train"), ClassFolders(root, "val")


def _check_classes(root: Path, names: list[list[str]], expected: int) -> None:
    train, test = names
    only = [f"train/{name}" for name in sorted({*train} - {*test})]
    only += [f"val/{name}" for name in sorted({*test} - {*train})]
    if only:
        verb = "are" if len(only) > 1 else "is"
        raise UserError(
            f"{root}: {', '.join(only[:3])} {verb} in one part and not the other; {WHERE}"
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
