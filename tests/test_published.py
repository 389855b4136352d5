"""Measured beside published, on figures that are made up to agree or not."""

import json

import numpy
import pandas as pd
import pytest
from trials import ask, run

from harness.report.model import load_report
from harness.report.published import against_published
from harness.run.trials import specs
from harness.storage.store import Store
from harness.suite import files
from harness.suite.config import Published

CONDITIONS = {
    "data": "CIFAR-10",
    "data.train_size": "all",
    "recipe.epochs": 250,
    "recipe.optimizer": {"name": "SGD", "lr": 0.1},
    "model.build": "here:model",
}
EXPERIMENT = {
    "data": {"train_size": None, "synthetic": False, "validation_size": 50},
    "recipe": {"epochs": 250, "optimizer": {"name": "SGD", "lr": 0.1}},
    "model": {"build": "here:model"},
}
PARAMETERS = {"kind": "neq", "eps": 0.001, "mu": 0.5, "gradient": "exact"}
FIGURE = {"methods": ["neq"], "what": "metric", "value": 0.9296, "certainty": "runs"}


def compared(figure, values, experiment=EXPERIMENT, data="CIFAR-10", column="value"):
    trials = pd.DataFrame([{"experiment": json.dumps(experiment), "data": data}])
    own = {"method": "neq", "label": "neq", "parameters": json.dumps(PARAMETERS)}
    done = pd.DataFrame([own | {column: value, "paper_curve": [1.0, value]} for value in values])
    stated = {"source": "somewhere", "conditions": CONDITIONS, "values": [FIGURE | figure]}
    found = against_published(Published.model_validate(stated), done, trials, 0.005)
    return found[0] if found else None


def around(mean, spread=0.001):
    return [mean - spread, mean, mean + spread, mean]


def test_agrees_and_differs():
    known = {"std": 0.0021, "n": 4}
    same = compared(known, around(0.9290))
    assert (same.verdict, same.n, same.certainty) == ("agrees", 4, "runs")
    assert (same.measured, same.published) == (pytest.approx(0.929), 0.9296)
    other = compared(known, around(0.9200))
    assert (other.verdict, other.why.partition(",")[0]) == ("differs", "by −0.96 points")
    wide = compared(known, around(0.9290, spread=0.01))
    assert (wide.verdict, wide.why) == ("undecided", "the interval is too wide: more seeds")
    few = compared(known, [0.929, 0.93])
    assert (few.verdict, few.why) == ("undecided", "fewer than 3 seeds")


def test_an_exact_reproduction_agrees():
    """Values without any spread, and the last digit of a published one."""
    share = {"what": "frozen", "std": 0.0, "n": 4, "value": 0.995617879053}
    assert compared(share, [2272 / 2282] * 4, column="frozen").verdict == "agrees"
    assert compared(share, [2271 / 2282] * 4, column="frozen").verdict == "differs"


def test_other_parameters_are_not_comparable():
    figure = {"parameters": {"eps": 1e-3, "mu": 0}, "std": 0.002, "n": 4}
    found = compared(figure, around(0.9296))
    assert (found.verdict, found.why) == ("not comparable", "mu 0.5, published with 0")
    assert compared(figure | {"parameters": PARAMETERS}, around(0.9296)).verdict == "agrees"


def test_figures_of_some_epochs():
    figure = {"what": "paper", "epochs": [1, 1], "value": 5.0, "error": 0.01}
    found = compared(figure, around(5.0), column="value")
    assert (found.verdict, found.epochs, found.measured) == ("agrees", (1, 1), pytest.approx(5.0))


def test_epochs_that_were_not_run_are_not_measured():
    figure = {"what": "paper", "epochs": [100, 149], "value": 5.0}
    short = EXPERIMENT | {"recipe": {"epochs": 2}}
    for experiment, why in ((EXPERIMENT, "not measured"), (short, "recipe.epochs 2, published")):
        found = compared(figure, around(5.0), experiment)
        assert (found.verdict, found.measured) == ("not comparable", None)
        assert found.why.startswith(why)


def test_what_was_read_off_a_figure_has_its_error():
    figure = {"what": "paper", "value": 84.85e6, "certainty": "digitised"}
    near = around(85.4e6, spread=1e5)
    assert compared(figure, near, column="paper").verdict == "differs"
    assert compared(figure | {"error": 0.01}, near, column="paper").verdict == "agrees"


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("recipe", {"epochs": 8, "optimizer": {"name": "SGD", "lr": 0.1}}, "recipe.epochs 8, "),
        (
            "recipe",
            {"epochs": 250, "optimizer": {"name": "SGD", "lr": 0.2}},
            "recipe.optimizer SGD (lr 0.2), published with SGD (lr 0.1)",
        ),
        ("data", {"train_size": 3000, "synthetic": False}, "data.train_size 3000, "),
        ("data", {"train_size": None, "synthetic": True}, "trained on noise"),
    ],
)
def test_other_conditions_are_not_comparable(part, value, why):
    found = compared({}, around(0.9296), EXPERIMENT | {part: value})
    assert found.verdict == "not comparable"
    assert found.why.startswith(why)


def test_other_images_are_not_comparable():
    found = compared({}, around(0.9296), data="CIFAR-10 (JPEG)")
    assert found.why == "data CIFAR-10 (JPEG), published with CIFAR-10"
    assert found.measured is not None


