"""What every form shows: sections of tables, their columns and cells."""

import math
from dataclasses import dataclass, field

TONES = dict.fromkeys(("keeps", "agrees", "less", "better"), "good")
TONES |= dict.fromkeys(("loses", "differs", "more", "worse"), "bad")
TONES |= dict.fromkeys(("undecided", "unclear"), "unclear")


@dataclass(frozen=True, slots=True)
class Column:
    """`wide`: has room only in a wide terminal, where a narrow one leaves it out."""

    title: str
    unit: str = ""
    text: bool = False
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """What is shown, what it is sorted by, and whether it is "good", "bad" or "unclear"."""

    text: str
    value: float | str | None = None
    tone: str = ""

    @property
    def key(self) -> float | str | None:
        """The value, where it can be put in order."""
        return (
            None if isinstance(self.value, float) and not math.isfinite(self.value) else self.value
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table; its first column names the rows. `sortable`: each row stands for itself."""

    title: str
    columns: list[Column]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    sortable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """All about one group. `answers`: in a sentence for each method in question; `alerts`: (kind,
    line) of what is missing, unfinished or failed.
    """

    suite: str
    title: str
    group: str
    tables: list[Table]
    facts: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    alerts: list[tuple[str, str]] = field(default_factory=list)
