"""Decode pictures, saying which one where that fails."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from harness.errors import UserError, one_line

SIXTEEN_BITS = ("PNG", "PPM")  # formats whose 16 bits some versions of Pillow give as 32
STRETCHED = {"L;2": 85, "L;4": 17}  # what Pillow multiplies grey values of fewer than 8 bits by


def decode(data: bytes | Path, where: str) -> Image.Image:
    """A picture in RGB from its encoded bytes or its file; raises UserError naming `where`.

    Of 16 bits the upper 8 are taken, as Pillow does where they are in colour. Grey values of 32
    bits, or real ones, must be those of 8 bits: which other value is white no file says.
    """
    return _opened(data, where, _in_rgb)


def decode_labels(path: Path) -> Image.Image:
    """A picture whose pixels are labels, as they are stored: a palette's indices, or grey values
    of up to 32 bits; raises UserError.
    """
    return _opened(path, str(path), _as_stored)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = numpy.asarray(image)
        if image.mode.startswith("I;16") or image.format in SIXTEEN_BITS:
            values = values >> 8
        _check_scale(values)
        return Image.fromarray(values.astype(numpy.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without Pillow's warning
    return image.convert("RGB")


def _check_scale(values: NDArray[Any]) -> None:
    """Raises ValueError where grey values can't be those of 8 bits, as where 1 is white."""
    low, high = values.min(), values.max()
    shares = values.dtype.kind == "f" and 0 < high <= 1
    if shares or not (low >= 0 and high <= 255):  # nor are NaNs
        raise ValueError(f"its grey values lie between {low:g} and {high:g}: save it with 8 bits")


def _as_stored(image: Image.Image) -> Image.Image:
    tiles = getattr(image, "tile", None)  # gone once it is loaded
    factor = STRETCHED.get(tiles[0][3], 1) if tiles else 1
    if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
        raise ValueError(f"labels must be a palette or grey picture, not {image.mode}")
    if image.mode in ("L", "1"):
        return Image.fromarray(numpy.asarray(image).astype(numpy.uint8) // factor)
    return image.copy()


def _opened(
    data: bytes | Path, where: str, converted: Callable[[Image.Image], Image.Image]
) -> Image.Image:
    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
            return converted(image)
    except UnidentifiedImageError:
        raise UserError(f"{where} cannot be decoded (it is no picture); replace it") from None
    except Exception as error:
        raise UserError(f"{where} cannot be decoded ({one_line(error)}); replace it") from None
