"""The report in each of its forms, all from the same tables."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from harness.console import write
from harness.errors import UserError, one_line
from harness.report import terminal
from harness.report.method_row import json_keys
from harness.report.model import GroupTable, Report, plain
from harness.report.sections import sections
from harness.report.tables import Column, Section, Table

if TYPE_CHECKING:
    from harness.report.style import Picture

GROUP = (
    *("suite", "group", "point", "metric", "data", "epochs", "margin"),
    *("timing_shared", "timing_withheld"),
)
# What TeX sets in another way.
TEX = {
    "\\": r"\textbackslash{}",
    **{sign: rf"\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "|": r"$|$",
    "<": "$<$",
    ">": "$>$",
    "·": r"$\cdot$",
    "–": "--",
    "ᵃ": r"$^{a}$",
    "ᵇ": r"$^{b}$",
    "ᵈ": r"$^{d}$",
    "†": r"$\dagger$",
    **{sign: f"$^{{{number}}}$" for number, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
}


def render(report: Report, form: str, console: Console, folder: str | None = None) -> list[Path]:
    """Print the report; `form`: "rich", "html", "md", "latex", "csv" or "json".

    Returns the paths of the figures that it writes to `folder`, as PNG (default: none). Raises
    UserError where they can't be written.
    """
    drawn = []
    if form == "html" or folder is not None:
        from harness.report.figures import pictures  # matplotlib

        drawn = list(pictures(report))
    if form == "rich":
        terminal.print_report(sections(report), console)
    elif form == "html":
        from harness.report.page import page

        write(page(report, drawn))
    else:
        write(FORMS[form](report))
    return [] if folder is None else list(_written(drawn, folder))


def _written(drawn: list["Picture"], folder: str) -> Iterator[Path]:
    if not folder or "://" in folder:
        raise UserError(f"--figures {folder!r}: name a folder of this machine")
    for picture in drawn:
        path = Path(folder) / f"{picture.name}.png"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture.png())
        except OSError as error:
            raise UserError(f"--figures {folder}: can't be written: {one_line(error)}") from None
        yield path


def to_csv(report: Report) -> str:
    """The report as CSV: a line for each group and method, keys and units as in the JSON."""
    rows = [_flat(table, row.to_json()) for table in report.groups for row in table.methods]
    text = io.StringIO()
    heads = [*GROUP, *(key for key in json_keys() if key != "parameters")]
    names = list(dict.fromkeys([*heads, *(name for row in rows for name in row)]))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().rstrip("\n")


def _flat(table: GroupTable, row: dict[str, Any]) -> dict[str, Any]:
    parameters = row.pop("parameters")
    row["seeds"] = " ".join(map(str, row["seeds"]))
    row["measures"] = "; ".join(
        f"{measure['name']}{' by layer' * (measure['layers'] > 0)}={measure['mean']}"
        for measure in row["measures"]
    )
    row["stuck"] = "; ".join(
        f"{each['layer']}={each['neurons']:g} ({each['reason']})" for each in row["stuck"]
    )
    group = {name: getattr(table, name) for name in GROUP}
    known = group | row
    own = {f"parameters.{k}" if k in known else k: value for k, value in parameters.items()}
    found: dict[str, Any] = plain(known | own)
    return found


def to_markdown(report: Report) -> str:
    """The report as Markdown: headings and pipe tables, as GitHub shows them."""
    return "\n".join(text for section in sections(report) for text in _markdown(section))


def _markdown(section: Section) -> Iterator[str]:
    yield f"## {_pipe(section.title)}\n"
    yield from (f"- {_pipe(fact)}" for fact in section.facts)
    yield ""
    yield from (f"**{_pipe(answer)}**\n" for answer in section.answers)
    for table in section.tables:
        heads = [_pipe(_title(column)) or " " for column in table.columns]
        yield f"### {_pipe(table.title)}\n"
        yield f"| {' | '.join(heads)} |"
        yield f"| {' | '.join(':--' if c.text else '--:' for c in table.columns)} |"
        yield from (f"| {' | '.join(_pipe(cell.text) for cell in row)} |" for row in table.rows)
        yield ""
        yield from (f"{_pipe(note)}\n" for note in table.notes)
    yield from (f"- {_pipe(line)}" for line in section.details)
    yield ""
    yield from (f"{_pipe(note)}\n" for note in section.notes)
    yield from (f"- **{kind}:** {_pipe(text)}" for kind, text in section.alerts)
    if section.alerts:
        yield ""


def _pipe(text: str) -> str:
    return re.sub(r"([\\|*_<\[`])", r"\\\1", " ".join(text.split()))


def _title(column: Column) -> str:
    return f"{column.title}, {column.unit}" if column.unit else column.title


def to_latex(report: Report) -> str:
    """The report as LaTeX: floats with booktabs' rules, to be included in a paper."""
    head = "% needs \\usepackage{booktabs,graphicx}"
    return "\n\n".join([head, *(part for s in sections(report) for part in _latex(s))])


def _latex(section: Section) -> Iterator[str]:
    told = (section.title, *section.facts, *section.answers, *section.details)
    yield "\n".join(f"% {text}" for text in told)
    yield from (_float(section, table) for table in section.tables)
    yield "\n".join(
        [
            rf"\noindent {_tex(section.title)}.",
            *(_tex(note) for note in section.notes),
            *(_tex(f"{kind}: {text}.") for kind, text in section.alerts),
        ]
    )


def _float(section: Section, table: Table) -> str:
    ends = r" \\"
    heads = " & ".join(_tex(_title(column)) for column in table.columns) + ends
    rows = [" & ".join(_tex(cell.text) for cell in row) + ends for row in table.rows]
    form = "".join("l" if column.text else "r" for column in table.columns)
    notes = " ".join(_tex(note) for note in table.notes)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_tex(section.title)}. {_tex(table.title)}.}}",
            r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
            rf"\begin{{tabular}}{{{form}}}",
            r"\toprule",
            heads,
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\par\smallskip",
            rf"\parbox{{\linewidth}}{{\footnotesize {notes}}}",
            r"\end{table}",
        ]
    )


def _tex(text: str) -> str:
    return "".join(TEX.get(sign, sign) for sign in text)


FORMS: dict[str, Callable[[Report], str]] = {
    "md": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
    "json": Report.to_json,
}
