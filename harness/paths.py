"""Files and folders as users have them: links, byte order marks, what other programs leave."""

import os
from collections.abc import Collection
from pathlib import Path

from harness.errors import UserError

LEFT_BY_OTHERS = {
    "__MACOSX",
    "__pycache__",
    "@eaDir",
    "lost+found",
    "#recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
}


def passed_over(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or is there for another program."""
    return name.startswith(".") or name in LEFT_BY_OTHERS


def files_below(folder: Path, endings: Collection[str]) -> list[str]:
    """The files below `folder` with one of these endings (".png", in any case), sorted by folder.

    Links are followed, and no folder is entered twice. What is `passed_over` is left out, and so
    are folders below it that can't be read. Raises UserError for a folder that can't be read
    itself, and for a link to a file that can't be followed.
    """
    found: list[tuple[str, str]] = []  # there may be a million: no Path for each
    entered: set[tuple[int, int]] = set()
    todo = [str(folder)]
    while todo:
        at = todo.pop()
        try:
            facts = Path(at).stat()
            if (facts.st_dev, facts.st_ino) in entered:
                continue
            entered.add((facts.st_dev, facts.st_ino))
            with os.scandir(at) as listed:
                entries = sorted(listed, key=lambda entry: entry.name, reverse=True)
        except OSError as error:
            if at != str(folder):
                continue
            raise UserError(lost_link(folder) or f"{folder}: {error.strerror}") from None
        for entry in entries:
            if passed_over(entry.name):
                continue
            linked = entry.is_symlink()
            if is_folder(Path(entry.path)) if linked else entry.is_dir():
                todo.append(entry.path)
            elif entry.name.lower().endswith(tuple(endings)):
                if linked:
                    check_link(Path(entry.path))
                found.append((at, entry.name))
    return [f"{at}/{name}" for at, name in sorted(found)]


def lost_link(path: Path) -> str:
    """What to say where `path`, or a folder above it, is a link to nothing; else empty.

    Where a link can't be looked at, nothing is known of it.
    """
    for link in (path, *path.parents):
        try:
            target = link.readlink()
        except (OSError, ValueError):  # no link, as a rule
            continue
        try:
            link.stat()
        except PermissionError:
            continue
        except OSError:
            return (
                f"{link} is a link to {target}, which is not there; mount or mend that, or remove "
                "the link"
            )
    return ""


def check_link(path: Path) -> None:
    """Raises UserError for a link that can't be followed."""
    try:
        path.stat()
    except OSError as error:
        raise UserError(lost_link(path) or f"{path}: {error.strerror}") from None


def is_there(path: Path) -> bool:
    """Whether something is there, as far as can be seen."""
    return os.path.exists(path)  # noqa: PTH110 — Path's raises where nothing can be seen


def is_folder(path: Path) -> bool:
    """Whether a folder is there, as far as can be seen."""
    return os.path.isdir(path)  # noqa: PTH112 — as above


def is_file(path: Path) -> bool:
    """Whether a file is there, as far as can be seen."""
    return os.path.isfile(path)  # noqa: PTH113 — as above


def read_text(path: Path) -> str:
    """A text that a user wrote, in UTF-8, with a byte order mark or without.

    Raises UserError where it can't be read or is in another encoding.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {error.object[error.start]:#04x}, which is no UTF-8"
        if path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"):
            wrong = "it is UTF-16"
    else:
        if "\0" not in text:
            return text
        wrong = "it has zero bytes, as UTF-16 has"
    raise UserError(f"{path}: cannot be read: {wrong}; save it as UTF-8")
