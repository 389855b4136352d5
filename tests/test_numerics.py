"""The numbers of three tiny trials, pinned: stored results are compared with those of new code."""

import pytest
from trials import run, small

from harness.storage.schema import EpochRecord
from harness.suite.config import NUMERICS

SETTINGS = [
    "recipe.epochs=4",
    "data.train_size=120",
    "recipe.scheduler.milestones=[4]",
    "methods.neq.eps=0.05",
    "methods.neq-cut.eps=0.05",
]
PINNED = 3  # the NUMERICS that these numbers are of
# By epoch: training loss, test loss, frozen neurons.
NUMBERS = {
    "neq": [
        (2.463766, 2.502026, 0),
        (2.285207, 2.366281, 0),
        (2.255442, 2.380631, 217),
        (2.175076, 2.376890, 140),
    ],
    "random": [
        (2.463766, 2.502026, 0),
        (2.291434, 2.362243, 72),
        (2.257392, 2.393171, 72),
        (2.141864, 2.377143, 72),
    ],
    "neq-cut": [
        (2.463766, 2.502026, 0),
        (2.285207, 2.366281, 0),
        (2.255717, 2.380058, 217),
        (2.177707, 2.376508, 139),
    ],
}
ADVICE = (
    "this code changes the numbers of trials: results that are stored already can't be compared "
    "with new ones. If that is meant, raise NUMERICS in harness/suite/config.py, and put the new "
    "numbers and PINNED here"
)


@pytest.mark.slow
@pytest.mark.parametrize("method", NUMBERS)
def test_the_numbers_of_trials_are_those_of_stored_results(tmp_path, method):
    """Kernels are fixed. Other machines round otherwise: by 1e-6 here, up to 3e-4 where that has
    turned a ReLU; to cut the gradient or not is 1.2e-3.
    """
    records = run(small(method, *SETTINGS), tmp_path)
    found = [
        (r.train_loss, r.test_loss, r.frozen_neurons) for r in records if isinstance(r, EpochRecord)
    ]
    near = [
        (*(pytest.approx(loss, rel=5e-4) for loss in losses), pytest.approx(frozen, abs=3))
        for *losses, frozen in NUMBERS[method]
    ]
    assert found == near, ADVICE
    assert NUMERICS == PINNED, ADVICE
