"""FLOPs of training that prunes, as counted and as PyTorch's counter sees them being executed."""

import pytest
import torch
from test_pruning_methods import narrow, trial
from torch.utils.flop_counter import FlopCounterMode
from trials import run

from harness.seeds import restored
from harness.storage.store import Store
from harness.train.assembly import assemble
from harness.train.loop import Loop
from harness.train.tuning import Tuning, numerics

PLAIN = {"tuning": Tuning().to_json()}
METHODS = {
    "serene": "lam=0.02, twt=0.2, pwe=0",
    "serene-exact": "lam=0.02, twt=0.2, pwe=0",
    "serene-local": "lam=0.02, twt=0.2, pwe=0",
    "lobster": "lam=0.02, twt=0.2, pwe=0",
    "gradual": "sparsity=0.5",
    "smaller": "arguments={width=3}",
}


def seen(work, loop, epoch):
    """(all that torch counts in an epoch, all that is said of it)."""
    frozen, plan = work.begin_epoch()
    with FlopCounterMode(display=False) as counter:
        loop.train(epoch)
        work.method.end_epoch(epoch)
    said = work.flops(frozen, plan)
    return counter.get_total_flops(), said


ACCUMULATED = ["recipe.forward_batch=12"]


@pytest.mark.slow
@pytest.mark.parametrize("method, settings", [(m, []) for m in METHODS] + [("serene", ACCUMULATED)])
def test_counted_is_executed(method, settings):
    """To the unit: forwards, backwards, passes for sensitivities, evaluations of thresholds."""
    spec = narrow(method, *settings, arguments=METHODS[method])
    with restored(), numerics("float32"):
        work = assemble(spec, torch.device("cpu"), None, PLAIN)
        loop = Loop(work, spec.suite.recipe, spec.seed)
        work.start()
        for epoch in range(2):
            executed, said = seen(work, loop, epoch)
            assert said["backward_executed"] == said["backward_dense"]
            total = said["forward"] + said["backward_executed"] + said["overhead"]
            assert executed == total
            sample = work.costs.forward()
            if method in ("serene", "serene-exact"):
                assert said["overhead"] > said["forward"] / 2
            elif method in ("serene-local", "lobster"):
                assert 2 * 20 * sample <= said["overhead"] <= 13 * 20 * sample
            else:
                assert said["overhead"] == 0


def test_a_pass_back_is_a_forward_but_for_the_first_layer():
    work = assemble(narrow("serene"), torch.device("cpu"), None, PLAIN)
    names = list(work.costs.neurons)
    first = work.costs.layers(torch.zeros(len(work.costs.neurons), dtype=torch.bool), 1)["conv1"][0]
    layers = [name for name in names if "bn" not in name]
    assert work.costs.derivatives(layers) == work.costs.forward() - first
    assert work.costs.derivatives(["fc"]) == 0
    assert work.costs.derivatives(layers, 7) == 7 * work.costs.derivatives(layers)


@pytest.mark.slow
def test_an_exact_pass_costs_one_for_each_class(tmp_path):
    overhead = {}
    for method in ("serene", "serene-exact"):
        spec = trial(method, "recipe.epochs=2", arguments="lam=0.01, sparsity=0.5, end=1.0")
        run(spec, tmp_path)
        overhead[method] = Store(tmp_path, spec.suite.name).epochs(spec.key)[0]["overhead_flops"]
    assert overhead["serene-exact"] == 10 * overhead["serene"] > 0
