"""Trials with `recipe.compile = true`, beside the same trials in eager mode.

Graphs are compiled to torch's own operators, which needs no compiler and takes seconds; one trial
is compiled in earnest.
"""

import json
from unittest.mock import patch

import pytest
import torch
from conftest import start_workers
from torch import distributed, nn
from torch.utils.flop_counter import FlopCounterMode
from trials import assert_same_results, results, run, toy

import neq
from harness import parallel
from harness.errors import UserError
from harness.run.preflight import preflight
from harness.storage.locations import open_location
from harness.storage.schema import Failure
from harness.suite.parts import build_model
from harness.train import compiling, tuning
from harness.train.assembly import assemble
from harness.train.loop import Loop

COMPILE = "recipe.compile=true"
SUITE = """
title = "Graphs that are small"
seeds = [0]
model = { build = "parts:model", arguments = { width = 6 }, input = [1, 16, 16], exclude = ["7"] }
data = { load = "suites.digits.data:load", train_size = 110, validation_size = 20 }
resources = { cpus = 1, gpus = 0 }

[task_arguments]
label_smoothing = 0.1
mixup = 0.2
classes = 10

[recipe]
epochs = 3
batch_size = 40  # of 90: the last batch has 10
precision = "float32"
optimizer = { name = "SGD", lr = 0.05, momentum = 0.9, weight_decay = 1e-3 }

[methods]
baseline = {}
neq = { eps = 0.1 }
neq-cut = { kind = "neq", eps = 0.1, gradient = "cut" }
neq-group = { eps = 0.1 }
random = { keep = 0.5 }
freeze-first = { flops = 0.6 }
smaller = { arguments = { width = 4 } }
lobster = { lam = 1e-3, sparsity = 0.5 }
serene = { lam = 1e-3, sparsity = 0.5 }
serene-local = { lam = 1e-3, sparsity = 0.5 }
"""
PARTS = """
from torch import nn


def model(width):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1),
        nn.Linear(9 * width, 10),
    )
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    compiling.start_anew()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "suite.toml").write_text(SUITE)
    (path / "parts.py").write_text(PARTS)
    return path


def pair(folder, method, *settings):
    """The trial compiled, and in eager mode."""
    return toy(folder, method, COMPILE, *settings), toy(folder, method, *settings)


def assert_alike(compiled, plain, root):
    """The same counts, and the same weights but for how sums round."""
    half = compiled.suite.recipe.precision != "float32"
    (ours, epochs, layers), (theirs, *tables) = (results(spec, root) for spec in (compiled, plain))
    for name, tensor in theirs["model"].items():
        torch.testing.assert_close(
            ours["model"][name], tensor, rtol=1e-3, atol=5e-3 if half else 1e-4
        )
    for table, beside in zip((epochs, layers), tables, strict=True):
        for name in table.column_names:
            if "flops" in name or "frozen" in name:
                assert table[name].equals(beside[name])
    return epochs["frozen_neurons"].to_pylist()


def test_a_key_has_it_only_where_it_is_set(folder):
    compiled, plain = pair(folder, "neq")
    assert "compile" not in plain.suite.experiment()["recipe"]
    assert toy(folder, "neq", "recipe.compile=false").key == plain.key
    assert compiled.group != plain.group
    with pytest.raises(UserError, match=r"recipe\.compile: Input should be a valid boolean"):
        toy(folder, "neq", "recipe.compile=perhaps")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("neq", ["recipe.forward_batch=16"]),
        ("neq-cut", ["recipe.precision=fp16"]),
        ("neq-group", []),
        ("lobster", []),
    ],
)
def test_it_trains_as_in_eager_mode_and_resumes_to_the_bit(tmp_path, folder, method, settings):
    compiled, plain = pair(folder, method, *settings)
    preflight([compiled])
    run(compiled, tmp_path)
    run(plain, tmp_path)
    frozen = assert_alike(compiled, plain, tmp_path)
    assert (frozen[-1] > 0) == ("neq" in method)
    for epochs in (2, None):
        compiling.start_anew()
        run(compiled, tmp_path / "resumed", epochs)
    assert_same_results(compiled, tmp_path, tmp_path / "resumed")


class Counted:
    """FLOPs that torch counts in backwards."""

    def __init__(self):
        self.total, self._backward = 0, torch.autograd.backward

    def __call__(self, loss):
        with FlopCounterMode(display=False) as counter:
            self._backward(loss)
        self.total += counter.get_total_flops()


def trained(spec):
    """By epoch what is said to execute, and what torch counts; kernels of the last, and weights."""
    model = build_model(spec.suite.model.build, spec.folder, spec.suite.model.arguments)
    table = {
        layer.name: {"dense": {layer.size: 1.0}, "gather": {layer.size - 1: 0.1}}
        for layer in neq.NeuronIndex(model).layers
        if isinstance(layer.module, (nn.Conv2d, nn.Linear))
    }
    tuned = tuning.Tuning(True, neq.Timings(table)).to_json()
    work = assemble(spec, torch.device("cpu"), None, {"tuning": tuned})
    loop = Loop(work, spec.suite.recipe, spec.seed)
    work.start()
    said, counts = [], []
    for epoch in range(3):
        frozen, plan = work.begin_epoch()
        loop.train(epoch)  # compiles
        with patch.object(torch.autograd, "backward", Counted()) as counted:
            loop.train(epoch)
        said.append(work.flops(frozen, plan)["backward_executed"])
        counts.append(int(parallel.add_up(torch.tensor(counted.total))))
        parallel.agree(work.model, work.method.state_dict())
        work.method.end_epoch(epoch)
    kernels = {part.kernel for part in plan.values()}
    return said, counts, kernels, [p.detach() for p in work.model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kernel"), [("random", "gather"), ("freeze-first", "skip")])
def test_an_epoch_executes_what_is_counted(folder, method, kernel):
    """Over forwards of several sizes, with a smaller last batch."""
    compiled, plain = pair(folder, method, "recipe.forward_batch=17")
    said, counts, kernels, weights = trained(compiled)
    assert counts == said
    assert said[1] < said[0]
    assert kernel in kernels
    others = trained(plain)
    assert others[0] == said
    for ours, theirs in zip(weights, others[-1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def worker(rank, folder, specs):
    torch.set_num_threads(1)
    compiling.BACKEND = "aot_eager"
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.save([trained(spec) for spec in specs], f"{folder}/{rank}.pt")
    distributed.barrier()  # gloo aborts a process that leaves while another still talks to it
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_workers_train_a_compiled_model(folder):
    settings = ["resources.workers=2", "recipe.forward_batch=10", "methods.neq-cut.eps=9"]
    specs = [spec for m in ("freeze-first", "neq-cut") for spec in pair(folder, m, *settings)]
    start_workers(worker, (str(folder), specs), 2)
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    for compiled, plain, other in zip(first[::2], first[1::2], second[::2], strict=True):
        assert compiled[0] == compiled[1] == plain[0]
        assert compiled[0][2] < compiled[0][0]
        assert "skip" in compiled[2]
        for ours, eager, theirs in zip(compiled[-1], plain[-1], other[-1], strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-3, atol=1e-4)
            assert torch.equal(ours, theirs)


@pytest.fixture
def batches(monkeypatch):
    """Sizes of the batches that graphs were compiled for, so far."""
    sizes = []

    def backend(graph, inputs):
        sizes.extend(x.shape[0] for x in inputs if x.dim() == 4 and x.shape[-1] == 16)
        return graph.forward

    monkeypatch.setattr(compiling, "BACKEND", backend)
    return sizes


@pytest.mark.slow
def test_each_size_of_a_batch_has_a_graph_and_keeps_it(tmp_path, folder, batches):
    """With one for all sizes a resumed trial would begin by another than it was broken off with."""
    run(pair(folder, "baseline")[0], tmp_path)
    assert batches == [40, 10]
    assert all(type(size) is int for size in batches)


@pytest.mark.slow
def test_a_trial_begins_without_the_graphs_of_others(tmp_path, folder, batches):
    """Beyond a few of them torch compiles a function no more."""
    with torch._dynamo.config.patch(recompile_limit=2):
        for width in (3, 4, 5):
            setting = f"methods.smaller.arguments={{width={width}}}"
            run(pair(folder, "smaller", "recipe.epochs=1", setting)[0], tmp_path)
    assert batches == [40, 10] * 3


@pytest.mark.slow
def test_tuning_is_of_compiled_steps_and_kept_apart(tmp_path, folder, batches):
    location, found = open_location(tmp_path, "tiny"), []
    for spec in pair(folder, "neq"):
        model = build_model(spec.suite.model.build, spec.folder, spec.suite.model.arguments)
        tuning.tuning_for(location, spec.suite, model)
        found.append(batches[:])
    assert found[0][:2] == [40, 40]  # in two memory formats
    assert found[1] == found[0]
    kept = [json.loads(path.read_text()) for path in (tmp_path / "tiny" / "tuning").glob("[!.]*")]
    assert sorted(one.pop("compile", None) is True for one in kept) == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["serene", "serene-local"])
def test_methods_that_look_at_layers_are_refused(tmp_path, folder, method):
    compiled, plain = pair(folder, method)
    words = f"method {method} looks at layers .* can't be trained with recipe.compile.*; drop it"
    with pytest.raises(UserError, match=words) as raised:
        preflight([compiled])
    assert "\n" not in str(raised.value)
    (failure,) = (event for event in run(compiled, tmp_path) if isinstance(event, Failure))
    assert failure.reason in str(raised.value)
    preflight([plain])


BY_GRADIENT = """
import torch

