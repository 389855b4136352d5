"""Commands that are given so much time, and no more."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

HERE = Path(__file__).parents[1]
GRACE = 15.0  # seconds for a command that was asked to end


@dataclass
class Child:
    """A command in a session of its own; it writes to `log`, and its output to `out` if given."""

    words: Sequence[str]
    log: Path
    out: Path | None = None
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        for path in (self.log, self.out or self.log):
            path.write_bytes(b"")
        with self.log.open("ab") as log, (self.out or self.log).open("ab") as out:
            self.process = _start(self.words, out, log)

    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to it and to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def last_words(self, lines: int = 3) -> str:
        """The end of what it has said, in a line."""
        said = self.log.read_text(errors="replace").splitlines()
        words = (" ".join(line.strip("= ").split()) for line in said if line.strip())
        return " ".join(list(words)[-lines:])[-300:]


def _start(words: Sequence[str], out: IO[bytes], log: IO[bytes]) -> subprocess.Popen[bytes]:
    paths = [str(HERE / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
    }
    return subprocess.Popen(
        words,
        cwd=HERE,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=log,
        start_new_session=True,
    )


def watched(children: Sequence[Child], limit: float) -> bool:
    """Whether all have ended by themselves within so many seconds; otherwise they are ended."""
    end = time.monotonic() + limit
    try:
        while any(child.running() for child in children) and time.monotonic() < end:
            time.sleep(0.1)
        return not any(child.running() for child in children)
    finally:
        _end([child for child in children if child.running()])


def _end(children: Sequence[Child]) -> None:
    """Ask all of them to end, and after GRACE seconds make them."""
    for child in children:
        child.signal(signal.SIGTERM)
    end = time.monotonic() + GRACE
    while any(child.running() for child in children) and time.monotonic() < end:
        time.sleep(0.1)
    for child in children:
        child.signal(signal.SIGKILL)  # what it has started may have stayed
        child.process.wait()
