"""The report in a terminal, readable from 80 columns on."""

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from harness.console import say
from harness.report.tables import Section, Table

WORDS = 17  # columns that one of text keeps at least
WIDE = 110  # columns from which there is room for all
STYLES = {"good": "green", "bad": "red", "unclear": "yellow"}
ALERTS = {"Failed": "red"}


def print_report(sections: Iterable[Section], console: Console) -> None:
    """Print the sections one after the other: tables, then what they leave out."""
    for section in sections:
        say(section.title, console, style="bold")
        for fact in section.facts:
            say(fact, console, style="dim")
        for answer in section.answers:
            say(answer, console)
        for table in section.tables:
            print_table(table, console)
        for note in section.notes:
            say(note, console)
        for kind, line in section.alerts:
            say(f"{kind}: {line}", console, style=ALERTS.get(kind, "yellow"))
        console.print()


def print_table(table: Table, console: Console) -> None:
    """Print a table under its title, with its notes below."""
    shown = [p for p, c in enumerate(table.columns) if console.width >= WIDE or not c.wide]
    grid = Grid(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    units = any(column.unit for column in table.columns)
    for position in shown:
        column = table.columns[position]
        title = f"{column.title}\n{column.unit}" if units else column.title
        longest = max((len(row[position].text) for row in table.rows), default=0)
        grid.add_column(
            title,
            justify="left" if column.text else "right",
            no_wrap=not column.text,
            overflow="fold",
            min_width=min(WORDS, max(longest, len(column.title))) if column.text else None,
        )
    for row in table.rows:
        grid.add_row(*(Text(row[p].text, style=STYLES.get(row[p].tone, "")) for p in shown))
    console.print()
    console.print(Text(table.title, style="bold"))
    with console.capture() as captured:
        console.print(grid)
    for line in captured.get().splitlines():  # without the spaces that fill up the last column
        console.print(Text.from_ansi(line.rstrip()), soft_wrap=True)
    for note in table.notes:
        say(note, console, style="dim")
    hidden = dict.fromkeys(c.title for c in table.columns if c.wide and console.width < WIDE)
    if hidden:
        say(f"From {WIDE} columns on, also: {', '.join(hidden)}.", console, style="dim")
