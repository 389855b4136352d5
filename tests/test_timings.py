import copy
import json

import pytest
import torch
from conftest import Net
from torch import nn

import neq
from neq.kernels import choose_rows, rows_for
from neq.selective import geometry


def as_lists(rows):
    parts = (rows.index, rows.others, rows.fillers, rows.inputs)
    return [None if part is None else part.tolist() for part in parts] + [rows.groups]


@pytest.mark.parametrize(
    "frozen, options, expected",
    [
        ("0110", {}, ([0, 3], [1, 2], [], None, 1)),
        ("0110", {"multiple": 3}, ([0, 1, 3], [2], [1], None, 1)),
        ("0110", {"multiple": 8}, ([0, 1, 2, 3], [], [1, 2], None, 1)),
        # two groups of three with three inputs each: equal counts
        ("011001", {"groups": 2, "inputs": 6}, ([0, 1, 3, 4], [2, 5], [1], None, 2)),
        # only the second group takes part, and reads its own inputs
        ("111010", {"groups": 2, "inputs": 6}, ([3, 5], [0, 1, 2, 4], [], [3, 4, 5], 1)),
        # depthwise
        ("1011", {"groups": 4, "inputs": 4}, ([1], [0, 2, 3], [], [1], 1)),
    ],
)
def test_the_rows_that_are_computed(frozen, options, expected):
    mask = torch.tensor([digit == "1" for digit in frozen])
    assert as_lists(choose_rows(mask, **options)) == list(expected)


TABLE = {
    "fc": {
        "dense": {8: 1.0},
        "gather": {2: 0.5, 4: 0.7, 6: 0.99},
        "swap": {2: 0.6, 4: 0.65},
        "cut": {2: 0.3, 4: 0.98, 6: 1.1},
    }
}


@pytest.mark.parametrize(
    "rows, kernel",
    [(1, "gather"), (2, "gather"), (3, "swap"), (4, "swap"), (5, "dense"), (7, "dense")],
)
def test_the_fastest_kernel_at_the_next_larger_count(rows, kernel):
    timings = neq.Timings(TABLE)
    assert timings.kernel("fc", rows, 8) == kernel
    assert timings.cut_kernel("fc", rows, 8) == kernel  # an old table: the trial keeps its plan
    again = neq.Timings.from_json(json.loads(json.dumps(timings.to_json())))
    assert again == timings


def test_without_times_half_the_rows_are_gathered():
    timings = neq.Timings()
    assert [timings.kernel("fc", rows, 8) for rows in (1, 4, 5)] == ["gather", "gather", "dense"]


