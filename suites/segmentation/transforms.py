"""Transforms of pictures together with the labels of their pixels."""

from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from harness.data import Transform
from harness.errors import UserError
from harness.vision import torchvision

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORE = 255


def labelled(image: Image.Image, labels: Any, classes: int, where: str) -> tuple[Any, Any]:
    """The pair for transforms; raises UserError where labels [height, width] don't fit."""
    values = numpy.asarray(labels)
    if values.shape != (image.height, image.width):
        raise UserError(
            f"{where}: labels of {' × '.join(map(str, values.shape[::-1]))} for an image of "
            f"{image.width} × {image.height}; replace one of them"
        )
    wrong = values[(values < 0) | ((values >= classes) & (values != IGNORE))]
    if wrong.size:
        raise UserError(
            f"{where}: label {int(wrong.flat[0])} is none of 0 to {classes - 1} or {IGNORE}; "
            "mend it"
        )
    mask = torch.from_numpy(values.astype(numpy.uint8))
    return image, torchvision("torchvision.tv_tensors").Mask(mask)


def transforms(base: int = 520, size: int = 480) -> dict[str, Transform]:
    """Arguments of Samples: training images scaled by 0.5 to 2 and cropped, validation images
    cropped to the same size, test images whole.
    """
    v2, tv = torchvision("torchvision.transforms.v2"), torchvision("torchvision.tv_tensors")
    fill = {tv.Image: 0, tv.Mask: IGNORE}
    tensor = [v2.ToDtype({tv.Image: torch.float32, "others": None}, scale=True)]
    tensor += [v2.Normalize(MEAN, STD), v2.ToPureTensor()]
    crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    augmented = [v2.RandomResize(base // 2, base * 2), v2.RandomHorizontalFlip(), crop]
    whole = [v2.ToImage(), v2.Resize(base)]
    return {
        "train_transform": v2.Compose([v2.ToImage(), *augmented, *tensor]),
        "validation_transform": v2.Compose([*whole, _Centre(size, fill), *tensor]),
        "test_transform": v2.Compose([*whole, *tensor]),
    }


class _Centre:
    """The central window; what lies outside of the image is ignored."""

    def __init__(self, size: int, fill: dict[Any, int]) -> None:
        self._size, self._fill = size, fill

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Any, Any]:
        v2 = torchvision("torchvision.transforms.v2")
        missing = [max(self._size - side, 0) for side in image.shape[-2:]]
        borders = [missing[1] // 2, missing[0] // 2, -(-missing[1] // 2), -(-missing[0] // 2)]
        pair = v2.Pad(borders, fill=self._fill)(image, mask)
        cut: tuple[Any, Any] = v2.CenterCrop(self._size)(*pair)
        return cut
