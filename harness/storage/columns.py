"""How a column of a table is declared."""

from dataclasses import dataclass

import pyarrow as pa

INTEGER, NUMBER, TEXT, YES_NO = pa.int64(), pa.float64(), pa.string(), pa.bool_()
TIME, NUMBERS, BITS = pa.timestamp("us", tz="UTC"), pa.list_(pa.float64()), pa.binary()


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredColumn:
    """One column of a table.

    `meaning`: its line in results/README.md. `reported`: whether the report reads it. `since`: the
    schema version that brought it; in files of earlier versions it is read as null.
    """

    name: str
    type: pa.DataType
    meaning: str
    reported: bool = True
    since: int = 1


def told(
    name: str, kind: pa.DataType, meaning: str, *, reported: bool = True, since: int = 1
) -> DeclaredColumn:
    """A column, declared."""
    return DeclaredColumn(name=name, type=kind, meaning=meaning, reported=reported, since=since)
