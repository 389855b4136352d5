import gc
import os
import random
import weakref

import numpy
import pandas as pd
import pytest
import torch
from trials import (
    METHODS,
    SLOT,
    WIDE,
    assert_same_results,
    keep_tuning,
    results,
    run,
    same,
    slow,
    small,
)

from harness.run.attempt import attempt
from harness.run.events import Halted, Started
from harness.storage.owner import Owner
from harness.storage.provenance import Slot
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store


def records(events):
    return [event for event in events if isinstance(event, EpochRecord)]


@pytest.mark.parametrize("optimizer", ["SGD", slow("Adam")])
@pytest.mark.parametrize("method", [m if m == "neq" else slow(m) for m in METHODS])
def test_resumed_equals_uninterrupted_after_any_epoch(tmp_path, method, optimizer):
    settings = [f"recipe.optimizer={{name='{optimizer}', lr=0.01, weight_decay=1e-3}}"]
    every = method == "neq" and optimizer == "SGD"
    spec = small(method, *settings, *(WIDE if every else ()))
    through = records(run(spec, tmp_path / "through"))
    assert [record.epoch for record in through] == list(range(5))
    assert method == "baseline" or through[-1].frozen_neurons > 0
    for stop in range(1, 5) if every else (3,):
        root = tmp_path / str(stop)
        run(spec, root, epochs=stop)
        resumed = run(spec, root)
        assert isinstance(resumed[0], Started)
        assert [record.epoch for record in records(resumed)] == list(range(5))
        assert_same_results(spec, tmp_path / "through", root)
    assert_same_results(spec, tmp_path / "through", root)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_resumed_in_half_precision(tmp_path, precision):
    settings = [f"recipe.precision={precision}", "recipe.epochs=2", "data.train_size=60"]
    spec = small("neq", *settings)
    run(spec, tmp_path / "through")
    run(spec, tmp_path / "resumed", epochs=1)
    run(spec, tmp_path / "resumed")
    assert_same_results(spec, tmp_path / "through", tmp_path / "resumed")


def test_a_finished_trial_is_not_computed_again(tmp_path):
    spec = small("neq")
    first = records(run(spec, tmp_path))
    store = Store(tmp_path, "digits")
    for kind in ("trials", "epochs"):  # lost after the last commit
        (tmp_path / "digits" / kind / f"{spec.key}.parquet").unlink()
    again = records(run(spec, tmp_path))
    assert [r.test_loss for r in again] == [r.test_loss for r in first]
    assert [r.seconds_train for r in again] == [r.seconds_train for r in first]
    assert store.trial(spec.key)["state"] == "done"


def test_neq_with_eps_zero_is_the_baseline_to_the_bit(tmp_path):
    plain, zero = small("baseline"), small("neq", "methods.neq.eps=0")
    for spec in (plain, zero):
        run(spec, tmp_path)
    (a, epochs_a, _), (b, epochs_b, _) = results(plain, tmp_path), results(zero, tmp_path)
    assert same(a["model"], b["model"])
    assert same(a["optimizer"], b["optimizer"])
    names = epochs_a.column_names
    differing = {c for c in names if not epochs_a[c].equals(epochs_b[c])}
    assert differing == {"trial", "method", "overhead_flops"}


def test_seeds_differ_and_a_seed_repeats(tmp_path):
    one, two = small("baseline"), small("baseline", seed=1)
    losses = [[r.train_loss for r in records(run(spec, tmp_path))] for spec in (one, two)]
    assert losses[0] != losses[1]
    assert [r.train_loss for r in records(run(one, tmp_path / "again"))] == losses[0]


def test_the_process_is_left_as_it_was(tmp_path):
    torch.set_num_threads(2)
    state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    run(small("random"), tmp_path)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert (numpy.random.get_state()[1] == state[2]).all()


def test_what_is_stored(tmp_path):
    spec = small("neq")
    run(spec, tmp_path)
    epochs = pd.read_parquet(tmp_path / "digits" / "epochs")
    layers = pd.read_parquet(tmp_path / "digits" / "layers")
    (trial,) = pd.read_parquet(tmp_path / "digits" / "trials").to_dict("records")
    assert list(epochs["epoch"]) == list(range(5))
    assert list(epochs["lr"]) == pytest.approx([0.05, 0.05, 0.005, 0.005, 0.0005])
    assert (epochs["samples"] == 210).all()
    assert epochs["frozen_neurons"][:2].tolist() == [0, 0]
    assert epochs["frozen_neurons"].max() > 0
    assert (epochs["backward_flops_executed"] >= epochs["backward_flops_required"]).all()
    assert (epochs["backward_flops_executed"] <= epochs["backward_flops_dense"]).all()
    assert epochs["backward_flops_executed"].iloc[-1] < epochs["backward_flops_dense"].iloc[-1]
    assert epochs["peak_memory_bytes"].isna().all()
    assert (epochs["backward_flops_required"] <= epochs["backward_flops_dense"]).all()
    assert (epochs["overhead_flops"] == 2 * 20 * epochs["forward_flops"] / 210).all()
    kinds = ("paper", "required", "executed")
    columns = ["frozen", "forward_flops", *(f"backward_flops_{kind}" for kind in kinds)]
    by_epoch = layers.groupby("epoch")[columns].sum()
    totals = epochs[["frozen_neurons", *columns[1:]]]
    assert (by_epoch.to_numpy() == totals.to_numpy()).all()
    fc = layers[layers["layer"] == "fc"]
    assert (fc["frozen"] == 0).all()
    quantiles = numpy.array(fc["phi_quantiles"].tolist())
    assert quantiles.shape == (5, 7)
    assert (numpy.diff(quantiles) >= 0).all()
    assert (quantiles[:, -1] <= 1).all()
    assert fc["velocity_quantiles"].isna().tolist() == [True, False, False, False, False]
    assert (trial["state"], trial["epochs"], trial["epochs_done"]) == ("done", 5, 5)
    assert (trial["threads"], trial["device"], trial["attempts"]) == (1, "cpu", 1)
    assert (trial["metric"], trial["data"]) == ("accuracy", "digits")


