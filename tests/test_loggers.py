"""Loggers: each value once, whatever died meanwhile; read back by the packages' own readers."""

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import neq
from neq.integrations.loggers import check_place, frozen_shares, open_logger

pytestmark = [  # of the packages, about each other
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "ResourceWarning")
]
KINDS = ["tensorboard", "mlflow database", "mlflow folder", "wandb"]


@pytest.fixture(params=KINDS)
def where(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return {
        "tensorboard": f"tensorboard:{tmp_path}/board",
        "mlflow database": f"mlflow:sqlite:///{tmp_path}/mlflow.db",
        "mlflow folder": f"mlflow:{tmp_path}/runs",
        "wandb": "wandb:offline",
    }[request.param]


def read(where, name):
    """[(epoch, value)] of the run called "mine", as whoever looks at the place sees it."""
    kind, _, rest = where.partition(":")
    if kind == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        seen = EventAccumulator(f"{rest}/mine", size_guidance={"scalars": 0}).Reload()
        return [(event.step, event.value) for event in seen.Scalars(name)]
    if kind == "mlflow":
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=rest)
        experiment = client.get_experiment_by_name("neq")
        (run,) = client.search_runs([experiment.experiment_id])
        return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
    from neq.integrations.to_wandb import _rows  # W&B has no reader for offline files

    files = sorted(Path("wandb").glob("offline-run-*/*.wandb"))
    rows = [row for path in files for row in _rows(path.read_bytes())]
    return [(epoch, value) for found, epoch, value in rows if found == name]


def values(epoch):
    return {"loss": 1 / (epoch + 1), "frozen": 0.25 * epoch, "frozen_by_layer/body.0": 0.5}


