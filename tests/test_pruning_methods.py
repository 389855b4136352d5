"""Trials that prune: resumed, under Ray, on two workers, what they record, what they refuse."""

import math

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from test_together import own, together  # noqa: F401 — `own` is a fixture
from trials import (
    NARROW,
    SMALL,
    assert_same_results,
    keep_tuning,
    render,
    results,
    run,
    run_by_ray_in_two_goes,
)

from harness import load_results
from harness.errors import UserError
from harness.report.model import load_report
from harness.run.executors import Inline
from harness.run.preflight import preflight
from harness.run.trials import specs
from harness.storage.frames import stores_named
from harness.storage.store import Store
from harness.suite.parts import build_model

PLATEAUS = "lam=0.02, twt=0.2, pwe=2"  # the loss rises, as much is lost in each step
METHODS = {
    "serene": PLATEAUS,
    "serene-exact": "lam=0.04, twt=0.2, pwe=2",
    "serene-local": "lam=0.08, twt=0.2, pwe=2",
    "lobster": PLATEAUS,
    "decay": PLATEAUS,
    "one-shot": "sparsity=0.8, at=0.4",
    "gradual": "sparsity=0.8, end=0.8",
    "random-pruning": "sparsity=0.8, end=0.8",
    "lottery": "sparsity=0.8, at=0.8, rewind=0.2",
    "smaller": "arguments={width=3}",
}
SHRINKING = ("serene", "serene-exact", "serene-local", "lobster", "decay")


def trial(method, *settings, arguments=None, seed=0, suite="digits-pruning"):
    values = [f"kind='{method}'", METHODS[method] if arguments is None else arguments]
    table = f"methods.{method}={{{', '.join(filter(None, values))}}}"
    own_model = suite != "digits-pruning"
    first = [s for s in SMALL if not s.startswith("methods.") and not (own_model and s in NARROW)]
    (spec,) = specs(suite, [*first, table, *settings], method, str(seed))
    return spec


def narrow(method, *settings, **more):
    width = "model.arguments={blocks=1, width=6, channels=1, classes=10}"
    return trial(method, width, *settings, **more)


def stored(spec, root):
    return Store(root, spec.suite.name).load_checkpoint(spec.key)


def measures(root, layer=None, suite="digits-pruning"):
    """Name → values by epoch, of the whole model or a layer."""
    rows = load_results(suite, root=str(root)).measures.sort_values("epoch")
    rows = rows[rows["layer"].isna() if layer is None else rows["layer"] == layer]
    return {name: mine["value"].tolist() for name, mine in rows.groupby("name")}


def recorded(root):
    columns = ["trial", "epoch", "name", "layer"]
    rows = load_results("digits-pruning", root=str(root)).measures.sort_values(columns)
    return rows.reset_index(drop=True)


@pytest.mark.slow
def test_resumed_while_shrinking_by_schedule_and_after(tmp_path):
    spec = narrow("serene", arguments="lam=0.01, sparsity=0.5, end=0.6")
    run(spec, tmp_path / "through")
    for stop in (2, 4):
        run(spec, tmp_path / str(stop), epochs=stop)
        assert stored(spec, tmp_path / str(stop))["method"]["active"] == (stop == 2)
        run(spec, tmp_path / str(stop))
        assert_same_results(spec, tmp_path / "through", tmp_path / str(stop))


@pytest.mark.slow
def test_resumed_right_after_rewinding(tmp_path):
    """Also where early weights and pruning fall on the same epoch."""
    spec = narrow("lottery", arguments="sparsity=0.8, at=0.4, rewind=0.39")
    run(spec, tmp_path / "through")
    run(spec, tmp_path / "stopped", epochs=2)
    assert not stored(spec, tmp_path / "stopped")["optimizer"]["state"]
    run(spec, tmp_path / "stopped")
    assert_same_results(spec, tmp_path / "through", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(tmp_path, method):
    """Stopped within a plateau, between prunings, before a rewinding."""
    spec = narrow(method)
    run(spec, tmp_path / "through")
    run(spec, tmp_path / "stopped", epochs=3)
    state = stored(spec, tmp_path / "stopped")["method"]
    run(spec, tmp_path / "stopped")
    assert_same_results(spec, tmp_path / "through", tmp_path / "stopped")
    assert recorded(tmp_path / "stopped").equals(recorded(tmp_path / "through"))
    if method != "smaller":
        assert stored(spec, tmp_path / "through")["method"]["masks"]
    if method in SHRINKING:
        assert state["plateau"]["bad"] == 1
    if method == "lottery":
        assert state["early"]


@pytest.mark.slow
def test_under_ray_stopped_and_resumed(tmp_path, shared_ray):
    chosen = [narrow(method) for method in ("serene", "gradual", "lottery")]
    for root in ("ray", "through"):
        keep_tuning(chosen[0], tmp_path / root)
    run_by_ray_in_two_goes(chosen, tmp_path / "ray")
    for spec in chosen:
        run(spec, tmp_path / "through")
        assert_same_results(spec, tmp_path / "through", tmp_path / "ray")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["serene", "lobster", "gradual"])
