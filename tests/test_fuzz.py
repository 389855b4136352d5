"""What users write and what disks do to it: one clear line and exit 2, never a traceback."""

import json
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from trials import SMALL, ask, run, small

from harness.run.trials import specs
from harness.storage.store import Store

SUITE = """
title = "Fuzzed"
seeds = [0, 1]
[model]
build = "suites.resnet:resnet8"
input = [1, 16, 16]
exclude = ["fc"]
[data]
load = "suites.digits.data:load"
validation_size = 50
[recipe]
epochs = 3
batch_size = 50
precision = "float32"
optimizer = { name = "SGD", lr = 0.05, momentum = 0.9 }
[methods.baseline]
[methods.neq]
eps = 1e-3
mu = 0.5
[resources]
cpus = 1
"""
SETTINGS = [word for setting in SMALL for word in ("--set", setting)]


def refused(result):
    """Either fine, or refused in one line."""
    if result.returncode == 2:
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    else:
        assert result.returncode == 0
    return result.returncode == 2


def spoilt(text, draw):
    """A few characters or lines changed, lost, doubled."""
    for _ in range(draw.randrange(1, 4)):
        at, kind = draw.randrange(len(text)), draw.randrange(4)
        line = text.rfind("\n", 0, at) + 1
        end = text.find("\n", at) + 1 or len(text)
        if kind == 0:
            text = text[:at] + draw.choice("[]{}=\"'.,-0eé\x00 \n") + text[at + 1 :]
        elif kind == 1:
            text = text[:line] + text[end:]
        elif kind == 2:
            text = text[:end] + text[line:end] + text[end:]
        else:
            text = text[:at]
        text = text or "x"
    return text


def test_suite_files(tmp_path, neqbench):
    draw, wrong = random.Random(0), 0
    (tmp_path / "own").mkdir()
    for _ in range(60):
        (tmp_path / "own" / "suite.toml").write_text(spoilt(SUITE, draw))
        wrong += refused(neqbench("plan", tmp_path / "own", "--results", tmp_path / "results"))
    assert 30 < wrong < 60
    assert not (tmp_path / "results").exists()


VALUES = [
    "",
    "-1",
    "0",
    "nan",
    "inf",
    "1e999",
    "[]",
    "{}",
    "''",
    "true",
    "1979-05-27",
    "'x'",
    "[[[",
    "é",
]
PATHS = [
    "recipe.epochs",
    "recipe.optimizer",
    "recipe.optimizer.lr",
    "recipe.scheduler.gamma",
    "recipe.precision",
    "model.input",
    "model.build",
    "data.validation_size",
    "data.load",
    "methods",
    "methods.neq",
    "methods.neq.eps",
    "resources.gpus",
    "resources.time_limit",
    "seeds",
    "title",
    "name",
]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_settings(path, tmp_path, neqbench):
    results = [
        neqbench("plan", "digits", "--set", f"{path}={value}", "--results", tmp_path)
        for value in VALUES
    ]
    assert sum(map(refused, results)) > 2


def test_settings_that_are_none(neqbench, tmp_path):
    for setting in (
        "",
        "=",
        "a",
        ".=1",
        "recipe=1",
        "a.b.c.d=1",
        "recipe.epochs.x=1",
        "x=" + "[" * 9000,
    ):
        assert refused(neqbench("plan", "digits", "--set", setting, "--results", tmp_path))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    for method in ("baseline", "neq"):
        run(small(method), root)
    run(small("random"), root, epochs=2)
    trials = specs("digits", SMALL, "baseline,neq,random", "0-1")
    store = Store(root, "digits")
    ask(store, trials)
    return root


