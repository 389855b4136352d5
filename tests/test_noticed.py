"""What `run` and `doctor` notice in a model before hours are spent on it."""

import json
from itertools import takewhile

import pytest
import torch
from torch import nn
from trials import run, toy

from harness.commands.doctor_suite import examine_suite
from harness.commands.flops import count
from harness.errors import UserError
from harness.flops.subject import subject
from harness.run.preflight import preflight
from harness.run.trials import specs
from harness.storage.locations import StorageError, open_location
from harness.storage.store import Store
from harness.suite.parts import build_model
from harness.train import tuning

SUITE = """
title = "Noticed"
seeds = [0, 1]
data = {{ load = "suites.digits.data:load", train_size = 60, validation_size = 20 }}
resources = {{ cpus = 1, gpus = 0 }}

[model]
build = "parts:model"
input = [1, 16, 16]
exclude = ["head"]
{model}

[recipe]
epochs = 2
batch_size = 20
precision = "float32"
optimizer = {{ name = "SGD", lr = 0.05 }}

[methods]
baseline = {{}}
neq = {{ eps = 0.01 }}
{methods}
"""
PLAIN = """
import random
import numpy
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4, skip=0.0, draw=random.random):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, stride=4)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(16 * width, 10)
        self.skip, self.draw = skip, draw

    def forward(self, x):
        x = self.conv(x)
        for block in self.blocks:
            if not (self.training and self.draw() < self.skip):
                x = x + block(x).relu()
        return self.head(x.flatten(1))

"""


@pytest.fixture
def made(tmp_path):
    """A suite with a model function of this body."""

    def suite(body, model="", methods=""):
        folder = tmp_path / "noticed"
        folder.mkdir()
        (folder / "suite.toml").write_text(SUITE.format(model=model, methods=methods))
        (folder / "parts.py").write_text(f"{PLAIN}\ndef model(width=4, skip=0.0):\n    {body}\n")
        return folder

    return suite


def examined(folder):
    """What doctor finds until it has looked at the model."""
    findings = examine_suite(str(folder), [])
    return [*takewhile(lambda finding: finding.what in ("the suite file", "the model"), findings)]


def group(folder, methods="baseline,neq"):
    return specs(str(folder), [], methods, "0").groups()[0]


# Sizes that are not known


