import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from trials import PATIENCE, SMALL, assert_same_results, run, wait_for

from harness.run.preflight import preflight
from harness.run.trials import specs

NEQBENCH = Path(sys.executable).parent / "neqbench"


def small(root, *more):
    settings = [word for setting in SMALL for word in ("--set", setting)]
    words = ["--executor", "inline", "--no-replay", "--results", root]
    return ["run", "digits", *settings, *words, *more]


@pytest.mark.slow
def test_run_resume_report(tmp_path, neqbench):
    arguments = small(tmp_path, "--methods", "baseline,neq", "--seeds", "0-1")
    first = neqbench(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("done    digits") == 4
    assert "4 done, 0 running, 0 to do" in first.stdout
    table = first.stdout[first.stdout.index("digits: Handwritten") :]
    again = neqbench(*arguments)
    assert again.returncode == 0
    assert again.stdout == table  # nothing computed, the same report
    report = neqbench("report", "digits", "--results", tmp_path)
    assert (report.returncode, report.stdout) == (0, table)
    value = json.loads(
        neqbench("report", "digits", "--results", tmp_path, "--format", "json").stdout
    )
    assert [m["n"] for m in value["groups"][0]["methods"]] == [2, 2]
    settings = [word for setting in SMALL for word in ("--set", setting)]
    planned = neqbench("plan", "digits", *settings, "--results", tmp_path, "--format", "json")
    states = {(p["method"], p["seed"]): p["state"] for p in json.loads(planned.stdout)}
    assert len(states) == 15
    assert [key for key, state in states.items() if state == "done"] == [
        (method, seed) for seed in (0, 1) for method in ("baseline", "neq")
    ]
    more = neqbench(*small(tmp_path, "--methods", "baseline,neq", "--seeds", "0-2"))
    assert more.stdout.count("done    digits") == 2  # a suite that grows runs only what is new


@pytest.mark.slow
def test_a_failed_trial_is_exit_1_and_kept_until_asked_for(tmp_path, neqbench):
    settings = ["--set", "recipe.optimizer.lr=1e30", "--seeds", "0", "--methods", "baseline"]
    first = neqbench(*small(tmp_path, *settings))
    assert first.returncode == 1
    assert "failed  digits baseline seed 0: the training loss became" in first.stdout
    assert "Failed: baseline seed 0" in first.stdout
    again = neqbench(*small(tmp_path, *settings))
    assert again.returncode == 1
    assert "failed  digits" not in again.stdout  # reported, not tried
    retried = neqbench(*small(tmp_path, *settings, "--retry-failed"))
    assert retried.returncode == 1
    assert "failed  digits" in retried.stdout
    assert pd.read_parquet(tmp_path / "digits/trials")["attempts"].tolist() == [2]


@pytest.mark.slow
def test_published_counts(neqbench):
    suite = json.loads(neqbench("flops", "cifar10", "--format", "json").stdout)
    assert suite["backward"]["paper"] == 138_937_600
    assert (suite["neurons"], suite["frozen"], suite["verify"]) == (2282, 0.0, None)
    arguments = ["--model", "torchvision.models:resnet18", "--input", "3x224x224"]
    any_model = json.loads(neqbench("flops", *arguments, "--format", "json").stdout)
    assert any_model["backward"]["paper"] == 3_638_081_536
    half = json.loads(
        neqbench("flops", *arguments, "--frozen", "0.5", "--seed", "1", "--format", "json").stdout
    )
    assert half["frozen"] == (10600 - 1000) / 2 / 10600  # the head never freezes
    assert half["backward"]["required"] < any_model["backward"]["required"]
    assert half["backward"]["dense"] == any_model["backward"]["dense"]
    people = neqbench("flops", *arguments).stdout
    assert "3,638,081,536" in people


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        ["digits"],
        ["cifar10"],
        ["imagenet", "--set", "model.input=[3, 64, 64]"],
        ["segmentation-digits"],
        ["--model", "torchvision.models:mobilenet_v2", "--input", "3x32x32"],
    ],
)
def test_counted_is_executed(neqbench, what):
    for frozen, seed in ((0.5, 0), (1, 3)):
        done = neqbench(
            *("flops", *what, "--frozen", frozen, "--seed", seed, "--verify", "--format", "json")
        )
        assert done.returncode == 0
        found = json.loads(done.stdout)
        assert found["verify"]["counted"] == found["verify"]["measured"]
        assert (
            found["verify"]["batch"] * found["backward"]["executed"] == found["verify"]["counted"]
        )
    assert "agrees" in neqbench("flops", *what, "--verify").stdout


