"""PyTorch's own FLOP counter around a forward and a backward."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from harness.flops.oracle import Rules

BATCH = 2


def counted_by_torch(model, shape, mapping=None):
    """(forward, backward) FLOPs of one sample, in train mode; {}: by PyTorch's rules alone."""
    mapping = Rules().mapping if mapping is None else mapping
    model.train()
    inputs = torch.randn(BATCH, *shape, device=next(model.parameters()).device)
    with FlopCounterMode(display=False, custom_mapping=mapping) as forward:
        outputs = tree_leaves(model(inputs))
    loss = sum(o.sum() for o in outputs if isinstance(o, Tensor) and o.requires_grad)
    with FlopCounterMode(display=False, custom_mapping=mapping) as backward:
        loss.backward()
    return forward.get_total_flops() / BATCH, backward.get_total_flops() / BATCH
