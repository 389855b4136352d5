"""Two runs beside each other: what is left after removal, its latency, and gates on both."""

import json
import math

import numpy as np
import pytest
from made_up import SUITE, keep, removal, sizes, trials
from scipy import stats

LATENCIES = (0.60, 0.62, 0.64)
PARAMETERS = (300, 310, 320)


@pytest.fixture
def run(tmp_path):
    """A run's folder: a baseline, and gradual pruning with these parameters (None: of that seed
    nothing is known) and latencies.
    """

    def made(
        name, parameters=PARAMETERS, latencies=LATENCIES, methods="baseline,gradual", **values
    ):
        for (method, seed), spec in trials(methods).items():
            measures, row = {}, None
            if method == "gradual":
                measures = sizes(100)
                if parameters[seed] is not None:
                    row = removal(parameters[seed], latencies[seed], **values)
            keep(spec, tmp_path / name, 0.9 + seed / 100, measures=measures, removal=row)
        return tmp_path / name / SUITE

    return made


@pytest.fixture
def found(neqbench):
    def compared(a, b, *gates):
        words = [word for gate in gates for word in ("--fail-on", gate)]
        result = neqbench("compare", a, b, *words, "--format", "json")
        return result.returncode, json.loads(result.stdout)

    return compared


def changes(value, method="gradual"):
    (found,) = [each for each in value["methods"] if each["method"] == method]
    return {change["quantity"]: change for change in found["changes"]}


GATES = ("parameters>5%", "forward>5%", "latency>5%")


def test_the_same_results_pass(run, found):
    code, value = found(run("a"), run("b"), *GATES)
    assert (code, value["missed"]) == (0, [])
    assert {change["mark"] for change in changes(value).values()} == {"same"}
    assert {"parameters", "forward", "latency"} <= set(changes(value))
    assert {"parameters", "forward", "latency"}.isdisjoint(changes(value, "baseline"))
    assert [each["prunes"] for each in value["methods"]] == [False, True]


def test_changes_are_ratios_with_scipy_s_intervals(run, found):
    more, slower = (330, 335, 350), (0.70, 0.75, 0.71)
    code, value = found(run("a"), run("b", more, slower), *GATES)
    known = changes(value)
    for name, before, after in (
        ("parameters", PARAMETERS, more),
        ("forward", PARAMETERS, more),
        ("latency", LATENCIES, slower),
    ):
        logs = np.log(after) - np.log(before)
        low, high = stats.t.interval(0.95, 2, logs.mean(), stats.sem(logs))
        ends = [100 * (math.exp(end) - 1) for end in (logs.mean(), low, high)]
        change = known[name]
        assert [change["change"], change["low"], change["high"]] == pytest.approx(ends)
        assert change["mark"] == "worse"
    assert code == 1
    assert [line.partition(":")[0] for line in value["missed"]] == list(GATES)
    assert f"latency>5%: {SUITE} gradual: +{known['latency']['change']:.2f} %" in value["missed"]


@pytest.mark.slow
@pytest.mark.parametrize("values", [{"device": "another"}, {"trials_on_device": 2}])
def test_a_latency_that_can_not_be_compared(run, found, values):
    code, value = found(run("a"), run("b", **values), *GATES)
    assert {"parameters", "forward"} <= set(changes(value))
    assert "latency" not in changes(value)
    assert value["missed"] == [
        f"latency>5%: {SUITE} gradual: can't be checked (no latency to compare)"
    ]
    assert any(note.startswith("Latencies are not compared") for note in value["notes"])
    assert code == 1


def test_a_gate_on_what_nothing_has(run, found):
    code, value = found(run("a", methods="baseline"), run("b", methods="baseline"), GATES[0])
    assert code == 1
    assert value["missed"] == ["parameters>5%: can't be checked (nothing that prunes is in A or B)"]


def test_a_gate_on_what_only_b_has(run, found):
    code, value = found(run("a", methods="baseline"), run("b"), *GATES)
    assert code == 1
    why = "can't be checked (nothing that prunes is in A; gradual is only in B)"
    assert value["missed"] == [f"{gate}: {why}" for gate in GATES]


@pytest.mark.slow
def test_a_gate_on_seeds_that_b_knows_nothing_of(run, found):
    b = run("b", (300, None, 320), (0.60, None, None))
    code, value = found(run("a"), b, *GATES)
    assert code == 1
    assert value["missed"] == [
        f"parameters>5%: {SUITE} gradual: can't be checked (B lacks parameters of seeds 1)",
        f"forward>5%: {SUITE} gradual: can't be checked (B lacks forward of seeds 1)",
        f"latency>5%: {SUITE} gradual: can't be checked (B lacks latency of seeds 1, 2)",
    ]
    assert changes(value)["latency"]["lacking"] == [1, 2]
    assert found(b, run("a"), *GATES)[0] == 0  # the other way round B knows more


@pytest.mark.slow
def test_in_words(run, neqbench):
    a, b = run("a"), run("b", (330, 335, 350))
    for columns in (80, 160):
        text = neqbench("compare", a, b, columns=columns).stdout
        assert all(len(line) <= columns or str(a.parent) in line for line in text.splitlines())
        line = next(li for li in text.partition("After removal")[2].splitlines() if SUITE in li)
        assert line.count("worse") == 2
        assert line.endswith("same")
        changed = text.partition("Trials that changed in what removal leaves")[2]
        assert changed.count("+10.00") == 2  # of seed 0, parameters and FLOPs
        assert text.count("Trials that changed") == 1
    same = "3 of 6 trials are the same in metric, savings and what removal leaves."
    assert same in text  # of the baseline; the others are larger
    assert "6 of 6 trials are the same" in neqbench("compare", a, a).stdout


@pytest.mark.parametrize("text", ["parameters>5pp", "forwards>5%"])
def test_a_gate_that_is_none(run, neqbench, text):
    a = run("a")
    result = neqbench("compare", a, a, "--fail-on", text)
    assert result.returncode == 2
    assert "parameters, forward, latency in %" in result.stderr