def test_two_workers_train_as_one(tmp_path, own, method):  # noqa: F811
    arguments = METHODS[method].replace("pwe=2", "pwe=1")
    settings = ["recipe.batch_size=35", "data.validation_size=100"]
    one, two = (
        trial(method, *settings, f"resources.workers={n}", arguments=arguments, suite=str(own))
        for n in (1, 2)
    )
    keep_tuning(one, tmp_path / "one")
    list(Inline().run([one], str(tmp_path / "one")))
    together([two], tmp_path / "two")
    alone, shared = stored(one, tmp_path / "one"), stored(two, tmp_path / "two")
    assert alone["method"]["masks"]
    for name, mask in alone["method"]["masks"].items():
        other = shared["method"]["masks"][name]
        # Sums over samples are rounded in another order: what lies at the threshold may differ.
        assert int((mask != other).sum()) <= 0.01 * mask.numel() + 1
        weights = [state["model"][f"{name}.weight"] * mask * other for state in (alone, shared)]
        torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-3)
    epochs = [results(s, tmp_path / r)[1] for s, r in ((one, "one"), (two, "two"))]
    assert epochs[0]["overhead_flops"].equals(epochs[1]["overhead_flops"])
    found = [measures(tmp_path / root, suite="own") for root in ("one", "two")]
    assert found[0]["psp_entropy"] == pytest.approx(found[1]["psp_entropy"], rel=0.02)


def test_what_is_recorded(tmp_path):
    spec = narrow("gradual")
    run(spec, tmp_path)
    weights = stored(spec, tmp_path)["model"]
    whole, conv = measures(tmp_path), measures(tmp_path, "layer3.0.conv2")
    sizes = {n: w for n, w in weights.items() if "running" not in n and w.dim() > 0}
    prunable = [w for n, w in sizes.items() if "conv" in n or n == "fc.weight"]
    assert whole["parameters"] == 5 * [sum(w.numel() for w in sizes.values())]
    pruned = sum(int((w == 0).sum()) for w in prunable)
    assert pruned == round(0.8 * sum(w.numel() for w in prunable))
    assert whole["parameters_left"][-1] == whole["parameters"][0] - pruned
    rows = [(w.flatten(1) != 0).any(1) for w in prunable]
    assert whole["neurons"][0] == sum(map(len, rows))
    assert whole["neurons_left"][-1] == sum(int(alive.sum()) for alive in rows)
    kept = weights["layer3.0.conv2.weight"] != 0
    used = kept.flatten(2).any(2)
    assert conv["parameters_left"][-1] == int(kept.sum())
    dense = 2 * kept.numel() * 4 * 4  # of 16 positions
    share = int(used.any(1).sum()) * int(used.any(0).sum()) / used.numel()
    assert conv["forward_flops_effective"][-1] == round(share * dense)
    epochs = pd.DataFrame(pq.read_table(tmp_path / "digits-pruning" / "epochs").to_pandas())
    assert epochs["effective_parameters"].tolist() == whole["parameters_left"]
    dense = epochs["forward_flops"][0] // epochs["samples"][0]
    assert whole["forward_flops_nonzero"][-1] < whole["forward_flops_effective"][-1] <= dense
    by_layer = load_results("digits-pruning", root=str(tmp_path)).measures
    last = by_layer[(by_layer["epoch"] == 4) & by_layer["layer"].notna()]
    each = last[last["name"] == "forward_flops_effective"]["value"].sum()
    assert whole["forward_flops_effective"][-1] == each
    assert whole["threshold"] == sorted(whole["threshold"])
    smallest = min(float(w[w != 0].abs().min()) for w in prunable)
    assert smallest > 0
    assert (epochs["overhead_flops"] == 0).all()


@pytest.mark.slow
def test_the_entropy_is_null_where_a_class_is_missing(tmp_path):
    spec = trial("gradual", "data.validation_size=100")
    few = trial("gradual", "data.validation_size=4")
    for each in (spec, few):
        run(each, tmp_path / each.group)
    assert all(map(math.isnan, measures(tmp_path / few.group)["psp_entropy"]))
    assert all(0 < h < 10 for h in measures(tmp_path / spec.group)["psp_entropy"])


@pytest.mark.slow
def test_random_pruning_is_as_sparse_and_other(tmp_path):
    masks = {}
    for method, seed in (("gradual", 0), ("random-pruning", 0), ("random-pruning", 1)):
        spec = narrow(method, seed=seed)
        run(spec, tmp_path)
        masks[method, seed] = stored(spec, tmp_path)["method"]["masks"]
    counts = {sum(int(m.sum()) for m in found.values()) for found in masks.values()}
    assert len(counts) == 1
    first, second = masks["random-pruning", 0], masks["random-pruning", 1]
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_survivors_of_the_lottery_go_back(tmp_path):
    spec = narrow("lottery")
    run(spec, tmp_path, epochs=1)
    early = stored(spec, tmp_path)["model"]
    run(spec, tmp_path, epochs=4)
    rewound = stored(spec, tmp_path)
    assert rewound["method"]["masks"]
    for name, mask in rewound["method"]["masks"].items():
        weight = rewound["model"][f"{name}.weight"]
        assert torch.equal(weight, early[f"{name}.weight"] * mask)
    assert torch.equal(rewound["model"]["bn1.running_mean"], early["bn1.running_mean"])
    assert not rewound["optimizer"]["state"]


