import json
import shutil
from threading import Thread

import pandas as pd
import pytest
import torch
from torch import nn
from trials import SLOT, assert_same_results, keep_tuning, small

import neq
from harness.errors import UserError
from harness.run.attempt import attempt
from harness.storage.locations import open_location
from harness.storage.store import Store
from harness.suite.parts import build_model
from harness.train import tuning
from suites.resnet import resnet8


def test_it_is_measured_once_while_others_wait(tmp_path, monkeypatch):
    suite, model, calls = small("neq").suite, resnet8(), []

    def slow(*_arguments):
        calls.append(1)
        return tuning.Tuning(False, neq.Timings({"fc": {"dense": {10: 0.1 + len(calls)}}}))

    monkeypatch.setattr(tuning, "tune", slow)
    found = []

    def ask():
        found.append(tuning.tuning_for(open_location(tmp_path, "digits"), suite, model))

    threads = [Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert all(one == found[0] for one in found)
    (path,) = (tmp_path / "digits" / "tuning").glob("[!.]*.json")
    kept = json.loads(path.read_text())
    assert (kept["batch_size"], kept["precision"]) == (40, "float32")
    assert "thread" in kept["hardware"]
    other = small("neq", "recipe.batch_size=20").suite
    tuning.tuning_for(open_location(tmp_path, "digits"), other, model)
    assert len(calls) == 2


def test_a_damaged_file_is_named(tmp_path):
    spec = small("baseline")
    keep_tuning(spec, tmp_path)
    (path,) = (tmp_path / "digits" / "tuning").glob("[!.]*.json")
    path.write_text("{")
    with pytest.raises(UserError, match="is damaged; delete it"):
        keep_tuning(spec, tmp_path)


def test_tuning_leaves_model_and_random_streams_alone(net):
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    found = tuning.tune(net, (3, 6, 6), 4, "bf16")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert set(found.timings.layers) == {"conv", "grouped", "fc1", "fc2"}
    assert tuning.Tuning.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert not tuning.tune(nn.Linear(4, 3), (4,), 2, "float32").channels_last


def run(spec, root, epochs=None):
    events = attempt(spec, str(root), SLOT)
    for seen, _ in enumerate(events):
        if seen == epochs:
            events.close()


@pytest.mark.slow
def test_a_trial_uses_it_and_keeps_its_own(tmp_path, monkeypatch):
    """Other choices, made later in the same folder, change nothing for a trial that has begun."""
    spec = small("neq")
    model = build_model(spec.suite.model.build, spec.folder, spec.suite.model.arguments)
    table = {
        layer.name: {"dense": {layer.size: 1.0}, "gather": {layer.size - 1: 0.1}}
        for layer in neq.NeuronIndex(model).layers
        if isinstance(layer.module, (nn.Conv2d, nn.Linear))
    }
    chosen = tuning.Tuning(True, neq.Timings(table))
    monkeypatch.setattr(tuning, "tune", lambda *_: chosen)
    run(spec, tmp_path / "through")
    run(spec, tmp_path / "resumed", epochs=3)
    shutil.rmtree(tmp_path / "resumed" / "digits" / "tuning")
    monkeypatch.setattr(tuning, "tune", lambda *_: tuning.Tuning())
    run(spec, tmp_path / "resumed")
    assert_same_results(spec, tmp_path / "through", tmp_path / "resumed")
    checkpoint = Store(tmp_path / "through", "digits").load_checkpoint(spec.key)
    assert tuning.Tuning.from_json(checkpoint["tuning"]) == chosen
    weight = checkpoint["model"]["layer1.0.conv1.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last)
    epochs = pd.read_parquet(tmp_path / "through" / "digits" / "epochs")
    assert (epochs["backward_flops_executed"] == epochs["backward_flops_required"]).all()


@pytest.mark.slow
def test_cut_is_named_and_counted(tmp_path):
    spec = small("neq-cut")
    keep_tuning(spec, tmp_path)
    run(spec, tmp_path)
    trial = Store(tmp_path, "digits").trial(spec.key)
    assert json.loads(trial["parameters"])["gradient"] == "cut"
    epochs = pd.read_parquet(tmp_path / "digits" / "epochs")
    last = epochs.iloc[-1]
    assert last["frozen_neurons"] > 0
    assert last["backward_flops_required"] <= last["backward_flops_executed"]
    assert last["backward_flops_executed"] < last["backward_flops_dense"]
