"""COCO with the 21 classes of VOC, and VOC 2012 itself, each in its own layout."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from PIL import Image

from harness.data import Data, Samples
from harness.errors import UserError, one_line
from harness.paths import read_text
from harness.vision import torchvision
from suites.pictures import decode, decode_labels
from suites.segmentation.transforms import IGNORE, labelled, transforms

CLASSES = 21  # the background first, then VOC's categories in alphabetical order
# COCO's ids of the same.
COCO_IDS = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
LEAST_AREA = 1000  # pixels of a training image that its objects must cover
WHERE_COCO = (
    "get train2017.zip, val2017.zip and annotations_trainval2017.zip from cocodataset.org (or run "
    "neqbench prepare segmentation), and point --set data.root=… at the folder they are unpacked in"
)
WHERE_VOC = (
    "get VOCtrainval_11-May-2012.tar from host.robots.ox.ac.uk/pascal/VOC (or run neqbench prepare "
    "segmentation-voc), and point --set data.root=… at the folder that holds VOCdevkit"
)


class Coco:
    """COCO's images with a label for each pixel; where objects overlap, pixels are ignored."""

    def __init__(self, root: Path, part: str, *, train: bool) -> None:
        self._folder = root / part
        annotations = root / "annotations" / f"instances_{part}.json"
        self._index = _coco(annotations)
        self._images = self._index.imgs
        self._check_files(annotations)
        self._ids = [i for i in sorted(self._images) if not train or self._area(i) >= LEAST_AREA]
        if not self._ids:
            raise UserError(
                f"{annotations}: no image shows enough of one of VOC's 20 categories; "
                "replace the file"
            )

    def _check_files(self, annotations: Path) -> None:
        try:
            there = {path.name for path in self._folder.iterdir()}
        except OSError as error:
            raise UserError(f"{self._folder}: {error.strerror}; {WHERE_COCO}") from None
        gone = [image["file_name"] for image in self._images.values()]
        gone = [name for name in gone if name not in there]
        if gone:
            raise UserError(
                f"{annotations} names {len(gone)} images that are not in {self._folder}, such as "
                f"{gone[0]}; the two belong to different sets, or files are missing"
            )

    def _objects(self, image: int) -> list[dict[str, Any]]:
        return [a for a in self._index.imgToAnns[image] if a["category_id"] in COCO_IDS]

    def _area(self, image: int) -> float:
        return sum(float(annotation["area"]) for annotation in self._objects(image))

    @property
    def labels(self) -> Sequence[str]:
        """Names of the images."""
        return [self._images[i]["file_name"] for i in self._ids]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        facts = self._images[self._ids[index]]
        path = self._folder / facts["file_name"]
        image = decode(path, str(path))
        labels = numpy.zeros((facts["height"], facts["width"]), dtype=numpy.uint8)
        covered = numpy.zeros_like(labels)
        for annotation in self._objects(facts["id"]):
            try:
                mask = self._index.annToMask(annotation)
            except Exception as error:
                raise UserError(
                    f"annotation {annotation.get('id')} of {path} can't be read "
                    f"({type(error).__name__}: {error}); replace the annotations"
                ) from None
            labels[mask > 0] = COCO_IDS.index(annotation["category_id"])
            covered += mask
        labels[covered > 1] = IGNORE
        return labelled(image, labels, CLASSES, str(path))


def _coco(path: Path) -> Any:
    """pycocotools' index of an annotation file; raises UserError where that is something else."""
    try:
        from pycocotools.coco import COCO
    except ImportError:
        raise UserError("COCO needs pycocotools: pip install 'neqbench[coco]'") from None
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it talks
            index = COCO()
            index.dataset = dict(json.loads(path.read_text(encoding="utf-8-sig")))
            index.createIndex()
        wrong = _foreign(index)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {WHERE_COCO}") from None
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        wrong = f"not COCO's instance annotations ({type(error).__name__}: {error})"
    if wrong:
        raise UserError(f"{path}: {wrong}; replace the file")
    return index


def _foreign(index: Any) -> str:
    """What tells that the annotations are not COCO's or not of these images; empty if nothing."""
    images = index.imgs.values()
    if not all(image["file_name"] and image["height"] * image["width"] for image in images):
        return "an image has no name or size"
    if not {*COCO_IDS[1:]} <= index.cats.keys():
        return "its categories are not COCO's"
    strange = [a["id"] for a in index.anns.values() if a["image_id"] not in index.imgs]
    return f"annotation {strange[0]} is of an image that is not listed" if strange else ""


