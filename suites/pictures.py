"""Decode pictures, saying which one where that fails."""

import io
from pathlib import Path

from PIL import Image

from harness.errors import UserError, one_line


def decode(data: bytes | Path, where: str) -> Image.Image:
    """A picture in RGB from its encoded bytes or its file; raises UserError naming `where`."""
    return _opened(data, where, "RGB")


def decode_labels(path: Path) -> Image.Image:
    """A picture whose pixels are labels: a palette's indices or grey values; raises UserError."""
    image = _opened(path, str(path), None)
    if image.mode not in ("P", "L"):
        raise UserError(f"{path}: labels must be a palette or grey picture, not {image.mode}")
    return image


def _opened(data: bytes | Path, where: str, mode: str | None) -> Image.Image:
    try:
        with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as image:
            image.load()
            return image.convert(mode) if mode else image.copy()
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{where} cannot be decoded ({one_line(error)}); replace it") from None
