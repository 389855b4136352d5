import io
from dataclasses import replace

import pytest
from rich.console import Console
from trials import run, small

from harness.commands.progress import Progress
from harness.run.events import Started
from harness.storage.schema import Failure


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    specs = [small("neq"), small("baseline")]
    return [(spec, run(spec, root)) for spec in specs]


def follow(trials, terminal):
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    with Progress(console, done=3, to_do=2) as progress:
        (first, events), (second, _) = trials
        for event in events[:4]:
            progress.follow(first, event)
        progress.follow(second, Started())
        view = Console(file=io.StringIO(), width=80)
        view.print(progress._view())
        for event in (*events[4:], None):
            progress.follow(first, event)
        progress.follow(second, Failure("too hot", ""))
        progress.follow(second, None)
    return progress, view.file.getvalue(), console.file.getvalue()


@pytest.mark.slow
def test_the_live_view(trials):
    _, view, _ = follow(trials, terminal=True)
    head, first, second, summary = view.splitlines()
    assert head.split() == ["trial", "epoch", "metric", "frozen", "left"]
    last = trials[0][1][3]
    cells = ["3/5", f"{last.test_metric:.4f}", f"{last.frozen_neurons / 250:.0%}"]
    assert first.split()[:7] == ["digits", "neq", "seed", "0", *cells]
    assert second.split()[:5] == ["digits", "baseline", "seed", "0", "0/5"]
    assert summary.startswith("3 done, 2 running, 0 to do, about")


def test_plain_lines(trials):
    progress, _, text = follow(trials, terminal=False)
    done, failed = text.splitlines()
    assert done.startswith("done    digits neq seed 0: 5 epochs, metric 0.")
    assert done.endswith("(4 done, 1 running, 0 to do)")
    assert failed == "failed  digits baseline seed 0: too hot"
    assert [reason for _, reason in progress.failures] == ["too hot"]


def test_time_left_is_the_mean_of_the_epochs_so_far(trials):
    (spec, events), _ = trials
    slow = replace(
        events[1],
        seconds_train=90.0,
        seconds_equilibrium=5.0,
        seconds_test=4.0,
        seconds_checkpoint=1.0,
    )
    console = Console(file=io.StringIO(), width=80)
    with Progress(console, done=0, to_do=2) as progress:
        progress.follow(spec, Started())
        progress.follow(spec, slow)
        view = Console(file=io.StringIO(), width=80)
        view.print(progress._view())
    row, summary = view.file.getvalue().splitlines()[1:]
    assert row.endswith("6 min 40 s")  # four epochs of 100 s
    assert summary.endswith("about 15 min 00 s left")  # and five of the trial to do
