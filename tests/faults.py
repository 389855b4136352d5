"""Kill what computes, at random points; what is complete in the end must equal a quiet run.

    python tests/faults.py --kills 50 --seed 0

Runs `neqbench run` on a Ray cluster of a head and two nodes on this machine. From outside it kills
workers, nodes and the driver, holds workers up and spoils checkpoints. Whenever the command ends,
it is given again. Nothing is told to the program.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from trials import same

from harness.storage import leases
from harness.storage.locations import open_location

METHODS = "baseline,neq,neq-cut,random,smallest_velocity,freeze_after"
MEASURED = {"peak_memory_bytes", "energy_joules", "other_load", "code"}
FAULTS = {"worker": 5, "node": 3, "driver": 4, "held up": 1, "truncated": 1}
PATIENCE = 600  # seconds, for one campaign after its last fault
HERE = Path(__file__).parents[1]


class Cluster:
    """A head, which runs no trials, and two nodes with one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster as Nodes

        self._nodes = Nodes(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False},
        )
        self.address = self._nodes.address
        self._workers = [self._add() for _ in range(2)]

    def _add(self):
        return self._nodes.add_node(num_cpus=1)

    def kill_node(self, draw: random.Random) -> None:
        """Its processes are gone at once; another machine takes its place."""
        node = self._workers.pop(draw.randrange(len(self._workers)))
        self._nodes.remove_node(node, allow_graceful=False)
        self._workers.append(self._add())

    def end(self) -> None:
        self._nodes.shutdown()


class Campaign:
    """One suite, disturbed until `kills` faults have struck or it is complete."""

    def __init__(self, root: Path, command: list[str], draw: random.Random) -> None:
        self.root, self.command, self.draw = root, command, draw
        self.struck: Counter[str] = Counter()
        self.spoilt: set[str] = set()
        self.wrong: list[str] = []
        self._seen: dict[str, list[float]] = {}
        self._done: dict[str, object] = {}
        self._driver: subprocess.Popen[bytes] | None = None
        self._log = (root / "log").open("wb")

    def run(self, cluster: Cluster, kills: int) -> None:
        """Until the command has ended well; at most `kills` faults."""
        patience = time.monotonic() + PATIENCE
        wait = 0.0
        while True:
            if self._driver is None:
                self._start()
            time.sleep(0.3)
            self._watch()
            code = self._driver.poll()
            if code == 0:
                break
            if code is not None:
                if code != -signal.SIGKILL:
                    self.wrong.append(f"the command ended with {code}")
                self._driver = None
                continue
            if wait < time.monotonic() and self.struck.total() < kills:
                patience = time.monotonic() + PATIENCE
                wait = time.monotonic() + self.draw.uniform(0.5, 5)
                self._strike(cluster)
            if time.monotonic() > patience:
                self._driver.kill()
                raise SystemExit(f"not complete after {PATIENCE} s; see {self.root / 'log'}")
        self._watch()

    def _start(self) -> None:
        self._driver = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, cwd=HERE
        )

    def _strike(self, cluster: Cluster) -> None:
        held = self._held()
        ((fault,),) = [self.draw.choices(list(FAULTS), FAULTS.values())]
        if fault == "driver":
            self._driver.kill()
            self._driver.wait()
            self._driver = None
        elif not held:
            return
        elif fault == "node":
            cluster.kill_node(self.draw)
        elif fault == "worker":
            _signal(self.draw.choice(held)[1].pid, signal.SIGKILL)
        elif fault == "held up":
            pid = self.draw.choice(held)[1].pid
            _signal(pid, signal.SIGSTOP)
            time.sleep(self.draw.uniform(1, 8))
            _signal(pid, signal.SIGCONT)
        elif not self._truncate(held):
            return
        self.struck[fault] += 1

    def _held(self):
        """(trial, lease) of all that is being computed."""
        spot = open_location(self.root, "digits")
        found = [(key, leases.latest(spot, key)) for key in spot.names("leases")]
        return [
            (k, b)
            for k, b in found
            if b and b.owner and not b.released and leases.born(b.pid) == b.born
        ]

    def _truncate(self, held) -> bool:
        """Spoil the newest of two commits and kill who might overwrite it."""
        key, beat = self.draw.choice(held)
        _signal(beat.pid, signal.SIGKILL)
        commits = sorted((self.root / "digits/checkpoints" / key).glob("*.pt"))
        if len(commits) < 2:
            return False
        size = commits[-1].stat().st_size
        os.truncate(commits[-1], self.draw.randrange(size))
        self.spoilt.add(key)
        return True

    def _watch(self) -> None:
        """What is published stays, with the seconds it took; what is done is not touched again."""
        for path in (self.root / "digits/epochs").glob("[!.]*.parquet"):
            rows = read(path)
            seconds = list(rows["seconds_train"])
            before = self._seen.get(path.stem, [])
            if list(rows["epoch"]) != list(range(len(rows))):
                self.wrong.append(f"{path.stem}: epochs {list(rows['epoch'])}")
            if seconds[: len(before)] != before and path.stem not in self.spoilt:
                self.wrong.append(f"{path.stem}: computed again: {before} and then {seconds}")
            self._seen[path.stem] = seconds
        for path in (self.root / "digits/trials").glob("[!.]*.parquet"):
            row = read(path).iloc[0]
            before = (
                self._done.setdefault(path.stem, row["updated"]) if row["state"] == "done" else None
            )
            if before not in (None, row["updated"]):
                self.wrong.append(f"{path.stem}: done, and then touched again")