def test_measuring_covers_the_layers_and_changes_nothing(net):
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(4, 3, 6, 6)
    state = torch.get_rng_state()
    timings = neq.measure(net, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert list(timings.layers) == ["conv", "grouped", "fc1", "fc2"]
    assert set(timings.layers["conv"]) == {
        "dense",
        "gather",
        "cut",
        "cut/dense",
        "swap",
        "swap/3",
        "swap/last",
    }
    assert set(timings.layers["grouped"]) == {"dense", "gather", "cut", "cut/dense"}
    assert list(timings.layers["fc1"]["dense"]) == [6]
    seconds = [
        s for kernels in timings.layers.values() for t in kernels.values() for s in t.values()
    ]
    assert all(0 < s < 10 for s in seconds)


def test_measuring_under_autocast_and_for_a_layer_called_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 8)

        def forward(self, x):
            return self.fc(input=x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        timings = neq.measure(Named(), torch.randn(3, 4))
    assert set(timings.layers["fc"]) == {"dense", "gather", "cut", "cut/dense"}


def test_the_plan_is_what_a_freezer_does_and_travels_with_its_state():
    net, other = Net(), Net()
    timings = neq.Timings(
        {"conv": {"dense": {8: 1.0}, "swap": {7: 0.1}}, "fc1": {"dense": {6: 1.0}, "gather": {}}}
    )
    freezers = [
        neq.NeuronFreezer(
            model, torch.optim.SGD(model.parameters(), lr=0.1), neq.Everyone(), timings=table
        )
        for model, table in ((net, timings), (other, None))
    ]
    mask = torch.zeros(len(freezers[0].neurons), dtype=torch.bool)
    for name in ("conv", "fc1"):
        mask[freezers[0].neurons[name].start] = True
    mask[freezers[0].neurons["grouped"]] = True
    freezers[0].freeze(mask)
    plan = freezers[0].plan
    assert plan == neq.plan(freezers[0].neurons, mask, timings=timings)
    assert (plan["conv"].kernel, plan["conv"].rows) == ("swap", 7)
    assert (plan["fc1"].kernel, plan["fc1"].rows) == ("dense", 6)
    assert (plan["grouped"].kernel, plan["grouped"].rows) == ("skip", 0)
    assert (plan["bn"].kernel, plan["bn"].rows) == ("dense", 8)
    freezers[1].load_state_dict(freezers[0].state_dict())
    assert freezers[1].timings == timings
    assert freezers[1].plan == plan


def test_measuring_a_frozen_stem_and_an_expanded_input():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(4, 6).requires_grad_(False)
            self.wide = nn.Linear(6, 8)

        def forward(self, x):
            return self.wide(self.stem(x)[:1].expand(5, -1))

    assert list(neq.measure(Model(), torch.randn(3, 4)).layers) == ["wide"]


def test_a_table_of_other_sizes_is_not_used():
    assert neq.Timings(TABLE).kernel("fc", 2, 16) == "gather"
    assert neq.Timings(TABLE).kernel("fc", 9, 16) == "dense"
    assert neq.Timings(TABLE).cut_kernel("fc", 8, 16) == "gather"


def test_a_cut_through_rows_has_to_be_faster_than_a_dense_one():
    known = {"dense": {8: 1.0}, "gather": {4: 0.9}, "cut": {4: 0.8}}
    by_dense = {dense: known | {"cut/dense": {8: dense}} for dense in (1.0, 0.8)}
    tables = {dense: neq.Timings({"fc": times}) for dense, times in by_dense.items()}
    assert tables[1.0].cut_kernel("fc", 4, 8) == "gather"
    assert tables[0.8].cut_kernel("fc", 4, 8) == "dense"
    swaps = neq.Timings({"fc": by_dense[0.8] | {"swap": {4: 0.6}}})
    assert swaps.cut_kernel("fc", 4, 8) == "swap"  # 0.8 + 0.6 - 0.9 with its weight gradient
    old = neq.Timings({"fc": known | {"gather": {4: 0.99}}})
    assert (old.kernel("fc", 4, 8), old.cut_kernel("fc", 4, 8)) == ("dense", "gather")


def test_only_what_a_mask_looks_up_is_timed():
    """For its rows each kernel has the same bound as when everything is timed, and no others."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3, groups=4), nn.Flatten(),
        nn.Linear(16 * 16, 40), nn.Linear(40, 5),
    )  # fmt: skip
    inputs = torch.randn(2, 3, 8, 8)
    neurons = neq.NeuronIndex(model)
    masks = [
        torch.rand(len(neurons), generator=torch.Generator().manual_seed(seed)) < share
        for seed, share in enumerate((0.3, 0.8))
    ]
    everything, some = neq.measure(model, inputs), neq.measure(model, inputs, masks)
    for layer in neurons.layers:
        known, found = everything.layers[layer.name], some.layers[layer.name]
        wanted = {"dense": {layer.size}, "cut/dense": {layer.size}}
        for mask in masks:
            plan = neq.plan(neurons, mask, timings=neq.Timings())[layer.name]
            frozen = mask[layer.neurons]
            if frozen.all() or not frozen.any():
                continue
            rows = len(rows_for("gather", frozen, geometry(layer.module)).index)
            assert plan.rows in (rows, layer.size)
            for kernel, times in known.items():
                enough = [count for count in times if count >= rows]
                if enough:
                    wanted.setdefault(kernel, set()).add(min(enough))
        counted = {kernel: set(times) for kernel, times in found.items()}
        assert {k: v - {layer.size} for k, v in counted.items()} == {
            k: v - {layer.size} for k, v in wanted.items()
        }
