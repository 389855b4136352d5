"""Two runs of the same suite: planted changes, and what can't be compared."""

import json
import shutil

import pytest
from scipy import stats
from trials import SMALL, altered, ask, run, small

from harness.errors import UserError
from harness.report.gates import gates
from harness.run.trials import specs
from harness.storage.store import Store

SETTINGS = [*SMALL, "recipe.epochs=2"]


@pytest.fixture(scope="module")
def a(tmp_path_factory):
    root = tmp_path_factory.mktemp("a")
    trials = specs("digits", SETTINGS, "baseline,neq", "0-2")
    for spec in trials:
        run(spec, root)
    ask(Store(root, "digits"), trials)
    return root


@pytest.fixture
def b(a, tmp_path):
    shutil.copytree(a / "digits", tmp_path / "b" / "digits")
    return tmp_path / "b"


def key(method, seed):
    return small(method, "recipe.epochs=2", seed=seed).key


def found(neqbench, a, b, *options):
    result = neqbench("compare", a, b, *options, "--format", "json")
    return result, json.loads(result.stdout)


def change(compared, quantity):
    return next(c for c in compared["changes"] if c["quantity"] == quantity)


LOSS = ("--fail-on", "metric<-0.5pp", "--fail-on", "saved<-1pp")


@pytest.mark.slow
def test_the_same_results_pass(neqbench, a, b):
    result, value = found(neqbench, a, b, *LOSS, "--fail-on", "seconds>20%")
    assert result.returncode == 0
    assert value["missed"] == []
    assert [m["method"] for m in value["methods"]] == ["baseline", "neq"]
    assert {c["mark"] for m in value["methods"] for c in m["changes"]} == {"same"}
    assert [(t["method"], t["seed"]) for t in value["trials"]] == [
        (method, seed) for method in ("baseline", "neq") for seed in range(3)
    ]
    text = neqbench("compare", a, b).stdout
    assert "6 of 6 trials are the same" in text


def test_a_planted_loss_is_found(neqbench, a, b):
    before = [Store(a, "digits").epochs(key("neq", seed))[-1]["test_metric"] for seed in range(3)]
    after = [value - loss for value, loss in zip(before, (0.010, 0.012, 0.011), strict=True)]
    for seed, value in enumerate(after):
        altered(b, key("neq", seed), "epochs", "test_metric", value)
    result, value = found(neqbench, a, b, *LOSS)
    assert result.returncode == 1
    assert value["missed"] == ["metric<-0.5pp: digits neq: -1.10 pp"]
    neq = next(m for m in value["methods"] if m["method"] == "neq")
    lost = change(neq, "metric")
    low, high = stats.ttest_rel(after, before).confidence_interval()
    assert (lost["low"], lost["high"]) == pytest.approx((100 * low, 100 * high))
    assert (lost["mark"], change(neq, "saved")["mark"]) == ("worse", "same")
    assert neqbench("compare", b, a, *LOSS).returncode == 0  # the other way it is a gain
    (trial,) = [t for t in value["trials"] if (t["method"], t["seed"]) == ("neq", 1)]
    assert change(trial, "metric")["change"] == pytest.approx(-1.2)
    assert change(trial, "metric")["mark"] == "unclear"  # one seed
    text = neqbench("compare", a, b).stdout
    assert "Trials that changed" in text
    assert "3 of 6 trials are the same" in text


def test_a_change_within_the_noise_is_unclear(neqbench, a, b):
    before = [Store(a, "digits").epochs(key("neq", seed))[-1]["test_metric"] for seed in range(3)]
    for seed, change_ in enumerate((-0.05, 0.04, -0.03)):
        altered(b, key("neq", seed), "epochs", "test_metric", before[seed] + change_)
    _, value = found(neqbench, a, b)
    neq = next(m for m in value["methods"] if m["method"] == "neq")
    assert change(neq, "metric")["change"] == pytest.approx(-100 * 0.04 / 3)
    assert change(neq, "metric")["mark"] == "unclear"