def test_a_count_that_is_not_executed_is_exit_1(neqbench, monkeypatch):
    monkeypatch.setattr("harness.commands.flops.backward_flops_by_torch", lambda *_: [5, 7])
    done = neqbench("flops", "digits", "--verify", "--format", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["verify"]["measured"] == 5
    assert "does NOT agree" in neqbench("flops", "digits", "--verify").stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "digitz"], "unknown suite 'digitz' (did you mean 'digits'?)"),
        (["run", "digits", "--methods", "neq,foo"], "unknown method 'foo'"),
        (["run", "digits", "--set", "recipe.epoch=5"], "recipe.epoch: unknown key"),
        (["run", "digits", "--set", "methods.neq.eps=-1"], "methods.neq.eps"),
        (["run", "digits", "--set", "methods.neq.mu=1"], "methods.neq.mu"),
        (["run", "digits", "--set", "seeds=[]"], "seeds: must not be empty"),
        (["run", "digits", "--set", "recipe.epochs=0"], "recipe.epochs"),
        (["run", "digits", "--set", "data.validation_size=1200"], "none to train on"),
        (["run", "digits", "--set", "recipe.optimizer.name=X"], "unknown name 'X'"),
        (["run", "digits", "--results", "FILE"], "can't be written"),
        (["report", "digits", "--results", "nowhere"], "run `neqbench run digits` first"),
        (["flops"], "name a suite, or a model"),
        (["flops", "digits", "--model", "a:b"], "name a suite, or a model"),
        (["flops", "--model", "torchvision.models:nope", "--input", "3x8x8"], "cannot be loaded"),
        (["flops", "--model", "torchvision.models:resnet18"], "give one sample's shape"),
        (["flops", "--model", "torchvision.models:resnet18", "--input", "3x0"], "sample's shape"),
        (["flops", "--model", "torchvision.models:resnet18", "--input", "1x8x8"], "does not run"),
        (["flops", "--model", "torchvision.models", "--input", "3x8x8"], "as module:callable"),
        (["flops", "--model", "my-mod:net", "--input", "3x8x8"], "cannot be loaded"),
        (["flops", "digits", "--frozen", "2"], "write a share from 0 to 1"),
        (["flops", "digits", "--input", "3x8x8"], "--input belongs to --model"),
        (["run"], "Missing argument"),
        (["run", "digits", "--bogus"], "No such option"),
        (["run", "digits", "--executor", "foo"], "Invalid value for '--executor'"),
        (["report", "digits", "--format", "xml"], "Invalid value for '--format'"),
        (["nonsense"], "No such command"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, monkeypatch, neqbench, arguments, message):
    (tmp_path / "FILE").write_text("")
    monkeypatch.chdir(tmp_path)
    result = neqbench(*arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("suite digits: ") < 2


@pytest.mark.slow
def test_wrong_input_in_a_process_of_its_own():
    arguments = [NEQBENCH, "run", "digits", "--set", "recipe.epochs=0"]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "error: digits/suite.toml: recipe.epochs: Input should be greater than 0, got 0\n"
    )


