"""A learning rate that follows the validation loss: ReduceLROnPlateau."""

import json
from dataclasses import replace
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba
from test_together import together
from torch.optim.lr_scheduler import ReduceLROnPlateau
from trials import assert_same_results, render, run, small, toy

from harness.errors import UserError
from harness.report import forms, model
from harness.report.figures import pictures
from harness.report.page import page
from harness.report.sections import sections
from harness.report.style import looks
from harness.run.preflight import preflight
from harness.storage.schema import EpochRecord, Failure
from harness.storage.store import Store, find_stores
from harness.train.evaluation import Evaluator

# Losses must halve to count as better: plateaus and cooldowns within a few epochs.
ARGUMENTS = {"factor": 0.5, "patience": 1, "threshold": 0.5, "cooldown": 1}
LR, EPOCHS = 0.05, 8
PLATEAU = [
    "recipe.scheduler={name='ReduceLROnPlateau', factor=0.5, patience=1, threshold=0.5, cooldown=1}"
]
QUICK = [*PLATEAU, "data.train_size=100", f"recipe.epochs={EPOCHS}"]
WHERE = "Where in training"


def records(events):
    return [event for event in events if isinstance(event, EpochRecord)]


def followed(losses, **arguments):
    """The rate of each epoch by torch's own scheduler, fed by hand."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = ReduceLROnPlateau(optimizer, **(arguments or ARGUMENTS))
    rates = []
    for loss in losses:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(loss)
    return rates


def stored(root, spec):
    return pd.read_parquet(root / spec.suite.name / "epochs" / f"{spec.key}.parquet")


def state(root, spec):
    return Store(root, spec.suite.name).load_checkpoint(spec.key)["scheduler"]


@pytest.mark.slow
def test_the_rate_is_that_of_torchs_own_fed_with_the_validation_losses(tmp_path):
    spec = small("baseline", *QUICK)
    run(spec, tmp_path)
    epochs = stored(tmp_path, spec)
    assert list(epochs["lr"]) == followed(epochs["val_loss"])
    assert epochs["lr"].nunique() > 2
    best = state(tmp_path, spec)["best"]
    columns = ("train_loss", "val_loss", "test_loss")
    assert [best in set(epochs[name]) for name in columns] == [False, True, False]


@pytest.mark.slow
def test_it_follows_the_model_as_training_left_it(tmp_path, toys):
    """The method prunes at the end of an epoch, whose validation loss is stored as it is then."""
    spec = toy(toys, "pruner", "recipe.scheduler={name='ReduceLROnPlateau', patience=0}")
    losses, evaluate = [], Evaluator.loss_and_metric

    def noted(evaluator, part):
        found = evaluate(evaluator, part)
        losses.append((part, found[0]))
        return found

    with patch.object(Evaluator, "loss_and_metric", noted):
        run(spec, tmp_path)
    ends = [position for position, (part, _) in enumerate(losses) if part == "test"]
    firsts = [losses[start][1] for start in (0, *(end + 1 for end in ends[:-1]))]
    epochs = stored(tmp_path, spec)
    assert list(epochs["lr"]) == followed(firsts, patience=0)
    assert list(epochs["lr"]) != followed(epochs["val_loss"], patience=0)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_after_any_epoch(tmp_path):
    spec = small("neq", *QUICK)
    assert len(records(run(spec, tmp_path / "through"))) == EPOCHS
    states = []
    for stop in range(1, EPOCHS):
        root = tmp_path / str(stop)
        run(spec, root, epochs=stop)
        states.append(state(root, spec))
        assert len(records(run(spec, root))) == EPOCHS
        assert_same_results(spec, tmp_path / "through", root)
        assert state(root, spec) == state(tmp_path / "through", spec)
    assert any(kept["num_bad_epochs"] for kept in states)  # within a plateau
    assert any(kept["cooldown_counter"] for kept in states)
    assert all(type(kept["best"]) is float for kept in states)


@pytest.mark.slow
def test_two_workers_have_one_rate(tmp_path):
    """Also after a break within a cooldown."""
    spec = small("neq", *QUICK, "resources.workers=2")
    together([spec], tmp_path, epochs=3)
    assert state(tmp_path, spec)["cooldown_counter"]
    first, second = (
        [(e.lr, e.val_loss) for e in records(events)] for events in together([spec], tmp_path)
    )
    assert first == second
    assert [lr for lr, _ in first] == followed(loss for _, loss in first)
    assert len({lr for lr, _ in first}) > 2


def test_a_step_that_waits_for_the_loss_leaves_other_schedulers_alone(tmp_path):
    spec = small("baseline", "data.train_size=60", "recipe.epochs=3")
    rates = [record.lr for record in records(run(spec, tmp_path))]
    assert rates == pytest.approx([0.05, 0.05, 0.005])


def test_without_validation_images_there_is_nothing_to_follow(tmp_path):
    spec = small("baseline", *QUICK, "data.validation_size=0")
    message = (
        "suite digits: recipe.scheduler: ReduceLROnPlateau follows the validation loss: "
        "data.validation_size must be at least 1"
    )
    with pytest.raises(UserError) as raised:
        preflight([spec])
    assert str(raised.value) == message
    *others, last = run(spec, tmp_path)
    assert isinstance(last, Failure)
    assert last.reason == message
    assert not records(others)


def test_schedules_of_iterations_are_refused_before_anything_runs():
    with pytest.raises(UserError, match="can't step with every iteration"):
        preflight([small("baseline", *QUICK, "recipe.schedule=iteration")])


@pytest.mark.slow
def test_a_method_of_ones_own_is_rehearsed(toys):
    preflight([toy(toys, "regulariser", *PLATEAU)])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A group whose rate follows the loss, and one of the suite's own schedule."""
    root = tmp_path_factory.mktemp("rates")
    short = ["data.train_size=100", "recipe.epochs=5", "methods.neq.eps=9"]
    for seed in (0, 1):
        for method in ("baseline", "neq"):
            run(small(method, *short, *PLATEAU, seed=seed), root)
            if not seed:
                run(small(method, *short), root)
    return root


