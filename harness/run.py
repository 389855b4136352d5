"""`neqbench run`: check, execute what is not done, report."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from harness import parallel
from harness.check import check
from harness.config import TrialSpec
from harness.errors import UserError
from harness.executors import Executor, Inline, Ray
from harness.plan import specs, states
from harness.progress import Progress
from harness.storage import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the command line asks for."""

    suite: str
    settings: Sequence[str]
    methods: str | None
    seeds: str | None
    synthetic: bool
    root: str
    executor: str
    address: str | None
    retry_failed: bool


def run(wanted: Wanted, console: Console) -> int:
    """Run the suite and print its report; returns the number of failed trials.

    Under torchrun every process does so, together with the others, and one of them talks. Raises
    UserError for anything that is wrong before the first trial.
    """
    trials = specs(
        wanted.suite, wanted.settings, wanted.methods, wanted.seeds, synthetic=wanted.synthetic
    )
    if parallel.launched() == 1:
        return _run(wanted, trials, console)
    gpu = torch.cuda.is_available() and trials[0].suite.resources.gpus != 0
    with parallel.group(gpu):
        console.quiet = not parallel.leads()
        return _run(replace(wanted, executor="inline"), trials, console)


def _run(wanted: Wanted, trials: list[TrialSpec], console: Console) -> int:
    root = str(Path(wanted.root).absolute())
    store = Store(root, trials[0].suite.name)
    store.check_writable()
    planned = states(trials, root)
    leading = parallel.shared(planned)
    if [p.spec.key for p in leading] != [p.spec.key for p in planned]:
        raise UserError(
            "the data, code or weights on this machine differ from rank 0's: make them equal"
        )
    planned = leading  # their states may have changed meanwhile
    todo = [
        p
        for p in planned
        if p.state in ("to do", "partial") or (wanted.retry_failed and p.state == "failed")
    ]
    failed = len([p for p in planned if p.state == "failed" and p not in todo])
    if todo:
        check(trials)
        done = len(planned) - len(todo) - failed
        runner: Executor = Inline() if wanted.executor == "inline" else Ray(wanted.address)
        failed += _execute(runner, [p.spec for p in todo], done, root, console)
    if parallel.leads():
        _report(store, trials, console)
    return failed


def _execute(
    runner: Executor, todo: list[TrialSpec], done: int, root: str, console: Console
) -> int:
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
