"""Trials that decide by groups, blocks of rows or a budget: resumed, verified, refused."""

import copy

import pytest
import torch
from test_together import own, together  # noqa: F401 — `own` is a fixture
from trials import (
    NARROW,
    SMALL,
    assert_same_results,
    results,
    run,
    run_by_ray_in_two_goes,
)

import neq
from harness import load_results
from harness.errors import UserError
from harness.flops.costs import count_costs
from harness.flops.oracle import backward_flops_by_torch
from harness.run.preflight import preflight
from harness.run.trials import specs
from harness.storage.schema import Failure
from harness.storage.store import Store
from harness.suite.freezing_specs import NeqBudgetSpec, NeqSpec
from neq.required import BATCH
from suites.resnet import resnet8

METHODS = {
    "neq-group": "eps=0.01",
    "neq-cka": "eps=0.02",
    "neq-budget": "flops=0.5",
    "random-layers": "flops=0.5",
    "slowest-layers": "flops=0.5",
    "freeze-first": "flops=0.5",
}
VARIANTS = METHODS | {
    "blocks": "kind='neq-group', eps=0.01, groups=4, quantile=0.9",
    "modules": "kind='neq-group', eps=0.05, groups='layer1 layer2', gradient='cut'",
    "blocks of cka": "kind='neq-cka', eps=0.02, groups=4",
    "layers in a budget": "kind='neq-budget', flops=0.4, groups='layers'",
    "aligned": "kind='neq', eps=0.01, align=4",
    "aligned up": "kind='smallest_velocity', keep=0.4, align=4, rounding='up'",
}


def trial(method, *settings, arguments=None, suite="digits"):
    values = VARIANTS[method] if arguments is None else arguments
    kind = "" if "kind=" in values else f"kind='{method}', "
    name = method.replace(" ", "-")
    first = [
        s for s in SMALL if not s.startswith("methods.") and (suite == "digits" or s not in NARROW)
    ]
    (spec,) = specs(suite, [*first, f"methods.{name}={{{kind}{values}}}", *settings], name, "0")
    return spec


def epochs_of(spec, root):
    return results(spec, root)[1].to_pandas()


def measures(root, suite="digits"):
    rows = load_results(suite, root=str(root)).measures.sort_values("epoch")
    return dict(iter(rows.groupby("name")))


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "aligned"])
def test_resumed_equals_uninterrupted(tmp_path, method):
    spec = trial(method)
    run(spec, tmp_path / "through")
    run(spec, tmp_path / "stopped", epochs=3)
    run(spec, tmp_path / "stopped")
    assert_same_results(spec, tmp_path / "through", tmp_path / "stopped")
    frozen = epochs_of(spec, tmp_path / "through")["frozen_neurons"]
    assert frozen[0] == 0
    assert frozen.max() > 0
    ours, theirs = (
        load_results(str(tmp_path / r / "digits")).measures for r in ("through", "stopped")
    )
    assert ours.equals(theirs)


@pytest.mark.slow
@pytest.mark.parametrize("method", VARIANTS)
def test_what_is_counted_is_executed(method):
    """In a real backward, under the mask that the policy chooses."""
    torch.manual_seed(0)
    model, spec = resnet8(), trial(method)
    costs = count_costs(model, (1, 16, 16))
    index = costs.neurons
    index.freezable, index.flops = ~index.select(["fc"]), costs.required()
    sizes = torch.tensor([layer.size for layer in index.layers])
    scales = torch.logspace(-3, -1, len(sizes), dtype=torch.float64)[torch.randperm(len(sizes))]
    velocity = scales.repeat_interleave(sizes) * (1 - 0.5 * torch.rand(len(index)))
    mask = spec.method_spec.policy(0).frozen(3, index, velocity) & index.freezable
    assert mask.any()
    gradient = spec.method_spec.gradient
    plan = neq.plan(index, mask, gradient)
    counted = costs.backward(mask, BATCH, plan)
    seen = backward_flops_by_torch(copy.deepcopy(model), (1, 16, 16), mask, gradient)
    assert seen == [counted.executed] * 2
    if isinstance(spec.method_spec, NeqBudgetSpec):
        assert counted.required <= spec.method_spec.flops * counted.dense


@pytest.mark.slow
def test_budgets_are_kept_once_velocities_exist(tmp_path):
    for method, share in (("neq-budget", 0.5), ("layers in a budget", 0.4)):
        spec = trial(method)
        run(spec, tmp_path)
        epochs = epochs_of(spec, tmp_path)
        left = epochs["backward_flops_required"] / epochs["backward_flops_dense"]
        assert (left[:2] == 1).all()
        assert (left[2:] <= share).all()


@pytest.mark.slow
def test_groups_are_layers_that_stand_still_as_a_whole(tmp_path):
    spec = trial("neq-group")
    run(spec, tmp_path)
    layers = results(spec, tmp_path)[2].to_pandas()
    still = layers["frozen"] / layers["neurons"]
    assert set(still) == {0.0, 1.0}
    velocity = layers["velocity_quantiles"].dropna()
    after = layers.loc[velocity.index]
    slow = velocity.map(lambda quantiles: max(abs(quantiles[0]), abs(quantiles[-1])) < 0.01)
    assert slow.any()
    following = {(e, n): f for e, n, f in zip(layers["epoch"], layers["layer"], still, strict=True)}
    for epoch, name in zip(after["epoch"][slow], after["layer"][slow], strict=True):
        if epoch < 4 and name != "fc":
            assert following[epoch + 1, name] == 1