@pytest.fixture(scope="module")
def report(root):
    return model.load_report(find_stores("digits", str(root)))


def of(report, scheduler):
    (table,) = [t for t in report.groups if t.recipe["scheduler"]["name"] == scheduler]
    return table, replace(report, groups=[table])


def titles(report):
    return [table.title for section in sections(report) for table in section.tables]


@pytest.mark.slow
def test_phases_are_not_cut_and_the_note_says_why(report):
    note = (
        "The learning rate follows the validation loss (ReduceLROnPlateau): it differs by method "
        "and seed, so training is not cut into phases."
    )
    table, alone = of(report, "ReduceLROnPlateau")
    other, others = of(report, "MultiStepLR")
    assert table.phases == []
    assert table.notes.count(note) == 1
    assert note in render([table], 200)
    assert other.phases
    assert note not in other.notes
    assert json.loads(alone.to_json())["groups"][0]["phases"] == []
    assert json.loads(others.to_json())["groups"][0]["phases"]


def test_there_is_no_table_of_phases(report):
    _, alone = of(report, "ReduceLROnPlateau")
    _, others = of(report, "MultiStepLR")
    assert WHERE not in titles(alone)
    assert WHERE in titles(others)
    for text in (forms.to_markdown(alone), forms.to_latex(alone), page(alone, [])):
        assert WHERE not in text
        assert "it differs by method and seed" in text


def test_a_shorter_baseline_has_no_last_phase_to_miss(report):
    """Nearly all stands still early: the baseline can afford fewer epochs."""
    table, alone = of(report, "ReduceLROnPlateau")
    assert table.methods[1].shorter_baseline.stopped_epochs
    assert "Against a shorter baseline" in titles(alone)
    text = render([table], 200)
    assert "†" not in text
    assert "a schedule for that end may do better" in text
    other = render([of(report, "MultiStepLR")[0]], 200)
    assert "was not reached (†)." in other
    assert " of 5 †" in other


def test_the_figure_has_each_methods_own_rate(root, report):
    def rates(scheduler):
        table, alone = of(report, scheduler)
        (drawn,) = [p for p in pictures(alone) if p.name.endswith("epochs")]
        return table, drawn.figure.axes[3].lines

    table, lines = rates("ReduceLROnPlateau")
    epochs = pd.read_parquet(root / "digits" / "epochs")
    mine = epochs[epochs["group"] == table.group]
    look = looks([row.label for row in table.methods], {"baseline"})
    for row, line in zip(table.methods, lines, strict=True):
        by_epoch = mine[mine["method"] == row.method].groupby("epoch")["lr"].mean()
        assert list(line.get_ydata()) == pytest.approx(list(by_epoch))
        assert to_rgba(line.get_color()) == to_rgba(look[row.label].colour)
        assert line.get_linestyle() == look[row.label].line
    _, one = rates("MultiStepLR")
    assert len(one) == 1
