"""Live progress of a run: a table in a terminal, plain lines elsewhere."""

import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.run.events import Elsewhere, Event, Held, Notice
from harness.storage.schema import EpochRecord, Failure
from harness.suite.config import TrialSpec
from harness.suite.sweep import point_label


@dataclass(slots=True)
class _RunningTrial:
    spec: TrialSpec
    records: list[EpochRecord] = field(default_factory=list)
    elsewhere: bool = False

    @property
    def seconds_left(self) -> float | None:
        """At the mean speed so far."""
        if not self.records:
            return None
        seconds = sum(_seconds(record) for record in self.records) / len(self.records)
        return seconds * (self.spec.suite.recipe.epochs - len(self.records))


def _seconds(record: EpochRecord) -> float:
    return (
        record.seconds_train
        + record.seconds_equilibrium
        + record.seconds_test
        + (record.seconds_checkpoint or 0.0)
    )


class Progress:
    """Shows how a run goes, event by event.

    `done`, `to_do`: trials before it began; `failures`: (trial, reason) of those that failed.
    """

    def __init__(self, console: Console, done: int, to_do: int) -> None:
        self.failures: list[tuple[TrialSpec, str]] = []
        self._console = console
        self._done, self._to_do = done, to_do
        self._running: dict[str, _RunningTrial] = {}
        self._quiet_until = time.monotonic() + 60
        self._live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
            self._live.update(self._view())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._live:
            self._live.stop()

    def follow(self, spec: TrialSpec, event: Event | None) -> None:
        """Take one event of one trial; None ends the trial."""
        if isinstance(event, Notice):
            self._print(Text(f"note    {_name(spec)}: {event.text}", style="yellow"))
        elif isinstance(event, Held):
            self._to_do += self._running.pop(spec.key, None) is not None
            self._print(Text(f"waits   {_name(spec)}: another run has it"))
        else:
            self._follow(spec, event)
        if self._live:
            self._live.update(self._view())

    def _follow(self, spec: TrialSpec, event: Event | None) -> None:
        trial = self._running.get(spec.key)
        if trial is None:
            trial = self._running[spec.key] = _RunningTrial(spec)
            self._to_do -= 1
        if isinstance(event, EpochRecord):
            trial.records.append(event)
            self._still_running(trial)
        elif isinstance(event, Failure):
            self.failures.append((spec, event.reason))
            self._print(Text(f"failed  {_name(spec)}: {event.reason}", style="red"))
        elif event is None:
            del self._running[spec.key]
            if all(spec != failed for failed, _ in self.failures):
                self._finish(trial)
        elif isinstance(event, Elsewhere):
            trial.elsewhere = True

    def _finish(self, trial: _RunningTrial) -> None:
        self._done += 1
        if trial.elsewhere:
            done = f"done    {_name(trial.spec)}: by another run ({self._summary()})"
            self._print(Text(done))
            return
        last = trial.records[-1]
        seconds = sum(_seconds(record) for record in trial.records)
        line = (
            f"done    {_name(trial.spec)}: {last.epoch + 1} epochs, metric {last.test_metric:.4f}, "
            f"{_frozen(last)} frozen, {_duration(seconds)}"
        )
        self._print(Text(line if self._live else f"{line} ({self._summary()})"))

    def _still_running(self, trial: _RunningTrial) -> None:
        """Where nothing is live, a line a minute tells that the run is."""
        if self._live or time.monotonic() < self._quiet_until:
            return
        self._quiet_until = time.monotonic() + 60
        epoch, metric, frozen, left = _cells(trial)
        self._print(
            Text(
                f"running {_name(trial.spec)}: epoch {epoch}, metric {metric}, {frozen} frozen, "
                f"{left} left ({self._summary()})"
            )
        )

    def _print(self, line: Text) -> None:
        self._console.print(line, soft_wrap=True)

    def _summary(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return f"{self._done} done, {len(self._running)} running, {self._to_do} to do{failed}"

    def _view(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("trial", no_wrap=True)
        for title in ("epoch", "metric", "frozen", "left"):
            table.add_column(title, justify="right", no_wrap=True)
        for trial in self._running.values():
            table.add_row(_name(trial.spec), *_cells(trial))
        return Group(table, Text(self._summary() + self._time_left(), style="bold"))

    def _time_left(self) -> str:
        known = [t for t in self._running.values() if t.records]
        if not known:
            return ""
        each = sum(_seconds(r) for t in known for r in t.records)
        each /= sum(len(t.records) for t in known)
        waiting = self._to_do * known[0].spec.suite.recipe.epochs
        left = sum(t.spec.suite.recipe.epochs - len(t.records) for t in self._running.values())
        return f", about {_duration(each * (waiting + left) / len(self._running))} left"


def _cells(trial: _RunningTrial) -> list[str]:
    epochs = trial.spec.suite.recipe.epochs
    if not trial.records:
        return [f"0/{epochs}", "–", "–", "–"]
    last, left = trial.records[-1], trial.seconds_left
    done = f"{last.epoch + 1}/{epochs}"
    return [done, f"{last.test_metric:.4f}", _frozen(last), _duration(left or 0.0)]


def _name(spec: TrialSpec) -> str:
    words = [spec.suite.name, point_label(spec.suite.point), spec.method, f"seed {spec.seed}"]
    return " ".join(word for word in words if word)


def _frozen(record: EpochRecord) -> str:
    return f"{record.frozen_neurons / record.total_neurons:.0%}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
