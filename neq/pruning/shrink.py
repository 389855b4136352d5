"""Shrinks weights that do not matter, after each step of an optimizer (SeReNe, LOBSTER)."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.optimizers import bare
from neq.pruning.masks import prunable, weight
from neq.pruning.sensitivity import NeuronSensitivity, parameter_sensitivity


class Shrink:
    """After each step of `optimizer`: w ← w − lam · max(0, 1 − S) · w, for the prunable weights.

    `sensitivity`: a NeuronSensitivity (S of the weight's row: SeReNe), "gradient" (S = |∂L/∂w|:
    LOBSTER) or "none" (S = 0: uniform decay, the control of both). S is of the same batch, before
    the step. `lam` is per step, not scaled by the learning rate: what S = 0 halves in 0.693 / lam
    steps. Biases and norms are left alone, and so are weights without a gradient. `exclude`: layers
    to leave out; `active`: whether it shrinks at all.

    Make it before what prunes, so that pruned weights are zeroed last. It hooks the optimizer's
    step (without a closure), so that a training loop stays as it is; a step that a GradScaler skips
    shrinks nothing. Where gradients are clipped, or a GradScaler may skip a step of which the
    NeuronSensitivity has samples, call `read` in each step, after unscaling and before clipping.
    Raises ValueError for `lam` below 0 or from 1 on, and for a NeuronSensitivity that leaves out
    layers which shrink.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        sensitivity: NeuronSensitivity | Literal["gradient", "none"],
        lam: float,
        *,
        exclude: Iterable[str] = (),
    ) -> None:
        if not 0 <= lam < 1:
            raise ValueError(f"lam must be at least 0 and below 1, got {lam}")
        if isinstance(sensitivity, str) and sensitivity not in ("gradient", "none"):
            raise ValueError(
                f"sensitivity must be a NeuronSensitivity, 'gradient' or 'none', got "
                f"{sensitivity!r}"
            )
        self.lam = lam
        self.active = True
        self._sensitivity = sensitivity
        self._optimizer = optimizer = bare(optimizer)
        self._layers = prunable(model, exclude)
        if isinstance(sensitivity, NeuronSensitivity):
            names = (layer.name for layer in self._layers)
            if unknown := [name for name in names if name not in sensitivity.layers]:
                raise ValueError(
                    f"the NeuronSensitivity leaves out {unknown[0]!r}: exclude the same layers"
                )
        self._weights: list[Tensor] = []
        self._shrinking: list[Tensor] | None = None
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    @torch.no_grad()
    def read(self) -> None:
        """Read S, of all processes, for the step to come; its gradients are there and unscaled."""
        with_gradient = [layer for layer in self._layers if weight(layer).grad is not None]
        self._weights = [weight(layer) for layer in with_gradient]
        if isinstance(self._sensitivity, NeuronSensitivity):
            found = self._sensitivity.take()
            rows = [(found[layer.name], weight(layer)) for layer in with_gradient]
            self._shrinking = [
                (1 - s.to(w.dtype)).clamp_(min=0).view(-1, *[1] * (w.dim() - 1)) for s, w in rows
            ]
        elif self._sensitivity == "gradient":
            self._shrinking = self._by_gradient()
        else:
            self._shrinking = []

    def _by_gradient(self) -> list[Tensor]:
        found = [s for s in parameter_sensitivity(self._weights) if s is not None]
        scale = getattr(self._optimizer, "grad_scale", None)  # a fused optimizer unscales itself
        if scale is not None:
            torch._foreach_div_(found, scale)
        if found:  # max(0, 1 − S), in passes over all weights at once
            torch._foreach_neg_(found)
            torch._foreach_add_(found, 1)
            torch._foreach_clamp_min_(found, 0)
        return found

    def _before_step(self, *_: Any) -> None:
        if self.active and self._shrinking is None:
            self.read()
        elif not self.active and isinstance(self._sensitivity, NeuronSensitivity):
            self._sensitivity.reset()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        shrinking, self._shrinking = self._shrinking, None
        if not self.active or shrinking is None or not self._weights:
            return
        skipped = getattr(self._optimizer, "found_inf", None)  # a fused optimizer skips by itself
        if skipped is not None and bool(skipped):
            return
        if not shrinking:
            torch._foreach_mul_(self._weights, 1 - self.lam)
        elif isinstance(self._sensitivity, NeuronSensitivity):
            torch._foreach_mul_(shrinking, -self.lam)
            torch._foreach_add_(shrinking, 1)
            torch._foreach_mul_(self._weights, shrinking)
        else:
            torch._foreach_addcmul_(self._weights, self._weights, shrinking, -self.lam)

    def remove(self) -> None:
        """Let go of the optimizer: from here on nothing shrinks."""
        for handle in self._handles:
            handle.remove()
