"""Prunes weights or neurons with the smallest magnitude in the whole model."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.pruning.masks import Masks, weight

Units = Literal["weights", "neurons"]


@dataclass(frozen=True, slots=True)
class Bisection:
    """What a search for the largest threshold has found.

    `threshold`: everything below it was pruned, 0.0 where nothing was; `loss_before`, `loss`: of
    the model before and after; `evaluations`: how often the loss was asked for; `emptied`: the
    layer that larger thresholds would have left without a weight; None where the loss was the
    bound.
    """

    threshold: float
    loss_before: float
    loss: float
    evaluations: int
    emptied: str | None


class EmptiedLayerError(ValueError):
    """A threshold would leave `layer` without a weight."""

    def __init__(self, layer: str, sparsity: float) -> None:
        super().__init__(
            f"sparsity {sparsity:g} would leave {layer!r} without a weight; lower it (everything "
            "stays as it was)"
        )
        self.layer = layer


class MagnitudePruner:
    """Prunes `model`, whose pruned weights then stay zero under `optimizer`, by one threshold for
    all layers.

    `units`: "weights", or "neurons", whose magnitude is the root mean square of their row. Norms
    and biases are neither measured nor pruned. `exclude`: layers to leave whole; a head's neurons,
    which are the classes. `masks`: what is left. No layer is ever emptied: raises
    EmptiedLayerError, a ValueError that names it, and leaves everything as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        units: Units = "weights",
        exclude: Iterable[str] = (),
    ) -> None:
        if units not in ("weights", "neurons"):
            raise ValueError(f"units must be 'weights' or 'neurons', got {units!r}")
        self.units: Units = units
        self.masks = Masks(model, optimizer, exclude)
        self._model, self._optimizer = model, optimizer

    @property
    def count(self) -> int:
        """How many units there are, pruned or not."""
        return len(self._kept())

    @property
    def sparsity(self) -> float:
        """The share of units that is pruned."""
        kept = self._kept()
        return 1 - float(kept.sum()) / len(kept)

    @torch.no_grad()
    def prune(self, sparsity: float, generator: torch.Generator | None = None) -> float:
        """Prune until the share `sparsity` of all units is gone; returns the threshold: the
        smallest magnitude that is left.

        `generator`: a random stream of the CPU that draws units in the place of magnitudes, the
        control. What is pruned stays so: a sparsity that is reached already changes nothing.
        Raises ValueError for one that is not from 0 to below 1, EmptiedLayerError for one that
        would leave a layer without a weight.
        """
        if not 0 <= sparsity < 1:
            raise ValueError(f"sparsity must be at least 0 and below 1, got {sparsity}")
        magnitudes, kept = self._magnitudes(), self._kept()
        scores = magnitudes
        if generator is not None:
            scores = torch.rand(len(scores), generator=generator).to(scores.device)
        order = torch.where(kept, scores, -1.0).argsort(stable=True)
        chosen = kept.clone()
        chosen[order[: round(sparsity * len(order))]] = False
        emptied = self._emptied(chosen)
        if emptied is not None:
            raise EmptiedLayerError(emptied, sparsity)
        self.masks.set(self._spread(chosen))
        return float(magnitudes[chosen].min())

    @torch.no_grad()
    def bisect(
        self, loss: Callable[[], float], tolerance: float, evaluations: int = 12
    ) -> Bisection:
        """Prune below the largest threshold with which `loss()` rises to (1 + `tolerance`) times
        what it is now, at the most (TWT, threshold worsening tolerance).

        `loss` evaluates the model as it is, on validation samples, and tells the same in all
        processes; it is called `evaluations` times at the most, each of which halves the units in
        question. Thresholds that would empty a layer are not tried. Where `loss` raises everything
        is as before. Raises ValueError for `tolerance` < 0 and fewer than 2 evaluations.
        """
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be 0 or more, got {tolerance}")
        if evaluations < 2:
            raise ValueError(f"evaluations must be 2 or more, got {evaluations}")
        search = _Search(self, loss, tolerance)
        try:
            while search.open and search.evaluations < evaluations:
                search.halve(last=search.evaluations == evaluations - 1)
        except BaseException:
            search.put_back()
            raise
        return search.close()

    @torch.no_grad()
    def rewind(self, weights: Mapping[str, Tensor]) -> None:
        """Give the model earlier `weights` (a copied `state_dict`), but for what is pruned, and let
        the optimizer forget (the lottery ticket's control, arXiv 1803.03635).
        """
        self._model.load_state_dict(weights)
        self.masks.apply()
        self._optimizer.state.clear()

    def _magnitudes(self) -> Tensor:
        """Of every unit of all layers, one after the other."""
        found = []
        for layer in self.masks.layers.values():
            w = weight(layer).detach().float().abs()
            found.append(
                w.flatten() if self.units == "weights" else w.flatten(1).square().mean(1).sqrt()
            )
        return torch.cat(found)

    def _kept(self) -> Tensor:
        """Bool [units]: which are left."""
        masks = self.masks.kept.values()
        if self.units == "weights":
            return torch.cat([mask.flatten() for mask in masks])
        return torch.cat([mask.flatten(1).any(1) for mask in masks])

    def _spread(self, units: Tensor) -> dict[str, Tensor]:
        """Masks of weights, from one of units."""
        found = {}
        for name, part in self._by_layer(units).items():
            kept = self.masks.kept[name]
            rows = part.view([-1, *[1] * (kept.dim() - 1)])
            found[name] = (part.view_as(kept) if self.units == "weights" else rows) & kept
        return found

    def _by_layer(self, units: Tensor) -> dict[str, Tensor]:
        """The part of each layer in values of all units."""
        kept = self.masks.kept
        counts = [mask.numel() if self.units == "weights" else len(mask) for mask in kept.values()]
        return dict(zip(kept, torch.split(units, counts), strict=True))

    def _emptied(self, units: Tensor) -> str | None:
        """A layer without a weight under a mask of units."""
        spread = self._spread(units).items()
        return next((name for name, kept in spread if not bool(kept.any())), None)

    def state_dict(self) -> dict[str, Any]:
        """Which weights are left; the weights are the model's."""
        return self.masks.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self.masks.load_state_dict(state)