def test_savings_and_seconds(neqbench, a, b):
    for seed in range(3):
        store = Store(b, "digits").epochs(key("neq", seed))
        dense = store[0]["backward_flops_dense"]
        altered(b, key("neq", seed), "epochs", "backward_flops_executed", dense // 2 + seed)
        altered(b, key("neq", seed), "epochs", "overhead_flops", 0)
        altered(b, key("baseline", seed), "epochs", "seconds_equilibrium", 1000.0)
    result, value = found(neqbench, a, b, "--fail-on", "seconds>20%", "--fail-on", "saved>40pp")
    by = {m["method"]: m for m in value["methods"]}
    assert change(by["neq"], "saved")["mark"] == "better"
    assert change(by["baseline"], "seconds")["mark"] == "worse"
    assert result.returncode == 1
    assert [line.partition(": ")[0] for line in value["missed"]] == ["seconds>20%", "saved>40pp"]
    assert any("different times" in note for note in value["notes"])
    altered(b, key("neq", 0), "trials", "trials_on_device", 2)
    result, value = found(neqbench, a, b, "--fail-on", "seconds>2000000%")
    assert value["missed"] == [
        "seconds>2000000%: digits neq: can't be checked (no seconds to compare)"
    ]
    assert result.returncode == 1


@pytest.mark.slow
def test_what_is_not_comparable(neqbench, a, tmp_path):
    other = tmp_path / "other"
    for seed in range(2):
        run(small("baseline", "recipe.epochs=2", "recipe.batch_size=20", seed=seed), other)
    run(small("neq", "recipe.epochs=2", "methods.neq.eps=0.5"), other)
    result, value = found(neqbench, a, other, *LOSS)
    by = {m["method"]: m for m in value["methods"]}
    assert by["baseline"]["why"] == "recipe.batch_size 40 | 20"
    assert by["neq"]["why"] == "eps 0.01 | 0.5"
    assert value["trials"] == []
    assert result.returncode == 1
    assert "can't be checked (not comparable)" in value["missed"][0]
    text = " ".join(neqbench("compare", a, other).stdout.split())
    assert "Not comparable" in text
    assert neqbench("compare", a, other).returncode == 0


def test_other_code_and_other_data_are_named(neqbench, a, b, monkeypatch):
    monkeypatch.setattr("harness.suite.config.NUMERICS", 99)
    (spec,) = specs("digits", SETTINGS, "neq", "0")
    shutil.rmtree(b)
    run(spec, b)
    _, value = found(neqbench, a, b)
    by = {m["method"]: m["why"] for m in value["methods"]}
    assert by["neq"].startswith("other code: numerics ")
    assert by["baseline"] == f"only in {a / 'digits'}"


def test_other_data_are_named(neqbench, a, b):
    for seed in range(3):
        altered(b, key("neq", seed), "trials", "data_fingerprint", "of others")
        for kind in ("trials", "epochs"):
            altered(b, key("neq", seed), kind, "group", "theirs")
    _, value = found(neqbench, a, b)
    assert [m["why"].partition(": ")[0] for m in value["methods"]] == ["", "other data"]


def test_what_is_missing_or_failed_is_said(neqbench, a, b):
    altered(b, key("neq", 2), "trials", "state", "failed")
    altered(b, key("neq", 2), "trials", "reason", "it fell over")
    for kind in ("trials", "epochs", "layers"):
        (b / "digits" / kind / f"{key('baseline', 1)}.parquet").unlink()
    altered(b, key("neq", 0), "trials", "git_sha", "feedbeef")
    _, value = found(neqbench, a, b)
    assert "B: digits neq seed 2: it fell over" in value["notes"]
    assert "B: digits baseline: seed 1" in value["notes"]
    assert any("feedbee" in note for note in value["notes"])
    assert [change(m, "metric")["n"] for m in value["methods"]] == [2, 2]


@pytest.mark.parametrize("text", ["metric", "metric<5", "metric<-0.5%", "seconds>3pp", "speed>3%"])
def test_a_gate_that_is_none(neqbench, a, text):
    result = neqbench("compare", a, a, "--fail-on", text)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: --fail-on '{text}': ")
    with pytest.raises(UserError):
        gates([text])


def test_nothing_to_compare(neqbench, a, tmp_path):
    assert neqbench("compare", a, tmp_path / "none").returncode == 2
    run(small("neq"), tmp_path / "begun", epochs=1)
    result = neqbench("compare", tmp_path / "begun", tmp_path / "begun")
    assert result.returncode == 2
    assert "no trial is finished in either" in result.stderr


def test_a_seed_that_b_lacks_misses_every_gate(neqbench, a, b):
    altered(b, key("neq", 2), "trials", "state", "failed")
    result, value = found(neqbench, a, b, *LOSS)
    assert result.returncode == 1
    assert value["missed"] == [
        f"{gate}: digits neq: can't be checked (B lacks seeds 2)" for gate in (LOSS[1], LOSS[3])
    ]
    neq = next(m for m in value["methods"] if m["method"] == "neq")
    assert change(neq, "metric")["a"] == change(neq, "metric")["b"]  # of the common seeds
    assert neqbench("compare", b, a, *LOSS).returncode == 0


def test_what_is_only_in_b_has_no_gate(neqbench, a, b):
    run(small("random", "recipe.epochs=2"), b)
    result, value = found(neqbench, a, b, *LOSS)
    assert (result.returncode, value["missed"]) == (0, [])
    assert [m["new"] for m in value["methods"]] == [False, False, True]


def test_plans_are_not_needed_to_find_what_is_the_same(neqbench, a, b):
    shutil.rmtree(b / "digits" / "plans")
    assert found(neqbench, a, b, *LOSS)[0].returncode == 0


def test_a_loss_of_just_the_bound_passes(neqbench, a, b):
    before = [Store(a, "digits").epochs(key("neq", seed))[-1]["test_metric"] for seed in range(3)]
    for seed, value in enumerate(before):
        altered(b, key("neq", seed), "epochs", "test_metric", value - 0.005)
    assert neqbench("compare", a, b, "--fail-on", "metric<-0.5pp").returncode == 0
    assert neqbench("compare", a, b, "--fail-on", "metric<-0.49pp").returncode == 1


def test_a_run_without_a_finished_trial_misses_every_gate(neqbench, a, b):
    for seed in range(3):
        for method in ("baseline", "neq"):
            altered(b, key(method, seed), "trials", "state", "failed")
    result, value = found(neqbench, b, a, *LOSS)
    assert result.returncode == 1
    assert len(value["missed"]) == 4


def test_a_further_seed_changes_nothing(neqbench, a, b):
    run(small("neq", "recipe.epochs=2", seed=3), b)
    result, value = found(neqbench, a, b, *LOSS)
    assert result.returncode == 0
    assert {c["mark"] for m in value["methods"] for c in m["changes"]} == {"same"}
