"""`neqbench run`: check, execute what is not done, report."""

import contextlib
import signal
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.text import Text

from harness import parallel
from harness.commands.options import RunOptions
from harness.commands.progress import Progress
from harness.console import progress_line
from harness.errors import UserError
from harness.run.afterwards import Work
from harness.run.executors import Executor, Inline, Ray
from harness.run.logs import Logs, check_places
from harness.run.preflight import preflight
from harness.run.removals import Removals
from harness.run.replays import Replays
from harness.run.trials import Trials, states
from harness.storage.locations import open_location
from harness.storage.requests import Request, keep_request
from harness.storage.store import Store
from harness.suite.config import TrialSpec


def run(options: RunOptions, executor: str, address: str | None, console: Console) -> int:
    """Run the suite and print its report; returns the number of failed trials.

    `executor`: "ray" or "inline"; `address`: of a Ray cluster to join. Under torchrun every process
    does so, together with the others, and one of them talks. Raises UserError for anything that is
    wrong before the first trial.
    """
    if not options.replay_seconds > 0:
        raise UserError(
            f"--replay-seconds {options.replay_seconds:g}: must be above 0; --no-replay leaves "
            "replays out"
        )
    with _terminable():
        trials = options.trials()
        check_places(options.log or ())
        if parallel.launched() == 1:
            return _run(options, trials, _executor(options, executor, address), console)
        gpu = torch.cuda.is_available() and trials[0].suite.resources.gpus != 0
        with parallel.group(gpu):
            console.quiet = not parallel.leads()
            return _run(options, trials, Inline(retry=options.retry_failed), console)


def _executor(options: RunOptions, name: str, address: str | None) -> Executor:
    retry = options.retry_failed
    return Inline(retry=retry) if name == "inline" else Ray(address, retry=retry)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Inside, a polite kill (SIGTERM, as of a job that is stopped) is a Ctrl-C."""
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)


def _run(options: RunOptions, trials: Trials, executor: Executor, console: Console) -> int:
    root = open_location(options.results).uri
    store, groups = Store(root, trials[0].suite.name), trials.groups()
    store.check_writable()
    known = states(trials, root)
    names = [group[0].group for group in groups]
    if parallel.shared(names) != names:
        raise UserError(
            "the data, code or weights on this machine differ from rank 0's: make them equal"
        )
    again = ("to do", "partial", "failed") if options.retry_failed else ("to do", "partial")
    todo = trials.those(trial.state in again for trial in known)
    count = Counter(trial.state for trial in known if trial.state not in again)
    failed = count["failed"]
    if parallel.leads():
        for group in groups:
            asked = [(t.key, t.method, t.seed) for t in known if t.group == group[0].group]
            keep_request(store.location, Request.of(group[0], asked))
    if parallel.shared(len(todo)):
        warnings: dict[str, None] = {}
        for group in groups:
            preflight(group, lambda text: warnings.update({text: None}))
        for text in warnings:
            _warn(console, text)
    places = (options.log or []) if parallel.leads() else []
    with Logs(places, store, lambda text: _warn(console, text)) as logs:
        for trial, spec in zip(known, trials, strict=True) if places else ():
            if trial.state in ("done", "failed"):
                logs.fill(spec)
        if parallel.shared(len(todo)):
            failed += _execute(executor, todo, count["done"], root, console, logs)
    if parallel.workers() == 1:
        if not options.no_replay:
            _afterwards(Replays(options.replay_seconds), executor, groups, root, console)
        _afterwards(Removals(options.save_shrunk), executor, groups, root, console)
    if parallel.leads():
        _report(store, set(names), console)
    return failed


def _afterwards(
    work: Work, executor: Executor, groups: list[Trials], root: str, console: Console
) -> None:
    with progress_line() as shown:
        for group in groups:
            for told in executor.afterwards(work, group, root, shown.update):
                console.print(Text(told.text, style="" if told.well else "yellow"), soft_wrap=True)


def _warn(console: Console, text: str) -> None:
    console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)


def _execute(
    executor: Executor,
    todo: Sequence[TrialSpec],
    done: int,
    root: str,
    console: Console,
    logs: Logs,
) -> int:
    with (
        Progress(console, done, len(todo)) as progress,
        contextlib.closing(executor.run(todo, root)) as events,
    ):
        for spec, event in events:
            progress.follow(spec, event)
            logs.follow(spec, event)
    return len(progress.failures)


def _report(store: Store, groups: set[str], console: Console) -> None:
    from harness.report.forms import render
    from harness.report.model import load_report

    render(load_report([store], only=groups), "rich", console)
