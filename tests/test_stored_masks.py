"""Masks that are had back from the rows of a trial."""

import pytest
import torch
from torch import nn

import neq
from harness.flops.costs import count_costs
from harness.storage.masks import UnknownMaskError, epoch_masks, layer_mask


class Grouped(nn.Module):
    """A plain convolution, one with four groups, a depthwise one and a head."""

    def __init__(self):
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.depthwise(self.grouped(self.plain(x).relu()).relu()).relu()
        return self.head(x.mean((2, 3)))


def rows_of(index, mask, epoch=0):
    """As a trial writes them, each layer's part by hand."""
    return [
        {
            "epoch": epoch,
            "layer": layer.name,
            "neurons": layer.size,
            "frozen": int(mask[layer.neurons].sum()),
            "mask": layer_mask(layer, mask[layer.neurons]),
        }
        for layer in index.layers
    ]


def test_masks_that_cost_the_same_come_back():
    model = Grouped()
    costs = count_costs(model, (3, 8, 8))
    index = costs.neurons
    for seed in range(20):
        share = seed / 19
        mask = torch.rand(len(index), generator=torch.Generator().manual_seed(seed)) < share
        (found,) = epoch_masks(rows_of(index, mask))
        again = found.tensor(index)
        for layer in index.layers:
            assert again[layer.neurons].sum() == mask[layer.neurons].sum()
        for name in ("grouped", "depthwise"):  # in these it matters which
            assert torch.equal(again[index[name]], mask[index[name]])
        for gradient in ("exact", "cut"):
            plans = [neq.plan(index, each, gradient) for each in (mask, again)]
            assert plans[0] == plans[1]
            counts = [costs.backward(m, 7, p) for m, p in zip((mask, again), plans, strict=True)]
            assert counts[0] == counts[1]
        assert found.tensor(index).equal(again)  # the same each time


def test_only_what_the_count_does_not_tell_is_stored():
    index = neq.NeuronFreezer(
        Grouped(), torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1), neq.Everyone()
    ).neurons
    mask = torch.zeros(len(index), dtype=torch.bool)
    mask[index["plain"]] = True
    mask[index["grouped"].start + 3] = True
    mask[index["depthwise"]] = True
    stored = {row["layer"]: row["mask"] for row in rows_of(index, mask)}
    assert stored == {
        "plain": None,
        "grouped": bytes([0b00010000, 0]),
        "depthwise": None,
        "head": None,
    }


def test_masks_are_equal_where_the_rows_are():
    index = count_costs(Grouped(), (3, 8, 8)).neurons
    mask = torch.zeros(len(index), dtype=torch.bool)
    other = mask.clone()
    other[0] = True
    rows = [*rows_of(index, other, 1), *rows_of(index, mask, 0), *rows_of(index, mask, 2)]
    found = epoch_masks(rows)
    assert found[0] == found[2] != found[1]
    assert len({*found}) == 2


def test_what_is_not_known_is_said():
    model = Grouped()
    index = count_costs(model, (3, 8, 8)).neurons
    mask = torch.zeros(len(index), dtype=torch.bool)
    mask[index["grouped"].start] = True
    rows = rows_of(index, mask)
    before_version_4 = [row | {"mask": None} for row in rows]
    with pytest.raises(UnknownMaskError, match="of grouped, a convolution with groups"):
        epoch_masks(before_version_4)[0].tensor(index)
    with pytest.raises(UnknownMaskError, match="not those of the model"):
        epoch_masks(rows[1:])[0].tensor(index)