def test_what_is_unsure_is_never_held_against_anything():
    assert compared({"certainty": "unconfirmed"}, around(0.5)).verdict == "not comparable"
    doubted = compared({"doubt": "nobody knows"}, around(0.5))
    assert (doubted.verdict, doubted.why) == ("not comparable", "nobody knows")


def test_the_dense_count_depends_on_the_model_alone():
    figure = {"what": "paper_dense", "value": 1000, "certainty": "paper"}
    other = EXPERIMENT | {"recipe": {"epochs": 1}}
    assert compared(figure, [1000.0], other, "noise", "paper_dense").verdict == "agrees"
    assert compared(figure, [1001.0], other, "noise", "paper_dense").verdict == "differs"
    model = EXPERIMENT | {"model": {"build": "elsewhere:model"}}
    assert compared(figure, [1000.0], model, column="paper_dense").verdict == "not comparable"


def test_a_figure_of_another_point_of_a_sweep_is_left_out():
    assert compared({"conditions": {"data.validation_size": 25}}, around(0.9)) is None
    assert compared({"conditions": {"data.validation_size": 50}}, around(0.9)) is not None


# Of the run tables: 250 epochs, four seeds.
RUNS = {
    ("cifar10", "neq"): [0.9269, 0.9304, 0.9294, 0.9319],
    ("cifar10-eps", "neq eps=0.001"): [0.9226, 0.9235, 0.9247, 0.9259],
    ("cifar10-mu", "neq mu=0.9"): [0.9266, 0.9236, 0.9238, 0.9270],
}


@pytest.mark.parametrize(("name", "method"), RUNS)
def test_the_suites_carry_what_was_published(name, method):
    published = files.load_suite(name)[0].published
    figures = {v.what: v for v in published.values if method in v.methods}
    runs = RUNS[name, method]
    assert figures["metric"].value == pytest.approx(numpy.mean(runs), abs=1e-6)
    assert figures["metric"].std == pytest.approx(numpy.std(runs, ddof=1), abs=1e-6)
    assert figures["metric"].n == 4
    assert "arXiv 2207.09455" in published.source


DENSE = {
    "cifar10": 138_937_600,
    "imagenet": 3_638_081_536,
    "imagenet-swin": 30_280_413_184,
    "segmentation": 305_056_481_600,
}


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_counts(name):
    (figure,) = [v for v in files.load_suite(name)[0].published.values if v.what == "paper_dense"]
    assert (figure.value, figure.certainty) == (DENSE[name], "paper")


NAMES = {
    "cifar10": {"CIFAR-10"},
    "imagenet": {"ImageNet"},
    "segmentation": {"COCO 2017, VOC's classes"},
}
VALUES = dict.fromkeys(("value", "paper", "paper_dense", "frozen"), 1.0) | {"paper_curve": [1.0]}


# Published for COCO, and for 50 validation images.
ELSEWHERE = {"segmentation-voc", "cifar10-reproduction"}
NAMED = [n for n in files.shipped_suites() if n.partition("-")[0] in NAMES]


# Of the suites that prune nothing is published; another test says so.
@pytest.mark.parametrize("name", [n for n in NAMED if not {"digits", "pruning"} & {*n.split("-")}])
def test_a_suite_meets_the_conditions_of_what_it_carries(name):
    compared = 0
    for suite in files.load_experiments(name)[0]:
        trials = pd.DataFrame([{"experiment": json.dumps(suite.experiment()), "data": ""}])
        done = pd.DataFrame(
            [
                {"method": m, "label": m, "parameters": spec.model_dump_json()} | VALUES
                for m, spec in suite.methods.items()
            ]
        )
        stated = suite.published.model_dump(mode="json")
        if name in ELSEWHERE:
            continue
        assert stated["conditions"].pop("data", "ImageNet") in NAMES[name.partition("-")[0]]
        found = against_published(Published.model_validate(stated), done, trials, 0.005)
        compared += len(found)
        assert not [c.why for c in found if "published with" in c.why]
    assert compared > 0 or name in ELSEWHERE


@pytest.mark.slow
def test_the_report_holds_the_paper_against_a_run_of_noise(tmp_path, neqbench):
    settings = [
        "recipe.epochs=1", "data.train_size=60", "data.validation_size=10",
        "recipe.batch_size=50", "recipe.precision=float32", "resources={cpus=1, gpus=0}",
    ]  # fmt: skip
    trials = specs("cifar10", settings, "baseline,neq", "0", synthetic=True)
    for spec in trials:
        run(spec, tmp_path)
    ask(Store(tmp_path, "cifar10"), trials)
    (table,) = load_report([Store(tmp_path, "cifar10")]).groups
    verdicts = {(c.method, c.what): (c.verdict, c.why) for c in table.published}
    assert verdicts["baseline", "paper_dense"] == ("agrees", "")
    assert verdicts["neq", "metric"] == ("not comparable", "trained on noise")
    narrow = neqbench("report", tmp_path, columns=80).stdout
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.count("not comparable") >= 6
    assert " agrees" in narrow
    text = " ".join(neqbench("report", tmp_path, columns=120).stdout.split())
    assert "138,937,600 138,937,600 agrees" in text
    assert "92.97 ± 0.21 ᵃ not comparable ¹" in text
    assert "¹ trained on noise" in text
    assert "very likely used the recursion of the authors' code" in text
    assert "84.85 MFLOPs ᵈ" in text
