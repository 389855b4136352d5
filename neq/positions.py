"""Which outputs of a layer belong to which sample, and which positions a mask leaves out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Names of arguments under which models are told of padding: 1 where there is something, or where
# there is nothing.
LEFT_IN = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
LEFT_OUT = (
    *("key_padding_mask", "src_key_padding_mask"),
    *("tgt_key_padding_mask", "memory_key_padding_mask", "padding_mask"),
)


def masks_of(named: Mapping[Any, Any], device: torch.device) -> tuple[Tensor, ...]:
    """The masks among a model's arguments: bool [samples, positions] each, True where it counts.

    They are [samples, positions], or [samples, 1, 1, positions]; those of other shapes, which are
    of pairs of positions, are none.
    """
    found = []
    for name in (*LEFT_IN, *LEFT_OUT):
        mask = named.get(name)
        mask = flat_mask(mask) if isinstance(mask, Tensor) else None
        if mask is None or mask.dim() != 2 or (name == "padding_mask" and mask.is_floating_point()):
            continue
        mask = mask.to(device)
        # One that is added to the scores has 0 where there is something, and -inf, or close to it.
        if mask.is_floating_point() and (name in LEFT_OUT or not bool((mask > 0).any())):
            found.append(mask >= 0)
        else:
            found.append(mask != 0 if name in LEFT_IN else mask == 0)
    return tuple(found)


def flat_mask(mask: Tensor) -> Tensor:
    """It as [samples, positions] where it is [samples, 1, 1, positions], else as it is."""
    return mask[:, 0, 0] if mask.dim() == 4 and mask.shape[1:3] == (1, 1) else mask


def unmatched(output: Tensor, axis: int, masks: Sequence[Tensor]) -> bool:
    """Whether an output that `by_sample` found in no mask has positions that one may leave out."""
    return output.dim() > 2 and _of_tokens(output, axis) and not all(bool(m.all()) for m in masks)


def by_sample(
    output: Tensor, axis: int, samples: int, masks: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | None]:
    """A layer's output with its neurons, which lie at `axis`, last, and by sample: [samples, …,
    neurons]; one row of all where samples are not the outermost axis.

    Then which of its positions count: bool [samples, positions], of all `masks` that have just its
    samples and positions, and None where none has. Its second axis is positions then.
    """
    last = output.detach().movedim(axis, -1)
    for mask in masks if _of_tokens(output, axis) else ():
        parted = _parted(last, mask.shape)
        if parted is not None:
            alike = [other for other in masks if other.shape == mask.shape]
            return parted, torch.stack(alike).all(0)
    rows = samples if last.dim() > 1 and last.shape[0] % samples == 0 else 1
    return torch.unflatten(last, 0, (rows, -1)), None


def _of_tokens(output: Tensor, axis: int) -> bool:
    """Else it is an image's."""
    return output.dim() < 4 or axis in (-1, output.dim() - 1)


def _parted(last: Tensor, shape: torch.Size) -> Tensor | None:
    """An output as [samples, positions, …, neurons], where `shape` are its first two axes."""
    samples, positions = shape
    if last.dim() > 3 and (last.shape[0], last.shape[2]) == shape:  # by head
        return last.transpose(1, 2)
    if last.dim() > 2 and last.shape[:2] == shape:
        return last
    if last.dim() > 2 and last.shape[:2] == (positions, samples):
        return last.transpose(0, 1)
    if last.dim() == 2 and len(last) == samples * positions:
        return torch.unflatten(last, 0, shape)
    return None
