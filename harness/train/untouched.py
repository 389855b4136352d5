"""Somebody's model and optimizer, lent for some steps and given back as they were."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness.seeds import restored


@contextmanager
def untouched(model: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Afterwards parameters, gradients, buffers, modes, the optimizer's state and settings, and the
    global random streams are as before, bit for bit; tensors are the same objects.

    Their copies lie in the memory of the CPU meanwhile.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = list({id(p): p for p in (*model.parameters(), *parameters)}.values())
    values = [(t, _copied(t)) for t in (*parameters, *model.buffers())]
    gradients = [(p, p.grad, None if p.grad is None else _copied(p.grad)) for p in parameters]
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    states = {p: [(k, v, _copied(v)) for k, v in s.items()] for p, s in optimizer.state.items()}
    groups = [
        [(key, value, _copied(value)) for key, value in group.items() if key != "params"]
        for group in optimizer.param_groups
    ]
    gpus = sorted({p.device.index for p in parameters if p.is_cuda})
    try:
        with restored(), torch.random.fork_rng(gpus):
            yield
    finally:
        for held, names in buffers:  # a forward may have assigned other tensors
            held.clear()
            held.update(names)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
            for parameter, gradient, value in gradients:
                parameter.grad = None if gradient is None else gradient.copy_(value)
            optimizer.state.clear()
            for parameter, state in states.items():
                optimizer.state[parameter] = {k: _put_back(v, was) for k, v, was in state}
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update({key: _put_back(value, was) for key, value, was in settings})
        for module, training in modes:
            module.training = training


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    return copy.deepcopy(value)


def _put_back(value: Any, was: Any) -> Any:
    return value.copy_(was) if isinstance(value, Tensor) else was
