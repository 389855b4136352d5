import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.request
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from uuid import uuid4

# Several test processes share the cores; more threads than those would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A process keeps the mode in which it has first met a Ray, and asks the next one's workers for it.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import psutil
import pytest
import torch
from torch import Tensor, multiprocessing, nn

from harness.cli import main
from harness.run import ray_cluster
from harness.train import neighbours
from harness.vision import torchvision

# Several tests run at a time: a trial of one is no neighbour of a trial of another.
neighbours.FOLDER = f"neqbench-tests-{os.getpid()}"
neighbours._busy_seconds = lambda: 1.0

DOCS = Path(__file__).parents[1] / "docs"
WAITING = {"test_faults", "test_together", "test_executors", "test_submit"}  # for other processes


def pytest_collection_modifyitems(items):
    """Spread the tests that mostly wait: each of several test processes has its share of them.

    They lie evenly between the others, so that few of them compete for the cores at a time, and
    the last tests are short ones, which who is done early takes from the rest.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    waiting = [item for item in items if item.module.__name__ in WAITING]
    others = [item for item in items if item.module.__name__ not in WAITING]
    each = -(-len(others) // workers)
    items[:] = [
        item
        for number in range(workers)
        for item in _spread(waiting[number::workers], others[number * each :][:each])
    ]


def _spread(few, many):
    """`few` at even distances in the first nine tenths of `many`."""
    step = 0.9 * len(many) / max(len(few), 1)
    ends = [round(step * (number + 1)) for number in range(len(few))]
    starts = [0, *ends]
    for item, start, end in zip(few, starts, ends, strict=False):
        yield item
        yield from many[start:end]
    yield from many[starts[-1] :]


@pytest.fixture(scope="session")
def vision():
    return torchvision()


@pytest.fixture(scope="session")
def object_store():
    """An S3 endpoint on loopback; the environment says where, as it would in earnest."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "nothing",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(object_store):
    """The URI of an empty bucket."""
    name = f"bucket-{uuid4().hex}"
    urllib.request.urlopen(urllib.request.Request(f"{object_store}/{name}", method="PUT")).close()
    return f"s3://{name}"


def free_ports(count):
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def running_ray(folder, environment, *words):
    """The address of a Ray head on this machine, started by hand, away from any other."""
    port, client, agent = free_ports(3)
    command = f"start --head --block --port {port} --num-cpus {os.cpu_count()} --temp-dir {folder}"
    command += f" --ray-client-server-port {client} --dashboard-agent-listen-port {agent}"
    command += " --min-worker-port 0 --max-worker-port 0"
    process = subprocess.Popen(
        [Path(sys.executable).parent / "ray", *command.split(), *words],
        env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process:
        try:
            yield f"127.0.0.1:{port}"
        finally:  # asked politely it takes half a minute, and there is nothing to save
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                with suppress(psutil.NoSuchProcess):
                    each.kill()


@pytest.fixture(scope="session")
def ray_head():
    """The address of a Ray that lasts as long as this test process: starting one takes seconds."""
    from trials import wait_for

    with (
        tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder,
        running_ray(folder, {}, "--include-dashboard=false") as address,
    ):
        wait_for(lambda: ray_cluster.knock(address) or True)
        yield address


@pytest.fixture
def shared_ray(ray_head, monkeypatch):
    """What says nothing else joins the test process's own Ray."""
    monkeypatch.setenv("RAY_ADDRESS", ray_head)


class Net(nn.Module):
    """Every kind of layer that matters, an in-place activation, and one dead neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4, bias=False)
        self.norm = nn.GroupNorm(2, 8)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.2)
        self.fc1 = nn.Linear(8, 6)
        self.ln = nn.LayerNorm(6)
        self.fc2 = nn.Linear(6, 4)
        self.fc2.register_buffer("calls", torch.zeros(()))
        with torch.no_grad():
            self.conv.weight[3] = 0
            self.conv.bias[3] = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv(x)))
        x = self.relu(self.norm(self.grouped(x)))
        x = self.relu(self.ln(self.fc1(self.drop(x.mean((2, 3))))))
        self.fc2.calls += 1  # a buffer that even an evaluation changes
        return self.fc2(x)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def start_workers(function, arguments, count):
    """`function(rank, *arguments)` in so many processes, which need not import torch again."""
    modules = ["harness.run.attempt", "torch._dynamo"]  # the latter by the first optimiser
    get_context("forkserver").set_forkserver_preload(modules)
    multiprocessing.start_processes(function, arguments, nprocs=count, start_method="forkserver")


def train_epoch(model, optimizer, batches) -> None:
    model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def random_batches(count=3, size=8, classes=4, shape=(3, 6, 6), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(count)
    ]


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def mixed_results(tmp_path_factory):
    """Some of each: done, unfinished, failed, without a baseline, with a single seed and epoch."""
    from trials import run, small

    root = tmp_path_factory.mktemp("mixed")
    for seed in (0, 1):
        for method in ("random", "neq", "baseline"):
            run(small(method, seed=seed), root)
    run(small("neq", seed=2), root)  # no baseline to compare with
    run(small("random", seed=2), root, epochs=2)  # unfinished
    run(small("baseline", "recipe.optimizer.lr=1e30"), root)  # failed, in a group of its own
    run(small("baseline", "recipe.epochs=1"), root)  # one seed, in a group of its own
    return root


@pytest.fixture
def neqbench(monkeypatch, capsys):
    """The command line, called in this process: as the script does, but without its start."""

    def call(*arguments, columns=80):
        monkeypatch.setattr(sys, "argv", ["neqbench", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stopped:
            main()
        return Result(stopped.value.code, *capsys.readouterr())

    return call


def documented(page, file):
    """What a page of docs/ has a reader write to that file."""
    (block,) = re.findall(
        rf'^```\w+ title="{re.escape(file)}"\n(.*?)^```',
        (DOCS / page).read_text(),
        re.DOTALL | re.MULTILINE,
    )
    return block


@pytest.fixture
def toys(tmp_path):
    """A suite with methods of its own: a pruner, a regulariser, and the docs' freezer."""
    folder = tmp_path / "toys"
    shutil.copytree(
        Path(__file__).parent / "toys", folder, ignore=shutil.ignore_patterns("__pycache__")
    )
    (folder / "freezer.py").write_text(documented("your-method.md", "mine/freezer.py"))
    return folder
