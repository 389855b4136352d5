"""Fetch and unpack archives, one process at a time, so that what is there is whole."""

import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from harness.errors import UserError, one_line
from harness.paths import lost_link

FAILURES = (OSError, RuntimeError, EOFError, zipfile.BadZipFile, tarfile.TarError, zlib.error)


def fetch(root: Path, folder: str, get: Callable[[Path], object], where: str) -> None:
    """Let `get` unpack `folder` into a place of its own, then move it below `root`.

    Does nothing where the folder is there; others wait. Raises UserError with `where` to get it.
    """
    staging = root / f".fetching-{folder}"
    lost = lost_link(root / folder)
    if lost:
        raise UserError(lost)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".download.lock"):
            if not (root / folder).is_dir():
                shutil.rmtree(staging, ignore_errors=True)
                get(staging)
                (staging / folder).rename(root / folder)
                shutil.rmtree(staging, ignore_errors=True)  # NFS keeps what somebody still reads
    except FAILURES as error:
        raise UserError(
            f"{root}: the data can't be downloaded ({one_line(error)}); {where}"
        ) from None
