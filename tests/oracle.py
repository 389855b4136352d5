"""PyTorch's own FLOP counter, with the two rules mended that are wrong or differ by device.

The weight gradient of a grouped convolution (torch 2.13 forgets to divide by the groups) and fused
attention (not counted on the CPU; recomputed products counted on CUDA).
"""

from math import prod

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

BATCH = 2
aten = torch.ops.aten


def _convolution_backward(gradient, inputs, weight, *rest, **_):
    transposed, mask = rest[4], rest[7]
    positions = inputs if transposed else gradient
    return 2 * positions[0] * prod(positions[2:]) * prod(weight) * (mask[0] + mask[1])


def _attention(query, key, value, *_rest, **_):
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(_gradient, query, key, value, *_rest, **_):
    return 2 * _attention(query, key, value)


MAPPING = {
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted_by_torch(model, shape, mapping=MAPPING):
    """(forward, backward) FLOPs of one sample, in train mode."""
    model.train()
    inputs = torch.randn(BATCH, *shape)
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
        outputs = tree_leaves(model(inputs))
    loss = sum(o.sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        loss.backward()
    return forward.get_total_flops() / BATCH, backward.get_total_flops() / BATCH