def coco(options: Data) -> Samples:
    """COCO 2017; training images show at least 1,000 pixels of VOC's categories.

    `options.arguments`: `base` (520) and `size` (480), as `transforms` has them. Raises UserError
    where files are missing or don't fit together.
    """
    root = Path(options.root)
    return Samples(
        name="COCO 2017, VOC's classes",
        train=Coco(root, "train2017", train=True),
        test=Coco(root, "val2017", train=False),
        options=options,
        **transforms(**options.arguments),
    )


class Voc:
    """VOC 2012's segmented images of one list, and those of SBD that neither list has."""

    def __init__(self, root: Path, part: str) -> None:
        self._root = root / "VOCdevkit" / "VOC2012"
        names = self._root / "ImageSets" / "Segmentation" / f"{part}.txt"
        try:
            self.labels = read_text(names).split()
        except UserError as error:
            raise UserError(f"{error}; {WHERE_VOC}") from None
        if not self.labels:
            raise UserError(f"{names}: names no image; replace the file")
        self._check_files()

    def _paths(self, name: str) -> tuple[Path, Path]:
        masks = self._root / "SegmentationClass"
        return self._root / "JPEGImages" / f"{name}.jpg", masks / f"{name}.png"

    def _check_files(self) -> None:
        """Sizes stand in the first bytes: all of them are read."""
        for name in self.labels:
            sizes = []
            for path in self._paths(name):
                try:
                    with Image.open(path) as image:
                        sizes.append(image.size)
                except (OSError, ValueError, SyntaxError) as error:
                    reason = getattr(error, "strerror", None) or "no picture"
                    raise UserError(f"{path}: {reason}; {WHERE_VOC}") from None
            if sizes[0] != sizes[1]:
                raise UserError(
                    f"{self._paths(name)[1]}: labels of {sizes[1][0]} × {sizes[1][1]} for an image "
                    f"of {sizes[0][0]} × {sizes[0][1]}; replace one of them"
                )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, labels = self._paths(self.labels[index])
        image = decode(path, str(path))
        return labelled(image, decode_labels(labels), CLASSES, str(labels))


class WithSbd:
    """VOC's training images, then those of SBD that neither of VOC's lists has."""

    def __init__(self, voc: Voc, held_out: Voc, root: Path) -> None:
        self._voc, self._root = voc, root / "benchmark_RELEASE" / "dataset"
        try:
            files = torchvision("torchvision.datasets").SBDataset(
                str(self._root), image_set="train_noval", mode="segmentation"
            )
        except (OSError, RuntimeError, ImportError) as error:
            raise UserError(
                f"{self._root}: SBD's masks are not there ({one_line(error)}); "
                "get benchmark.tgz and train_noval.txt of the Semantic Boundaries Dataset, or "
                "leave them out with --set data.arguments.sbd=false"
            ) from None
        known = {*voc.labels, *held_out.labels}
        self._files = files
        self._extra = [i for i, p in enumerate(files.images) if Path(p).stem not in known]
        for path in (p for i in self._extra for p in (files.images[i], files.masks[i])):
            if not Path(path).is_file():
                raise UserError(f"{path}: no such file, and train_noval.txt names it; add it")

    @property
    def labels(self) -> Sequence[str]:
        """Names of the images."""
        return [*self._voc.labels, *(Path(self._files.images[i]).stem for i in self._extra)]

    def __len__(self) -> int:
        return len(self._voc) + len(self._extra)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index < len(self._voc):
            return self._voc[index]
        path = Path(self._files.images[self._extra[index - len(self._voc)]])
        masks = self._root / "cls" / f"{path.stem}.mat"
        try:
            _, labels = self._files[self._extra[index - len(self._voc)]]
        except Exception as error:
            raise UserError(f"{masks} or its image can't be read ({error}); replace it") from None
        return labelled(decode(path, str(path)), labels, CLASSES, str(masks))


def voc(options: Data) -> Samples:
    """VOC 2012: trained on its train list, tested on its val list.

    `options.arguments`: `sbd` (false) adds SBD's training masks; `base` and `size` as `transforms`
    has them. Raises UserError where files are missing or don't fit together.
    """
    root, arguments = Path(options.root), dict(options.arguments)
    train, test = Voc(root, "train"), Voc(root, "val")
    sbd = arguments.pop("sbd", False)
    return Samples(
        name="VOC 2012 with SBD" if sbd else "VOC 2012",
        train=WithSbd(train, test, root) if sbd else train,
        test=test,
        options=options,
        **transforms(**arguments),
    )
