"""TensorBoard's event files: read back, and added to."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from neq.integrations import missing

try:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise missing("tensorboard", "tensorboard") from error

LONGEST = 200  # characters of a folder's name
CONFIG = "config/text_summary"  # the name under which a writer keeps a text


def check(folder: str) -> None:
    """Raises OSError for a folder that can't be written, ValueError for a URI."""
    if "://" in folder:
        raise ValueError(f"tensorboard:{folder}: name a folder; TensorBoard is not written there")
    folder = str(Path(folder).expanduser())
    Path(folder).mkdir(parents=True, exist_ok=True)
    TemporaryFile(dir=folder).close()


class _Folder:
    """The event files of one run. Every process that writes has one of its own there; what a killed
    one has left half written is passed over, by TensorBoard as well.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._config = folder, config
        self._earlier = sorted(folder.glob("events.out.tfevents.*"))
        self._writer: Any = None

    def read(self) -> Iterator[tuple[str, int, float | None]]:
        for path in self._earlier:
            for event in EventFileLoader(str(path)).Load():
                for value in event.summary.value:
                    if value.tag == CONFIG:
                        self._config = {}
                        continue
                    number = make_ndarray(value.tensor)
                    yield value.tag, event.step, float(number) if number.ndim == 0 else None

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder))
            if self._config:
                lines = [f"| {name} | {value} |" for name, value in self._config.items()]
                text = "\n".join(["| | |", "| --- | --- |", *lines])
                self._writer.add_text("config", text, 0)
        for name, value in values.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def open_place(folder: str, run: str, config: Mapping[str, Any], project: str) -> _Folder:
    """The run's folder below `folder`; `project` is not said there."""
    parts = [re.sub(r"[^\w.=,+-]+", "-", part).strip(".-")[-LONGEST:] for part in run.split("/")]
    return _Folder(Path(folder, *filter(None, parts)).expanduser(), config)
