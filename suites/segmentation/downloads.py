"""Fetch COCO and VOC from where they are published."""

from functools import partial
from pathlib import Path

from harness.data import Data
from harness.vision import torchvision
from suites.archives import fetch
from suites.segmentation.data import WHERE_COCO, WHERE_VOC

COCO = "http://images.cocodataset.org/"
ARCHIVES = {
    "train2017": "zips/train2017.zip",
    "val2017": "zips/val2017.zip",
    "annotations": "annotations/annotations_trainval2017.zip",
}


def coco(options: Data) -> None:
    """Images and annotations of 2017 (about 20 GB, twice that while unpacking); raises UserError
    where that fails.
    """
    get = torchvision("torchvision.datasets.utils").download_and_extract_archive
    for folder, archive in ARCHIVES.items():
        fetch(Path(options.root), folder, partial(get, COCO + archive), WHERE_COCO)


def voc(options: Data) -> None:
    """VOC 2012 (about 2 GB); raises UserError where that fails."""
    get = partial(
        torchvision("torchvision.datasets").VOCSegmentation, image_set="train", download=True
    )
    fetch(Path(options.root), "VOCdevkit", get, WHERE_VOC)
