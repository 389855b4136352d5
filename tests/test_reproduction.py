"""The suite that repeats the authors' runs, and the figures that show both optimizers in one."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from trials import SMALL, ask, run, small

from harness.report.curves import every_sweep
from harness.report.figures import pictures
from harness.report.model import load_report
from harness.report.published import against_published
from harness.report.style import BASELINE, INK
from harness.report.sweep_courses import course_pictures
from harness.run.trials import specs
from harness.storage.store import Store
from harness.suite import files

NAME = "cifar10-reproduction"
SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ADAM = {"name": "Adam", "lr": 1e-3, "weight_decay": 5e-4}
TWO = ["recipe.optimizer=[{name='SGD', lr=0.05, momentum=0.9}, {name='Adam', lr=1e-3}]"]
POINTS = ["optimizer=SGD lr=0.05 momentum=0.9", "optimizer=Adam lr=0.001"]

pytestmark = pytest.mark.slow


def test_it_is_cifar10_with_500_images_and_two_optimizers():
    points, _ = files.load_experiments(NAME)
    cifar10, _ = files.load_suite("cifar10")
    assert [p.recipe.optimizer.model_dump() for p in points] == [SGD, ADAM]
    assert {p.data.validation_size for p in points} == {500}
    for point in points:
        recipe = point.recipe.model_copy(update={"optimizer": cifar10.recipe.optimizer})
        data = point.data.model_copy(update={"validation_size": 50})
        alike = [point.model, point.methods, point.seeds, recipe, data]
        same = [cifar10.model, cifar10.methods, cifar10.seeds, cifar10.recipe, cifar10.data]
        assert alike == same
    trials = specs(NAME, synthetic=True)
    assert len({trial.key for trial in trials}) == len(trials) == 2 * 3 * 4
    assert {trial.method for trial in trials} == {"baseline", "neq", "neq-reference"}
    assert [len(group) for group in trials.groups()] == [12, 12]


@pytest.mark.parametrize("images", [500, 50])
def test_what_is_published_for_50_images_is_compared_with_50_alone(images):
    """Of the run tables and figures: SGD 92.965 % and 84.85 MFLOPs, Adam 92.0 % and 64.2."""
    found = {}
    for point in files.load_experiments(NAME, [f"data.validation_size={images}"])[0]:
        trials = pd.DataFrame([{"experiment": json.dumps(point.experiment()), "data": "CIFAR-10"}])
        rows = [
            {"method": name, "label": name, "parameters": spec.model_dump_json(), "value": 0.93}
            | {"frozen": 0.98, "paper": 8e7, "paper_dense": 138_937_600.0, "paper_curve": [1.0]}
            for name, spec in point.methods.items()
        ]
        for row in against_published(point.published, pd.DataFrame(rows), trials, 0.005):
            found[point.recipe.optimizer.name, row.method, row.what, row.epochs] = row
    for method in ("neq", "neq-reference"):
        assert found["SGD", method, "metric", None].published == pytest.approx(0.92965)
        assert found["SGD", method, "paper", None].published == 84.85e6
        assert found["Adam", method, "metric", None].published == 0.92
        assert found["Adam", method, "paper", None].published == 64.2e6
    dense = [found.pop((name, "baseline", "paper_dense", None)) for name in ("SGD", "Adam")]
    assert [row.verdict for row in dense] == ["agrees", "agrees"]
    held = [row for (_, _, _, epochs), row in found.items() if epochs is None]
    why = "data.validation_size 500, published with 50" if images == 500 else "fewer than 3 seeds"
    assert {row.why for row in held} == {why}
    assert {row.verdict for row in held} == {"not comparable" if images == 500 else "undecided"}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("swept")
    found = specs("digits", [*SMALL, *TWO], "baseline,neq", "0-1")
    for spec in found:
        run(spec, root)
    for group in found.groups():
        ask(Store(root, "digits"), group)
    return root, found


@pytest.fixture(scope="module")
def report(swept):
    return load_report([Store(swept[0], "digits")])


def drawn(report):
    """By kind: (picture, its lines by label without those that mark drops)."""
    (sweep,) = every_sweep(report.groups)
    found = {picture.name.rpartition("-")[2]: picture for picture in course_pictures(sweep, report)}
    lines = {}
    for kind, picture in found.items():
        (axis,) = picture.figure.axes
        lines[kind] = {e.get_label(): e for e in axis.lines if not e.get_label().startswith("_")}
    return found, lines


def marked(picture):
    """Where the dotted lines from top to bottom are."""
    (axis,) = picture.figure.axes
    return [e.get_xdata()[0] for e in axis.lines if e.get_label().startswith("_")]


def test_both_optimizers_are_in_each_of_two_figures(swept, report):
    """Every line's values are those of the stored rows."""
    root, trials = swept
    found, lines = drawn(report)
    assert list(found) == ["neurons", "metric"]
    assert list(lines["neurons"]) == [f"neq {point}" for point in POINTS]
    assert list(lines["metric"]) == [f"{m} {p}" for p in POINTS for m in ("baseline", "neq")]
    stored = {}
    for spec in trials:
        place = ["SGD", "Adam"].index(spec.suite.recipe.optimizer.name)
        rows = pq.read_table(root / "digits" / "epochs" / f"{spec.key}.parquet").to_pylist()
        values = {
            "neurons": [1 - row["frozen_neurons"] / row["total_neurons"] for row in rows],
            "metric": [row["test_metric"] for row in rows],
        }
        assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
        for kind, curve in values.items():
            stored.setdefault((kind, f"{spec.method} {POINTS[place]}"), []).append(curve)
    for kind, mine in lines.items():
        (axis,) = found[kind].figure.axes
        for (label, line), band in zip(mine.items(), axis.collections, strict=True):
            curves = np.array(stored[kind, label])
            assert len(curves) == 2
            assert list(line.get_xdata()) == [0, 1, 2, 3, 4]
            np.testing.assert_allclose(line.get_ydata(), curves.mean(0))
            ends = band.get_paths()[0].get_extents()
            np.testing.assert_allclose([ends.y0, ends.y1], [curves.min(), curves.max()])
    assert min(lines["neurons"][f"neq {POINTS[0]}"].get_ydata()) < 1  # something was frozen


