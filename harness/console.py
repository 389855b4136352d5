"""What commands print, and where."""

import json
import os
import sys
from textwrap import fill
from typing import Any


def status() -> Any:
    """A line on the error stream, where that is a terminal."""
    from rich.console import Console

    return Console(stderr=True).status("reading the model")


def console() -> Any:
    """For people, as wide as their terminal."""
    from rich.console import Console

    class Patient(Console):
        """Works on when nobody reads any more (`neqbench run … | head`)."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            _nobody_reads()

    return Patient(highlight=False, markup=False, emoji=False)


def table(*titles: str) -> Any:
    """A plain one with these columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        made.add_column(title)
    return made


def write_json(value: Any) -> None:
    """For programs."""
    write(json.dumps(value, indent=2))


def write(text: str) -> None:
    """As it is."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _nobody_reads()


def say(text: str, console: Any, style: str = "") -> None:
    """`text`, filled to the console's width."""
    from rich.text import Text

    console.print(Text(fill(text, console.width, break_on_hyphens=False), style=style))


def _nobody_reads() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
