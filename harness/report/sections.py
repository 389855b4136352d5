"""The report as sections: for each group its facts, tables and notes, in all forms alike."""

from collections import Counter
from itertools import groupby
from typing import Any

from harness.report import views
from harness.report.answers import answers
from harness.report.beside_view import beside_tables
from harness.report.curves import Sweep, sweep_of, sweeps
from harness.report.grouped import groups_table
from harness.report.measures_view import measures, shown
from harness.report.model import GroupTable, NotBegun, Report
from harness.report.paper_view import against_paper
from harness.report.pruning_view import pruned
from harness.report.removed_view import removed
from harness.report.savings_view import savings
from harness.report.tables import Section
from harness.report.words import arguments, as_text, counted, listed
from harness.suite.config import forward_size


def sections(report: Report) -> list[Section]:
    """A section for each group, after the groups of a sweep one for all of them, and one for each
    group that is not begun.
    """
    found = []
    for _, mine in groupby(report.groups, key=lambda table: table.suite):
        groups = list(mine)
        points = Counter(table.point for table in groups)
        found += [_section(table, named=points[table.point] == 1) for table in groups]
        found += [_sweep(sweep) for sweep in sweeps(groups)]
    return found + [_not_begun(group) for group in report.not_begun]


def _sweep(sweep: Sweep) -> Section:
    point, first = sweep[0]
    swept = ", ".join(path.rpartition(".")[2] for path in point)
    return Section(
        suite=first.suite,
        title=f"{first.suite}: all points of {swept}",
        group=sweep_of(sweep),
        tables=[views.sweep(sweep)],
    )


def _not_begun(group: NotBegun) -> Section:
    point = f" ({group.point})" if group.point else ""
    return Section(
        suite=group.suite,
        title=f"{group.suite}{point}",
        group=group.group,
        tables=[],
        alerts=[("Not begun", line) for line in group.missing],
    )


def _section(table: GroupTable, *, named: bool) -> Section:
    """`named`: its point says enough of what tells it from the others."""
    made = []
    if any(row.n for row in table.methods):
        made = [views.accuracy(table), savings(table)]
        made += [views.by_phase(table)] if len(table.methods) > 1 and table.phases else []
        shorter = any(row.shorter_baseline.stopped_epochs for row in table.methods)
        made += [views.shorter_baseline(table)] if shorter else []
    made += [groups_table(table.grouped, table.metric)] if table.grouped else []
    made += [pruned(table)] if any(row.prunes for row in table.methods) else []
    made += [removed(table)] if any(row.removed.removed_n for row in table.methods) else []
    made += beside_tables(table)
    made += [measures(table)] if any(shown(row, table) for row in table.methods) else []
    made += [against_paper(table)] if made and table.published else []
    alerts = [("Not begun", line) for line in table.missing]
    alerts += [("Unfinished", line) for line in table.unfinished]
    alerts += [("Failed", line) for line in table.failed]
    alerts += [("Several code versions, of the same numerics", line) for line in table.commits]
    notes = [*([] if made else ["No trial is finished yet."]), *table.notes]
    point = f" ({table.point})" if table.point else ""
    return Section(
        suite=table.suite,
        title=f"{table.suite}{point}: {table.title}",
        group=table.group,
        facts=_facts(table, named=named),
        answers=answers(table),
        details=_details(table),
        tables=made,
        notes=notes,
        alerts=alerts,
    )


def _facts(table: GroupTable, *, named: bool) -> list[str]:
    recipe = table.recipe
    used = f" ({recipe['train_size']} images)" if recipe["train_size"] else ""
    facts = [
        f"{table.data}{used} · {counted(table.epochs, 'epoch')} · {_batch(recipe)} · "
        f"{recipe['precision']} · group {table.group}"
    ]
    if table.apart and not (table.point and named):
        differs = ", ".join(f"{path} {as_text(value)}" for path, value in table.apart.items())
        facts.append(f"Stands apart from the suite's other groups by {differs}")
    return facts


def _details(table: GroupTable) -> list[str]:
    classes = [table.recipe[part] for part in ("optimizer", "scheduler") if table.recipe[part]]
    details = [
        " · ".join(f"{part['name']} {listed(arguments(part))}" for part in classes),
        ", ".join(table.devices),
    ]
    for row in table.methods:
        known = row.parameters.items()
        parameters = {k: v for k, v in known if k != "kind" and v is not None}
        if parameters:
            details.append(f"{row.label}: {listed(parameters)}")
    return details


def _batch(recipe: dict[str, Any]) -> str:
    """What the batch is of, where BatchNorm does not see all of it at once."""
    size, workers = recipe["batch_size"], recipe["workers"]
    forward = forward_size(size, recipe.get("forward_batch"), workers)
    if forward == size:
        return f"batch {size}"
    by = f" on {workers} workers" if workers > 1 else ""
    return f"batch {size}{by}, {forward} per forward and BatchNorm"
