import math

import pytest
import torch
from torch import nn

from harness.errors import UserError
from harness.suite.config import Recipe
from harness.train.optimizers import build_optimizer

NOWHERE = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
PLATEAU = {"name": "ReduceLROnPlateau"}


def recipe(**values):
    return Recipe(
        **{"epochs": 4, "batch_size": 2, "precision": "float32", "optimizer": SGD} | values
    )


def rates(made, steps, count):
    """Learning rates of the first `count` steps."""
    optimizer, scheduler = build_optimizer("s", made, NOWHERE, steps)
    seen = []
    for _ in range(count):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_poly_is_per_iteration():
    poly = {"name": "PolynomialLR", "total_iters": 4, "power": 0.9}
    seen = rates(recipe(scheduler=poly, schedule="iteration"), 5, 20)
    assert seen == pytest.approx([0.1 * (1 - i / 20) ** 0.9 for i in range(20)])
    by_epoch = rates(recipe(scheduler=poly), 5, 4)
    assert by_epoch == pytest.approx([0.1 * (1 - i / 4) ** 0.9 for i in range(4)])


def test_a_count_of_epochs_may_be_written_with_a_point():
    made = [
        recipe(scheduler={"name": "PolynomialLR", "total_iters": n}, schedule="iteration")
        for n in (4, 4.0)
    ]
    assert rates(made[0], 5, 20) == rates(made[1], 5, 20)


def test_cosine_after_a_warm_up():
    scheduler = {
        "name": "SequentialLR",
        "milestones": [2],
        "schedulers": [
            {"name": "LinearLR", "start_factor": 0.25, "total_iters": 2},
            {"name": "CosineAnnealingLR", "T_max": 3},
        ],
    }
    seen = rates(recipe(scheduler=scheduler, schedule="iteration"), 4, 20)
    warm = [0.1 * (0.25 + 0.75 * i / 8) for i in range(8)]
    cool = [0.05 * (1 + math.cos(math.pi * i / 12)) for i in range(12)]
    assert seen == pytest.approx(warm + cool)


def test_a_part_has_a_learning_rate_of_its_own():
    optimizer, _ = build_optimizer("s", recipe(lr_factors={"head": 10.0}), NOWHERE)
    body, head = optimizer.param_groups
    assert (body["lr"], head["lr"]) == (0.1, pytest.approx(1.0))
    assert [id(p) for p in head["params"]] == [id(p) for p in NOWHERE["head"].parameters()]
    assert len(body["params"]) == 2
    before = [p.detach().clone() for p in NOWHERE.parameters()]
    for p in NOWHERE.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = [
        float((a - b).detach().mean()) for a, b in zip(before, NOWHERE.parameters(), strict=True)
    ]
    assert moved == pytest.approx([0.1, 0.1, 1.0, 1.0], rel=1e-4)


def test_without_factors_there_is_one_group():
    optimizer, scheduler = build_optimizer("s", recipe(), NOWHERE)
    assert len(optimizer.param_groups) == 1
    assert scheduler is None
    assert optimizer.defaults["fused"]


def test_a_plateau_lowers_the_rate_of_every_part():
    plateau = PLATEAU | {"factor": 0.5, "patience": 0, "min_lr": [0.0, 0.6]}
    made = recipe(scheduler=plateau, lr_factors={"head": 10.0})
    optimizer, scheduler = build_optimizer("s", made, NOWHERE, steps=5)
    seen = []
    for loss in (1.0, 2.0, 2.0):
        scheduler.step(loss)
        seen.append([group["lr"] for group in optimizer.param_groups])
    assert seen == [[0.1, 1.0], [0.05, 0.6], [0.025, 0.6]]


def test_a_plateau_in_one_step_an_epoch_is_no_schedule_of_iterations():
    with pytest.raises(UserError, match="can't step with every iteration"):
        build_optimizer("s", recipe(scheduler=PLATEAU, schedule="iteration"), NOWHERE)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lr_factors": {"tail": 2.0}}, "no part of the model is called 'tail'"),
        (
            {"lr_factors": {"head": 2.0}, "optimizer": {"name": "Adadelta"}},
            "need a number recipe.optimizer.lr",
        ),
        ({"scheduler": {"name": "SequentialLR", "schedulers": [3]}}, "each must be a table"),
        (
            {"scheduler": {"name": "SequentialLR", "schedulers": [{"name": "Foo"}]}},
            "unknown name 'Foo'",
        ),
        (
            {"scheduler": {"name": "SequentialLR", "schedulers": [], "milestones": [1]}},
            "refuses its arguments",
        ),
        ({"scheduler": {"name": "StepLR", "step_size": 3, "last_epoch": 5}}, "StepLR refuses"),
        (
            {"scheduler": {"name": "ExponentialLR", "gamma": 0.9}, "schedule": "iteration"},
            "ExponentialLR can't step with every iteration",
        ),
        (
            {"scheduler": {"name": "SequentialLR", "schedulers": [{"name": "L", "a": math.inf}]}},
            "a must be finite",
        ),
        ({"scheduler": {"name": "StepLR", "size": 3}}, "StepLR refuses its arguments"),
        ({"scheduler": {"name": "MultiStepLR", "milestones": [1.5]}}, "a list of epochs"),
        (
            {"scheduler": PLATEAU, "schedule": "iteration"},
            "ReduceLROnPlateau can't step with every iteration",
        ),
        ({"scheduler": PLATEAU | {"mode": "max"}}, "scheduler.mode: 'max'; .* follows a loss"),
        ({"scheduler": PLATEAU | {"mode": 3}}, "scheduler.mode: 3; .* follows a loss"),
        ({"scheduler": PLATEAU | {"factor": 1.5}}, "refuses its arguments: Factor"),
        ({"scheduler": PLATEAU | {"factor": -0.1}}, "scheduler.factor: -0.1 must be a number"),
        ({"scheduler": PLATEAU | {"patience": "late"}}, "scheduler.patience: 'late' must be a n"),
        ({"scheduler": PLATEAU | {"cooldown": [1]}}, r"scheduler.cooldown: \[1\] must be a number"),
        ({"scheduler": PLATEAU | {"threshold": True}}, "scheduler.threshold: True must be a n"),
        ({"scheduler": PLATEAU | {"min_lr": [0, 0]}}, "refuses its arguments: expected 1 min_lrs"),
        ({"scheduler": PLATEAU | {"threshold_mode": "odd"}}, "threshold mode odd is unknown"),
        ({"scheduler": PLATEAU | {"milestone": 3}}, "refuses its arguments"),
        (
            {"scheduler": {"name": "ChainedScheduler", "schedulers": [PLATEAU]}},
            r"scheduler.schedulers: ReduceLROnPlateau .* only recipe.scheduler itself is told",
        ),
        (
            {"scheduler": {"name": "SequentialLR", "schedulers": [PLATEAU], "milestones": []}},
            r"scheduler.schedulers: ReduceLROnPlateau .* only recipe.scheduler itself is told",
        ),
    ],
)
def test_what_torch_refuses(values, message):
    with pytest.raises(UserError, match=message):
        build_optimizer("s", recipe(**values), NOWHERE, steps=5)
