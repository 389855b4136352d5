"""Trials of several gloo workers against the same trials in one process."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from conftest import start_workers
from torch import distributed
from trials import PATIENCE, SLOT, SMALL, assert_same_results, keep_tuning, results, small

from harness import parallel
from harness.data import dataset, streamed
from harness.data.load import load_data
from harness.errors import UserError
from harness.run import preflight
from harness.run.attempt import Broken, attempt
from harness.run.executors import Inline, Ray
from harness.run.trials import resolved
from harness.storage import locations
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store
from harness.suite import files

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


# A model whose output for a sample does not depend on the others of its batch; data that say which
# process reads them, and that can break in one of them.
PARTS = """
import os
import time
from pathlib import Path

import torch
from harness.suite import files, parts
from harness.errors import UserError
from harness.parallel import rank
from torch import nn

HERE = Path(__file__).parent

# Waits in the third epoch for as long as a file tells it to.
class Hold(nn.Module):
    batches = 0

    def forward(self, x):
        self.batches += self.training and torch.is_grad_enabled()
        while self.batches > 13 and (HERE / "hold").exists():
            time.sleep(0.05)
        return x

def load(options):
    (HERE / f"pid{rank()}").write_text(str(os.getpid()))
    if (HERE / f"broken{rank()}").exists():
        raise UserError(f"the disk of worker {rank()} is gone")
    suite, folder = files.load_suite("digits")
    return parts.load_part("data:load", folder)(options)

def model():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2), nn.GroupNorm(4, 8), nn.ReLU(),
        nn.Flatten(), nn.Linear(392, 10), Hold(),
    )
"""


@pytest.fixture
def own(tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(files.shipped_suites()["digits"].parent, folder)
    (folder / "data.py").unlink()
    (folder / "parts.py").write_text(PARTS)
    text = (folder / "suite.toml").read_text()
    text = text.replace("data:load", "parts:load").replace('["fc"]', '["7"]')
    (folder / "suite.toml").write_text(text.replace("suites.resnet:resnet8", "parts:model"))
    return folder


def together(specs, root, world=2, epochs=None):
    """Run the trials in `world` processes, broken off after `epochs`; each rank's events."""
    for spec in specs:
        keep_tuning(spec, root)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, specs, str(root), epochs)
        start_workers(worker, arguments, world)
        return [torch.load(f"{folder}/{rank}", weights_only=False) for rank in range(world)]