class _Search:
    """Halves the number of units in question: `low` of the survivors may go, `high` may not."""

    def __init__(
        self, pruner: MagnitudePruner, loss: Callable[[], float], tolerance: float
    ) -> None:
        self._pruner, self._loss = pruner, loss
        self._weights = {
            name: weight(layer).detach().clone() for name, layer in pruner.masks.layers.items()
        }
        self._magnitudes, self._kept = pruner._magnitudes(), pruner._kept()
        self._sorted = self._magnitudes[self._kept].sort().values
        self._before = self._found = loss()
        self._bound = self._before + tolerance * abs(self._before)
        self.evaluations = 1
        self._limit, self._first = self._most()
        self._low, self._high = 0, self._limit + 1

    def _most(self) -> tuple[int, str]:
        """The most units that can go before a layer is empty, and the layer."""
        kept = self._pruner._by_layer(self._kept)
        magnitudes = self._pruner._by_layer(self._magnitudes)
        largest = {n: magnitudes[n][mask].max() for n, mask in kept.items() if bool(mask.any())}
        first = min(largest, key=lambda name: float(largest[name]))
        below = torch.searchsorted(self._sorted, largest[first])
        return int(below), first

    @property
    def open(self) -> bool:
        """Whether thresholds are left to try."""
        return self._high - self._low > 1

    def halve(self, *, last: bool) -> None:
        """Try one more threshold; as the `last` the largest, if the loss has borne all so far."""
        never_refused = self._high > self._limit
        middle = self._limit if last and never_refused else (self._low + self._high) // 2
        self._try(middle)
        found = self._loss()
        self.evaluations += 1
        if found <= self._bound:
            self._low, self._found = middle, found
        else:
            self._high = middle

    def _threshold(self, count: int) -> float:
        value = float(self._sorted[count])
        return value if count and value > float(self._sorted[0]) else 0.0

    def _mask(self, count: int) -> Tensor:
        return self._kept & ~(self._magnitudes < self._threshold(count))

    def _try(self, count: int) -> None:
        """The weights as they were, but for what is below that threshold."""
        masks = self._pruner._spread(self._mask(count))
        for name, layer in self._pruner.masks.layers.items():
            torch.mul(self._weights[name], masks[name], out=weight(layer))

    def put_back(self) -> None:
        """Give the model the weights that it had."""
        self._try(0)

    def close(self) -> Bisection:
        """Prune what was found."""
        self.put_back()
        self._pruner.masks.set(self._pruner._spread(self._mask(self._low)))
        return Bisection(
            self._threshold(self._low),
            self._before,
            self._found,
            self.evaluations,
            self._first if self._low == self._limit else None,
        )
