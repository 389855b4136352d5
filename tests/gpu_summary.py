"""The evidence of a device on one page: what it is, what became of each part, and the numbers."""

from collections.abc import Iterable, Mapping
from typing import Any

COLUMNS = ("granularity", "gradient", "frozen", "backward_ratio", "step_ratio", "executed_ratio")


def summary(
    machine: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
    tables: Mapping[str, Mapping[str, Any]],
    told: Iterable[str],
) -> str:
    """Markdown. `parts`: outcomes by name; `tables`: JSON of `neqbench speed` by name; `told`: what
    there is to say of the trials, in Markdown.
    """
    dirty = " with uncommitted changes" if machine["uncommitted"] else ""
    cuda = f"CUDA {machine['cuda']}, cuDNN {machine['cudnn']}, driver {machine['driver']}"
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    lines = [
        f"# {machine['device'] or machine['cpu']}",
        "",
        f"Taken {machine['date']}, code {machine['code']}{dirty}.",
        f"{cuda}; {versions}.",
        "",
        *rows(("part", "state", "seconds", ""), map(_part, parts.items())),
    ]
    for name, table in tables.items():
        lines += ["", f"## {name}", "", *rows(COLUMNS, map(_ratios, table.get("rows", [])))]
    return "\n".join([*lines, *(f"\n{text.rstrip()}" for text in told)]) + "\n"


def _part(item: tuple[str, Mapping[str, Any]]) -> list[str]:
    name, part = item
    return [name, part["state"], f"{part['seconds']:.0f}", part["reason"].replace("|", "/")]


def _ratios(row: Mapping[str, Any]) -> list[str]:
    return [_cell(row.get(column)) for column in COLUMNS]


def _cell(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)


def rows(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    cells = [heads, ["---" for _ in heads], *lines]
    return [f"| {' | '.join(row)} |" for row in cells]
