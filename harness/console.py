"""What commands print, and where: tables and text for people, JSON for programs."""

import json
import os
import sys
from textwrap import fill
from typing import Any


def progress_line() -> Any:
    """A rich status: one line on the error stream that changes, where that is a terminal."""
    from rich.console import Console

    return Console(stderr=True).status("reading the model")


def console() -> Any:
    """A rich console on the output stream, as wide as the terminal."""
    from rich.console import Console

    class Patient(Console):
        """Works on when nobody reads any more (`neqbench run … | head`)."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            _nobody_reads()

    return Patient(highlight=False, markup=False, emoji=False)


def table(*titles: str) -> Any:
    """A plain rich table with columns of these titles."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        made.add_column(title)
    return made


def as_text(*parts: Any) -> str:
    """Rich tables and lines as text of 80 columns."""
    from rich.console import Console

    plain = Console(
        width=80, color_system=None, force_terminal=False, highlight=False, markup=False
    )
    with plain.capture() as captured:
        for part in parts:
            plain.print(part, soft_wrap=isinstance(part, str))
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")


def write_json(value: Any) -> None:
    """Print a plain value as JSON."""
    write(json.dumps(value, indent=2))


def write(text: str) -> None:
    """Print text as it is; nothing happens where nobody reads any more."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _nobody_reads()


def say(text: str, console: Any, style: str = "") -> None:
    """Print `text` on a rich console, filled to its width, in a rich `style`."""
    from rich.text import Text

    console.print(Text(fill(text, console.width, break_on_hyphens=False), style=style))


def _nobody_reads() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
