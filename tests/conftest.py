import logging
import sys
import urllib.request
from dataclasses import dataclass
from uuid import uuid4

import pytest
import torch
from torch import Tensor, nn

from harness.cli import main
from harness.vision import torchvision


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
