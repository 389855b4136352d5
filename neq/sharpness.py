"""How sharp a minimum is: the top eigenvalue of the loss's Hessian, by power iteration."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from neq.batches import read_batch
from neq.calls import Run, changed
from neq.evaluation import arguments, evaluation, full_precision, run_with, state_of
from neq.neurons import unwrapped
from neq.parallel import add_up
from neq.selective import WORK, assign

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, slots=True)
class Eigenvalue:
    """An eigenvalue of a symmetric matrix, as power iteration has found it: the largest, or one
    that is less by a few per cent, where others lie that close.

    `value`: the Rayleigh quotient of the last vector. `low`, `high`: the same ± its residual's
    norm; there is an eigenvalue in between. `converged`: whether the residual is small enough.
    `iterations`: products with the matrix.
    """

    value: float
    low: float
    high: float
    converged: bool
    iterations: int


def top_eigenvalue(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Loss,
    *,
    kept: Mapping[str, Tensor] | None = None,
    iterations: int = 200,
    tolerance: float = 0.02,
    generator: torch.Generator | None = None,
) -> Eigenvalue:
    """The largest eigenvalue of the Hessian of the mean loss, in the trainable parameters.

    `batches`: (inputs, targets) of this process, gone through once for each product, so no
    iterator; sums are added up over all processes of torch.distributed. Inputs are a tensor, or a
    mapping of the model's arguments. `loss(outputs, targets)`: the mean over a batch. `kept`: by
    layer name, bool of its weight's shape, as `neq.pruning.Masks.kept`: the Hessian is that of the
    weights that are left. It has converged when the residual is at most `tolerance` of the
    quotient, and ends after `iterations` otherwise; where the eigenvalue of the largest magnitude
    is negative, it begins again with the Hessian shifted by that. `generator`: of the first vector,
    on the CPU (default: seeded with 0).

    The model is evaluated in eval mode and in full precision, as if nothing in it were frozen, and
    left as it was. Raises ValueError for masks that do not fit, where nothing is left to train, and
    without a sample; what autograd raises where the loss can't be differentiated twice.
    """
    if iterations < 1 or not 0 < tolerance < 1:
        raise ValueError(
            f"iterations must be 1 or more, tolerance between 0 and 1: {iterations}, {tolerance}"
        )
    model = unwrapped(model)
    hessian = _Hessian(model, batches, loss, kept or {})
    with (
        evaluation(model, hessian.device),
        torch.enable_grad(),
        sdpa_kernel(SDPBackend.MATH),  # the other kernels have no second derivative
        _plain(model),
    ):
        start = hessian.start(generator or torch.Generator().manual_seed(0))
        found, last, length = _iterate(hessian, start, 0.0, iterations, tolerance)
        if found.value < 0:
            start = start - (start * last).sum() * last  # or it might be found once more
            if (norm := _norm(start)) > 0:
                again, *_ = _iterate(hessian, start / norm, length, iterations, tolerance)
                found = replace(again, iterations=found.iterations + again.iterations)
    return found


def _iterate(
    hessian: "_Hessian", vector: Tensor, shift: float, iterations: int, tolerance: float
) -> tuple[Eigenvalue, Tensor, float]:
    """Power iteration with the Hessian plus `shift`; the last vector; and how long the last product
    was, which the largest magnitude of an eigenvalue is at least.
    """
    for done in range(1, iterations + 1):
        product = hessian.times(vector)
        quotient = float((vector * product).sum(dtype=torch.float64))
        residual = _norm(product - quotient * vector)
        converged = residual <= tolerance * abs(quotient)
        if converged or not math.isfinite(residual) or done == iterations:
            break
        vector = product + shift * vector
        vector = vector / _norm(vector)
    low, high = quotient - residual, quotient + residual
    return Eigenvalue(quotient, low, high, converged, done), vector, _norm(product)


def _norm(vector: Tensor) -> float:
    return float(torch.linalg.vector_norm(vector, dtype=torch.float64))


class _Hessian:
    """Multiplies vectors [trainable parameters] with the Hessian, that of what is `kept`."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Any]],
        loss: Loss,
        kept: Mapping[str, Tensor],
    ) -> None:
        self._model, self._batches, self._loss = model, batches, loss
        self._leaves = {  # their own, so that no gradient and no hook of the model's is touched
            name: full_precision(parameter.detach()).requires_grad_()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        if not self._leaves:
            raise ValueError("the model has no trainable parameter")
        self.device = next(model.parameters()).device
        self._kept = self._flat_mask(kept)

    def _flat_mask(self, kept: Mapping[str, Tensor]) -> Tensor | None:
        """Which places of a vector are left; None: all."""
        known = dict(self._model.named_parameters())
        for name, mask in kept.items():
            weight = known.get(f"{name}.weight")
            if weight is None or mask.dtype != torch.bool or mask.shape != weight.shape:
                wanted = "the mask of a layer" if weight is None else f"bool {list(weight.shape)}"
                raise ValueError(
                    f"kept[{name!r}] must be {wanted}, got {mask.dtype} {list(mask.shape)}"
                )
        if all(bool(mask.all()) for mask in kept.values()):
            return None
        whole = {
            name: torch.ones_like(leaf, dtype=torch.bool) for name, leaf in self._leaves.items()
        }
        of_weights = {f"{name}.weight": mask.to(self.device) for name, mask in kept.items()}
        return _flat({name: of_weights.get(name, mask) for name, mask in whole.items()}.values())

    def start(self, generator: torch.Generator) -> Tensor:
        """A random direction, of length 1."""
        leaves = self._leaves.values()
        drawn = torch.randn(sum(leaf.numel() for leaf in leaves), generator=generator)
        vector = self._left(drawn.to(self.device, next(iter(leaves)).dtype))
        length = _norm(vector)
        if not length:
            raise ValueError("no trainable parameter is left")
        return vector / length

    def _left(self, vector: Tensor) -> Tensor:
        return vector if self._kept is None else torch.where(self._kept, vector, 0)

    def times(self, vector: Tensor) -> Tensor:
        """The product with one vector that is zero where nothing is kept."""
        total = torch.zeros_like(vector)
        samples = torch.zeros((), dtype=torch.float64, device=self.device)
        directions = self._split(vector)
        for batch in self._batches:
            given = read_batch(batch, self.device)
            targets = _targets(batch, self.device)
            if given.samples:
                total += given.samples * self._of_batch(given.run, targets, directions)
                samples += given.samples
        count = float(add_up(samples))
        if not count:
            raise ValueError("the Hessian needs at least one sample")
        return self._left(add_up(total) / count)

    def _of_batch(self, run: Run, targets: Any, directions: list[Tensor]) -> Tensor:
        leaves = list(self._leaves.values())
        state = arguments(self._model, state_of(self._model)) | self._leaves
        mean = self._loss(run_with(self._model, state, run), targets)
        slopes = torch.autograd.grad(
            mean, leaves, create_graph=True, allow_unused=True, materialize_grads=True
        )
        for leaf in leaves:
            leaf.grad = None
        pairs = zip(slopes, directions, strict=True)
        curved = [(slope * direction).sum() for slope, direction in pairs if slope.requires_grad]
        if curved:  # it is not of a loss that is linear in every parameter
            # Not autograd.grad: that goes round what can be differentiated only once, in silence.
            torch.autograd.backward(torch.stack(curved).sum())
        return _flat(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)

    def _split(self, vector: Tensor) -> list[Tensor]:
        leaves = list(self._leaves.values())
        parts = torch.split(vector, [leaf.numel() for leaf in leaves])
        return [part.view(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)]


def _targets(batch: Any, device: torch.device) -> Any:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise TypeError(
            f"the loss needs batches (inputs, targets), not {type(batch).__name__}: where inputs "
            "and targets lie in one mapping, yield both as (mapping of inputs, targets)"
        )
    return changed(lambda part: part.to(device) if isinstance(part, Tensor) else part, batch[1])


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Inside, the layers whose backward skips rows are plain layers: those rows curve, too."""
    held = [(module, module.__dict__[WORK]) for module in model.modules() if WORK in vars(module)]
    for module, _ in held:
        assign(module, None)
    try:
        yield
    finally:
        for module, work in held:
            assign(module, work)
