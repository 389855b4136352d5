"""The folder in which a Ray that is started here keeps its sockets and logs, chosen as Ray does."""

import os
import sys
import tempfile
from pathlib import Path

from harness.errors import UserError, one_line
from harness.paths import is_there, lost_link

LONGEST = 107 if sys.platform == "linux" else 103  # bytes of a socket's path
SOCKET = "session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"  # the longest of Ray's


def ray_folder() -> Path:
    """What RAY_TMPDIR says, or TMPDIR, or /tmp."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    return Path(next((os.environ[name] for name in names if name in os.environ), "/tmp"), "ray")


def check_ray_folder() -> None:
    """Raises UserError where Ray can't start: the folder is relative, its sockets' paths are too
    long, or nothing can be written there.
    """
    folder = ray_folder()
    if not folder.is_absolute():
        raise UserError(
            f"Ray can't start in {folder}: it wants its folder from the root on; set RAY_TMPDIR to "
            "an absolute path, such as /tmp"
        )
    length = len(os.fsencode(folder / SOCKET.format(pid=os.getpid())))
    if length > LONGEST:
        raise UserError(
            f"Ray can't start in {folder}: its sockets' paths would have {length} bytes, and "
            f"{LONGEST} are allowed; set RAY_TMPDIR to a short path, such as /tmp"
        )
    wrong = lost_link(folder)
    there = next(path for path in (folder, *folder.parents) if is_there(path))  # Ray makes the rest
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        wrong = wrong or error.strerror or one_line(error)
    if wrong:
        raise UserError(
            f"Ray can't write in {folder}: {wrong}; set RAY_TMPDIR to a short path that can be "
            "written, such as /tmp"
        )
