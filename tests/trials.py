"""Small real trials for the tests: a few epochs of the digits suite, or of a suite of one's own."""

import io
import signal
import time
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from harness.report import model, terminal
from harness.report.sections import sections
from harness.run.attempt import attempt
from harness.run.executors import Ray
from harness.run.trials import specs
from harness.storage.provenance import Slot
from harness.storage.requests import Request, keep_request
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite import parts
from harness.train import tuning

NARROW = [  # digits' own model, half as wide: four times as fast
    "model.build=suites.resnet:ResNet",
    "model.arguments={blocks=1, width=8, channels=1, classes=10}",
]
WIDE = ["model.build=suites.resnet:resnet8", "model.arguments={}"]  # as it is
SMALL = [
    "data.train_size=230",
    "data.validation_size=20",
    "recipe.epochs=5",
    "recipe.batch_size=40",
    "recipe.scheduler.milestones=[2, 4]",
    "methods.neq.eps=0.01",
    "methods.freeze_after.epoch=2",
    "methods.neq-cut.eps=0.01",
    "methods.neq-reference={kind='neq', eps=0.01, recursion='reference', similarity='sample'}",
    *NARROW,
]
METHODS = ["baseline", "neq", "neq-reference", "random", "smallest_velocity", "freeze_after"]
# Or newer than rows that were written before.
MEASURED = {"peak_memory_bytes", "energy_joules", "other_load", "code", "fixed_neurons"}
SLOT = Slot(gpu=False, sharing=1)
PATIENCE = 600  # seconds for another process, unless it hangs: a busy machine is no failure


def slow(*values):
    """Of a parametrized test, what `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def wait_for(happens):
    """Until it does; files and servers that it asks may not be there yet."""
    end = time.monotonic() + PATIENCE
    while True:
        with suppress(OSError):
            if happens():
                return
        assert time.monotonic() < end
        time.sleep(0.05)


def small(method, *settings, seed=0, suite="digits"):
    """One trial of digits, or of another suite with its own model."""
    first = [setting for setting in SMALL if suite == "digits" or setting not in NARROW]
    (spec,) = specs(suite, [*first, *settings], method, str(seed))
    return spec


def toy(toys, method, *settings, seed=0):
    """One trial of the suite in the folder of the fixture `toys`."""
    (spec,) = specs(str(toys), settings, method, str(seed))
    return spec


def run_by_ray_in_two_goes(chosen, root):
    """Broken off after three records, then finished; none fails."""
    events = Ray().run(chosen, str(root))
    seen = (event for _, event in events if isinstance(event, EpochRecord))
    assert [next(seen).epoch for _ in range(3)]
    events.close()
    done = [event for _, event in Ray().run(chosen, str(root))]
    assert not [event for event in done if isinstance(event, Failure)]


def keep_tuning(spec, root):
    """Nothing is left to the clock: every root gets the same choices, and none is measured."""
    suite, chosen = spec.trained_suite, tuning.Tuning()
    with patch.object(tuning, "tune", lambda *_: chosen), torch.random.fork_rng():
        model = parts.build_model(suite.model.build, spec.folder, suite.model.arguments)
        threads = torch.get_num_threads()
        torch.set_num_threads(suite.resources.cpus)
        tuning.tuning_for(Store(root, suite.name).location, suite, model)
        torch.set_num_threads(threads)


def run(spec, root, epochs=None):
    """The trial's events; stopped from outside after `epochs` records."""
    keep_tuning(spec, root)
    seen = []
    events = attempt(spec, str(root), SLOT)
    for event in events:
        seen.append(event)
        if epochs is not None and len(seen) == epochs + 1:
            events.close()
            break
    return seen


def ask(store, trials):
    """As a run does before it begins."""
    asked = [(t.key, t.method, t.seed) for t in trials]
    keep_request(store.location, Request.of(trials[0], asked))


def altered(root, key, kind, column, value):
    """With another value in every row of one trial's column."""
    path = Path(root) / "digits" / kind / f"{key}.parquet"
    table = pq.read_table(path)
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(place, field, pa.array([value] * len(table), field.type)), path)


def percent(share):
    return f"{100 * share:.1f}".replace("-", "−")


def render(tables, width):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    report = model.Report(groups=tables, not_begun=[], done={}, results=None)
    terminal.print_report(sections(report), console)
    return console.file.getvalue()


def row_of(table, method):
    return next(row for row in table.methods if row.method == method)


def results(spec, root):
    """(checkpoint, epochs table, layers table): all but what is measured."""
    store = Store(root, spec.suite.name)
    checkpoint = store.load_checkpoint(spec.key)
    del checkpoint["rows"]
    tables = []
    for kind in ("epochs", "layers"):
        table = pq.read_table(Path(root) / store.name / kind / f"{spec.key}.parquet")
        names = table.column_names
        measured = [c for c in names if c.startswith("seconds_") or c in MEASURED]
        tables.append(table.drop_columns(measured))
    return checkpoint, *tables


def heed_ctrl_c():
    """For new processes: in a shell's background it is ignored, and they would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def same(a, b):
    """Equal to the bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_same_results(spec, root, other):
    ours, theirs = results(spec, root), results(spec, other)
    assert same(ours[0], theirs[0])
    for one, two in zip(ours[1:], theirs[1:], strict=True):
        assert one.equals(two)
        assert len(one) > 0