def test_a_lazy_layer_is_named_by_all_who_build_the_model(made, neqbench, tmp_path):
    folder = made("return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))")
    for words in (
        ("run", folder, "--results", tmp_path / "results", "--executor", "inline"),
        ("flops", folder),
        ("speed", folder),
    ):
        done = neqbench(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "layer 1, a LazyLinear, has no size yet; run one forward" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    wrong = examined(folder)[-1]
    assert wrong.what == "the model"
    assert "layer 1, a LazyLinear, has no size yet" in wrong.wrong


def test_a_lazy_model_that_has_run_is_as_any_other(made):
    body = "net = nn.Sequential(nn.Flatten(), nn.LazyLinear(9), nn.Linear(9, 10))"
    folder = made(f"{body}\n    net(torch.zeros(1, 1, 16, 16))\n    return net", model="")
    assert len(subject(str(folder), ["model.exclude=[]"], None, None).costs.neurons) == 19


def test_an_error_of_tuning_is_not_taken_for_a_damaged_file(made, tmp_path, monkeypatch):
    spec = group(made("return Net(width)"))[0]
    model = build_model(spec.suite.model.build, spec.folder, {})
    place = open_location(str(tmp_path / "results"))

    def fails(*_arguments):
        raise ValueError("of the model's own")

    monkeypatch.setattr(tuning, "tune", fails)
    with pytest.raises(ValueError, match="of the model's own"):
        tuning.tuning_for(place, spec.suite, model)
    monkeypatch.setattr(tuning, "tune", lambda *_: tuning.Tuning())
    tuning.tuning_for(place, spec.suite, model)
    (kept,) = (tmp_path / "results" / "tuning").glob("*.json")
    for text in ("{", "[]", "3", '{"channels_last": 1, "timings": {}}'):
        kept.write_text(text)
        with pytest.raises(StorageError, match=f"{kept.name} is damaged; delete it"):
            tuning.tuning_for(place, spec.suite, model)


# Layers that are left out at random


@pytest.mark.slow
def test_a_run_with_layers_left_out_at_random_ends_before_it_begins(made, neqbench, tmp_path):
    folder = made("return Net(width, skip)", model="arguments = { skip = 0.2 }")
    done = neqbench("run", folder, "--results", tmp_path / "results", "--executor", "inline")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the model leaves layers out at random (blocks." in line
    assert "switch that off, for instance by model.arguments" in line
    assert not list((tmp_path / "results").glob("*/trials/*"))
    preflight(specs(str(folder), ["model.arguments.skip=0.0"], "baseline", "0"))


@pytest.mark.slow
def test_the_model_of_a_method_is_looked_at_as_the_suite_s(made):
    folder = made("return Net(width, skip)", methods="smaller = { arguments = { skip = 0.5 } }")
    preflight(group(folder, "baseline"))
    with pytest.raises(UserError, match=r"methods.smaller: the model with .*skip.* at random"):
        preflight(group(folder, "baseline,smaller"))
    folder.joinpath("suite.toml").write_text(
        SUITE.format(model="", methods="smaller = { arguments = { width = 2 } }")
    )
    preflight(group(folder, "baseline,smaller"))  # dense FLOPs differ, and may


# Seeds that begin alike

ALIKE = {
    "torch": ("torch.manual_seed(0)", r"sets the seed itself \(torch.manual_seed\)"),
    "all": (
        "torch.manual_seed(0); random.seed(0); numpy.random.seed(0)",
        r"\(torch.manual_seed, numpy.random.seed, random.seed\)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ALIKE)
def test_a_builder_that_seeds_itself_is_refused(made, how):
    seeding, message = ALIKE[how]
    folder = made(f"{seeding}\n    return Net(width)")
    with pytest.raises(UserError, match=message):
        preflight(group(folder))
    assert "all seeds begin with the same weights; leave that out" in examined(folder)[-1].wrong


FROM_NUMPY = """net = Net(width)
    for p in net.parameters():
        p.data = torch.from_numpy(numpy.random.randn(*p.shape)).float()
    return net"""


def test_a_builder_that_draws_from_numpy_and_seeds_it_is_refused(made):
    with pytest.raises(UserError, match=r"itself \(numpy.random.seed\), so that all seeds"):
        preflight(group(made(f"numpy.random.seed(1)\n    {FROM_NUMPY}")))


def test_a_builder_that_draws_from_numpy_is_fine(made):
    said = []
    preflight(group(made(FROM_NUMPY)), said.append)
    assert said == []


WARNED = {
    "constants": "net = Net(width)\n    [nn.init.zeros_(p) for p in net.parameters()]\n",
    "a stream of its own": "net = Net(width)\n    own = torch.Generator().manual_seed(0)\n"
    "    [nn.init.normal_(p, generator=own) for p in net.parameters()]\n",
    "a stream that is put back": "with torch.random.fork_rng():\n        torch.manual_seed(0)\n"
    "        net = Net(width)\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", WARNED)
def test_weights_that_are_alike_without_seeding_are_a_line(made, how):
    folder, said = made(f"{WARNED[how]}    return net"), []
    preflight(group(folder), said.append)
    (line,) = said
    assert "'parts:model' gives all seeds the same first weights" in line
    *_, finding = examined(folder)
    assert (finding.note, finding.wrong) == (True, "")
    assert "gives all seeds the same first weights" in finding.found


def test_what_is_partly_alike(made):
    said = []
    folder = made(
        "net = Net(width)\n    torch.manual_seed(0)\n    nn.init.normal_(net.head.weight)\n"
        "    return net"
    )
    preflight(group(folder), said.append)
    (line,) = said
    assert "sets the seed itself (torch.manual_seed): head.weight begins alike" in line


def test_seeding_that_no_weight_follows_from_is_nothing(made):
    said = []
    preflight(group(made("random.seed(0)\n    return Net(width)")), said.append)
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("seeding", ["", "torch.manual_seed(3)"])
def test_weights_that_the_suite_gives_are_meant_to_be_alike(made, tmp_path, seeding):
    path, said = tmp_path / "weights.pt", []
    folder = made(f"{seeding or 'pass'}\n    return Net(width)", model=f'weights = "{path}"')
    torch.save(build_model("parts:model", folder, {}).state_dict(), path)
    preflight(group(folder), said.append)
    assert said == []


def test_constants_of_a_builder_that_seeds_itself_may_be_meant(made):
    """Nothing is drawn that the seeding could hold back."""
    folder, said = made(f"torch.manual_seed(0)\n    {WARNED['constants']}    return net"), []
    preflight(group(folder), said.append)
    (line,) = said
    assert "gives all seeds the same first weights" in line
    assert "sets the seed itself" not in line


# What no count holds

RECURRENT = """
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.head = nn.LSTM(16, 4, batch_first=True), nn.Linear(4, 10)

        def forward(self, x):
            return self.head(self.memory(x.squeeze(1))[0][:, -1])

    return Recurrent()"""


def test_operators_that_are_in_no_count_are_a_warning_of_run(made, neqbench, tmp_path):
    words = ("--executor", "inline", "--methods", "baseline", "--seeds", "0", "--no-replay")
    folder = made(RECURRENT, model="arguments = {}")
    done = neqbench("run", folder, *words, "--results", tmp_path / "results", columns=300)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: suite noticed: the FLOPs of ")
    assert "lstm" in line


# Layers that the model fixes

FIXED = "net = Net(width)\n    net.conv.requires_grad_(False)\n    return net"


def test_fixed_layers_are_counted_apart(made, tmp_path):
    folder = made(FIXED)
    spec = toy(folder, "random", "methods.random.keep=0.0")
    run(spec, tmp_path)
    store = Store(tmp_path, spec.suite.name)
    rows = store.read("epochs").to_pylist()
    # Of 4 + 4 · 4 + 10 neurons the convolution's are fixed, and the head is excluded.
    assert [(r["frozen_neurons"], r["fixed_neurons"], r["total_neurons"]) for r in rows] == [
        (0, 4, 30),
        (16, 4, 30),
    ]
    layers = {(r["epoch"], r["layer"]): r["frozen"] for r in store.read("layers").to_pylist()}
    assert (layers[1, "conv"], layers[1, "blocks.0"], layers[1, "head"]) == (0, 4, 0)


def test_flops_draws_among_those_that_may_freeze(made, neqbench):
    folder = made(FIXED)
    counted = count(subject(str(folder), [], None, None), 1.0, 0, verify=True)
    found = counted.json()
    assert (found["fixed"], found["frozen"]) == (pytest.approx(4 / 30), pytest.approx(16 / 30))
    assert counted.agrees
    done = neqbench("flops", folder, "--frozen", "1")
    assert "fixed by the model (requires_grad=False)    13.33%" in done.stdout
    done = neqbench("flops", "digits", "--format", "json")
    assert json.loads(done.stdout)["fixed"] == 0
    assert "fixed" not in neqbench("flops", "digits").stdout


OWN = """
import torch
from harness.methods import Method


class Own(Method):
    @property
    def frozen(self):
        return torch.arange(len(self.training.costs.neurons)) < 20
"""


def test_a_mask_of_one_s_own_does_not_freeze_what_is_fixed(made, tmp_path):
    folder = made(
        "net = Net(width)\n    net.requires_grad_(False)\n    net.head.requires_grad_()\n"
        "    return net",
        methods='own = { build = "own:Own" }',
    )
    (folder / "own.py").write_text(OWN)
    spec = toy(folder, "own")
    preflight([spec])
    run(spec, tmp_path)
    rows = Store(tmp_path, spec.suite.name).read("epochs").to_pylist()
    assert [(r["frozen_neurons"], r["fixed_neurons"]) for r in rows] == [(0, 20)] * 2
    head = 2 * 40 * 64 * 10  # its weight gradient; nothing upstream trains
    for name in ("dense", "required", "executed"):
        assert {r[f"backward_flops_{name}"] for r in rows} == {head}


ALL_BUT_THE_HEAD = (
    "net = Net(width)\n    net.requires_grad_(False)\n    net.head.requires_grad_()\n    return net"
)
WHY = "that the model does not fix itself (requires_grad=False)"


def test_doctor_says_why_no_neuron_may_freeze(made):
    *_, last = examine_suite(str(made(ALL_BUT_THE_HEAD)), [])
    assert last.what == "the methods"
    assert "no neuron may freeze: model.exclude names every supported layer" in last.wrong
    assert WHY in last.wrong


def test_run_says_it_before_it_trains(made, neqbench, tmp_path):
    folder, results = made(ALL_BUT_THE_HEAD), tmp_path / "results"
    done = neqbench("run", folder, "--results", results, "--executor", "inline")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "suite noticed: no neuron may freeze: " in line
    assert line.endswith(WHY)
    assert not list(results.glob("*/trials/*"))


def test_run_says_it_where_every_layer_is_excluded(made):
    settings = ['model.exclude=["conv", "blocks", "head"]']
    with pytest.raises(UserError, match=r"no neuron may freeze: .* every supported layer$"):
        preflight(specs(str(made("return Net(width)")), settings, "baseline,neq", "0"))


@pytest.mark.parametrize("methods", ["baseline", "baseline,one-shot"])
def test_who_freezes_nothing_may_train_what_can_t_freeze(made, methods):
    preflight(group(made(ALL_BUT_THE_HEAD, methods="one-shot = { sparsity = 0.5 }"), methods))


def test_plain_training_without_a_layer_to_count_is_told(made, neqbench, tmp_path):
    """Nothing but an activation trains: the dense backward has no FLOPs."""
    folder = made(
        "net = Net(width)\n    net.requires_grad_(False)\n"
        "    net.head = nn.Sequential(net.head, nn.PReLU())\n    return net"
    )
    words = ("--results", tmp_path / "results", "--executor", "inline", "--no-replay")
    done = neqbench("run", folder, "--methods", "baseline", "--seeds", "0", *words)
    assert (done.returncode, done.stderr) == (0, "")
    counted = json.loads(neqbench("flops", folder, "--format", "json").stdout)
    assert counted["backward"]["dense"] == 0


# oneDNN's narrow 1 × 1 convolutions


def narrow(*arguments, **named):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(*arguments, **named))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (narrow(8, 16, 1, stride=2), ["1"]),
        (narrow(8, 16, 1, stride=(1, 2)), ["1"]),
        (narrow(64, 64, 1, stride=2, groups=8), ["1"]),
        (narrow(8, 16, 1), []),
        (narrow(8, 16, 3, stride=2), []),
        (narrow(16, 16, 1, stride=2), []),
    ],
)
def test_narrow_strided_convolutions_are_named(model, names):
    assert tuning.narrow_strided(model) == names


@pytest.mark.parametrize(("precision", "formats"), [("float32", 1), ("bf16", 2)])
def test_channels_last_is_not_chosen_for_them(monkeypatch, precision, formats):
    seen = []

    def fastest(known, *_):
        seen.append(len(known))
        return known[-1]

    monkeypatch.setattr(tuning, "_fastest", fastest)
    monkeypatch.setattr(tuning.neq, "measure", lambda *_: tuning.neq.Timings())
    found = tuning.tune(narrow(8, 16, 1, stride=2), (3, 8, 8), 2, precision)
    assert found.channels_last == (formats == 2)
    assert seen == ([2] if formats == 2 else [])
    assert tuning.tune(narrow(16, 16, 1, stride=2)[:1], (3, 8, 8), 2, "float32").channels_last


def test_doctor_notes_them(made):
    folder = made(
        "net = Net(width)\n    net.blocks[1] = nn.Sequential(nn.Conv2d(width, width, 1, "
        "stride=2), nn.Upsample(scale_factor=2))\n    return net"
    )
    *_, finding = examined(folder)
    assert finding.note
    assert finding.found.startswith(
        "layer blocks.1.0: in channels last and float32 on a CPU, oneDNN"
    )