def log_and_die(where, folder):
    """Epochs 0 and 1 are logged, of epoch 2 a part; then the process is killed."""
    os.chdir(folder)
    logger = open_logger(where, "mine", {"lr": 0.1})
    for epoch in (0, 1):
        logger.log(epoch, values(epoch))
    logger.log(2, {"loss": values(2)["loss"]})
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_each_epoch_is_there_once_after_a_kill(where, tmp_path):
    process = multiprocessing.get_context("forkserver").Process(
        target=log_and_die, args=(where, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    for _ in range(2):  # the second time nothing is new
        logger = open_logger(where, "mine", {"lr": 0.1}, warn=pytest.fail)
        for epoch in range(5):
            logger.log(epoch, values(epoch))
        logger.close()
    for name in ("loss", "frozen", "frozen_by_layer/body.0"):
        expected = [(epoch, pytest.approx(values(epoch)[name], rel=1e-6)) for epoch in range(5)]
        assert sorted(read(where, name)) == expected


def test_a_torn_record_is_written_again(tmp_path):
    where = f"tensorboard:{tmp_path}"
    logger = open_logger(where, "mine")
    for epoch in range(3):
        logger.log(epoch, {"loss": float(epoch)})
    logger.close()
    (path,) = (tmp_path / "mine").iterdir()
    os.truncate(path, path.stat().st_size - 5)
    logger = open_logger(where, "mine", warn=pytest.fail)
    assert logger.logged("loss", 1) == 1.0
    assert logger.logged("loss", 2) is None
    for epoch in range(4):
        logger.log(epoch, {"loss": float(epoch)})
    logger.close()
    assert read(where, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0)]


def test_the_training_s_random_numbers_stay(monkeypatch):
    """A server that does not answer is asked again after a while, which is drawn by others."""
    check_place("mlflow:http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    before, told = random.getstate(), []
    open_logger("mlflow:http://127.0.0.1:9", "mine", warn=told.append)
    assert len(told) == 1
    assert random.getstate() == before


def test_a_server_is_asked_once_for_what_is_there(tmp_path, monkeypatch):
    from mlflow import MlflowClient

    where = f"mlflow:{tmp_path}"
    for _ in range(2):
        logger = open_logger(where, "mine", warn=pytest.fail)
        monkeypatch.setattr(MlflowClient, "get_metric_history", pytest.fail)
        for epoch in range(2):
            logger.log(epoch, {f"frozen_by_layer/{i}": 0.5 for i in range(30)})
        logger.close()
    monkeypatch.undo()
    assert read(where, "frozen_by_layer/29") == [(0, 0.5), (1, 0.5)]


def test_a_name_that_mlflow_spells_otherwise_is_there_once(tmp_path):
    where = f"mlflow:{tmp_path}"
    for _ in range(2):
        logger = open_logger(where, "mine", warn=pytest.fail)
        logger.log(0, {"loss[0]": 1.0})
        logger.close()
    assert read(where, "loss_0_") == [(0, 1.0)]


@pytest.mark.slow
def test_what_is_no_number_is_left_out(where):
    logger = open_logger(where, "mine", warn=pytest.fail)
    logger.log(0, {"loss": float("nan"), "metric": None, "frozen": 1})
    logger.log(1, {"loss": float("inf"), "frozen": True})
    logger.log(2, {"loss": 2.0})
    logger.close()
    assert read(where, "frozen") == [(0, 1.0), (1, 1.0)]
    assert read(where, "loss") == [(2, 2.0)]


@pytest.mark.slow
def test_names_that_a_place_would_refuse(where):
    """Too long for a folder, with characters that MLflow does not take; it ends with the key."""
    logger = open_logger(where, f"{'x' * 300} (é) 'ab'", {"odd {x}(1)": 1}, warn=pytest.fail)
    logger.log(0, {"loss, %": 1.0})
    logger.close()


def test_passwords_are_not_shown():
    told = []
    open_logger("mlflow:http://me:secret@127.0.0.1:9", warn=told.append)
    assert "secret" not in told[0]
    assert told[0].startswith("mlflow:http://127.0.0.1:9 can't")


@pytest.mark.slow
def test_runs_are_told_apart(tmp_path):
    where = f"mlflow:sqlite:///{tmp_path}/mlflow.db"
    for run in ("mine", "it's other"):
        for _ in range(2):
            logger = open_logger(where, run, {"lr": 0.1, "long": "x" * 9000}, warn=pytest.fail)
            logger.log(0, {"loss": 1.0})
            logger.close()
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=where.partition(":")[2])
    found = client.search_runs([client.get_experiment_by_name("neq").experiment_id])
    assert sorted(run.info.run_name for run in found) == ["it's other", "mine"]
    assert {run.data.params["lr"] for run in found} == {"0.1"}
    assert {run.info.status for run in found} == {"FINISHED"}


def test_a_place_that_fails_costs_one_warning(tmp_path):
    told = []
    logger = open_logger("mlflow:http://127.0.0.1:9", "mine", warn=told.append)
    logger.log(0, {"loss": 1.0})
    logger.close()
    (text,) = told
    assert text.startswith("mlflow:http://127.0.0.1:9 can't be written to (Mlflow")
    assert "\n" not in text
    (tmp_path / "board").write_text("a file")
    with pytest.warns(UserWarning, match="board can't be written to"):
        open_logger(f"tensorboard:{tmp_path}/board", "mine")


def test_nobody_is_asked_to_log_in(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    told = []
    open_logger("wandb", "mine", warn=told.append).log(0, {"loss": 1.0})
    (text,) = told
    assert "nobody is logged in: run `wandb login`, or log to wandb:offline" in text


@pytest.mark.parametrize("where", ["x:y", "tensorboard", "tensorboard:", "mlflow:", "wandb:on", ""])
def test_what_is_no_place_is_told(where):
    with pytest.raises(ValueError, match=f"'{where}' is no place to log to: write tensorboard:FOL"):
        open_logger(where)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/board' can't be written \(Not a directory\)"):
        check_place(f"tensorboard:{tmp_path}/file/board")


@pytest.mark.parametrize("package", ["tensorboard", "mlflow", "wandb"])
def test_a_package_that_is_missing_is_told(package, monkeypatch):
    monkeypatch.delitem(sys.modules, f"neq.integrations.to_{package}", raising=False)
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed: .*neqbench\[{package}\]"):
        open_logger(f"{package}:offline")


def test_shares_of_frozen_neurons():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    freezer = neq.NeuronFreezer(model, torch.optim.SGD(model.parameters(), 0.1), neq.Everyone())
    freezer.freeze(torch.tensor([True, False, False, False, True, True]))
    assert frozen_shares(freezer) == {
        "frozen": 0.5,
        "frozen_by_layer/0": 0.25,
        "frozen_by_layer/1": 1.0,
    }
