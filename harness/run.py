"""`neqbench run`: check, execute what is not done, report."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from harness.config import TrialSpec
from harness.plan import check, specs, states
from harness.storage import Store


def run(
    name: str,
    settings: Sequence[str],
    *,
    methods: str | None,
    seeds: str | None,
    root: str,
    executor: str,
    address: str | None,
    retry_failed: bool,
    console: Console,
) -> int:
    """Run the suite and print its report; returns the number of failed trials.

    Raises UserError for anything that is wrong before the first trial.
    """
    root = str(Path(root).absolute())
    trials = specs(name, settings, methods, seeds)
    store = Store(root, trials[0].suite.name)
    store.check_writable()
    planned = states(trials, root)
    todo = [
        p
        for p in planned
        if p.state in ("to do", "partial") or (retry_failed and p.state == "failed")
    ]
    failed = len([p for p in planned if p.state == "failed" and p not in todo])
    if todo:
        check(trials)
        done = len(planned) - len(todo) - failed
        failed += _execute([p.spec for p in todo], done, root, executor, address, console)
    _report(store, trials, console)
    return failed


def _execute(
    todo: list[TrialSpec],
    done: int,
    root: str,
    executor: str,
    address: str | None,
    console: Console,
) -> int:
    from harness.executors import Executor, Inline, Ray
    from harness.progress import Progress

    runner: Executor = Inline() if executor == "inline" else Ray(address)
    with (
        Progress(console, done, len(todo)) as progress,
        contextlib.closing(runner.run(todo, root)) as events,
    ):
        for spec, event in events:
            progress.follow(spec, event)
    return len(progress.failures)


def _report(store: Store, trials: list[TrialSpec], console: Console) -> None:
    from harness.report import model, terminal

    groups = {trial.group for trial in trials}
    tables = [table for table in model.load([store.folder]) if table.group in groups]
    terminal.show(tables, console)