def start(*arguments):
    return subprocess.Popen(
        [NEQBENCH, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_run_goes_on_to_the_same_end(tmp_path, number):
    settings = [*SMALL, "recipe.epochs=10"]
    more = ["--methods", "neq", "--seeds", "0", "--set", "recipe.epochs=10"]
    with start(*small(tmp_path / "killed", *more)) as process:
        wait_for(lambda: list((tmp_path / "killed/digits/epochs").glob("[!.]*.parquet")))
        process.send_signal(number)
        _, err = process.communicate(timeout=PATIENCE)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert err.startswith("interrupted; go on with: neqbench run digits --set data.train")
        assert err.count("\n") == 1
        return  # resuming is the same as after a kill
    assert 1 <= len(pd.read_parquet(tmp_path / "killed" / "digits" / "epochs")) < 10
    (spec,) = specs("digits", settings, "neq", "0")
    tuning = "digits/tuning"  # measured by the run that was killed
    shutil.copytree(tmp_path / "killed" / tuning, tmp_path / "through" / tuning)
    run(spec, tmp_path / "killed")
    run(spec, tmp_path / "through")
    assert_same_results(spec, tmp_path / "through", tmp_path / "killed")


@pytest.mark.slow
def test_a_reader_that_goes_away_does_not_stop_a_run(tmp_path):
    with start(*small(tmp_path, "--methods", "baseline,random", "--seeds", "0-1")) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=PATIENCE) == 0
    trials = pd.read_parquet(tmp_path / "digits" / "trials")
    assert trials["state"].tolist() == ["done"] * 4


@pytest.mark.slow
def test_help_suites_and_plan(tmp_path, monkeypatch, neqbench):
    monkeypatch.chdir(tmp_path)
    assert "run" in neqbench("--help").stdout
    listed = json.loads(neqbench("suites", "--format", "json").stdout)
    assert {suite["name"] for suite in listed} >= {"digits", "cifar10", "cifar10-adam"}
    assert "cifar10-adam" in neqbench("suites").stdout
    planned = neqbench("plan", "digits")
    assert planned.stdout.count("to do") == 15
    assert not list(tmp_path.iterdir())  # looking writes nothing
    module = [sys.executable, "-m", "harness", "suites"]
    assert subprocess.run(module, capture_output=True).returncode == 0


def test_help_imports_nothing_heavy():
    code = "import harness.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert not {"torch", "ray", "pandas", "scipy", "pyarrow", "pydantic"} & set(loaded.split())


TINY = [  # ImageNet's suite, so small that two cores manage it
    *("recipe.epochs=2", "recipe.batch_size=4", "recipe.forward_batch=2"),
    *("data.train_size=11", "data.validation_size=2", "model.input=[3, 32, 32]"),
    *("model.build=suites.resnet:resnet32", "recipe.precision=float32"),
    "resources={cpus=1, gpus=0}",
]


def tiny(root, *more):
    sets = [part for setting in TINY for part in ("--set", setting)]
    choice = ["--methods", "baseline,neq", "--seeds", "0", "--executor", "inline", "--no-replay"]
    return ["run", "imagenet", *sets, *choice, "--results", root, *more]


@pytest.mark.slow
def test_synthetic_results_say_so_and_stand_apart(tmp_path, neqbench):
    done = neqbench(*tiny(tmp_path, "--synthetic"))
    assert done.returncode == 0, done.stderr
    assert "synthetic (11 images) · 2 epochs · batch 4, 2 per forward and BatchNorm" in done.stdout
    trials = pd.read_parquet(tmp_path / "imagenet/trials")
    assert trials["data"].tolist() == ["synthetic"] * 2
    assert all(json.loads(e)["data"]["synthetic"] for e in trials["experiment"])
    epochs = pd.read_parquet(tmp_path / "imagenet/epochs")
    assert (epochs["samples"] == 8).all()
    for part, classes in (("train", 10), ("val", 10)):
        for label in range(classes):
            folder = tmp_path / "data" / part / f"n{label}"
            folder.mkdir(parents=True)
            image = Image.new("RGB", (32, 32), (20 * label, 0, 0))
            for number in range(2):
                image.save(folder / f"{number}.JPEG")
    more = [
        "--set",
        f"data.root={tmp_path}/data",
        "--set",
        "data.arguments={size=32, resize=32, classes=10}",
    ]
    real = neqbench(*tiny(tmp_path, *more))
    assert real.returncode == 0, real.stderr
    assert "synthetic" not in real.stdout
    groups = pd.read_parquet(tmp_path / "imagenet/trials").groupby("data")["group"].unique()
    assert {len(found) for found in groups} == {1}
    assert groups["synthetic"][0] != groups["ImageNet"][0]
    sets = [part for setting in TINY for part in ("--set", setting)]
    prepared = neqbench("prepare", "imagenet", *sets, *more)
    assert prepared.returncode == 0, prepared.stderr
    assert "imagenet: ImageNet, ready" in prepared.stdout


PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
LINES = [line for page in PAGES for line in page.read_text().splitlines()]


@pytest.mark.slow
def test_the_docs_sweeps_can_be_run():
    lines = [line for line in LINES if line.startswith("neqbench run digits") and "=[" in line]
    counts = []
    for line in lines:
        _, _, suite, *words = shlex.split(line)
        settings = [word for word in words if "=" in word]
        trials = specs(suite, settings, "baseline,neq", "0")
        for group in trials.groups():
            preflight(group)
        counts.append([len(group) for group in trials.groups()])
    assert counts == [[4], [3, 3]]


@pytest.mark.slow
def test_the_docs_synthetic_lines_can_be_run():
    lines = [line for line in LINES if line.startswith("neqbench run") and "--synthetic" in line]
    assert len(lines) == 3
    for line in lines:
        _, _, suite, *words = shlex.split(line)
        settings = [word for word in words if "=" in word]
        trials = specs(suite, settings, seeds="0", synthetic=True)
        preflight(trials)
        assert {trial.data_name for trial in trials} == {"synthetic"}


@pytest.mark.parametrize("suite", ["imagenet", "segmentation", "segmentation-voc"])
def test_data_that_are_not_there_are_one_line(tmp_path, monkeypatch, neqbench, vision, suite):
    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(vision.datasets.utils, "download_and_extract_archive", offline)
    monkeypatch.setattr(vision.datasets, "VOCSegmentation", offline)
    where = ("--set", f"data.root={tmp_path}/none")
    for command in ("prepare", "run"):
        done = neqbench(command, suite, *where)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert "get " in done.stderr
        assert "data.root=" in done.stderr
