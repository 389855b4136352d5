"""The report in a terminal, readable from 80 columns on."""

from collections.abc import Iterable, Iterator
from itertools import pairwise

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as Grid
from rich.text import Text

from harness.console import say
from harness.report.tables import Section, Table

BROADEST = 1000  # columns that no table reaches
WORDS = 17  # columns that one of text keeps at least
WIDE = 110  # columns from which there is room for all
STYLES = {"good": "green", "bad": "red", "unclear": "yellow"}
ALERTS = {"Failed": "red"}


def print_report(sections: Iterable[Section], console: Console) -> None:
    """Print the sections one after the other: what was found, then what it rests on, what it leaves
    out.

    The first two tables stand together above their notes, so that both are on the first screen.
    """
    for section in sections:
        first, others = section.tables[:2], section.tables[2:]
        say(section.title, console, style="bold")
        for fact in section.facts:
            say(fact, console, style="dim")
        for answer in section.answers:
            say(answer, console)
        for table in first:
            _print_grid(table, console)
        if first:
            console.print()
        for table in first:
            _print_notes(table, console, f"“{table.title}” shows ")
        for table in others:
            print_table(table, console)
        if section.tables:
            console.print()
        for line in section.details:
            say(line, console, style="dim")
        for note in section.notes:
            say(note, console)
        for kind, line in section.alerts:
            say(f"{kind}: {line}", console, style=ALERTS.get(kind, "yellow"))
        console.print()


def print_table(table: Table, console: Console) -> None:
    """Print a table under its title, with its notes below."""
    _print_grid(table, console)
    _print_notes(table, console)


def _print_grid(table: Table, console: Console) -> None:
    shown = [p for p, c in enumerate(table.columns) if console.width >= WIDE or not c.wide]
    grid = Grid(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    units = any(column.unit for column in table.columns)
    for position in shown:
        column = table.columns[position]
        title = f"{column.title}\n{column.unit}" if units else column.title
        texts = [column.title, column.unit, *(row[position].text for row in table.rows)]
        longest = max(map(len, texts))
        grid.add_column(
            title,
            justify="left" if column.text else "right",
            no_wrap=not column.text,
            overflow="fold",
            min_width=min(WORDS, longest) if column.text else longest,
        )
    for row in table.rows:
        grid.add_row(*(Text(row[p].text, style=STYLES.get(row[p].tone, "")) for p in shown))
    console.print()
    console.print(Text(table.title, style="bold"))
    least = Measurement.get(console, console.options.update_width(BROADEST), grid).minimum
    if least > console.width:
        grid.width = least  # it is wrapped there, not cut
    with console.capture() as captured:
        console.print(grid, crop=False)
    for line in captured.get().splitlines():  # without the spaces that fill up the last column
        console.print(Text.from_ansi(line.rstrip()), soft_wrap=True)


def _print_notes(table: Table, console: Console, named: str = "") -> None:
    for note in table.notes:
        say(note, console, style="dim")
    hidden = dict.fromkeys(_hidden(table)) if console.width < WIDE else {}
    if hidden:
        more = f"From {WIDE} columns on, {named}also: {', '.join(hidden)}."
        say(more, console, style="dim")


def _hidden(table: Table) -> Iterator[str]:
    """What a narrow terminal leaves out; by the column before it, where another has its title."""
    shown = {column.title for column in table.columns if not column.wide}
    for before, column in pairwise(table.columns):
        if column.wide:
            of = f" of {before.title}" if column.title in shown else ""
            yield column.title + of
