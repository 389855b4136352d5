"""What a trial reports: one record per epoch, and the fixed schemas of the three tables."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from harness.errors import UserError, line
from harness.suite.config import TrialSpec

SCHEMA_VERSION = "2"
READABLE = {"1": {"energy_joules"}, SCHEMA_VERSION: set[str]()}  # with columns still missing there
REWRITTEN = "delete it and run the suite again: it is rewritten from its checkpoint"
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochRecord:
    """One epoch of one trial: a row of `epochs`. FLOPs are totals of the epoch; shares are 0 to 1;
    None is "not measured". Frozen counts and FLOPs are of the mask in force during the epoch.
    """

    epoch: int
    samples: int
    lr: float
    train_loss: float
    val_loss: float | None
    test_loss: float
    test_metric: float
    frozen_neurons: int
    total_neurons: int
    forward_flops: int
    backward_flops_dense: int
    backward_flops_paper: int
    backward_flops_required: int
    backward_flops_executed: int | None
    overhead_flops: int
    seconds_train: float
    seconds_equilibrium: float
    seconds_test: float
    seconds_checkpoint: float | None
    peak_memory_bytes: int | None
    energy_joules: float | None

    def row(self) -> dict[str, Any]:
        """As a row of the table."""
        return asdict(self)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Self:
        """From a row of the table."""
        values: dict[str, Any] = {name: row.get(name) for name in cls.__dataclass_fields__}
        return cls(**values)


_IDENTITY = [
    ("trial", pa.string()),
    ("group", pa.string()),
    ("suite", pa.string()),
    ("method", pa.string()),
    ("seed", pa.int64()),
]
_FLOPS = [
    ("forward_flops", pa.int64()),
    ("backward_flops_dense", pa.int64()),
    ("backward_flops_paper", pa.int64()),
    ("backward_flops_required", pa.int64()),
    ("backward_flops_executed", pa.int64()),
]


def _schema(columns: list[tuple[str, Any]]) -> pa.Schema:
    return pa.schema(_IDENTITY + columns, metadata={"neqbench.schema": SCHEMA_VERSION})


SCHEMAS: dict[str, pa.Schema] = {
    "trials": _schema(
        [
            ("state", pa.string()),
            ("reason", pa.string()),
            ("traceback", pa.string()),
            ("epochs", pa.int64()),
            ("epochs_done", pa.int64()),
            ("metric", pa.string()),
            ("title", pa.string()),
            ("experiment", pa.string()),
            ("parameters", pa.string()),
            ("data", pa.string()),
            ("data_fingerprint", pa.string()),
            ("attempts", pa.int64()),
            ("trials_on_device", pa.int64()),
            ("threads", pa.int64()),
            ("device", pa.string()),
            ("cpu", pa.string()),
            ("gpu", pa.string()),
            ("driver", pa.string()),
            ("git_sha", pa.string()),
            ("git_dirty", pa.bool_()),
            ("versions", pa.string()),
            ("started", pa.timestamp("us", tz="UTC")),
            ("updated", pa.timestamp("us", tz="UTC")),
        ]
    ),
    "epochs": _schema(
        [
            ("epoch", pa.int64()),
            ("samples", pa.int64()),
            ("lr", pa.float64()),
            ("train_loss", pa.float64()),
            ("val_loss", pa.float64()),
            ("test_loss", pa.float64()),
            ("test_metric", pa.float64()),
            ("frozen_neurons", pa.int64()),
            ("total_neurons", pa.int64()),
            *_FLOPS,
            ("overhead_flops", pa.int64()),
            ("seconds_train", pa.float64()),
            ("seconds_equilibrium", pa.float64()),
            ("seconds_test", pa.float64()),
            ("seconds_checkpoint", pa.float64()),
            ("peak_memory_bytes", pa.int64()),
            ("energy_joules", pa.float64()),
        ]
    ),
    "layers": _schema(
        [
            ("epoch", pa.int64()),
            ("layer", pa.string()),
            ("neurons", pa.int64()),
            ("frozen", pa.int64()),
            *_FLOPS,
            *((f"{name}_quantiles", pa.list_(pa.float64())) for name in ("phi", "delta_phi")),
            ("velocity_quantiles", pa.list_(pa.float64())),
        ]
    ),
}


def identified(spec: TrialSpec, rows: list[dict[str, Any]], kind: str) -> pa.Table:
    """`rows` as a table of `kind`, with the columns that say whose they are."""
    identity = {
        "trial": spec.key,
        "group": spec.group,
        "suite": spec.suite.name,
        "method": spec.method,
        "seed": spec.seed,
    }
    return pa.Table.from_pylist([identity | row for row in rows], schema=SCHEMAS[kind])


def to_bytes(table: pa.Table) -> bytes:
    """Arrow's own file format, to be kept inside a checkpoint."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes) -> pa.Table:
    """The inverse of `to_bytes`."""
    return pa.ipc.open_file(pa.py_buffer(data)).read_all()


def from_parquet(data: bytes, path: str, kind: str, columns: list[str] | None) -> pa.Table:
    """The rows in a file of one table; raises UserError for a damaged file and another version."""
    try:
        # From memory: by its path a file is opened twice, and may be replaced in between.
        file = pq.ParquetFile(pa.py_buffer(data))
        written = file.schema_arrow
        version = (written.metadata or {}).get(b"neqbench.schema", b"?").decode(errors="replace")
        missing = READABLE.get(version, set()) & set(SCHEMAS[kind].names)
        fitting = version in READABLE and written.equals(_without(SCHEMAS[kind], missing))
        names = columns or SCHEMAS[kind].names
        table = file.read([n for n in names if n in written.names], use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({line(error)[:100]}); {REWRITTEN}") from None
    if not fitting:
        raise UserError(
            f"{path}: schema version {version}, this neqbench reads version {SCHEMA_VERSION}; "
            "use the neqbench that wrote it, or another --results"
        )
    for name in missing.intersection(names):
        absent = pa.nulls(len(table), SCHEMAS[kind].field(name).type)
        table = table.append_column(SCHEMAS[kind].field(name), absent)
    return table.select(names)


def _without(schema: pa.Schema, names: set[str]) -> pa.Schema:
    return pa.schema([field for field in schema if field.name not in names])