def worker(rank, world, folder, specs, root, epochs):
    torch.set_num_threads(1)
    store = distributed.FileStore(f"{folder}/store", world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    seen, written, write = [], [], locations.Folder.write

    def noted(place, name, data, last=None):
        written.append(name)
        write(place, name, data, last)

    locations.Folder.write = noted
    try:
        for spec in specs:
            for count, event in enumerate(attempt(spec, root, SLOT)):
                seen.append(event)
                if count == epochs:
                    break
    except Broken as error:
        written.clear()  # but why it failed
        seen.append(str(error))
    if rank:  # whoever follows writes nothing
        assert not written
    torch.save(seen, f"{folder}/{rank}")
    if not isinstance(seen[-1], str):
        distributed.barrier()
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_several_workers_train_as_one(tmp_path, own, world):
    """Also over several forwards a step, and with a batch that does not divide evenly."""
    settings = ["recipe.forward_batch=8", "recipe.batch_size=35"]
    methods = ("random", "freeze_after")
    one = [small(m, *settings, suite=str(own)) for m in methods]
    settings.append(f"resources.workers={world}")
    many = [small(m, *settings, suite=str(own)) for m in methods]
    keep_tuning(one[0], tmp_path / "one")
    list(Inline().run(one, str(tmp_path / "one")))
    together(many, tmp_path / "many", world)
    for single, several in zip(one, many, strict=True):
        assert single.group != several.group
        alone, epochs, _ = results(single, tmp_path / "one")
        shared, same_epochs, _ = results(several, tmp_path / "many")
        for name, tensor in alone["model"].items():
            torch.testing.assert_close(shared["model"][name], tensor, rtol=1e-3, atol=1e-4)
        for column in ("epoch", "samples", "lr", "frozen_neurons", "backward_flops_executed"):
            assert epochs[column].equals(same_epochs[column])
        for column in ("train_loss", "test_loss", "val_loss"):
            pairs = zip(epochs[column].to_pylist(), same_epochs[column].to_pylist(), strict=True)
            assert all(a == pytest.approx(b, rel=1e-3) for a, b in pairs)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_two_workers(tmp_path):
    settings = ["resources.workers=2", "recipe.forward_batch=10"]
    specs = [small(method, *settings) for method in ("neq", "neq-cut", "random")]
    through = together(specs, tmp_path / "through")
    together(specs, tmp_path / "resumed", epochs=2)
    resumed = together(specs, tmp_path / "resumed")
    for spec in specs:
        assert_same_results(spec, tmp_path / "through", tmp_path / "resumed")
    for events in (*through, *resumed):
        epochs = [event.epoch for event in events if isinstance(event, EpochRecord)]
        assert epochs == 3 * list(range(5))
    first, second = (
        [e.frozen_neurons for e in events if isinstance(e, EpochRecord)] for events in through
    )
    assert first == second
    assert max(first) > 0


def test_a_worker_that_fails_says_why_and_ends_the_others(tmp_path, own):
    spec = small("baseline", "resources.workers=2", suite=str(own))
    (own / "broken1").touch()
    seen = together([spec], tmp_path)
    assert seen[1][-1] == "the disk of worker 1 is gone"
    assert isinstance(seen[0][-1], str)  # it could not go on alone
    row = Store(tmp_path, "own").trial(spec.key)
    assert (row["state"], row["reason"]) == ("failed", "the disk of worker 1 is gone")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_workers_alike(tmp_path):
    spec = small("baseline", "resources.workers=2", "recipe.optimizer.lr=1e30")
    for events in together([spec], tmp_path):
        assert isinstance(events[-1], Failure)
        assert "loss became" in events[-1].reason


def drifting(rank, folder):
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model, mask = torch.nn.Linear(3, 3), torch.zeros(3, dtype=torch.bool)
    parallel.agree(model, mask)
    with torch.no_grad():
        model.weight[0, 0] += 1e-7 * rank
    with pytest.raises(RuntimeError, match="drifted apart"):
        parallel.agree(model, mask)
    with torch.no_grad():
        model.weight[0, 0] -= 1e-7 * rank
    parallel.agree(model, {"steps": 3, "losses": [0.5, mask]})
    for state in ({"loss": 0.5 + rank}, {"masks": [mask] * (1 + rank)}):
        with pytest.raises(RuntimeError, match="drifted apart"):
            parallel.agree(model, state)
    mask[1 + rank] = True  # as many, but others
    with pytest.raises(RuntimeError, match="drifted apart"):
        parallel.agree(torch.nn.Identity(), mask)
    distributed.barrier()  # gloo aborts a process that leaves while another still talks to it
    distributed.destroy_process_group()


def test_workers_that_drift_apart_are_found(tmp_path):
    start_workers(drifting, (str(tmp_path),), 2)


@pytest.mark.slow
def test_a_killed_worker_ends_at_the_same_numbers_under_ray(tmp_path, own, shared_ray):
    spec = small("neq", "resources.workers=2", suite=str(own))
    together([spec], tmp_path / "through")
    keep_tuning(spec, tmp_path / "ray")
    seen, killed = [], 0
    (own / "hold").touch()
    for _, event in Ray().run([spec], str(tmp_path / "ray")):
        seen.append(event)
        if isinstance(event, EpochRecord) and event.epoch == 1 and not killed:
            killed = int((own / "pid1").read_text())
            os.kill(killed, signal.SIGKILL)
            (own / "hold").unlink()
    assert killed != int((own / "pid1").read_text())
    assert [e.epoch for e in seen if isinstance(e, EpochRecord)] == list(range(5))
    assert seen[-1] is None
    assert_same_results(spec, tmp_path / "through", tmp_path / "ray")
    row = Store(tmp_path / "ray", "own").trial(spec.key)
    assert (row["state"], row["attempts"]) == ("done", 2)
    (own / "broken1").touch()
    other = small("random", "resources.workers=2", suite=str(own))
    events = [event for _, event in Ray().run([other], str(tmp_path / "ray"))]
    (failure,) = [event for event in events if isinstance(event, Failure)]
    assert failure.reason == "the disk of worker 1 is gone"
    assert not list((tmp_path / "ray" / "own").glob(".train/*"))


def test_what_only_says_that_another_is_gone():
    gone = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10114"
    assert parallel.lost_another(RuntimeError(gone))
    assert parallel.lost_another(distributed.DistBackendError("NCCL error"))
    assert not parallel.lost_another(UserError("/data/gloo/transport/x.jpg cannot be decoded"))
    assert not parallel.lost_another(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def resuming(rank, folder, spec, root):
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    place = root if rank == 0 else f"{folder}/elsewhere"  # a folder that not every node sees
    keep_tuning(spec, place)
    with pytest.raises(Broken, match=r"do not find the same checkpoint .* must lie where every"):
        list(attempt(spec, place, SLOT))


@pytest.mark.slow
def test_results_that_not_every_worker_sees(tmp_path):
    spec = small("baseline", "resources.workers=2")
    together([spec], tmp_path / "root", epochs=2)
    arguments = (str(tmp_path), spec, str(tmp_path / "root"))
    start_workers(resuming, arguments, 2)


@pytest.mark.parametrize("world", [3, 4])
def test_samples_are_checked_on_every_worker(world):
    """Each looks at its own, and has some."""
    settings = ["model.input=[3, 32, 32]", "data.validation_size=2", "recipe.batch_size=16"]
    suite, folder = resolved(*files.load_suite("imagenet", settings), synthetic=True)
    data = load_data(suite, folder)
    for rank in range(world):
        with (
            patch.object(dataset, "rank", lambda rank=rank: rank),
            patch.object(streamed, "rank", lambda rank=rank: rank),
            patch.object(dataset, "workers", lambda: world),
            patch.object(streamed, "workers", lambda: world),
            patch.object(parallel, "workers", lambda: world),
        ):
            looked = preflight.few(suite, data)
        assert [len(x) for x, _ in looked["training"]] == [2]
        assert [len(x) for x, _ in looked["test"]] == [2]


@pytest.mark.slow
def test_a_parameter_without_a_gradient_is_named(own):
    text = (own / "parts.py").read_text().replace("def model():", "def plain():")
    text += """
class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.unused = plain(), nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x)

def model():
    return Loose()
"""
    (own / "parts.py").write_text(text)
    settings = ["model.exclude=['inner.7']"]
    preflight.preflight([small("baseline", *settings, suite=str(own))])
    settings.append("resources.workers=2")
    with pytest.raises(UserError, match=r"unused\.weight gets no gradient"):
        preflight.preflight([small("baseline", *settings, suite=str(own))])


def test_more_workers_than_there_is_room_for(tmp_path, shared_ray):
    spec = small("baseline", "resources.workers=2", "recipe.batch_size=8")
    with pytest.raises(UserError, match=r"one process can.t be 2 workers; .* torchrun --nproc-per"):
        list(Inline().run([spec], str(tmp_path)))
    many = small("baseline", "resources.workers=999", "recipe.batch_size=2000")
    with pytest.raises(UserError, match=r"999 workers with 1 CPUs and 0 GPUs each, more than"):
        list(Ray().run([many], str(tmp_path)))


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "harness", "run", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.slow
def test_torchrun_runs_a_suite_without_ray(tmp_path):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    choice = ["--methods", "baseline,neq", "--seeds", "0", "--results", tmp_path]
    done = torchrun("digits", *settings, *choice)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done    digits neq seed 0") == 1  # one of the two talks
    assert done.stdout.count("batch 40 on 2 workers, 20 per forward") == 1
    assert "ray" not in done.stderr.lower()
    trials = pd.read_parquet(tmp_path / "digits" / "trials")
    assert trials["state"].tolist() == ["done", "done"]
    (spec,) = [s for s in (small("neq", "resources.workers=2"),) if s.key in set(trials["trial"])]
    assert spec.suite.resources.world_size == 2
    wrong = torchrun("digits", *settings, *choice, "--set", "resources.workers=3")
    assert wrong.returncode != 0
    assert "torchrun started 2 processes, suite digits asks for 3 workers" in wrong.stderr
