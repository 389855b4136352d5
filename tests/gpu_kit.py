"""What only a GPU can show, in ten minutes, kept as files that can be committed and reported.

    python3 tests/gpu_kit.py --data FOLDER --results results --minutes 10

In this order: the tests marked `gpu`, tables of `neqbench speed`, and as many epochs of cifar10's
trials as fit; nothing is installed or downloaded. All of it lies below RESULTS/evidence/<device>/.
The same command goes on where it has stopped: what is there for the same code and versions is kept.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from gpu_children import GRACE, HERE, Child, watched
from gpu_summary import summary

HARNESS = [sys.executable, "-m", "harness"]
METHODS = "baseline,neq,neq-reference,random,freeze_after"
LEAST = 20.0  # seconds: with less left, no part is begun
ASKING = 180.0  # seconds for the first import of torch
PARTS = ("tests", "speed", "trials")
STAYS = ("checkpoints", "leases")  # in the results: only who goes on with them needs them


@dataclass(frozen=True)
class Plan:
    """What is run: words for pytest, for `neqbench speed` by table, and for `neqbench run`.

    `tests_limit` and `table_limit`: seconds for all tests, and for each table; `reserve`: seconds
    at the end, for the report.
    """

    tests: tuple[str, ...]
    tables: dict[str, tuple[str, ...]]
    suite: str
    trials: tuple[str, ...]
    needs_data: bool = True
    tests_limit: float = 150.0
    table_limit: float = 75.0
    reserve: float = 30.0


def _model(name: str, batch: int, shape: str) -> tuple[str, ...]:
    return ("--model", name, "--input", shape, "--batch", str(batch), "--precision", "bf16")


GPU = Plan(
    tests=("-m", "gpu", "tests/test_gpu.py"),
    tables={
        "resnet18-128": _model("torchvision.models:resnet18", 128, "3x224x224"),
        "resnet32-100": _model("suites.resnet:resnet32", 100, "3x32x32"),
        "resnet32-1024": _model("suites.resnet:resnet32", 1024, "3x32x32"),
        "swin-t-64": _model("gpu_models:swin_tiny", 64, "3x224x224"),
        "deeplabv3-8": _model("gpu_models:deeplab", 8, "3x321x321"),
    },
    suite="cifar10",
    trials=("--methods", METHODS, "--seeds", "0-3"),
)
TOY = Plan(
    tests=("tests/test_statistics.py",),
    tables={
        "resnet8-4": ("--model", "suites.resnet:resnet8", "--input", "1x16x16", "--frozen", "0.5")
    },
    suite="digits",
    trials=(
        *("--methods", "baseline,neq", "--seeds", "0", "--no-replay"),
        *("--set", "recipe.epochs=6", "--set", "data.train_size=300"),
        *("--set", "model.build=suites.resnet:ResNet"),
        *("--set", "model.arguments={blocks=1, width=8, channels=1, classes=10}"),
    ),
    needs_data=False,
    reserve=20.0,
)


@dataclass
class Outcome:
    """What became of a part: "done", "failed", "stopped" at its limit, or "left out".

    `identity`: of code, versions and words that it was done with.
    """

    state: str
    seconds: float = 0.0
    reason: str = ""
    identity: str = ""


class Kit:
    """Runs the parts of `plan` until `deadline` (of time.monotonic), and keeps what they give.

    `machine`: as gpu_machine tells; `place`: where the evidence lies; `results`: where trials do.
    """

    def __init__(
        self,
        plan: Plan,
        results: Path,
        place: Path,
        machine: dict[str, Any],
        deadline: float,
    ) -> None:
        self.plan, self.results, self.place, self.deadline = plan, results, place, deadline
        self.machine = machine
        self.logs = place / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.outcomes = {name: Outcome(**row) for name, row in _read(place / "parts.json").items()}
        self.now: dict[str, Outcome] = {}  # of this call
        self._write("versions.json", machine)

    def left(self) -> float:
        """Seconds until the reserve for the report begins."""
        return self.deadline - self.plan.reserve - time.monotonic()

    def tests(self) -> None:
        """Run the tests; those that have passed with this code and on this machine are kept."""
        words = [sys.executable, "-m", "pytest", "-vv", "-W", "default", "-p", "no:cacheprovider"]
        words += [*self.plan.tests, "--durations=10", "--tb=short"]
        self._part("tests", words, self.plan.tests_limit, self.place / "tests.txt")

    def table(self, name: str) -> None:
        """Take one table of `neqbench speed`."""
        words = [*HARNESS, "speed", *self.plan.tables[name], "--format", "json"]
        log, file = self.logs / f"speed-{name}.txt", self.place / f"speed-{name}.json"
        fresh = self.place / f".{file.name}"
        fresh.unlink(missing_ok=True)
        if not file.exists():
            self.outcomes.pop(f"speed-{name}", None)
        outcome = self._part(f"speed-{name}", words, self.plan.table_limit, log, fresh)
        if outcome.state in ("failed", "stopped"):
            file.unlink(missing_ok=True)
        elif fresh.exists():
            fresh.replace(file)
        fresh.unlink(missing_ok=True)

    def trials(self, data: str | None, jobs: int) -> None:
        """Go on with the trials, `jobs` at a time; each keeps its last whole epoch."""
        name = self.plan.suite
        if self.plan.needs_data and data is None:
            self._told(name, Outcome("left out", reason="no --data FOLDER: nothing was trained"))
            return
        words = [*HARNESS, "run", name, *self.plan.trials, "--executor", "inline"]
        words += ["--results", str(self.results)]
        words += ["--set", f"data.root={Path(data).absolute()}"] if data else []
        limit = self.left() - GRACE
        if limit < LEAST:
            self._told(name, Outcome("left out", reason=f"{max(limit, 0):.0f} s were left"))
            return
        start = time.monotonic()
        children = [Child(words, self.logs / f"{name}-{n}.txt") for n in range(jobs)]
        ended = watched(children, limit)
        bad = [c for c in children if ended and c.process.returncode]
        reason = bad[0].last_words() if bad else "" if ended else "the same command goes on"
        state = "failed" if bad else "done" if ended else "stopped"
        self._told(name, Outcome(state, time.monotonic() - start, reason))

    def report(self) -> None:
        """Copy the trials' tables beside the rest, and write the summary."""
        name, told = self.plan.suite, []
        mine, copied = self.results / name, self.place / name
        if (mine / "trials").is_dir():
            shutil.rmtree(copied, ignore_errors=True)
            shutil.copytree(mine, copied, ignore=shutil.ignore_patterns(*STAYS, ".*"))
            report = [*HARNESS, "report", str(self.place), "--format", "md"]
            asked = {"progress": [sys.executable, "-m", "gpu_progress", str(copied)]}
            told = [self._answer(n, words) for n, words in (asked | {"report": report}).items()]
        tables = {p.stem: _read(p) for p in sorted(self.place.glob("speed-*.json"))}
        rows = {part: asdict(outcome) for part, outcome in self.outcomes.items()}
        (self.place / "summary.md").write_text(summary(self.machine, rows, tables, told))

    def _answer(self, name: str, words: Sequence[str]) -> str:
        """What the command says; its last words where it fails, or takes too long."""
        child = Child(words, self.logs / f"{name}.txt", self.logs / f"{name}.md")
        left = max(self.deadline - time.monotonic(), LEAST)
        well = watched([child], left) and child.process.returncode == 0
        return child.out.read_text() if well else f"{name}: {child.last_words()}"

    def _part(
        self, name: str, words: Sequence[str], most: float, log: Path, out: Path | None = None
    ) -> Outcome:
        """Run one command, unless it is done already; `most`: seconds."""
        identity = _digest([*words[1:], self._same])
        before = self.outcomes.get(name)
        if before and before.state == "done" and before.identity == identity:
            return self._told(name, before, "kept")
        limit = min(most, self.left() - GRACE)
        if limit < LEAST and limit < most:
            return self._told(name, Outcome("left out", reason=f"{max(limit, 0):.0f} s were left"))
        start = time.monotonic()
        child = Child(words, log, out)
        ended = watched([child], limit)
        state = "stopped" if not ended else "failed" if child.process.returncode else "done"
        done = child.last_words(1) if name == "tests" else ""
        reason = done if state == "done" else child.last_words()
        if not ended:
            reason = f"took more than {limit:.0f} s; {reason}"
        return self._told(name, Outcome(state, time.monotonic() - start, reason, identity))

    @cached_property
    def _same(self) -> str:
        """What results depend on: versions, device, and every line of the code."""
        files = sorted(
            path
            for folder in ("neq", "harness", "suites", "tests")
            for path in (HERE / folder).rglob("*")
            if path.suffix in (".py", ".toml", ".html")
        )
        known = [self.machine[key] for key in ("device", "driver", "cuda", "cudnn", "versions")]
        return _digest([known, *(sha256(path.read_bytes()).hexdigest() for path in files)])

    def _told(self, name: str, outcome: Outcome, state: str | None = None) -> Outcome:
        """Print a line on the part, and keep what became of it."""
        self.now[name] = outcome
        if outcome.state != "left out" or name not in self.outcomes:  # what there was stays
            self.outcomes[name] = outcome
        seconds = f"{outcome.seconds:6.1f} s"
        line = f"{name:22} {state or outcome.state:9} {seconds}  {outcome.reason}"
        print(line.rstrip(), flush=True)
        self._write("parts.json", {n: asdict(o) for n, o in self.outcomes.items()})
        return outcome

    def _write(self, name: str, value: Any) -> None:
        path = self.place / name
        beside = path.with_name(f".{name}")
        beside.write_text(json.dumps(value, indent=1) + "\n")
        beside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def _digest(value: Any) -> str:
    return sha256(json.dumps(value).encode()).hexdigest()[:16]