def content(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


KINDS = ["trials", "epochs", "plans", "leases", "checkpoints", "tuning"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_damaged(kind, tmp_path, results, neqbench):
    """Reading commands say so or do not need them; nothing is changed."""
    draw, wrong = random.Random(kind), 0
    for number in range(9):
        root = tmp_path / str(number)
        shutil.copytree(results, root)
        files = sorted(p for p in (root / "digits" / kind).rglob("*") if p.is_file())
        path = draw.choice(files)
        data = bytearray(path.read_bytes())
        if number % 3 == 0:
            del data[draw.randrange(len(data)) :]
        elif number % 3 == 1:
            for _ in range(20):
                data[draw.randrange(len(data))] = draw.randrange(256)
        else:
            data = bytearray(draw.randbytes(draw.randrange(300)))
        path.write_bytes(data)
        before = content(root)
        for command in (["status"], ["report", "digits"], ["plan", "digits", *SETTINGS]):
            result = neqbench(*command, "--results", root)
            wrong += refused(result)
            assert "Traceback" not in result.stdout
        assert content(root) == before
    assert wrong or kind in ("leases", "checkpoints", "tuning")


JSON = ["null", "[]", "3", '"x"', "{}", '{"group": 1}', '{"group": "g", "trials": 1}']
JSON += ['{"group": "g", "trials": [1]}', '{"group": [], "trials": [{"trial": "x"}]}']


@pytest.mark.slow
@pytest.mark.parametrize("text", JSON)
def test_json_that_says_something_else(text, tmp_path, results, neqbench):
    shutil.copytree(results, tmp_path / "r")
    for kind in ("plans", "leases", "tuning"):
        path = next(p for p in sorted((tmp_path / "r" / "digits" / kind).rglob("*.json")))
        path.write_text(text)
    refused(neqbench("status", "--results", tmp_path / "r"))
    for path in (tmp_path / "r" / "digits" / "plans").iterdir():
        path.unlink()
    assert not refused(neqbench("status", "--results", tmp_path / "r"))
    (path,) = (tmp_path / "r" / "digits" / "tuning").iterdir()
    other = run_again(neqbench, tmp_path / "r", "--seeds", "1", "--methods", "neq")
    assert other.returncode == 2
    assert str(path) in other.stderr


def run_again(neqbench, root, *more):
    words = ["run", "digits", *SETTINGS, "--executor", "inline", "--no-replay", "--results", root]
    return neqbench(*words, *more)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["another trial", "another version", "no state", "other rows"])
def test_checkpoints_that_are_whole_and_wrong(spoil, tmp_path, results, neqbench):
    """The run stops before anything of the trial is touched."""
    import hashlib
    import io

    import torch

    shutil.copytree(results, tmp_path / "r")
    folder = tmp_path / "r/digits/checkpoints" / small("random").key
    newest = sorted(folder.iterdir())[-1]
    value = torch.load(newest, weights_only=True)
    if spoil == "another trial":
        value["trial"] = "0" * 16
    elif spoil == "another version":
        value["version"] = "99"
    elif spoil == "no state":
        value["state"] = {}
    else:
        value["state"]["rows"] = {"epochs": torch.zeros(3, dtype=torch.uint8)}
    buffer = io.BytesIO()
    torch.save(value, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()[:16]
    newest.with_name(f"{newest.name[:13]}.{digest}.pt").write_bytes(buffer.getvalue())
    newest.unlink()
    before = {
        k: v for k, v in content(tmp_path / "r").items() if "lease" not in k and "plan" not in k
    }
    done = run_again(neqbench, tmp_path / "r", "--seeds", "0", "--methods", "random")
    assert done.returncode == 2
    assert "checkpoint" in done.stderr
    assert done.stderr.count("\n") == 1
    after = content(tmp_path / "r")
    assert {name: after[name] for name in before} == before


@pytest.mark.slow
def test_nothing_of_a_results_folder_is_unpickled(tmp_path, results, neqbench):
    """A checkpoint that would run code does not."""
    import hashlib
    import io
    import pickle

    import torch

    class Harm:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harmed",)

    shutil.copytree(results, tmp_path / "r")
    folder = tmp_path / "r/digits/checkpoints" / small("random").key
    key, buffer = small("random").key, io.BytesIO()
    torch.save({"trial": key, "version": "1", "state": {"rows": Harm()}}, buffer)
    for data in (buffer.getvalue(), pickle.dumps(Harm())):
        digest = hashlib.sha256(data).hexdigest()[:16]
        path = folder / f"000004.000009.{digest}.pt"
        path.write_bytes(data)
        done = run_again(neqbench, tmp_path / "r", "--seeds", "0", "--methods", "random")
        assert (done.returncode, done.stdout) == (2, "")
        path.unlink()
    assert not (tmp_path / "harmed").exists()


def test_rows_of_another_trial(tmp_path, results, neqbench):
    """One trial's files under another's name are no results of it."""
    shutil.copytree(results, tmp_path / "r")
    one, two = small("baseline").key, small("baseline", seed=1).key
    for kind in ("trials", "epochs", "layers"):
        folder = tmp_path / "r/digits" / kind
        shutil.copy(folder / f"{one}.parquet", folder / f"{two}.parquet")
    for command in (["status"], ["report", "digits"], ["plan", "digits", *SETTINGS]):
        result = neqbench(*command, "--results", tmp_path / "r")
        assert refused(result)
        assert f"{two}.parquet holds rows of {{'{one}'}}" in result.stderr


@pytest.mark.parametrize(
    "column, value",
    [
        ("experiment", None),
        ("experiment", "{"),
        ("parameters", "[]"),
        ("parameters", '{"kind": "x"}'),
        ("seed", None),
        ("epochs", None),
    ],
)
def test_a_row_that_makes_no_sense(column, value, tmp_path, results, neqbench):
    shutil.copytree(results, tmp_path / "r")
    path = next(iter(sorted((tmp_path / "r/digits/trials").iterdir())))
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0][column] = value
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    result = neqbench("report", "digits", "--results", tmp_path / "r")
    assert refused(result)
    assert f"{path} is not as a run writes it" in result.stderr


def test_what_is_said_is_not_cut_off(tmp_path, results, neqbench):
    """A newer schema names itself; both commands that read it refuse."""
    shutil.copytree(results, tmp_path / "r")
    path = next((tmp_path / "r/digits/trials").iterdir())
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"neqbench.schema": "9"}), path)
    result = neqbench("plan", "digits", *SETTINGS, "--results", tmp_path / "r")
    assert refused(result)
    assert "schema version 9, this neqbench reads version 6; use the neqbench that wrote it" in (
        result.stderr
    )
    assert json.loads(neqbench("suites", "--format", "json").stdout)