def test_methods_and_optimizers_can_be_told_apart(report):
    found, lines = drawn(report)
    mine = lines["metric"].values()
    looks = [(e.get_color(), e.get_linestyle(), e.get_marker(), e.get_alpha()) for e in mine]
    colours, styles, marks, alphas = zip(*looks, strict=True)
    assert colours[:2] == colours[2:] == (BASELINE, colours[1])
    assert colours[1] != BASELINE
    assert styles[0] == styles[1] != styles[2] == styles[3]
    assert marks[0] == marks[1] != marks[2] == marks[3]
    assert 1 == alphas[0] == alphas[1] > alphas[2] == alphas[3] > 0.5
    neurons = lines["neurons"].values()  # a point looks alike in both
    assert [e.get_alpha() for e in neurons] == [alphas[1], alphas[3]]
    (legend,) = found["metric"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["baseline", "neq", *POINTS]
    (legend,) = found["neurons"].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["neq", "", *POINTS]
    keys = [e for e in legend.get_lines() if e.get_color() == INK]  # turns with the page
    assert len(keys) == 2


def test_drops_of_the_learning_rate_are_marked_where_all_points_have_them(report):
    found, _ = drawn(report)
    for picture in found.values():
        assert marked(picture) == [1.5, 3.5]  # before epochs 2 and 4, the milestones
        assert "dotted: drops of the learning rate." in picture.caption
    epochs = report.results.epochs
    own = np.where(epochs["group"] == report.groups[0].group, 0.1, epochs["lr"])
    apart = replace(report, results=replace(report.results, epochs=epochs.assign(lr=own)))
    for picture in drawn(apart)[0].values():
        assert marked(picture) == []
        assert "dotted" not in picture.caption


def test_they_stand_with_all_points_on_the_page_and_in_the_folder(swept, tmp_path, neqbench):
    root, _ = swept
    words = ["report", "digits", "--results", root, "--format", "html", "--figures", tmp_path]
    page = neqbench(*words).stdout
    begins = page.index("<h2>digits: all points of optimizer</h2>")
    section = page[begins : page.index("</section>", begins)]
    for what in ("neurons updated", "metric"):
        named = "accuracy" if what == "metric" else what
        assert f"digits: {named} by epoch at the points of optimizer, with a colour" in section
    assert section.count("<figure") == 3  # and the curve over the optimizers
    names = {
        path.name.rpartition("-")[2] for path in tmp_path.glob("digits-recipe.optimizer-*.png")
    }
    assert names == {"neurons.png", "metric.png", "sweep.png"}


def test_where_nothing_freezes_there_is_the_metric_alone(report):
    plain = [replace(t, methods=[r for r in t.methods if r.plain]) for t in report.groups]
    found, lines = drawn(replace(report, groups=plain))
    assert list(found) == ["metric"]
    assert list(lines["metric"]) == [f"baseline {point}" for point in POINTS]


def test_a_method_that_a_point_lacks_is_drawn_where_it_is(report):
    first, second = report.groups
    second = replace(second, methods=[row for row in second.methods if row.plain])
    _, lines = drawn(replace(report, groups=[first, second]))
    assert list(lines["neurons"]) == [f"neq {POINTS[0]}"]
    assert list(lines["metric"])[1:] == [f"neq {POINTS[0]}", f"baseline {POINTS[1]}"]


def test_of_many_points_and_methods_the_first_are_drawn(report):
    """As many as lines can be told apart, and that is said."""
    first, epochs = report.groups[0], report.results.epochs
    rows, of = epochs[epochs["group"] == first.group], report.done[first.group]
    methods = [*first.methods, replace(first.methods[1], label="other")]
    groups, done, more = [], {}, []
    for number in range(8):
        group, axes = f"{number:016x}", [{"recipe.optimizer": f"SGD lr={number}"}]
        groups.append(replace(first, group=group, axes=axes, methods=methods))
        done[group] = pd.concat([of, of[of["label"] == "neq"].assign(label="other")])
        more.append(rows.assign(group=group))
    results = replace(report.results, epochs=pd.concat(more))
    found, lines = drawn(replace(report, groups=groups, done=done, results=results))
    assert {kind: len(mine) for kind, mine in lines.items()} == {"neurons": 6, "metric": 12}
    said = "The first 6 of 8 points. The first 2 of 3 methods."
    assert all(picture.caption.endswith(said) for picture in found.values())
    assert len({line.get_marker() for line in lines["neurons"].values()}) == 6


AXES = [
    ([{"recipe.optimizer": "SGD"}, {"recipe.optimizer": "Adam"}], True),
    ([{"recipe.optimizer.nesterov": True}, {"recipe.optimizer.nesterov": False}], True),
    ([{"model.arguments": "{}"}, {"model.arguments": "width=8"}], True),
    ([{"recipe.batch_size": 40, "recipe.precision": p} for p in ("bf16", "fp16")], True),
    ([{"data.validation_size": 20}, {"data.validation_size": 5}], False),
    ([{"recipe.optimizer.lr": lr, "recipe.epochs": 3} for lr in (0.1, 1.0)], False),
]


@pytest.mark.parametrize(("points", "words"), AXES)
def test_a_sweep_over_numbers_has_a_curve_instead(points, words, report):
    pairs = zip(report.groups, points, strict=True)
    tables = [replace(table, axes=[point], apart={}) for table, point in pairs]
    sweep = [(point, table) for table, point in zip(tables, points, strict=True)]
    assert bool(list(course_pictures(sweep, replace(report, groups=tables)))) is words


def test_a_point_that_was_asked_for_twice_is_one(report):
    """Two runs may name it differently, by what else they ask for."""
    first, second = report.groups
    once = [({"recipe.optimizer": word}, first) for word in ("SGD", "SGD lr=0.05")]
    assert not list(course_pictures(once, report))
    twice = [*once, ({"recipe.optimizer": "Adam"}, second)]
    _, metric = course_pictures(twice, report)
    (axis,) = metric.figure.axes
    drawn = [line.get_label() for line in axis.lines if not line.get_label().startswith("_")]
    points = ("optimizer=SGD lr=0.05", "optimizer=Adam")
    assert drawn == [f"{method} {point}" for point in points for method in ("baseline", "neq")]


def test_a_suite_without_points_has_none(tmp_path):
    spec = small("baseline", "recipe.epochs=1")
    run(spec, tmp_path)
    ask(Store(tmp_path, "digits"), [spec])
    names = [picture.name for picture in pictures(load_report([Store(tmp_path, "digits")]))]
    assert [name for name in names if name.endswith("-epochs")]
    assert not [name for name in names if name.endswith(("-neurons", "-metric"))]