from harness.methods import Method


class Mine(Method):
    def __init__(self, training):
        super().__init__(training)
        self.layer, self.outputs, self.found = training.model[3], [], 0.0
        {prepare}

    def after_forward(self, inputs, targets, outputs, *, weight, last):
        if self.training.model[1].num_batches_tracked == 1:  # later its graph has been kept once
            return
        (gradient,) = torch.autograd.grad(
            outputs.square().sum(), {of}, retain_graph=True, allow_unused=True{more}
        )
        {then}
        self.outputs.clear()
        self.found = 0.0 if gradient is None else float(gradient.detach().abs().mean())

    @torch.no_grad()
    def after_step(self):
        self.layer.weight.mul_(1 - 0.1 * min(self.found, 1))
"""
WRAPPED = """
        forward = self.layer.forward

        def seen(x):
            self.outputs.append(forward(x))
            return self.outputs[-1]

        self.layer.forward = seen"""
HOOKED = "self.layer.register_forward_hook(lambda *a: self.outputs.append(a[-1]))"
SECOND = "torch.autograd.grad(gradient.square().sum(), self.layer.weight, retain_graph=True)"
LAST = "self.outputs[-1]"


def own(folder, **how):
    how = {"prepare": "pass", "of": "self.layer.weight", "more": "", "then": ""} | how
    (folder / "mine.py").write_text(BY_GRADIENT.format(**how))
    return pair(folder, "mine", "methods.mine={build='mine:Mine'}")


@pytest.mark.slow
def test_a_method_of_ones_own_may_go_back_through_the_graph(tmp_path, folder):
    compiled, plain = own(folder)
    preflight([compiled])
    for spec in (compiled, plain):
        assert not [event for event in run(spec, tmp_path) if isinstance(event, Failure)]
    assert_alike(compiled, plain, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"prepare": HOOKED, "of": LAST}, "method mine looks at layers one by one, and can't be"),
        ({"prepare": WRAPPED, "of": LAST}, "method mine trains to other weights with recipe.comp"),
        (
            {"more": ", create_graph=True", "then": SECOND},
            "after_forward.. failed: .*double backward.*; without recipe.compile it does not fail",
        ),
    ],
)
def test_what_a_compiled_graph_can_not_tell_is_refused(folder, how, words):
    compiled, plain = own(folder, **how)
    preflight([plain])
    with pytest.raises(UserError, match=words) as raised:
        preflight([compiled])
    assert "\n" not in str(raised.value)


def test_without_a_compiler_one_line_says_so_before_the_first_step(tmp_path, folder, monkeypatch):
    spec, _ = pair(folder, "baseline")
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    with torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}):
        words = r"torch.compile needs a C\+\+ compiler.*; install g\+\+.* without recipe.compile"
        with pytest.raises(UserError, match=words) as raised:
            compiling.check_compiler(torch.device("cpu"))
        *_, failure = run(spec, tmp_path)
    assert isinstance(failure, Failure)
    assert failure.reason == str(raised.value)
    assert "\n" not in failure.reason
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match=r"needs Python.h, .*; install python3-dev"):
        compiling.check_compiler(torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "triton", "words"),
    [((6, 1), True, "has no use for a P100, too old"), ((8, 0), False, "needs Triton on a GPU")],
)
def test_without_a_compiler_for_the_gpu(monkeypatch, capability, triton, words):
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a P100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.utils._triton, "has_triton_package", lambda: triton)
    with pytest.raises(UserError, match=words):
        compiling.check_compiler(torch.device("cuda"))


@pytest.mark.slow
def test_by_inductor_it_resumes_to_the_bit(tmp_path, folder, monkeypatch):
    """With a compiled last batch of its own size, and layers frozen whole in the end."""
    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    try:
        compiling.check_compiler(torch.device("cpu"))
    except UserError as error:
        pytest.skip(str(error))
    dense = "import torch\n\n\ndef model(width):\n    linear = torch.nn.Linear\n    return "
    dense += "torch.nn.Sequential(torch.nn.Flatten(), linear(256, width), linear(width, 10))\n"
    (folder / "parts.py").write_text(dense)
    compiled, plain = pair(folder, "neq", "methods.neq.eps=9", "model.exclude=['2']")
    for spec in (compiled, plain):
        run(spec, tmp_path)
    assert assert_alike(compiled, plain, tmp_path)[-1] == 6
    for epochs in (2, None):
        compiling.start_anew()
        run(compiled, tmp_path / "resumed", epochs)
    assert_same_results(compiled, tmp_path, tmp_path / "resumed")
