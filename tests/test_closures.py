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


class Thrice(torch.optim.SGD):
    """Moves who has a gradient after each of three calls of its closure, with weight decay."""

    def step(self, closure):
        for _ in range(3):
            closure()
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(0.99).sub_(parameter.grad, alpha=0.1)


@pytest.mark.parametrize("gradient", ["exact", "cut"])
def test_rows_stand_still_however_often_a_step_calls_its_closure(gradient):
    """Even if the closure gives everyone a gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    optimizer = Thrice(net.parameters())
    freezer = neq.NeuronFreezer(net, optimizer, neq.Everyone(), gradient=gradient)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.randn(8, 4)).square().sum()
        loss.backward()
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        return loss

    optimizer.step(closure)
    mask = torch.zeros(len(freezer.neurons), dtype=torch.bool)
    mask[WHOLE] = mask[PARTLY] = True
    freezer.freeze(mask)
    before = [p.detach().clone() for p in net.parameters()]
    for _ in range(2):
        optimizer.step(closure)
    both = zip(net.parameters(), before, strict=True)
    same = [(p == then).reshape(len(p), -1).all(1) for p, then in both]
    assert all(bool(rows[PARTLY].all()) for rows in same[:2])
    assert all(bool(rows.all()) for rows in same[2:4])
    assert not any(bool(rows.any()) for rows in (same[0][2:], *same[4:]))
