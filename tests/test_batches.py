"""How an epoch is cut into steps, and steps into forwards of workers."""

from unittest.mock import patch

import pytest
import torch

from harness.data import dataset
from harness.suite.config import Recipe, Resources


def recipe(batch_size, forward_batch=None):
    optimizer = {"name": "SGD", "lr": 0.1}
    return Recipe(
        epochs=1,
        batch_size=batch_size,
        forward_batch=forward_batch,
        precision="float32",
        optimizer=optimizer,
    )


def cut(count, made, world):
    """The shares of each worker."""
    found = []
    for rank in range(world):
        with (
            patch.object(dataset, "rank", lambda rank=rank: rank),
            patch.object(dataset, "workers", lambda: world),
        ):
            found.append(list(dataset.shares(count, made)))
            used = dataset.used(count, made)
    return found, used


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("forward", [None, 2, 3, 8])
@pytest.mark.parametrize("count", [16, 40, 41, 43, 47, 100])
def test_every_sample_is_trained_on_once_with_the_weight_of_its_batch(count, forward, world):
    made = recipe(16, forward)
    found, used = cut(count, made, world)
    rest = count % 16
    assert used == (count - rest if rest < 2 * world else count)
    assert len({len(shares) for shares in found}) == 1  # else some would wait for ever
    weights, step = torch.zeros(used), torch.arange(used) // 16
    for shares in found:
        for share in shares:
            rows = torch.arange(count)[share.rows]
            assert len(rows) >= 2 or forward == 2  # BatchNorm
            assert (rows // 16).unique().numel() == 1
            # Of a mean over the share, averaged over workers.
            weights[rows] += share.weight / len(rows) / world
    sizes = step.bincount()[step]
    torch.testing.assert_close(weights, 1 / sizes.float())
    for shares in zip(*found, strict=True):
        assert len({share.last for share in shares}) == 1
    assert sum(share.last for share in found[0]) == -(-used // 16)


def test_forwards_are_no_larger_than_asked_for():
    found, _ = cut(64, recipe(32, 8), 2)
    lengths = {len(range(64)[share.rows]) for shares in found for share in shares}
    assert lengths == {8}
    assert [share.last for share in found[0]] == [False, True] * 2
    found, _ = cut(64, recipe(32), 1)
    assert [(share.rows, share.weight) for share in found[0]] == [
        (slice(0, 32, 1), 1.0),
        (slice(32, 64, 1), 1.0),
    ]


@pytest.mark.parametrize(
    "resources, world, each",
    [
        ({}, 1, 1),
        ({"gpus": 4}, 4, 1),
        ({"gpus": 0.5}, 1, 0.5),
        ({"workers": 2}, 2, 1),
        ({"workers": 3, "gpus": 3}, 3, 1),
        ({"workers": 2, "gpus": 0}, 2, 0),
    ],
)
def test_workers_and_gpus(resources, world, each):
    found = Resources(**resources)
    assert (found.world_size, found.gpus_each) == (world, each)


@pytest.mark.parametrize(
    "resources", [{"gpus": 1.5}, {"workers": 2, "gpus": 1}, {"workers": 1, "gpus": 2}]
)
def test_gpus_that_workers_cannot_share(resources):
    with pytest.raises(ValueError, match="gpus"):
        Resources(**resources)
