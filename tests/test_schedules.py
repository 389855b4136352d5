"""Schedules against formulas and brute force, plateaus against sequences by hand."""

import json
import math
import random

import pytest

from neq.pruning import Plateau, Schedule

SHAPES = ("cubic", "linear", "cycles")


def written_out(schedule):
    """By pruning, from 1: the sparsity."""
    count, s = schedule.prunings or schedule.end - schedule.begin, schedule.sparsity
    found, left = [], 1.0
    for number in range(1, count + 1):
        left *= (1 - s) ** (1 / count)  # of cycles: the same share of the survivors each time
        # Zhu and Gupta, equation 1, with an initial sparsity of 0.
        cubic = s + (0 - s) * (1 - number / count) ** 3
        found.append({"cubic": cubic, "linear": s * number / count, "cycles": 1 - left})
    return [each[schedule.shape] for each in found]


def prunings_of(schedule):
    """The epochs at which something is pruned, far beyond the end, and to which sparsity."""
    targets = {done: schedule.target(done) for done in range(-3, 2 * schedule.end + 5)}
    return {done: target for done, target in targets.items() if target is not None}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_schedule_of_up_to_20_epochs(shape):
    for end in range(1, 21):
        for begin in range(end):
            for prunings in (None, *range(1, end - begin + 1)):
                schedule = Schedule(
                    sparsity=0.9, begin=begin, end=end, shape=shape, prunings=prunings
                )
                found = prunings_of(schedule)
                assert list(found.values()) == pytest.approx(written_out(schedule))
                assert len(found) == (prunings or end - begin)
                assert begin < min(found)
                assert max(found) == end
                assert found[end] == 0.9
                assert sorted(found.values()) == list(found.values())
                gaps = [b - a for a, b in zip([begin, *found], found, strict=False)]
                assert max(gaps) - min(gaps) <= 1  # evenly


@pytest.mark.parametrize(
    "shape, targets",
    [
        ("cubic", {4: 0.5 * 37 / 64, 5: 0.5 * 7 / 8, 6: 0.5 * 63 / 64, 7: 0.5}),
        ("linear", {4: 0.125, 5: 0.25, 6: 0.375, 7: 0.5}),
        ("cycles", {4: 1 - 0.5**0.25, 5: 1 - 0.5**0.5, 6: 1 - 0.5**0.75, 7: 0.5}),
    ],
)
def test_targets_by_hand(shape, targets):
    schedule = Schedule(sparsity=0.5, begin=3, end=7, shape=shape)
    assert prunings_of(schedule) == pytest.approx(targets)


def test_one_shot_and_spacing_by_hand():
    assert prunings_of(Schedule(sparsity=0.3, end=9, prunings=1)) == {9: 0.3}
    assert prunings_of(Schedule(sparsity=0.3, end=1)) == {1: 0.3}
    spaced = Schedule(sparsity=0.8, begin=10, end=20, prunings=4, shape="linear")
    assert prunings_of(spaced) == pytest.approx({12: 0.2, 15: 0.4, 17: 0.6, 20: 0.8})


def test_long_schedules():
    draws = random.Random(0)
    for _ in range(30):
        begin = draws.randint(0, 2000)
        end = begin + draws.randint(1, 3000)
        prunings = draws.randint(1, end - begin)
        schedule = Schedule(
            sparsity=draws.uniform(0.1, 0.99), begin=begin, end=end, prunings=prunings
        )
        found = prunings_of(schedule)
        assert list(found.values()) == pytest.approx(written_out(schedule))
        assert max(found) == end
        assert found[end] == schedule.sparsity


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 0.0}, "sparsity must be above 0 and below 1"),
        ({"sparsity": 1.0}, "sparsity must be above 0 and below 1"),
        ({"sparsity": math.nan}, "sparsity must be above 0 and below 1"),
        ({"begin": -1}, "got -1 to 5"),
        ({"begin": 5}, "got 5 to 5"),
        ({"shape": "square"}, "shape must be one of cubic, linear, cycles"),
        ({"prunings": 0}, "prunings must be 1 to 5, one for each epoch, got 0"),
        ({"prunings": 4, "begin": 2}, "prunings must be 1 to 3"),
    ],
)
def test_wrong_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{"sparsity": 0.5, "end": 5} | options)