def test_shrinking_by_schedule_ends_with_it(tmp_path):
    """And SeReNe's passes back are paid until then, not longer."""
    spec = narrow("serene", arguments="lam=0.01, sparsity=0.5, begin=0.2, end=0.6")
    run(spec, tmp_path)
    overhead = results(spec, tmp_path)[1]["overhead_flops"].to_pylist()
    assert overhead[0] == overhead[2] > overhead[3] == overhead[4] == 0
    left = measures(tmp_path)["parameters_left"]
    assert left[0] > left[1] > left[2] == left[4]


@pytest.mark.slow
def test_a_smaller_model(tmp_path):
    spec, baseline = narrow("smaller"), narrow("baseline", arguments="")
    preflight([spec])
    for each in (spec, baseline):
        run(each, tmp_path)
    assert stored(spec, tmp_path)["model"]["conv1.weight"].shape == (3, 1, 3, 3)
    ours, theirs = (results(s, tmp_path)[1] for s in (spec, baseline))
    assert ours["forward_flops"][0].as_py() < theirs["forward_flops"][0].as_py() / 2
    parts = spec.trained_suite.model
    model = build_model(parts.build, spec.folder, parts.arguments)
    assert ours["effective_parameters"][0].as_py() == sum(p.numel() for p in model.parameters())


WRONG = [
    ("gradual", "sparsity=1.0", "less than 1"),
    ("gradual", "sparsity=0.5, end=1.2", "end: 1.2 is after the last epoch"),
    ("gradual", "sparsity=0.5, begin=0.7", "begin: 0.7 must be before end, 0.6"),
    ("one-shot", "sparsity=0.5, at=1.5", "at: 1.5 is after the last epoch"),
    ("one-shot", "sparsity=0", "greater than 0"),
    ("one-shot", "at=0.5", "sparsity"),
    ("lottery", "sparsity=0.5, rewind=0.5", "rewind: 0.5 must be before at, 0.5"),
    ("lobster", "twt=-0.1", "greater than or equal to 0"),
    ("lobster", "lam=1.0", "less than 1"),
    ("lobster", "end=0.5", "end: is of a schedule, which needs a sparsity"),
    ("lobster", "sparsity=0.5, pwe=3", "pwe: is of plateaus; with a sparsity leave it out"),
    ("lobster", "pwe=5", "no plateau can come within 5 epochs"),
    ("lobster", "pwe=1, evaluations=1", "greater than or equal to 2"),
    ("serene", "positions='max'", "'sum' or 'mean'"),
    ("gradual", "sparsity=0.9999, units='neurons'", "leaves 0 of .* neurons, and 7 layers need"),
    ("lottery", "sparsity=0.5, at=1.0", "at: of 5 epochs none would be left to train"),
    ("smaller", "arguments={classes=5}", "label"),
    ("smaller", "arguments={}", "at least 1 item|must not be empty"),
    ("smaller", "arguments={width=0}", "conv1.weight has no elements; widths must be 1 or more"),
    ("smaller", "arguments={widht=3}", "methods.smaller: the model with .*widht"),
]


@pytest.mark.slow
@pytest.mark.parametrize("method, arguments, message", WRONG)
def test_wrong_choices(method, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        preflight([trial(method, arguments=arguments)])
    assert "\n" not in str(error.value)


def test_methods_at_plateaus_need_validation_images():
    preflight([trial("lobster", "data.validation_size=0", arguments="sparsity=0.5")])
    with pytest.raises(UserError, match="validation_size"):
        preflight([trial("lobster", "data.validation_size=0")])


@pytest.mark.slow
def test_a_layer_is_never_emptied(tmp_path):
    """What would leave it without a weight is refused and named; what was pruned before stays."""
    spec = narrow("gradual", arguments="sparsity=0.999, begin=0.2, end=0.8, shape='linear'")
    run(spec, tmp_path)
    left = measures(tmp_path)["parameters_left"]
    assert left[0] > left[1] > left[2] == left[4]
    rows = load_results("digits-pruning", root=str(tmp_path)).measures
    emptied = rows[rows["name"] == "would_empty"]
    assert set(emptied["epoch"]) == {3, 4}
    assert emptied["layer"].nunique() == 1
    for name, mask in stored(spec, tmp_path)["method"]["masks"].items():
        assert mask.any(), name
    (table,) = load_report(stores_named([str(tmp_path)], str(tmp_path))).groups
    assert "gradual: pruned less than asked" in " ".join(render([table], 160).split())
