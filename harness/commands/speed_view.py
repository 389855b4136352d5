"""What `neqbench speed` prints: from when on it pays, and a table for each way of freezing."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from harness.console import say
from harness.train.speeds import Row, Speed

BAR = 8  # characters for the time of the dense model, on a terminal of 80 columns
FEW = 5  # pairs of steps, below which quartiles say little
UNKNOWN = "–"


def print_speed(speed: Speed, console: Console) -> None:
    """Print what follows, then a table for each way of freezing, with a bar for each row's time."""
    layout = ", channels_last" if speed.channels_last else ""
    compiled = ", compiled" if speed.compiled else ""
    batch = "" if speed.batch is None else f"batch {speed.batch}, "
    say(f"{speed.name}: {batch}{speed.precision}{layout}{compiled}", console, "bold")
    say(f"{speed.device}; {_dense(speed)}", console, "dim")
    for sentence in speed.sentences:
        say(sentence, console)
    if speed.pairs < FEW:
        say(
            f"The time was enough for {speed.pairs} steps under each mask only: --seconds gives "
            "more of it.",
            console,
            "yellow",
        )
    width = max(BAR + (console.width - 80) // 2, BAR)
    for kind, title in speed.kinds.items():
        console.print()
        console.print(_grid(title, speed.of(kind), min(width, 3 * BAR)))
    console.print()
    say(
        "Over the dense model: time of the backward (median and quartiles over pairs of steps) and "
        "of the whole step, FLOPs of the backward, bytes kept for it, and of optimizer state. It "
        "pays from the smallest share on from which every step's upper quartile is below 1.",
        console,
        "dim",
    )


def _dense(speed: Speed) -> str:
    dense = speed.dense
    activations, state = (n / 2**20 for n in (dense.activation_bytes, dense.optimizer_bytes))
    compiling = ""
    if dense.compile_seconds is not None:
        compiling = f"; the first was compiled for {_seconds(dense.compile_seconds)}"
    return (
        f"a dense step takes {_seconds(dense.step_seconds)}, keeps {activations:,.3g} MiB for "
        f"its backward and {state:,.3g} MiB of optimizer state{compiling}"
    )


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"


def _grid(title: str, rows: list[Row], width: int) -> Table:
    table = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        title=title,
        title_justify="left",
    )
    headings = ("frozen", "backward", "quartiles", "step", "required", "executed", "kept", "state")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        backward = row.backward_ratio
        table.add_row(
            f"{row.frozen:.0%}",
            _ratio(backward),
            f"{_ratio(row.backward_ratio_low)}–{_ratio(row.backward_ratio_high)}",
            _ratio(row.step_ratio),
            _ratio(row.required_ratio),
            _ratio(row.executed_ratio),
            _ratio(row.activation_ratio),
            _ratio(row.optimizer_ratio),
            "█" * round(width * min(backward or 0, 1.2)),
        )
    return table


def _ratio(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"
