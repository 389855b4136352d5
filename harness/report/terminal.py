"""The report in a terminal, readable from 80 columns on."""

from textwrap import fill
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config import forward_size
from harness.report.model import GroupTable, MethodRow

NOTE = (
    "FLOPs: backward of one sample, mean over epochs; {dense} {unit}FLOPs dense. executed: what "
    "the kernels did; its saving counts the cost of deciding in. {required}paper: the published "
    "convention, {paper_dense} {unit}FLOPs with nothing frozen. train: seconds, with deciding."
)
REQUIRED = "required: the least that would have done. "
CUT = "gradient cut: an approximation; no gradient flowed through frozen neurons."
WIDE = 100  # columns from which there is room for the required FLOPs
MIXED = "Trials ran on different devices: their seconds are not averaged."
SHARED = "* Trials shared a device: these seconds are no measurement."


def show(tables: list[GroupTable], console: Console) -> None:
    """One table per group, then what it leaves out."""
    for table in tables:
        _show(table, console)


def _show(table: GroupTable, console: Console) -> None:
    console.print(Text(f"{table.suite}: {table.title}", style="bold"))
    for facts in _facts(table):
        say(facts, console, style="dim")
    if table.methods:
        unit, scale = _unit(table.dense)
        wide = console.width >= WIDE
        console.print(_grid(table, unit, scale, wide))
        note = NOTE.format(
            unit=unit,
            dense=f"{table.dense / scale:.2f}",
            paper_dense=f"{table.paper_dense / scale:.2f}",
            required=REQUIRED if wide else "",
        )
        say(note, console)
        for row in table.methods:
            parameters = {k: v for k, v in row.parameters.items() if k != "kind"}
            if parameters:
                say(f"{row.label}: {_listed(parameters)}", console, style="dim")
        if any(row.parameters.get("gradient") == "cut" for row in table.methods):
            say(CUT, console)
        if len(table.devices) > 1:
            say(MIXED, console)
        elif table.timing_shared:
            say(SHARED, console)
    else:
        say("No trial is finished yet.", console)
    for what, lines in (("Unfinished", table.unfinished), ("Failed", table.failed)):
        for line in lines:
            say(f"{what}: {line}", console, style="red" if what == "Failed" else "yellow")
    console.print()


def _facts(table: GroupTable) -> list[str]:
    recipe = table.recipe
    used = f" ({recipe['train_size']} images)" if recipe["train_size"] else ""
    named = [recipe[part] for part in ("optimizer", "scheduler") if recipe[part]]
    return [
        f"{table.data}{used} · {table.epochs} epochs · {_batch(recipe)} · "
        f"{recipe['precision']} · group {table.group}",
        " · ".join(f"{part['name']} {_listed(_arguments(part))}" for part in named),
        ", ".join(table.devices),
    ]


def _arguments(named: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in named.items() if key != "name"}


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_said(value)}" for key, value in values.items())


def _said(value: Any) -> str:
    """A scheduler among another's arguments is a table with its name."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return " then ".join(_said(item) for item in value)
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({_listed(_arguments(value))})"
    return str(value)


def _batch(recipe: dict[str, Any]) -> str:
    """What the batch is of, where BatchNorm does not see all of it at once."""
    size, workers = recipe["batch_size"], recipe["workers"]
    forward = forward_size(size, recipe.get("forward_batch"), workers)
    if forward == size:
        return f"batch {size}"
    by = f" on {workers} workers" if workers > 1 else ""
    return f"batch {size}{by}, {forward} per forward and BatchNorm"


def _grid(table: GroupTable, unit: str, scale: float, wide: bool) -> Table:
    grid = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False)
    grid.add_column("method", overflow="fold")
    mark = "*" if table.timing_shared else ""
    for title in (
        "n",
        f"{table.metric}\n%",
        "Δ\npp",
        *([f"required\n{unit}FLOPs"] if wide else []),
        f"executed\n{unit}FLOPs",
        "decide\n%",
        "saved\n%",
        f"paper\n{unit}FLOPs",
        "saved\n%",
        f"train\ns{mark}",
    ):
        grid.add_column(title, justify="right", no_wrap=True)
    for row in table.methods:
        grid.add_row(row.label, *_cells(row, scale, wide))
    return grid


def _cells(row: MethodRow, scale: float, wide: bool) -> list[str]:
    spread = "" if row.metric_std is None else f" ± {100 * row.metric_std:.2f}"
    return [
        str(row.n),
        f"{100 * row.metric_mean:.2f}{spread}",
        "–" if row.difference is None else f"{100 * row.difference:+.2f}",
        *([f"{row.required / scale:.2f}"] if wide else []),
        f"{row.executed / scale:.2f}",
        f"{100 * row.overhead_share:.1f}",
        f"{100 * row.saved:.1f}",
        f"{row.paper / scale:.2f}",
        f"{100 * row.saved_paper:.1f}",
        _seconds(row),
    ]


def _seconds(row: MethodRow) -> str:
    if row.seconds_train is None or row.seconds_decide is None:
        return "–"
    seconds = row.seconds_train + row.seconds_decide
    return f"{seconds:.0f}" if seconds >= 1000 else f"{seconds:.1f}"


def _unit(flops: float) -> tuple[str, float]:
    units = (("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next(((unit, scale) for unit, scale in units if flops >= scale), ("", 1.0))


def say(text: str, console: Console, style: str = "") -> None:
    """`text`, filled to the console's width."""
    console.print(Text(fill(text, console.width), style=style))
