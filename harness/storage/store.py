"""The results of one suite, as anybody may read them.

`<root>/<suite>/{trials,epochs,layers,measures}/<trial>.parquet`, and beside them `checkpoints`,
`leases`, `plans` (what runs were asked for) and `tuning` (what was chosen by the clock for a kind
of machine). README.md beside this file says what a reader may assume.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from harness.errors import UserError
from harness.storage import leases
from harness.storage.commits import Commits
from harness.storage.locations import StorageError, open_location
from harness.storage.schema import SCHEMAS, from_parquet, mend


class NothingError(UserError):
    """There are no results."""


class Store:
    """The results of the suite called `suite` below `root`, a path or a URI."""

    def __init__(self, root: Path | str, suite: str) -> None:
        self.location, self.name = open_location(root, suite), suite

    def check_writable(self) -> None:
        """Raises UserError where results can't be written, before anything is computed."""
        name = f".writable.{leases.new_owner()}"
        try:
            self.location.write(name, b"")
            self.location.remove(name)
        except StorageError as error:
            raise UserError(
                f"results folder {self.location.uri} can't be written: {error}"
            ) from None

    def read(
        self,
        kind: str,
        columns: list[str] | None = None,
        but: Container[str] = (),
        only: Container[str] | None = None,
    ) -> pa.Table:
        """The rows of one table ("trials", "epochs", "layers", "measures") of all trials.

        `columns`: some of them (default: all); `but`: trials to leave out; `only`: trials to read.
        Raises UserError for damaged and newer files.
        """
        keys = [k for k in self._keys(kind) if k not in but and (only is None or k in only)]

        def one(key: str) -> pa.Table | None:
            return self._table(kind, key, columns)

        readers = self.location.readers
        with ThreadPoolExecutor(readers) as pool:
            found = (pool.map if readers > 1 else map)(one, keys)
            tables = [table for table in found if table is not None]
        if tables:
            return pa.concat_tables(tables)
        empty = SCHEMAS[kind].empty_table()  # which imports pandas
        return empty.select(columns or empty.column_names)

    def trial(self, key: str) -> dict[str, Any] | None:
        """The row of `trials` of one trial; None where it has none."""
        table = self._table("trials", key)
        return None if table is None else table.to_pylist()[0]

    def epochs(self, key: str) -> list[dict[str, Any]]:
        """The rows of `epochs` of one trial, as far as they are published."""
        table = self._table("epochs", key)
        return [] if table is None else table.to_pylist()

    def has_rows(self, trial: Mapping[str, Any]) -> bool:
        """Whether the files of a trial, a row of `trials`, are there: `epochs`, `layers`, and
        `measures` where it has any.
        """
        return all(self.location.read(f"{k}/{trial['trial']}.parquet") for k in _kinds(trial))

    def with_rows(self, trials: Iterable[Mapping[str, Any]]) -> set[str]:
        """Those of the trials, rows of `trials`, whose files are there, as `has_rows` says."""
        known = {kind: set(self._keys(kind)) for kind in ("epochs", "layers", "measures")}
        return {t["trial"] for t in trials if all(t["trial"] in known[k] for k in _kinds(t))}

    def load_checkpoint(
        self, key: str, report: Callable[[str], None] = lambda path: None
    ) -> dict[str, Any] | None:
        """The state of a trial's last commit that is whole, as `Commits.load` gives it."""
        return Commits(self.location, key).load(report)

    def _keys(self, kind: str) -> list[str]:
        names = self.location.names(kind)
        return [name.removesuffix(".parquet") for name in names if name.endswith(".parquet")]

    def _table(self, kind: str, key: str, columns: list[str] | None = None) -> pa.Table | None:
        name = f"{kind}/{key}.parquet"
        data, path = self.location.read(name), self.location.path(name)
        if data is None:
            return None
        table = from_parquet(data, path, kind, columns)
        whose = set(table["trial"].unique().to_pylist())
        if whose - {key} or (kind == "trials" and len(table) != 1):
            raise UserError(f"{path} holds rows of {whose or 'nobody'}; {mend(kind)}")
        return table


def _kinds(trial: Mapping[str, Any]) -> list[str]:
    return ["epochs", "layers", *(["measures"] if trial["measures"] else [])]


def find_stores(where: str, root: str) -> list[Store]:
    """The results that a user means by `where`.

    That is a suite's name (below `root`), a results root (then all suites in it), or the results of
    one suite. Raises NothingError where there are none.
    """
    inside = [] if "://" in where else [f"{root.rstrip('/')}/{where}"]
    for uri in (*inside, where):
        if _is_suite(uri):
            return [Store(*_split(uri))]
        below = [name for name in open_location(uri).names("") if _is_suite(f"{uri}/{name}")]
        if below:
            return [Store(uri, name) for name in below]
    raise NothingError(
        f"no results for {where!r} below {root!r}: run `neqbench run {where}` first, or name the "
        "folder that holds them"
    )


def _is_suite(uri: str) -> bool:
    return not {"trials", "plans"}.isdisjoint(open_location(uri).names(""))


def _split(uri: str) -> tuple[str, str]:
    parent, _, name = open_location(uri).uri.rpartition("/")
    return parent or "/", name
