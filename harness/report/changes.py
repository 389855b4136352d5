"""The comparison of two runs, printed as tables."""

from collections.abc import Iterator

from rich.console import Console

from harness.console import say
from harness.report.compare import Change, Compared, RunComparison
from harness.report.gates import REMOVED
from harness.report.tables import TONES, Cell, Column, Table
from harness.report.terminal import print_table
from harness.report.words import NONE, points, spread

LISTED = 30  # trials, at the most
COUNTED, SIZES = ("metric", "saved"), ("parameters", "forward")  # what no clock tells
NOTE = (
    "B minus A: metric and saved in percentage points, seconds in per cent; means over seeds with "
    "95 % intervals, paired by seed where seeds match. better, worse: the interval leaves zero "
    "out; unclear: it does not, or there are fewer than three seeds."
)
AFTER = (
    "Of what prunes, once dead neurons are removed, in per cent, with 95 % intervals: parameters, "
    "FLOPs of a forward, and the latency of a batch over the dense model's."
)


def print_comparison(found: RunComparison, console: Console) -> None:
    """Print the methods, the trials that changed, what is missing, and the gates that are
    missed.
    """
    say(f"A: {found.a}", console)
    say(f"B: {found.b}", console)
    for table in _tables(found):
        print_table(table, console)
    console.print()
    for note in found.notes:
        say(note, console, style="yellow")
    for line in found.missed:
        say(f"missed: {line}", console, style="red")


def _tables(found: RunComparison) -> Iterator[Table]:
    metrics = " | ".join(dict.fromkeys(found.metrics.values()))
    changed, resized = ([t for t in found.trials if _changed(t, of)] for of in (COUNTED, SIZES))
    same = len(found.trials) - len([t for t in found.trials if _changed(t, COUNTED + SIZES)])
    sized = any(change.quantity in SIZES for trial in found.trials for change in trial.changes)
    what = "metric, savings and what removal leaves" if sized else "metric and savings"
    notes = [f"{same} of {len(found.trials)} trials are the same in {what}."]
    comparable = [method for method in found.methods if not method.why]
    if comparable:
        yield _changes("Methods", metrics, comparable, [NOTE, *notes])
    removed = [m for m in comparable if any(c.quantity in REMOVED for c in m.changes)]
    if removed:
        yield _removed("After removal", removed, [AFTER])
    others = [method for method in found.methods if method.why]
    if others:
        rows = [[Cell(_name(m)), Cell(m.why)] for m in others]
        columns = [Column("method", text=True), Column("why", text=True)]
        yield Table(title="Not comparable", columns=columns, rows=rows)
    if changed:
        yield _changes("Trials that changed", metrics, changed[:LISTED], _more(changed))
    if resized:
        title = "Trials that changed in what removal leaves"
        yield _removed(title, resized[:LISTED], _more(resized))


def _changed(trial: Compared, quantities: tuple[str, ...]) -> bool:
    return any(c.mark != "same" for c in trial.changes if c.quantity in quantities)


def _more(trials: list[Compared]) -> list[str]:
    more = len(trials) - LISTED
    return [f"And {more} more (--format json has all)."] if more > 0 else []


def _changes(title: str, metric: str, compared: list[Compared], notes: list[str]) -> Table:
    columns = [
        Column("method", text=True),
        Column("n"),
        Column("A", "%", wide=True),
        Column("B", "%", wide=True),
        Column(metric, "pp"),
        Column("95 %", "pp", wide=True),
        Column("", text=True),
        Column("saved", "pp"),
        Column("", text=True),
        Column("seconds", "%"),
        Column("", text=True),
    ]
    return Table(title=title, columns=columns, rows=[_row(c) for c in compared], notes=notes)


def _row(compared: Compared) -> list[Cell]:
    by = {change.quantity: change for change in compared.changes}
    metric = by.get("metric")
    return [
        Cell(_name(compared)),
        Cell(str(metric.n) if metric else NONE),
        Cell(spread(metric.a if metric else None, None)),
        Cell(spread(metric.b if metric else None, None)),
        _size(metric),
        Cell(_range(metric)),
        _mark(metric),
        _size(by.get("saved")),
        _mark(by.get("saved")),
        _size(by.get("seconds"), 1),
        _mark(by.get("seconds")),
    ]


def _removed(title: str, compared: list[Compared], notes: list[str]) -> Table:
    columns = [Column("method", text=True)]
    for quantity in REMOVED:
        columns += [
            Column(quantity, "%"),
            Column("95 %", "%", wide=True),
            Column("", text=True),
        ]
    rows = []
    for each in compared:
        by = {change.quantity: change for change in each.changes}
        found = [by.get(quantity) for quantity in REMOVED]
        cells = [[_size(change), Cell(_range(change)), _mark(change)] for change in found]
        rows.append([Cell(_name(each)), *(cell for part in cells for cell in part)])
    return Table(title=title, columns=columns, rows=rows, notes=notes)


def _name(compared: Compared) -> str:
    seed = None if compared.seed is None else f"seed {compared.seed}"
    words = [compared.suite, compared.point, compared.method, seed]
    return " ".join(word for word in words if word)


def _size(change: Change | None, digits: int = 2) -> Cell:
    if change is None or change.change is None:
        return Cell(NONE)
    return Cell(points(change.change, digits), change.change)


def _range(change: Change | None) -> str:
    if change is None or change.low is None or change.high is None:
        return NONE
    return f"[{points(change.low)}, {points(change.high)}]"


def _mark(change: Change | None) -> Cell:
    return (
        Cell("") if change is None else Cell(change.mark, change.mark, TONES.get(change.mark, ""))
    )