def test_a_loss_that_is_not_finite_is_a_failure_with_its_reason(tmp_path):
    spec = small("baseline", "recipe.optimizer.lr=1e30")
    *_, last = run(spec, tmp_path)
    assert isinstance(last, Failure)
    assert "training loss became" in last.reason
    row = Store(tmp_path, "digits").trial(spec.key)
    assert (row["state"], row["reason"]) == ("failed", last.reason)
    assert "DivergedError" in row["traceback"]


def test_a_test_loss_that_is_not_finite_is_a_failure_too(tmp_path):
    settings = ["data.train_size=60", "recipe.epochs=1", "recipe.optimizer.lr=1e30"]
    spec = small("baseline", *settings)  # one step: the training loss is still finite
    *_, last = run(spec, tmp_path)
    assert "the test loss became nan in epoch 0" in last.reason


def test_fp16_goes_on_when_everything_stands_still(tmp_path):
    settings = [
        "recipe.precision=fp16",
        "recipe.epochs=2",
        "model.exclude=[]",
        "methods.freeze_after.epoch=1",
        "data.train_size=60",
    ]
    last = run(small("freeze_after", *settings), tmp_path)[-1]
    assert (last.epoch, last.frozen_neurons) == (1, last.total_neurons)


def test_what_earlier_attempts_ran_on_is_kept(tmp_path):
    spec = small("baseline")
    events = attempt(spec, str(tmp_path), Slot(gpu=False, sharing=8))
    for _ in range(3):
        next(events)
    events.close()
    run(spec, tmp_path)
    assert Store(tmp_path, "digits").trial(spec.key)["trials_on_device"] == 8


def test_a_full_disk_ends_the_run_and_not_the_trial(tmp_path, monkeypatch):
    def full(_fd):
        raise OSError(28, "No space left on device")

    spec = small("baseline")
    keep_tuning(spec, tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    *_, last = run(spec, tmp_path)
    assert isinstance(last, Halted)
    assert "No space left on device" in last.reason
    monkeypatch.undo()
    run(spec, tmp_path)
    assert Store(tmp_path, "digits").trial(spec.key)["state"] == "done"


def test_threads_are_decided_once(tmp_path):
    spec = small("baseline")
    run(spec, tmp_path, epochs=1)
    more = small("baseline", "resources.cpus=2")
    assert more.key == spec.key
    run(more, tmp_path)
    assert Store(tmp_path, "digits").trial(spec.key)["threads"] == 1
    assert Store(tmp_path, "digits").trial(spec.key)["attempts"] == 2


def test_where_all_are_damaged_nothing_is_lost(tmp_path):
    spec = small("baseline")
    run(spec, tmp_path, epochs=2)
    for path in (tmp_path / "digits" / "checkpoints" / spec.key).iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    *_, last = run(spec, tmp_path)
    assert isinstance(last, Halted)
    assert f"every checkpoint of trial {spec.key} is damaged; delete" in last.reason
    assert Store(tmp_path, "digits").trial(spec.key)["state"] == "running"
    assert len(pd.read_parquet(tmp_path / "digits" / "epochs")) == 2


def test_where_the_last_commit_is_damaged_the_one_before_it_serves(tmp_path):
    spec = small("neq")
    run(spec, tmp_path / "through")
    run(spec, tmp_path / "damaged", epochs=3)
    older, newest = sorted((tmp_path / "damaged/digits/checkpoints" / spec.key).iterdir())
    assert (older.name[:6], newest.name[:6]) == ("000002", "000003")
    newest.write_bytes(newest.read_bytes()[:-1])
    _, note, *rest = run(spec, tmp_path / "damaged")
    assert str(newest) in note.text
    assert [record.epoch for record in rest] == list(range(5))
    assert_same_results(spec, tmp_path / "through", tmp_path / "damaged")
    (last,) = (tmp_path / "damaged/digits/checkpoints" / spec.key).iterdir()
    assert last.name.startswith("000005.")


def test_a_checkpoint_is_let_go_of_before_training_goes_on(tmp_path, monkeypatch):
    spec = small("neq", "recipe.epochs=3")
    run(spec, tmp_path, epochs=1)
    loaded, load = [], Owner.load_checkpoint

    def watched(*arguments):
        state = load(*arguments)
        loaded.append(weakref.ref(next(iter(state["model"].values()))))
        return state

    monkeypatch.setattr(Owner, "load_checkpoint", watched)
    events = attempt(spec, str(tmp_path), SLOT)
    while not (isinstance(event := next(events), EpochRecord) and event.epoch == 1):
        pass
    gc.collect()
    assert [reference() for reference in loaded] == [None]
    events.close()
