"""Steps whose closure runs the backward, as Lightning's do, against those that come after it."""

import pytest
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import neq
from neq.neurons import unwrapped

WHOLE, PARTLY = slice(6, 11), slice(0, 2)  # neurons of the second layer, and of the first


def trained(by_closure, gradient, wrap, positional=False):
    torch.manual_seed(0)
    parts = nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    net = nn.Sequential(*parts)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=0.1)
    called, norms = wrap(net), []
    freezer = neq.NeuronFreezer(called, optimizer, neq.Everyone(), gradient=gradient)

    def backward(inputs):
        optimizer.zero_grad()
        loss = called(inputs).square().sum()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.5)))
        return loss

    def step():
        inputs = torch.randn(8, 4)
        if positional:
            assert optimizer.step(lambda: backward(inputs)).requires_grad
        elif by_closure:
            assert optimizer.step(closure=lambda: backward(inputs)).requires_grad
        else:
            backward(inputs)
            optimizer.step()

    step()
    mask = torch.zeros(len(freezer.neurons), dtype=torch.bool)
    mask[WHOLE] = mask[PARTLY] = True
    freezer.freeze(mask)
    before = [p.detach().clone() for p in net.parameters()]
    steps = [int(optimizer.state[p]["step"]) for p in net.parameters()]
    for _ in range(3):
        step()
    weight, bias, *whole = [*net.parameters()][:4]
    assert torch.equal(weight[PARTLY], before[0][PARTLY])
    assert torch.equal(bias[PARTLY], before[1][PARTLY])
    assert all(map(torch.equal, whole, before[2:4]))
    now = [int(optimizer.state[p]["step"]) for p in net.parameters()]
    assert [after - then for after, then in zip(now, steps, strict=True)] == [3, 3, 0, 0, 3, 3]
    states = [v for p in net.parameters() for v in optimizer.state[p].values()]
    return [*net.parameters(), *states, torch.tensor(norms)]


@pytest.mark.parametrize("gradient", ["exact", "cut"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_closure_s_gradients_are_those_of_a_backward_before_the_step(
    tmp_path, gradient, parallel
):
    """DistributedDataParallel gives zeros where a parameter has no gradient."""
    wrap = DistributedDataParallel if parallel else unwrapped
    if parallel:
        store = distributed.FileStore(str(tmp_path / "store"), 1)
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        expected = trained(False, gradient, wrap)
        for positional in (False, True):
            found = trained(True, gradient, wrap, positional)
            assert all(map(torch.equal, found, expected))
    finally:
        if parallel:
            distributed.destroy_process_group()
