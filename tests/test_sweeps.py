"""A list where one value is expected makes a grid."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
from trials import SMALL, ask, run

from harness.errors import UserError
from harness.report.curves import curves, sweeps
from harness.report.figures import pictures
from harness.report.model import load_report
from harness.run.trials import chosen_methods, specs
from harness.storage.store import Store
from harness.suite import files
from harness.suite.sweep import point_label


def trials(*settings, methods="baseline,neq", seeds="0"):
    return specs("digits", [*SMALL, *settings], methods, seeds)


def test_a_methods_parameters_make_methods():
    found = trials("methods.neq.eps=[0, 1e-4, 0.5]", "methods.neq.mu=[0, 0.9]")
    assert [t.method for t in found][:3] == ["baseline", "neq eps=0 mu=0", "neq eps=0 mu=0.9"]
    assert len(found) == 7
    assert len({t.group for t in found}) == 1
    assert len({t.key for t in found}) == 7
    assert (found[4].method_spec.eps, found[4].method_spec.mu) == (1e-4, 0.9)


def test_values_of_the_experiment_make_groups_with_a_baseline_each():
    found = trials("data.validation_size=[20, 5]", seeds="0-1")
    assert [(point_label(t.suite.point), t.method, t.seed) for t in found] == [
        (point, method, seed)
        for seed in (0, 1)
        for point in ("validation_size=20", "validation_size=5")
        for method in ("baseline", "neq")
    ]
    assert [len(group) for group in found.groups()] == [4, 4]
    assert {t.suite.data.validation_size for t in found.groups()[1]} == {5}
    (alone,) = {t.key for t in trials("data.validation_size=5", methods="neq")}
    assert alone in {t.key for t in found}  # a point of a sweep is the trial that it is alone


def test_tables_are_points_too():
    adam = "recipe.optimizer=[{name='SGD', lr=0.05}, {name='SGD', lr=0.5}, {name='Adam', lr=1e-3}]"
    found = trials(adam, "recipe.epochs=[2, 3]", "model.arguments=[{}, {width=8}]")
    points = [point_label(group[0].suite.point) for group in found.groups()]
    assert len(points) == len(set(points)) == 12
    assert points[0] == "arguments={} epochs=2 optimizer=SGD lr=0.05"
    assert {group[0].suite.recipe.optimizer.name for group in found.groups()} == {"SGD", "Adam"}


def test_numbers_of_torchs_classes_are_axes():
    found = trials("recipe.optimizer.lr=[0.1, 0.01]", "recipe.scheduler.gamma=[0.1, 0.5]")
    assert [group[0].suite.recipe.optimizer.arguments["lr"] for group in found.groups()] == [
        0.1,
        0.1,
        0.01,
        0.01,
    ]
    assert found[0].suite.point == {"recipe.optimizer.lr": 0.1, "recipe.scheduler.gamma": 0.1}


def test_what_takes_a_list_is_no_axis():
    (group,) = trials("recipe.scheduler.milestones=[1, 2, 3]", "model.exclude=['fc']").groups()
    assert group[0].suite.model.input == (1, 16, 16)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("methods.neq.eps=[]", r"digits/suite.toml: methods.neq.eps: an empty list"),
        ("data.validation_size=[]", r"data.validation_size: an empty list"),
        ("methods.neq.eps=[0, 1e-3, 0.0]", r"methods.neq.eps: 0.0 is listed twice"),
        ("data.validation_size=[5, 'a']", r"data.validation_size: .*valid integer, got 'a'"),
        ("recipe.optimizer.foreach=[0, 1]", "recipe.optimizer.foreach: a list; to sweep it, give"),
        ("point=1", "digits/suite.toml: point: unknown key"),
        ("methods.neq.eps=['a']", r"methods.neq eps=a.eps: .*valid number"),
    ],
)
def test_a_grid_that_is_none(setting, message):
    with pytest.raises(UserError, match=message):
        files.load_suite("digits", [setting])


def test_one_method_of_a_sweep_can_be_chosen():
    (one,) = trials("methods.neq.eps=[0, 1e-4]", methods="neq eps=0.0001")
    assert one.method_spec.eps == 1e-4
    with pytest.raises(
        UserError, match=r"unknown method 'neq eps=1'; suite digits has .*neq eps=0"
    ):
        trials("methods.neq.eps=[0, 1e-4]", methods="neq eps=1")


PAPER = {
    "cifar10-eps": (["methods"], 9, 5000),
    "cifar10-mu": (["methods"], 3, 5000),
    "cifar10-validation-size": (["data"], 8, None),
    "cifar10-optimizers": (["recipe"], 4, 50),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_ablations(name):
    (axis,), count, validation = PAPER[name]
    points, _ = files.load_experiments(name)
    chosen = chosen_methods(points[0], None)
    assert (len(chosen) - 1 if axis == "methods" else len(points)) == count
    sizes = {point.data.validation_size for point in points}
    assert sizes == ({validation} if validation else {5000, 2500, 50, 25, 10, 5, 2, 1})
    assert {point.recipe.epochs for point in points} == {250}
    named = {method for value in points[0].published.values for method in value.methods}
    assert named <= set(points[0].methods)
    short, _ = files.load_experiments(name.replace("cifar10", "digits"))
    assert {point.recipe.epochs for point in short} == {30}
    assert chosen_methods(short[0], None)[0] == "baseline"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("swept")
    found = trials("data.validation_size=[20, 5]", "methods.neq.eps=[0.01, 9]", "recipe.epochs=3")
    for spec in found:
        run(spec, root)
    for group in found.groups():
        ask(Store(root, "digits"), group)
    return root


@pytest.mark.slow
def test_a_sweep_is_reported_point_by_point_and_as_curves(swept, neqbench):
    report = load_report([Store(swept, "digits")])
    assert [t.point for t in report.groups] == ["validation_size=20", "validation_size=5"]
    assert [t.apart["data.validation_size"] for t in report.groups] == [20, 5]
    assert report.groups[0].axes == [{"data.validation_size": 20}]
    found = {(c.parameter, c.group): c for c in curves(report.groups)}
    assert len(found) == 3
    eps = found["eps", report.groups[0].group]
    assert [point.x for point in eps.lines["neq"]] == [0.01, 9.0]
    assert [point.row for point in eps.lines["neq"]] == report.groups[0].methods[1:]
    (sizes,) = [c for (parameter, _), c in found.items() if parameter == "data.validation_size"]
    assert [point.x for point in sizes.lines["baseline"]] == [5, 20]
    assert list(sizes.lines) == ["baseline", "neq eps=0.01", "neq eps=9"]
    text = neqbench("report", "digits", "--results", swept).stdout
    assert "digits (validation_size=5): Handwritten" in text
    rows = re.findall(r"^validation_size=\d+ .*", text, re.MULTILINE)
    of = [(t.point, row) for t in report.groups for row in t.methods]
    assert len(rows) == len(of) == 6
    for line, (point, row) in zip(rows, of, strict=True):
        assert line.startswith(f"{point} ")
        assert f"{100 * row.quality.metric_mean:.2f}" in line
    page = neqbench("report", "digits", "--results", swept, "--format", "html").stdout
    assert page.count("<figure") == len(list(pictures(report)))
    status = json.loads(neqbench("status", "--results", swept, "--format", "json").stdout)
    assert {group["point"] for group in status["groups"]} == {t.point for t in report.groups}
    planned = neqbench(
        "plan", "digits", "--results", swept, "--set", "data.validation_size=[20, 5]",
        *(word for setting in SMALL for word in ("--set", setting) if "validation" not in setting),
        "--set", "recipe.epochs=3", "--set", "methods.neq.eps=[0.01, 9]", "--seeds", "0",
        "--methods", "baseline,neq", "--format", "json",
    ).stdout  # fmt: skip
    assert {row["state"] for row in json.loads(planned)} == {"done"}


@pytest.mark.slow
def test_a_curve_of_words_keeps_their_order(tmp_path):
    found = trials(
        "recipe.optimizer=[{name='SGD', lr=0.05}, {name='Adam', lr=1e-3}]", "recipe.epochs=1"
    )
    for spec in found:
        run(spec, tmp_path)
    for group in found.groups():
        ask(Store(tmp_path, "digits"), group)
    (curve,) = curves(load_report([Store(tmp_path, "digits")]).groups)
    assert (curve.parameter, curve.ticks) == (
        "recipe.optimizer",
        ["SGD\nlr=0.05", "Adam\nlr=0.001"],
    )
    shutil.rmtree(tmp_path / "digits" / "plans")  # without a plan nothing says that it is a sweep
    assert not list(curves(load_report([Store(tmp_path, "digits")]).groups))


@pytest.mark.slow
def test_points_are_told_apart_from_other_runs(swept, tmp_path):
    """Of noise, or with other epochs; a point that is run again alone stays in its sweep."""
    shutil.copytree(swept / "digits", tmp_path / "digits")
    store = Store(tmp_path, "digits")
    settings = ["methods.neq.eps=[0.01, 9]", "recipe.epochs=3", "data.validation_size=5"]
    ask(store, trials(*settings))
    sweep = ["data.validation_size=[20, 5]", "recipe.epochs=1"]
    for synthetic in (False, True):
        for spec in specs("digits", [*SMALL, *sweep], "baseline", "0", synthetic=synthetic):
            run(spec, tmp_path)
        for group in specs(
            "digits", [*SMALL, *sweep], "baseline", "0", synthetic=synthetic
        ).groups():
            ask(store, group)
    report = load_report([store])
    found = list(sweeps(report.groups))
    assert [[(t.epochs, t.synthetic) for _, t in sweep] for sweep in found] == [
        [(3, False)] * 2,
        [(1, False)] * 2,
        [(1, True)] * 2,
    ]
    names = [picture.name for picture in pictures(report)]
    assert len(names) == len(set(names))


def test_a_method_that_some_points_lack_is_drawn_where_it_is(swept, tmp_path):
    shutil.copytree(swept / "digits", tmp_path / "digits")
    report = load_report([Store(tmp_path, "digits")])
    lost = report.groups[1].group
    for path in list((tmp_path / "digits" / "trials").iterdir()):
        row = pq.read_table(path).to_pylist()[0]
        if row["group"] == lost and row["method"] == "neq eps=9":
            path.unlink()
    (curve,) = [c for c in curves(load_report([Store(tmp_path, "digits")]).groups) if not c.family]
    assert {label: len(points) for label, points in curve.lines.items()} == {
        "baseline": 2,
        "neq eps=0.01": 2,
        "neq eps=9": 1,
    }


@pytest.mark.slow
def test_words_beside_a_number_make_lines_of_their_own(tmp_path):
    found = trials(
        "methods.neq.eps=[0.01, 9]", "methods.neq.similarity=['dataset', 'sample']",
        "methods.random.keep=[0.2, 0.5]", "methods.smallest_velocity.keep=[0.2, 0.5]",
        "recipe.epochs=1", methods="baseline,neq,random,smallest_velocity",
    )  # fmt: skip
    for spec in found:
        run(spec, tmp_path)
    report = load_report([Store(tmp_path, "digits")])
    lines = {
        (c.family, label): len(p) for c in curves(report.groups) for label, p in c.lines.items()
    }
    assert lines == {
        ("neq", "neq similarity=dataset"): 2,
        ("neq", "neq similarity=sample"): 2,
        ("random", "random"): 2,
        ("smallest_velocity", "smallest_velocity"): 2,
    }
    names = [picture.name for picture in pictures(report)]
    assert len(names) == len(set(names))


@pytest.mark.slow
def test_a_group_can_be_a_point_of_two_sweeps(swept, tmp_path):
    shutil.copytree(swept / "digits", tmp_path / "digits")
    settings = ["methods.neq.eps=[0.01, 9]", "recipe.epochs=3", "data.validation_size=20"]
    found = trials(*settings, "recipe.optimizer.lr=[0.05, 0.01]", methods="baseline")
    for spec in found:
        run(spec, tmp_path)
    for group in found.groups():
        ask(Store(tmp_path, "digits"), group)
    report = load_report([Store(tmp_path, "digits")])
    points = [[point for point, _ in sweep] for sweep in sweeps(report.groups)]
    assert points == [
        [{"data.validation_size": 20}, {"data.validation_size": 5}],
        [{"recipe.optimizer.lr": 0.05}, {"recipe.optimizer.lr": 0.01}],
    ]
    names = [picture.name for picture in pictures(report)]
    assert len(names) == len(set(names))
