"""Neurons freeze in the docs' loop with Accelerate, also in one that was killed and resumed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate_fit import train
from trainer_fit import padded
from trials import wait_for

import neq
from harness import verify

SCRIPT = Path(__file__).with_name("accelerate_fit.py")
PAGE = SCRIPT.parents[1] / "docs" / "integrations.md"


def proof_of(freezer):
    """Of a real step on some samples."""
    batch = padded([{"input_ids": torch.arange(1, n), "labels": n % 3} for n in (5, 9, 12, 7)])
    return verify(freezer, batch, lambda model, batch: model(**batch).loss)


@pytest.fixture(autouse=True, scope="module")
def fresh_accelerate():
    """What a process has told Accelerate holds until its end."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), cpu=True)


def assert_same(one, other):
    for first, second in zip(one[1].parameters(), other[1].parameters(), strict=True):
        assert torch.equal(first, second)
    states = [result[2].state_dict()["state"] for result in (one, other)]
    for place, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][place][name]), name
    assert torch.equal(one[3].frozen, other[3].frozen)


def loop_of(text):
    """The lines of the loop, from what it resumes to the name of a checkpoint, without comments."""
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("if saved :="))
    last = next(i for i, line in enumerate(lines) if ".rename(" in line)
    return [line for line in lines[first : last + 1] if line != "watch(freezer)"]


def test_the_docs_show_this_loop():
    assert loop_of(PAGE.read_text()) == loop_of(SCRIPT.read_text())


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_same(tmp_path, whole):
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, "-W", "ignore", SCRIPT, tmp_path, "21"]  # within the last epoch
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            wait_for(lambda: (tmp_path / "held").exists() or process.poll() is not None)
        finally:
            process.kill()
        assert process.wait() == -9, process.stderr.read()
    assert sorted(p.name for p in tmp_path.glob("epoch-*"))[-1] == "epoch-0002"
    proofs = []
    resumed = train(tmp_path, watch=lambda freezer: proofs.append(proof_of(freezer)), cpu=True)
    assert_same(resumed, whole)
    (proof,) = proofs
    assert sum(layer.frozen for layer in proof.layers) == int(whole[3].frozen.sum()) > 0
    assert proof.measured == proof.counted < proof.dense


@pytest.mark.slow
def test_rows_stand_still_in_half_precision(tmp_path):
    """The forward of the prepared model is an attribute with an autocast, which deciding avoids."""
    kinds, rows = set(), []
    AcceleratorState._reset_state(reset_partial_state=True)

    def watch(freezer):
        layer = freezer.neurons.layers[3]
        if freezer.epoch == 1:
            layer.module.register_forward_hook(lambda m, _, out: kinds.add((m.training, out.dtype)))
        rows.append((freezer.frozen, [p.detach().clone() for p in layer.parameters]))

    *_, freezer = train(tmp_path, 3, watch=watch, mixed_precision="bf16", cpu=True)
    layer = freezer.neurons.layers[3]
    frozen, before = rows[-1]
    mine = frozen[layer.neurons]
    assert 0 < int(mine.sum()) < layer.size
    for parameter, then in zip(layer.parameters, before, strict=True):
        assert torch.equal(parameter[mine], then[mine])
        assert not torch.equal(parameter[~mine], then[~mine])
    assert kinds == {(True, torch.bfloat16), (False, torch.float32)}
    assert proof_of(freezer).measured < proof_of(freezer).dense


def test_a_step_copies_no_layer_that_is_frozen_whole(monkeypatch):
    """Accelerate's optimizers call it as step(None), Lightning's with a closure."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    freezer = neq.NeuronFreezer(model, optimizer)
    freezer.freeze(torch.ones(2, dtype=torch.bool))
    copied = []
    index_select = torch.Tensor.index_select

    def noted(tensor, *arguments):
        copied.append(tensor.shape)
        return index_select(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "index_select", noted)
    optimizer.step(None)
    optimizer.step(lambda: model(torch.ones(1, 3)).sum())
    assert not copied
