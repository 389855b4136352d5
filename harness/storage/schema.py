"""The tables of results, and the record of one epoch.

A column is declared once, here, with its type, its meaning and who reads it. The Arrow schemas, the
fields of `EpochRecord`, what the report reads and the tables of results/README.md follow from that.
To add one to `epochs`: declare it with the next `since`, raise VERSION, give its value in
`train.trial`, and put its line into results/README.md, which a test holds against this file.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import UserError, one_line
from harness.storage.after_columns import AFTERWARDS
from harness.storage.columns import (
    BITS,
    INTEGER,
    NUMBER,
    NUMBERS,
    TEXT,
    TIME,
    YES_NO,
    DeclaredColumn,
    told,
)
from harness.suite.config import TrialSpec

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 6  # raise with every column that is added
SCHEMA_VERSION = str(VERSION)
REWRITTEN = "delete it and run the suite again: it is rewritten from its checkpoint"
REMEASURED = "delete it and run the suite again: it is measured anew"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)

_ARROW = {int: INTEGER, float: NUMBER, int | None: INTEGER, float | None: NUMBER, str | None: TEXT}


def _column(meaning: str, *, reported: bool = True, since: int = 1, by_layer: bool = False) -> Any:
    """A field of EpochRecord, declared as a column; `by_layer`: `layers` has it, too."""
    told = {"meaning": meaning, "reported": reported, "since": since}
    return field(metadata={"column": told, "by_layer": by_layer})


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One epoch of one trial, a row of `epochs`.

    FLOPs are totals of the epoch, shares lie between 0 and 1, and None means "not measured". Frozen
    counts and FLOPs are those of the mask in force during the epoch.
    """

    epoch: int = _column("number of the epoch, from 0")
    samples: int = _column("samples trained on")
    lr: float = _column("learning rate of the first parameter group at the start of the epoch")
    train_loss: float = _column("mean loss over the training samples")
    val_loss: float | None = _column("mean loss over the validation samples", reported=False)
    test_loss: float = _column("mean loss over the test samples")
    test_metric: float = _column("what `metric` of `trials` names, a share from 0 to 1")
    frozen_neurons: int = _column("neurons frozen during the epoch")
    total_neurons: int = _column("all neurons of the model")
    forward_flops: int = _column("FLOPs of the training forwards", by_layer=True)
    backward_flops_dense: int = _column(
        "of the backwards with nothing frozen: weight and input gradients, what is recomputed",
        by_layer=True,
    )
    backward_flops_paper: int = _column(
        "of the backwards by the published convention", by_layer=True
    )
    backward_flops_required: int = _column(
        "the least that exact backwards can do with this mask", by_layer=True
    )
    backward_flops_executed: int | None = _column(
        "what the kernels of the plan in force really did", by_layer=True
    )
    overhead_flops: int = _column("FLOPs of deciding: evaluations, and whatever a method adds")
    seconds_train: float = _column("seconds of training, by the first worker's clock")
    seconds_equilibrium: float = _column("seconds of deciding")
    seconds_test: float = _column("seconds of validation and test", reported=False)
    seconds_checkpoint: float | None = _column("seconds of the commit", reported=False)
    peak_memory_bytes: int | None = _column(
        "peak memory of the GPU, of the worker that needed most; null on a CPU"
    )
    energy_joules: float | None = _column(
        "energy of training and deciding, of all GPUs of the trial by their own counters; null on "
        "a CPU, on a GPU that trials share, and without `neqbench[energy]`",
        since=2,
    )
    effective_parameters: int | None = _column(
        "parameters that are left, of a method that prunes; null for others", since=3
    )
    other_load: float | None = _column(
        "what else the device did meanwhile: CPUs that other processes kept busy, on average over "
        "the epoch; on a GPU, how many other processes had memory there",
        since=3,
    )
    code: str | None = _column(
        "commit that computed the epoch, with + where it had uncommitted changes; the version "
        "where neqbench was installed",
        reported=False,
        since=3,
    )
    fixed_neurons: int | None = _column(
        "neurons whose layers the model keeps from training (`requires_grad=False`): they are not "
        "frozen, whatever the method says",
        since=6,
    )

    def row(self) -> dict[str, Any]:
        """The record as a row of the table: column name → value."""
        return asdict(self)

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Self:
        """The record in a row of the table; columns of no epoch are passed over."""
        values: dict[str, Any] = {name: row.get(name) for name in cls.__dataclass_fields__}
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a trial could not be finished, in a line, and the traceback where there is one."""

    reason: str
    traceback: str


def flops_columns(flops: Mapping[str, int | None]) -> dict[str, Any]:
    """FLOPs by name ("forward", "backward_dense", …, "overhead") → by column of `epochs` and
    `layers`.
    """
    return {
        name.replace("backward", "backward_flops")
        if name.startswith("backward")
        else f"{name}_flops": value
        for name, value in flops.items()
    }


def quantiles(values: "Tensor") -> list[float] | None:
    """At QUANTILES, of the values that are defined; None where none is."""
    import torch

    defined = values[~values.isnan()]
    if not len(defined):
        return None
    at = torch.tensor(QUANTILES, dtype=defined.dtype, device=defined.device)
    return [float(q) for q in torch.quantile(defined, at)]


def _of_record(*, by_layer: bool) -> Iterable[DeclaredColumn]:
    """The columns that EpochRecord declares: all, or those that `layers` has as well."""
    for each in fields(EpochRecord):
        if each.metadata["by_layer"] or not by_layer:
            yield DeclaredColumn(
                name=each.name,
                type=_ARROW[each.type],  # type: ignore[index]
                **each.metadata["column"],
            )


IDENTITY = (
    told("trial", TEXT, "hash of all that defines the trial"),
    told("group", TEXT, "hash of the same without method and seed: what may stand in one table"),
    told("suite", TEXT, "name of the suite", reported=False),
    told("method", TEXT, "name of the method in the suite", reported=False),
    told("seed", INTEGER, "seed of all random streams", reported=False),
)
COLUMNS: dict[str, tuple[DeclaredColumn, ...]] = {
    "trials": (
        told("state", TEXT, "running, done or failed"),
        told("reason", TEXT, "why it failed, in a line"),
        told("traceback", TEXT, "where it failed", reported=False),
        told("epochs", INTEGER, "epochs of the recipe"),
        told("epochs_done", INTEGER, "epochs committed"),
        told("metric", TEXT, "what `test_metric` of `epochs` measures"),
        told("title", TEXT, "the suite's title"),
        told(
            "experiment",
            TEXT,
            "JSON: recipe, model, data and `world_size`, the number of workers that shared each "
            "batch (BatchNorm saw `recipe.forward_batch` samples at a time, by default "
            "`batch_size` / `world_size`); `data.synthetic`: whether it was trained on noise",
        ),
        told("parameters", TEXT, "JSON: the method's parameters"),
        told("data", TEXT, "name of the data"),
        told("data_fingerprint", TEXT, "hash of counts, labels and some decoded samples"),
        told("attempts", INTEGER, "how often the trial was begun or gone on with"),
        told(
            "trials_on_device",
            INTEGER,
            "trials that shared the CPU or GPU, of this run and of others: above 1, seconds are no "
            "measurement",
        ),
        told("threads", INTEGER, "threads of torch on the CPU"),
        told("device", TEXT, "cpu or cuda"),
        told("cpu", TEXT, 'model of the CPU (several, with "; " between, where attempts differ)'),
        told("gpu", TEXT, "model of the GPU, likewise"),
        told("driver", TEXT, "version of the GPU's driver, likewise", reported=False),
        told(
            "git_sha",
            TEXT,
            'commit of the code that computed epochs (several with "; " between; `code` of '
            "`epochs` says which); the version where neqbench was installed",
        ),
        told("git_dirty", YES_NO, "whether any of that had uncommitted changes"),
        told("versions", TEXT, "JSON: versions of Python and packages"),
        told("measures", INTEGER, "rows of the trial in `measures`", reported=False, since=3),
        told("started", TIME, "when the first attempt began"),
        told("updated", TIME, "when this row was written"),
    ),
    "epochs": tuple(_of_record(by_layer=False)),
    "layers": (
        told("epoch", INTEGER, "number of the epoch, from 0"),
        told("layer", TEXT, "name of the layer's module"),
        told("neurons", INTEGER, "neurons of the layer"),
        told("frozen", INTEGER, "how many of them were frozen during the epoch"),
        *_of_record(by_layer=True),
        told("phi_quantiles", NUMBERS, "quantiles 0, 5, 25, 50, 75, 95, 100 % of phi"),
        told("delta_phi_quantiles", NUMBERS, "the same of delta-phi"),
        told("velocity_quantiles", NUMBERS, "the same of the velocity"),
        told(
            "mask",
            BITS,
            "of a convolution with groups, some of whose neurons were frozen: which, a bit for "
            "each (`numpy.packbits`); null where `frozen` tells enough",
            reported=False,
            since=4,
        ),
    ),
    "measures": (
        told("epoch", INTEGER, "number of the epoch, from 0"),
        told("layer", TEXT, "name of the layer's module; null: the whole model"),
        told("name", TEXT, "what was recorded"),
        told("value", NUMBER, "its value after the epoch; null where it is not finite"),
    ),
    **AFTERWARDS,
}
SCHEMAS: dict[str, pa.Schema] = {
    kind: pa.schema(
        [(column.name, column.type) for column in (*IDENTITY, *columns)],
        metadata={"neqbench.schema": SCHEMA_VERSION},
    )
    for kind, columns in COLUMNS.items()
}
READABLE = tuple(str(version) for version in range(1, VERSION + 1))


def reported(kind: str) -> list[str]:
    """Names of the columns of a table that the report reads."""
    whose = [column.name for column in IDENTITY if column.reported or kind == "trials"]
    return whose + [column.name for column in COLUMNS[kind] if column.reported]


def identified(spec: TrialSpec, rows: list[dict[str, Any]], kind: str) -> pa.Table:
    """`rows` as a table of `kind` ("trials", "epochs", …), with whose they are in front."""
    identity = {
        "trial": spec.key,
        "group": spec.group,
        "suite": spec.suite.name,
        "method": spec.method,
        "seed": spec.seed,
    }
    return pa.Table.from_pylist([identity | row for row in rows], schema=SCHEMAS[kind])


def mend(kind: str) -> str:
    """What to do with a file of a table that makes no sense."""
    return REMEASURED if kind in AFTERWARDS else REWRITTEN


def from_parquet(data: bytes, path: str, kind: str, columns: list[str] | None) -> pa.Table:
    """The table of `kind` in the bytes of a parquet file, or some of its columns.

    Columns that are newer than the file are null. Raises UserError, naming `path`, for a damaged
    file and for one of another version.
    """
    try:
        # From memory: by its path a file is opened twice, and may be replaced in between.
        file = pq.ParquetFile(pa.py_buffer(data))
        written = file.schema_arrow
        version = (written.metadata or {}).get(b"neqbench.schema", b"?").decode(errors="replace")
        missing = _newer_than(version, kind)
        fitting = version in READABLE and written.equals(_without(SCHEMAS[kind], missing))
        names = columns or SCHEMAS[kind].names
        table = file.read([n for n in names if n in written.names], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)[:100]}); {mend(kind)}") from None
    if not fitting:
        raise UserError(
            f"{path}: schema version {version}, this neqbench reads version {SCHEMA_VERSION}; "
            "use the neqbench that wrote it, or another --results"
        )
    return with_newer_columns(table, kind, names)


def with_newer_columns(table: pa.Table, kind: str, names: list[str] | None = None) -> pa.Table:
    """`table` of an earlier version with the columns called `names` (default: all of today's).

    Those that it does not have are null.
    """
    names = names or SCHEMAS[kind].names
    for name in names:
        if name not in table.column_names:
            absent = pa.nulls(len(table), SCHEMAS[kind].field(name).type)
            table = table.append_column(SCHEMAS[kind].field(name), absent)
    return table.select(names).replace_schema_metadata(SCHEMAS[kind].metadata)


def _newer_than(version: str, kind: str) -> set[str]:
    if version not in READABLE:
        return set()
    columns = (*IDENTITY, *COLUMNS[kind])
    return {column.name for column in columns if column.since > int(version)}


def _without(schema: pa.Schema, names: set[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in names])
