"""`neqbench doctor` on the docs' example of a suite, with one thing wrong in it.

That nothing is wrong in it as it is, docs/your-suite.md shows.
"""

import re

import pytest
from conftest import documented


@pytest.fixture
def blobs(tmp_path):
    """The suite as the docs have it."""
    folder = tmp_path / "blobs"
    folder.mkdir()
    for file in ("suite.toml", "parts.py"):
        (folder / file).write_text(documented("your-suite.md", f"blobs/{file}"))
    return folder


CHANCE = "import random, time\nfrom harness import data\n"
WRONG = {
    "no baseline": ("suite.toml", "[methods.baseline]", "", "the suite file", "add .methods.base"),
    "a key": ("suite.toml", "epochs = 12", "epoch = 12", "the suite file", "unknown key"),
    "no model": ("parts.py", "def model", "def modell", "the model", "cannot be loaded"),
    "an unseeded model": (
        "parts.py",
        "    return nn.Sequential",
        "    torch.seed()\n    return nn.Sequential",
        "the model",
        "two models built from one seed differ in conv.weight",
    ),
    "another size": (
        "suite.toml",
        "[1, 12, 12]",
        "[1, 14, 14]",
        "the samples",
        "images are .1, 12",
    ),
    "unstable data": (
        "parts.py",
        "manual_seed(seed)",
        "manual_seed(torch.seed() % 2**40)",
        "the data",
        "differ each time they are loaded",
    ),
    "a large batch": ("suite.toml", "batch_size = 32", "batch_size = 999", "the data", "lower it"),
    "labels": ("parts.py", "torch.randint(4, (", "torch.randint(6, (", "the task", "labels from"),
    "one label of many": (
        "parts.py",
        "    for image, label in",
        "    labels[count - 5] += 4\n    for image, label in",
        "the task",
        "labels from 0 to [4-7] do not fit",
    ),
    "no images": (
        "parts.py",
        "return Images(",
        "return dict(",
        "the data",
        "not Images or Samples",
    ),
    "an excluded": (
        "suite.toml",
        'exclude = ["head"]',
        'exclude = ["tail"]',
        "the model",
        "no layer is called 'tail'",
    ),
    "all excluded": (
        "suite.toml",
        'exclude = ["head"]',
        'exclude = ["conv", "norm", "head"]',
        "the methods",
        "no neuron may freeze",
    ),
    "an optimizer": ("suite.toml", '"SGD"', '"SDG"', "the methods", "unknown name 'SDG'"),
    "a hidden state": (
        "parts.py",
        "relu=nn.ReLU(inplace=True)",
        "relu=Counting()",
        "a resumed trial",
        "resumed ended with other weights",
    ),
    "a count": (
        "parts.py",
        "relu=nn.ReLU(inplace=True)",
        "relu=Changing()",
        "the accounting",
        "differ",
    ),
}
HIDDEN = """

class Counting(nn.ReLU):
    calls = 0
    def forward(self, x):
        self.calls += self.training
        return super().forward(x) * (1 + 0.01 * self.calls)


class Changing(nn.ReLU):
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls % 2:
            x = x + (x.flatten(1) @ x.flatten(1).T).mean()
        return super().forward(x)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named_where_it_is(blobs, neqbench, what):
    file, before, after, where, message = WRONG[what]
    text = (blobs / file).read_text()
    assert before in text
    (blobs / file).write_text(text.replace(before, after))
    (blobs / "parts.py").write_text((blobs / "parts.py").read_text() + HIDDEN)
    done = neqbench("doctor", blobs, columns=300)
    assert done.returncode == 1, done.stdout
    *fine, last = done.stdout.splitlines()
    assert all(line.startswith("ok ") for line in fine)
    assert last.startswith(f"wrong {where}: ")
    assert re.search(message, last)


SAMPLES = """

from harness.data import Samples
from harness.tasks import Accuracy, Task
import random, time

class Numbers:
    labels = torch.arange(60) % 4
    def __len__(self): return 60
    def __getitem__(self, i): return torch.full((1, 12, 12), i, dtype=torch.uint8), i % 4

def still(image, target): return image.float() / 60, target
def drawn(image, target): return image.float() / 60 + random.random(), target
def clock(image, target): return image.float() / 60 + time.perf_counter(), target
def whole(image, target): return image, target

def samples(options, transform=still, validation=still):
    return Samples(name="numbers", train=Numbers(), test=Numbers(), train_transform=transform,
                   validation_transform=validation, options=options)

def by_chance(options): return samples(options, clock)
def validated_by_chance(options): return samples(options, validation=drawn)
def really_by_chance(options): return samples(options, validation=clock)
def of_bytes(options): return samples(options, whole)

class Own(Task):
    metric = "own"
    def loss(self, outputs, targets): return nn.functional.cross_entropy(outputs, targets)
    def meter(self, device): return Accuracy(device)

class Nameless(Own):
    metric = None

class Sums(Own):
    def loss(self, outputs, targets): return super().loss(outputs, targets).expand(3)

class Last(Accuracy):
    def add(self, outputs, targets): self.counts = torch.tensor([1, len(targets)])

class Forgetful(Own):
    def meter(self, device): return Last(device)

class Percent(Accuracy):
    def value(self): return 101.0

class Percents(Own):
    def meter(self, device): return Percent(device)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "load, task, where, message",
    [
        ("samples", "Own", "", ""),
        ("validated_by_chance", "Own", "", ""),  # drawn from streams that are seeded
        ("by_chance", "Own", "the order", "two passes over the same epoch differ"),
        ("really_by_chance", "Own", "the order", "two passes over the validation images differ"),
        ("of_bytes", "Own", "the samples", "must be finite float32, got torch.uint8"),
        ("samples", "Nameless", "the task", "has no metric: name what its meter measures"),
        ("samples", "Sums", "the task", "the loss must be one finite number"),
        ("samples", "Forgetful", "the task", "do not add up"),
        ("samples", "Percents", "the task", "must be a share from 0 to 1, got 101"),
        ("samples", "Numbers", "the task", "not a harness.tasks.Task"),
    ],
)
def test_samples_and_tasks_of_one_s_own(blobs, neqbench, load, task, where, message):
    (blobs / "parts.py").write_text((blobs / "parts.py").read_text() + SAMPLES)
    text = (blobs / "suite.toml").read_text().replace("parts:load", f"parts:{load}")
    (blobs / "suite.toml").write_text(f'task = "parts:{task}"\n' + text)
    done = neqbench("doctor", blobs, columns=300)
    assert done.returncode == bool(where), done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"wrong {where}: " if where else "ok ")
    assert message in last


def test_a_suite_that_is_not_there(neqbench):
    done = neqbench("doctor", "/no/such/folder")
    assert done.returncode == 2
    assert "unknown suite" in done.stderr
