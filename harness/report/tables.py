"""What every form of the report is made of: sections of tables, their columns and cells."""

import math
from dataclasses import dataclass, field

TONES = dict.fromkeys(("keeps", "agrees", "less", "better"), "good")
TONES |= dict.fromkeys(("loses", "differs", "more", "worse"), "bad")
TONES |= dict.fromkeys(("undecided", "unclear"), "unclear")


@dataclass(frozen=True, slots=True)
class Column:
    """A column; `text`: of words, not numbers; `wide`: left out in a narrow terminal."""

    title: str
    unit: str = ""
    text: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell: what is shown, what it is sorted by, and its tone: "good", "bad" or "unclear"."""

    text: str
    value: float | str | None = None
    tone: str = ""

    @property
    def key(self) -> float | str | None:
        """What the cell is sorted by; None where it can't be put in order."""
        return (
            None if isinstance(self.value, float) and not math.isfinite(self.value) else self.value
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table, whose first column names the rows; `sortable`: whether each row stands for
    itself.
    """

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    sortable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """All about one group.

    `facts`: what was trained on, and what tells it from other groups; `answers`: a sentence for
    each method in question; `details`: recipe, devices and the methods' parameters; `alerts`:
    (kind, line) for what is missing, unfinished or failed.
    """

    suite: str
    title: str
    group: str
    tables: list[Table]
    facts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    alerts: list[tuple[str, str]] = field(default_factory=list)
