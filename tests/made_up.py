"""Results of pruning that are made up, so that what the report makes of them can be worked out."""

import io
import json
from datetime import UTC, datetime

import pyarrow.parquet as pq
from rich.console import Console

from harness.report.model import load_report
from harness.report.sections import sections
from harness.report.terminal import print_report
from harness.run.trials import specs
from harness.storage.schema import EpochRecord, identified
from harness.storage.store import Store

SUITE = "digits-pruning"
SAMPLES, DENSE, DEVICE = 10, 1000, "a CPU, 1 thread"
FLOPS = {"forward": 100, "dense": 200, "executed": 200, "overhead": 0}  # of one sample


def trials(methods, seeds="0-2", *settings, epochs=2):
    """Of the suite of pruned digits, by method and seed."""
    wanted = [f"recipe.epochs={epochs}", "recipe.scheduler.milestones=[1]", *settings]
    found = specs(SUITE, wanted, methods, seeds)
    return {(spec.method, spec.seed): spec for spec in found}


def removal(parameters, latency, **values):
    """A row of `removals` of a model of 1000 parameters; `values`: what is otherwise in it."""
    row = {
        "reason": None,
        "stuck": "[]",
        "neurons_dead": 10,
        "neurons_removed": 10,
        "parameters": parameters,
        "parameters_dense": DENSE,
        "forward_flops": 2 * parameters,
        "forward_flops_dense": 2 * DENSE,
        "file_bytes": 4 * parameters + 400,
        "file_bytes_dense": 4 * DENSE + 400,
        "difference": 2e-6,
        "difference_float64": 3e-15,
        "batch": 50,
        "device": DEVICE,
        "trials_on_device": 1,
        "other_load": 0.0,
        "code": "a commit",
        "updated": datetime.now(UTC),
    }
    for name, ratio in (("one", None if latency is None else 1.1 * latency), ("batch", latency)):
        times = {"": ratio, "_low": ratio and 0.9 * ratio, "_high": ratio and 1.2 * ratio}
        row |= {f"latency_{name}{end}": value for end, value in times.items()}
        row |= {f"seconds_{name}": ratio and 1e-3 * ratio, f"seconds_{name}_dense": 1e-3}
    return row | values


def untraced(dead, latency, **values):
    """A row of a model that could not be traced: it is as it was."""
    why = "torch-pruning can't trace the model: no graph"
    nothing = dict.fromkeys(("difference", "difference_float64"))
    stuck = json.dumps([{"layer": "conv1", "neurons": dead, "reason": why}])
    counts = {"neurons_dead": dead, "neurons_removed": 0}
    return removal(DENSE, latency, reason=why, stuck=stuck, **nothing, **counts, **values)


def keep(spec, root, metric, *, epochs=2, measures=None, layers=None, removal=None, **flops):
    """The tables of one trial.

    `measures`: by name the value after the last epoch, or a list of all epochs'; `layers`: the
    same by layer and name.
    """
    named = {(None, name): value for name, value in (measures or {}).items()} | (layers or {})
    recorded = [
        {"epoch": epoch, "layer": layer, "name": name, "value": value}
        for (layer, name), values in named.items()
        for epoch, value in _by_epoch(values, epochs)
    ]
    each = FLOPS | flops
    rows = [
        EpochRecord.of(
            {
                "epoch": epoch,
                "samples": SAMPLES,
                "lr": 0.1,
                "test_metric": metric - 0.02 * (epochs - 1 - epoch),
                "frozen_neurons": 0,
                "total_neurons": 100,
                "forward_flops": SAMPLES * each["forward"],
                **{
                    f"backward_flops_{name}": SAMPLES * each["dense"]
                    for name in ("dense", "paper", "required")
                },
                "backward_flops_executed": SAMPLES * each["executed"],
                "overhead_flops": SAMPLES * each["overhead"],
                "seconds_train": 1.0,
                "seconds_equilibrium": 0.0,
                "effective_parameters": (measures or {}).get("parameters_left"),
            }
        ).row()
        for epoch in range(epochs)
    ]
    trial = done(spec, epochs, len(recorded))
    tables = {"trials": [trial], "epochs": rows, "layers": [], "measures": recorded}
    write(spec, root, tables | ({"removals": [removal]} if removal else {}))


def done(spec, epochs, measures):
    """The row of a finished trial with so many rows of measures."""
    return {
        "state": "done",
        "epochs": epochs,
        "epochs_done": epochs,
        "metric": "accuracy",
        "title": spec.suite.title,
        "experiment": json.dumps(spec.suite.experiment()),
        "parameters": spec.parameters,
        "data": "digits",
        "trials_on_device": 1,
        "cpu": "a CPU",
        "threads": 1,
        "versions": "{}",
        "measures": measures,
        "started": datetime.now(UTC),
    }


def write(spec, root, tables):
    """The rows of a trial's tables, by kind, as its files."""
    for kind, rows in tables.items():
        path = root / spec.suite.name / kind / f"{spec.key}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(identified(spec, rows, kind), path)


def _by_epoch(values, epochs):
    known = values if isinstance(values, list) else [*[None] * (epochs - 1), values]
    return [(e, v) for e, v in enumerate(known) if isinstance(values, list) or e == epochs - 1]


def report_of(root):
    return load_report([Store(root, SUITE)])


def sizes(left, neurons=60, effective=40):
    """What a pruner records of a model of 1000 parameters and 100 neurons."""
    return {
        "parameters": DENSE,
        "parameters_left": left,
        "neurons": 100,
        "neurons_left": neurons,
        "forward_flops_effective": effective,
    }


def row(report, label):
    (table,) = report.groups
    return next(each for each in table.methods if each.label == label)


def words(report, width):
    """The report as a terminal of that width shows it."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_report(sections(report), console)
    return console.file.getvalue()


def said(report, width=80):
    """The same without line ends."""
    return " ".join(words(report, width).split())
