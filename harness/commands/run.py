"""`neqbench run`: check, execute what is not done, report."""

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console

from harness import parallel
from harness.commands.progress import Progress
from harness.errors import UserError
from harness.run.executors import Executor, Inline, Ray
from harness.run.preflight import check
from harness.run.trials import Trials, specs, states
from harness.storage.locations import place
from harness.storage.requests import Plan
from harness.storage.store import Store
from harness.suite.config import TrialSpec


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
    with _terminable():
        return _checked(wanted, console)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill, as of a job that is stopped, is a Ctrl-C."""
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _checked(wanted: Wanted, console: Console) -> int:
    trials = specs(
        wanted.suite, wanted.settings, wanted.methods, wanted.seeds, synthetic=wanted.synthetic
    )
    if parallel.launched() == 1:
        return _run(wanted, trials, console)
    gpu = torch.cuda.is_available() and trials[0].suite.resources.gpus != 0
    with parallel.group(gpu):
        console.quiet = not parallel.leads()
        return _run(replace(wanted, executor="inline"), trials, console)


def _run(wanted: Wanted, trials: Trials, console: Console) -> int:
    root = place(wanted.root).uri
    store, groups = Store(root, trials[0].suite.name), trials.groups()
    store.check_writable()
    planned = states(trials, root)
    names = [group[0].group for group in groups]
    if parallel.shared(names) != names:
        raise UserError(
            "the data, code or weights on this machine differ from rank 0's: make them equal"
        )
    again = ("to do", "partial", "failed") if wanted.retry_failed else ("to do", "partial")
    todo = trials.those(p.state in again for p in planned)
    count = Counter(p.state for p in planned if p.state not in again)
    failed = count["failed"]
    if parallel.leads():
        for group in groups:
            rows = [(p.key, p.method, p.seed) for p in planned if p.group == group[0].group]
            store.plan(Plan.of(group[0], rows))
    if parallel.shared(len(todo)):
        for group in groups:
            check(group)
        runner: Executor = (
            Inline(retry=wanted.retry_failed)
            if wanted.executor == "inline"
            else Ray(wanted.address, retry=wanted.retry_failed)
        )
        failed += _execute(runner, todo, count["done"], root, console)
    if parallel.leads():
        _report(store, set(names), console)
    return failed


def _execute(
    runner: Executor, todo: Sequence[TrialSpec], done: int, root: str, console: Console
) -> int:
    with (
        Progress(console, done, len(todo)) as progress,
        contextlib.closing(runner.run(todo, root)) as events,
    ):
        for spec, event in events:
            progress.follow(spec, event)
    return len(progress.failures)


def _report(store: Store, groups: set[str], console: Console) -> None:
    from harness.report.forms import render
    from harness.report.model import load

    render(load([store], only=groups), "rich", console)
