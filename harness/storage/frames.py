"""What is stored, as data frames: of one results folder, or of several taken together."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import pandas as pd
import pyarrow as pa

from harness.storage.requests import Request, read_requests
from harness.storage.store import Store, find_stores


@dataclass(kw_only=True)
class Results:
    """Results as data frames, each trial once, with the columns of results/README.md.

    `trials` has one more: `results`, the folder that a trial was taken from. `requests`: what runs
    were asked for, the oldest first. `twice`: trials that lie in several folders → those folders;
    the copy that is done, or furthest on, is taken.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    requests: list[Request] = field(default_factory=list)
    twice: dict[str, list[str]] = field(default_factory=dict)
    _origins: list[tuple[Store, set[str]]] = field(default_factory=list)

    @property
    def layers(self) -> pd.DataFrame:
        """All rows of `layers`, one for each epoch and layer; read when asked for, since they are
        many.
        """
        return self.layers_of(None)

    @property
    def measures(self) -> pd.DataFrame:
        """All rows of `measures`, what methods have recorded themselves; read when asked for."""
        return self._rows("measures", None)

    @property
    def replays(self) -> pd.DataFrame:
        """All rows of `replays`, one for each trial whose masks were timed; read when asked for."""
        return self._rows("replays", None)

    @property
    def removals(self) -> pd.DataFrame:
        """All rows of `removals`, one for each trial of what prunes whose dead neurons were
        removed; read when asked for.
        """
        return self._rows("removals", None)

    def removals_of(self, trials: Container[str]) -> pd.DataFrame:
        """The rows of `removals` of these trials."""
        return self._rows("removals", trials)

    def replays_of(self, trials: Container[str]) -> pd.DataFrame:
        """The rows of `replays` of these trials."""
        return self._rows("replays", trials)

    def measures_of(self, trials: Container[str]) -> pd.DataFrame:
        """The rows of `measures` of these trials."""
        return self._rows("measures", trials)

    def layers_of(self, trials: Container[str] | None) -> pd.DataFrame:
        """The rows of `layers` of these trials; None: of all."""
        return self._rows("layers", trials)

    def _rows(self, kind: str, trials: Container[str] | None) -> pd.DataFrame:
        tables = [
            store.read(kind, only=keys if trials is None else {k for k in keys if k in trials})
            for store, keys in self._origins
        ]
        rows: pd.DataFrame = pa.concat_tables(tables).to_pandas()
        return rows


def load_results(*where: str, root: str = "results") -> Results:
    """Results as data frames; several folders are taken together.

    `where`: as for `neqbench report`, a suite's name (below `root`), a results root, or one suite's
    results; default: all below `root`. Raises harness.errors.UserError where there are none, or
    where they are damaged.
    """
    return read_results(stores_named(where or (root,), root))


def stores_named(where: Iterable[str], root: str) -> list[Store]:
    """The stores that `find_stores` finds for each name, each once; raises NothingError."""
    known = {store.location.uri: store for each in where for store in find_stores(each, root)}
    return list(known.values())


def read_results(
    found: Iterable[Store],
    trial_columns: list[str] | None = None,
    epoch_columns: list[str] | None = None,
) -> Results:
    """All rows of these stores; of a trial in several, those of the one that went furthest.

    `trial_columns`, `epoch_columns`: names of columns to read (default: all).
    """
    found = list(found)
    tables = [store.read("trials", trial_columns).to_pandas() for store in found]
    trials = pd.concat(
        [
            table.assign(results=store.location.uri)
            for store, table in zip(found, tables, strict=True)
        ],
        ignore_index=True,
    )
    trials["_done"] = trials["state"] == "done"
    order = trials.sort_values(["_done", "epochs_done"], ascending=False, kind="stable")
    order = order.drop(columns="_done")
    kept = order[~order["trial"].duplicated()].sort_values("started", kind="stable")
    several = order[order["trial"].duplicated(keep=False)].groupby("trial")["results"]
    origins = [
        (store, set(kept.loc[kept["results"] == store.location.uri, "trial"])) for store in found
    ]
    epochs = pa.concat_tables(
        [store.read("epochs", epoch_columns, only=keys) for store, keys in origins]
    )
    return Results(
        trials=kept.reset_index(drop=True),
        epochs=epochs.to_pandas(categories=["trial", "group"]),
        requests=sorted(
            (r for store in found for r in read_requests(store.location)), key=lambda r: r.written
        ),
        twice={str(trial): list(uris) for trial, uris in several},
        _origins=origins,
    )