@pytest.mark.parametrize(
    "patience, events",
    [
        # loss, improved, plateau; bad from 1.01 times the best on
        (2, [(1.0, 1, 0), (1.005, 0, 0), (0.9, 1, 0), (0.909, 0, 0), (0.95, 0, 1), (2.0, 1, 0)]),
        (2, [(1.0, 1, 0), (1.1, 0, 0), (1.005, 0, 0), (1.1, 0, 0), (1.2, 0, 1), (1.3, 1, 0)]),
        (1, [(3.0, 1, 0), (2.0, 1, 0), (2.1, 0, 1), (2.2, 1, 0), (2.3, 0, 1), (math.nan, 0, 1)]),
        (0, [(3.0, 1, 1), (2.0, 1, 1), (4.0, 1, 1)]),
        (3, [(math.nan, 0, 0), (math.nan, 0, 0), (5.0, 1, 0), (math.inf, 0, 0), (5.04, 0, 0)]),
    ],
)
def test_plateaus_by_hand(patience, events):
    plateau = Plateau(patience)
    seen = []
    for loss, *_ in events:
        reached = plateau.step(loss)
        seen.append((loss, int(plateau.improved), int(reached)))
    assert [e[1:] for e in seen] == [e[1:] for e in events]


def naive(losses, patience, tolerance):
    """By looking back at all losses since the last plateau, each time."""
    found, start = [], 0
    for now in range(len(losses)):
        since = losses[start : now + 1]
        bad = [i > 0 and loss >= (1 + tolerance) * min(since[:i]) for i, loss in enumerate(since)]
        reached = len(since) >= patience and all(bad[len(bad) - patience :])
        found.append((reached, all(since[-1] < loss for loss in since[:-1])))
        start = now + 1 if reached else start
    return found


@pytest.mark.parametrize("patience", [0, 1, 2, 5])
@pytest.mark.parametrize("tolerance", [0.0, 0.01, 0.2])
def test_plateaus_against_looking_back(patience, tolerance):
    """Also where another plateau goes on from a state at each epoch."""
    draws = random.Random(patience)
    losses = [draws.choice([0.5, 0.75, 1.0, draws.uniform(0.4, 2)]) for _ in range(300)]
    plateau, resumed = Plateau(patience, tolerance), Plateau(patience, tolerance)
    seen = []
    for loss in losses:
        resumed, before = Plateau(patience, tolerance), json.loads(json.dumps(plateau.state_dict()))
        resumed.load_state_dict(before)
        seen.append((plateau.step(loss), plateau.improved))
        assert (resumed.step(loss), resumed.improved) == seen[-1]
        assert resumed.state_dict() == plateau.state_dict()
    assert seen == naive(losses, patience, tolerance)
    assert sum(reached for reached, _ in seen) > 0


def test_the_first_loss_is_not_bad_without_a_tolerance():
    plateau = Plateau(1, tolerance=0.0)
    assert [plateau.step(loss) for loss in (3.0, 2.0, 2.0, 1.0)] == [False, False, True, False]


def test_resumed_in_the_middle_of_a_plateau():
    plateau = Plateau(3)
    assert not any(plateau.step(loss) for loss in (1.0, 2.0, 2.0))
    resumed = Plateau(3)
    resumed.load_state_dict(plateau.state_dict())
    assert resumed.step(1.5)
    assert not Plateau(3).step(1.5)


def test_wrong_plateaus():
    for arguments in ((-1, 0.01), (1, -0.01)):
        with pytest.raises(ValueError, match="patience and tolerance must be 0 or more"):
            Plateau(*arguments)