def read(path: Path) -> pd.DataFrame:
    """In one go: by its path it would be opened twice, and may be replaced in between."""
    return pd.read_parquet(io.BytesIO(path.read_bytes()))


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def differences(quiet: Path, disturbed: Path) -> list[str]:
    """Everything that is not equal to the bit, but what is measured."""
    found = []
    trials = [
        pd.read_parquet(root / "digits/trials").set_index("trial") for root in (quiet, disturbed)
    ]
    if set(trials[0].index) != set(trials[1].index) or set(trials[1]["state"]) != {"done"}:
        return [f"not complete: {dict(trials[1]['state'])}"]
    for kind in ("epochs", "layers"):
        keys = ["trial", "epoch"] + ["layer"] * (kind == "layers")
        tables = [pd.read_parquet(root / "digits" / kind) for root in (quiet, disturbed)]
        keep = [c for c in tables[0] if c not in MEASURED and not c.startswith("seconds_")]
        one, two = (t[keep].sort_values(keys).astype(str).reset_index(drop=True) for t in tables)
        if not one.equals(two):
            columns = [c for c in keep if len(one) == len(two) and not one[c].equals(two[c])]
            found.append(f"{kind} differ in {columns}")
    for key in trials[0].index:
        (one,), (two,) = (
            (root / "digits/checkpoints" / key).glob("*.pt") for root in (quiet, disturbed)
        )
        states = [torch.load(path, weights_only=True)["state"] for path in (one, two)]
        for state in states:
            del state["rows"]
        if not same(*states):
            found.append(f"the weights of {key} differ")
    return found


def campaign(
    folder: Path,
    number: int,
    kills: int,
    draw: random.Random,
    epochs: int,
    settings: Sequence[str] = (),
) -> Campaign:
    """A quiet run of the suite, the same disturbed, and what differs in `wrong`."""
    seeds = f"{2 * number}-{2 * number + 1}"
    quiet, disturbed = folder / f"quiet{number}", folder / f"disturbed{number}"
    words = f"run digits --methods {METHODS} --seeds {seeds} --set recipe.epochs={epochs}".split()
    words += ["--no-replay"]
    words += [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "harness", *words, "--results"]
    subprocess.run(
        [*command, str(quiet), "--executor", "inline"], cwd=HERE, check=True, capture_output=True
    )
    shutil.copytree(quiet / "digits" / "tuning", disturbed / "digits" / "tuning")
    cluster = Cluster()
    try:
        run = Campaign(disturbed, [*command, str(disturbed), "--address", cluster.address], draw)
        run.run(cluster, kills)
    finally:
        cluster.end()
    run.wrong += differences(quiet, disturbed)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--each", type=int, default=10**9, help="faults of one campaign at the most"
    )
    given = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    print(f"seed {given.seed}", flush=True)
    draw, struck, wrong, number = random.Random(given.seed), Counter(), [], 0
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    while struck.total() < given.kills:
        start = time.monotonic()
        left = min(given.kills - struck.total(), given.each)
        run = campaign(folder, number, left, draw, given.epochs)
        struck, number = struck + run.struck, number + 1
        wrong += run.wrong
        seconds = time.monotonic() - start
        print(
            f"campaign {number}: {dict(run.struck)}, {seconds:.0f} s, wrong: {run.wrong}",
            flush=True,
        )
    print(json.dumps({"faults": struck, "campaigns": number, "wrong": wrong}))
    if not wrong:
        shutil.rmtree(folder)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