def machine_here() -> dict[str, Any]:
    """What gpu_machine tells; raises SystemExit where it can't even be asked."""
    try:
        asked = subprocess.run(
            [sys.executable, "-m", "gpu_machine"],
            cwd=HERE / "tests",
            env=os.environ
            | {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
            timeout=ASKING,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise SystemExit(_wrong(f"{sys.executable} can't run neqbench: {last}")) from None
    return json.loads(asked.stdout)


def _wrong(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--data", help="CIFAR-10's folder; without it nothing is trained")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all of it")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of tests,speed,trials")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time; with one, timed")
    parser.add_argument("--toy", action="store_true", help="small things on the CPU")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a test, a table or a trial failed; 2 for wrong input."""
    start = time.monotonic()
    options = arguments(given)
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        return _wrong(f"--parts {options.parts}: name some of {','.join(PARTS)}")
    if not options.minutes > 0 or options.jobs < 1:
        return _wrong("--minutes must be above 0, and --jobs at least 1")
    if options.data is not None and not Path(options.data).is_dir():
        return _wrong(f"--data {options.data}: there is no such folder")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    machine, plan = machine_here(), TOY if options.toy else GPU
    if machine["device"] is None and not options.toy:
        version = machine["versions"]["torch"]
        return _wrong(f"torch {version} sees no CUDA device here; run this on a machine with a GPU")
    device = "toy" if options.toy else re.sub(r"[^a-z0-9]+", "-", machine["device"].lower())
    results, deadline = options.results.absolute(), start + 60 * options.minutes
    kit = Kit(plan, results, results / "evidence" / device.strip("-"), machine, deadline)
    print(f"{machine['device'] or machine['cpu']}: {kit.place}", flush=True)
    return run(kit, parts, options.data, options.jobs)


def run(kit: Kit, parts: Sequence[str], data: str | None, jobs: int) -> int:
    """Run some parts, and report whatever happened; returns the exit code."""
    broken = False
    try:
        if "tests" in parts:
            kit.tests()
        for name in kit.plan.tables if "speed" in parts else ():
            kit.table(name)
        if "trials" in parts:
            kit.trials(data, jobs)
    except KeyboardInterrupt:
        broken = True
    kit.report()
    print((kit.place / "summary.md"), flush=True)
    failed = any(outcome.state == "failed" for outcome in kit.now.values())
    untested = "tests" in kit.now and kit.now["tests"].state != "done"
    return 130 if broken else int(failed or untested)


if __name__ == "__main__":
    sys.exit(main())
