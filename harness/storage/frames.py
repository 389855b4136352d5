"""What is stored, as data frames: of one results folder, or of several taken together."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

import pandas as pd
import pyarrow as pa

from harness.storage.requests import Plan
from harness.storage.store import Store, stores


@dataclass(kw_only=True)
class Results:
    """`trials` and `epochs`, with the columns of results/README.md, each trial once; `plans`: what
    was asked for, the oldest first; `twice`: trials that lie in several folders, of which the one
    that is done, or further on, is taken.
    """

    trials: pd.DataFrame
    epochs: pd.DataFrame
    plans: list[Plan] = field(default_factory=list)
    twice: dict[str, list[str]] = field(default_factory=dict)
    _origins: list[tuple[Store, set[str]]] = field(default_factory=list)

    @property
    def layers(self) -> pd.DataFrame:
        """All rows of `layers`, read when asked for: many."""
        return self.layers_of(None)

    def layers_of(self, trials: Container[str] | None) -> pd.DataFrame:
        """Those of some trials."""
        tables = [
            store.read("layers", only=keys if trials is None else {k for k in keys if k in trials})
            for store, keys in self._origins
        ]
        layers: pd.DataFrame = pa.concat_tables(tables).to_pandas()
        return layers


def load_results(*where: str, root: str = "results") -> Results:
    """Results as data frames; several folders are taken together.

    `where`: as for `neqbench report`, a suite's name (below `root`), a results root, or one suite's
    results; default: all below `root`. Raises harness.errors.UserError where there are none, or
    where they are damaged.
    """
    return read(found(where or (root,), root))


def found(where: Iterable[str], root: str) -> list[Store]:
    """The stores meant, each once; raises NothingError."""
    known = {store.place.uri: store for each in where for store in stores(each, root)}
    return list(known.values())


def read(
    found: Iterable[Store],
    trial_columns: list[str] | None = None,
    epoch_columns: list[str] | None = None,
) -> Results:
    """All rows of these stores; of a trial in several, those of the one that went furthest."""
    found = list(found)
    tables = [store.read("trials", trial_columns).to_pandas() for store in found]
    trials = pd.concat(
        [table.assign(results=store.place.uri) for store, table in zip(found, tables, strict=True)],
        ignore_index=True,
    )
    trials["_done"] = trials["state"] == "done"
    order = trials.sort_values(["_done", "epochs_done"], ascending=False, kind="stable")
    order = order.drop(columns="_done")
    kept = order[~order["trial"].duplicated()].sort_values("started", kind="stable")
    several = order[order["trial"].duplicated(keep=False)].groupby("trial")["results"]
    origins = [
        (store, set(kept.loc[kept["results"] == store.place.uri, "trial"])) for store in found
    ]
    epochs = pa.concat_tables(
        [store.read("epochs", epoch_columns, only=keys) for store, keys in origins]
    )
    return Results(
        trials=kept.reset_index(drop=True),
        epochs=epochs.to_pandas(categories=["trial", "group"]),
        plans=sorted((p for store in found for p in store.plans()), key=lambda p: p.written),
        twice={str(trial): list(uris) for trial, uris in several},
        _origins=origins,
    )