@pytest.mark.slow
def test_what_deciding_by_cka_takes_and_records(tmp_path):
    spec, group = trial("neq-cka"), trial("neq-group")
    for each in (spec, group):
        run(each, tmp_path)
    overhead = [epochs_of(each, tmp_path)["overhead_flops"] for each in (spec, group)]
    positions = {"8": 256, "16": 64, "32": 16}
    sizes = {"8": 4 + 2, "16": 4, "32": 4}  # width 8, 16, 32: layers of that many neurons
    products = sum(6 * 20 * positions[d] * int(d) ** 2 * n for d, n in sizes.items())
    products += 6 * 20 * 10**2  # the head has one row for each sample
    assert (overhead[0] - overhead[1] == products).all()
    kappa = measures(tmp_path)["cka"]
    assert set(kappa["layer"]) == set(results(spec, tmp_path)[2]["layer"].to_pylist())
    assert kappa["value"].between(0, 1).all()


@pytest.mark.slow
def test_what_alignment_moves_is_recorded(tmp_path):
    spec = trial("aligned")
    run(spec, tmp_path)
    layers = results(spec, tmp_path)[2].to_pandas()
    trains = layers["neurons"] - layers["frozen"]
    assert ((trains % 4 == 0) | (layers["frozen"] == 0)).all()
    assert measures(tmp_path)["neurons_moved_by_alignment"]["value"].max() > 0


@pytest.mark.slow
def test_two_workers_agree(tmp_path, own):  # noqa: F811
    """On readings and masks, which a trial asks them after each epoch."""
    settings = ["recipe.batch_size=36", "data.validation_size=101", "resources.workers=2"]
    arguments = {m: METHODS[m] for m in ("neq-budget", "random-layers")} | {"neq-cka": "eps=0.3"}
    two = [trial(m, *settings, suite=str(own), arguments=a) for m, a in arguments.items()]
    for events in together(two, tmp_path / "two"):
        assert not [event for event in events if isinstance(event, (Failure, str))]
    for spec in two:
        assert Store(tmp_path / "two", "own").load_checkpoint(spec.key)["method"]["frozen"].any()


@pytest.mark.slow
def test_under_ray_stopped_and_resumed(tmp_path, shared_ray):
    chosen = [trial(method) for method in ("neq-cka", "neq-budget")]
    for spec in chosen:
        run(spec, tmp_path / "through")
    run(chosen[0], tmp_path / "ray", epochs=1)
    run_by_ray_in_two_goes(chosen, tmp_path / "ray")
    for spec in chosen:
        assert_same_results(spec, tmp_path / "through", tmp_path / "ray")


def test_defaults_that_came_later_are_no_part_of_a_key():
    """What identified trials before alignment came identifies them still."""
    assert NeqSpec(kind="neq", eps=0.01).model_dump(mode="json") == {
        "gradient": "exact",
        "mu": 0.5,
        "recursion": "paper",
        "similarity": "dataset",
        "kind": "neq",
        "eps": 0.01,
    }
    plain, same = trial("neq", arguments="eps=0.01"), trial("neq", arguments="eps=0.01, align=1")
    other = trial("neq", arguments="eps=0.01, align=8")
    assert plain.key == same.key != other.key


WRONG = [
    ("neq-group", "groups='layer1 layer1.0'", "groups: 'layer1.0' overlaps with another group"),
    ("neq-group", "groups='stem'", "no layer is called 'stem'"),
    ("neq-group", "groups=0", 'write "layers", a number of rows from 1 on'),
    ("neq-group", "groups=true", 'write "layers", a number of rows from 1 on'),
    ("neq-group", "quantile=1.5", "quantile: .* less than or equal to 1"),
    ("neq-group", "quantile=-0.1", "quantile: .* greater than or equal to 0"),
    ("neq", "align=0", "align: .* greater than or equal to 1"),
    ("neq", "rounding='nearest'", "rounding: .*'down' or 'up'"),
    ("neq", "groups=8", "groups: unknown key"),
    ("neq-budget", "flops=0", "flops: .* greater than 0"),
    ("neq-budget", "flops=1.1", "flops: .* less than or equal to 1"),
    ("neq-budget", "flops=1e-6", "flops = 1e-06 is out of reach: .* still needs 0.00"),
    ("random-layers", "flops=1e-6", "flops = 1e-06 is out of reach"),
    ("neq-budget", "flops=0.5, align=4, rounding='up'", "rounding 'up' lets more train"),
    ("slowest-layers", "flops=0.5, align=4", "align: unknown key"),
]


@pytest.mark.slow
@pytest.mark.parametrize("method, arguments, message", WRONG)
def test_wrong_parameters_are_refused_before_the_first_trial(method, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        preflight([trial(method, arguments=arguments)])
    assert "\n" not in str(error.value)


def test_cka_without_enough_rows_is_refused_before_the_first_trial():
    chosen = ["data.synthetic=true", "data.validation_size=50", "methods.neq-cka={eps=1e-3}"]
    (spec,) = specs("mnist-lenet300", chosen, "neq-cka", "0")
    with pytest.raises(UserError, match=r"50 validation samples give 0\.5 at the most; raise"):
        preflight([spec])
