"""Training that prunes: neq.pruning at work in a trial."""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.methods.method import Measures, Method
from harness.methods.training import Training
from harness.suite.pruning_specs import (
    LobsterSpec,
    LotterySpec,
    PruningSpec,
    RandomPruningSpec,
    SereneLocalSpec,
    SereneSpec,
    ShrinkSpec,
)
from neq.pruning import (
    EmptiedLayerError,
    MagnitudePruner,
    Masks,
    NeuronSensitivity,
    NoClassesError,
    Plateau,
    Schedule,
    Shrink,
    Size,
    psp_entropy,
)

_Found = dict[str | tuple[str, str], float]


class Sized(Method):
    """Records how large the model is, of which `masks` tells what is left."""

    def __init__(self, training: Training, masks: Masks) -> None:
        super().__init__(training)
        self.masks = masks
        everyone = torch.zeros(len(training.costs.neurons), dtype=torch.bool)
        layers = training.costs.layers(everyone, 1).items()
        self._forward = {name: flops for name, (flops, _) in layers}

    @property
    def size(self) -> int:
        """See Method."""
        return self.masks.size().parameters_left

    @property
    def kept_weights(self) -> Mapping[str, Tensor]:
        """See Method."""
        return self.masks.kept

    def measures(self) -> Measures:
        """See Method: sizes, FLOPs of one sample's forward, and the PSP-entropy."""
        found = _sizes(self.masks.size())
        for name, size in self.masks.sizes().items():
            found |= _sizes(size, name)
        return found | self._forward_flops() | self._entropy()

    def _forward_flops(self) -> _Found:
        """Of the surviving rows and columns ("effective"), and of the weights that are left."""
        effective = nonzero = self.training.costs.forward()
        found: _Found = {}
        for name, (structure, weights) in self.masks.forward_shares().items():
            flops = self._forward.get(name, 0)
            found["forward_flops_effective", name] = round(structure * flops)
            effective -= flops - round(structure * flops)
            nonzero -= flops - round(weights * flops)
        return found | {"forward_flops_effective": effective, "forward_flops_nonzero": nonzero}

    def _entropy(self) -> _Found:
        """On the validation samples; nothing where these have no classes."""
        training = self.training
        if not training.samples["validation"]:
            return {}
        batches = training.validation_batches()
        try:
            entropy = psp_entropy(training.model, batches, exclude=training.exclude)
        except NoClassesError:  # labels of pixels, several labels of a sample, several outputs
            return {}
        found: _Found = {("psp_entropy", name): entropy.layer(name) for name in entropy.by_class}
        return found | {"psp_entropy": entropy.mean()}


def _sizes(size: Size, layer: str | None = None) -> _Found:
    """As measures, of a layer or of the whole model."""
    return {(name if layer is None else (name, layer)): n for name, n in asdict(size).items()}


class Smaller(Sized):
    """Plain training of another model."""

    def __init__(self, training: Training) -> None:
        super().__init__(training, Masks(training.model, training.optimizer))


class Pruning(Sized):
    """Shrinks and prunes as `spec` says."""

    def __init__(self, training: Training, spec: PruningSpec) -> None:
        model, optimizer, epochs = training.model, training.optimizer, training.epochs
        # Classes must stay; but single weights of a head may go.
        whole = training.exclude if spec.units == "neurons" else training.costs.uncalled
        self._sensitivity = _sensitivity(spec, model, whole)
        self._shrink = _shrink(spec, training, self._sensitivity, whole)
        self.pruner = MagnitudePruner(model, optimizer, units=spec.units, exclude=whole)
        super().__init__(training, self.pruner.masks)
        self._spec = spec
        self._schedule = spec.schedule(epochs)
        if self._schedule is not None:
            _check_sparsity(self._schedule.sparsity, self.pruner)
        self._rewind = _rewind(spec, self._schedule, epochs)
        self._plateau = _plateau(spec, epochs)
        self._classes = 1
        self._shrunk = False
        self._threshold: float | None = None
        self._evaluations = 0
        self._would_empty: str | None = None
        self._early: dict[str, Tensor] = {}

    def start(self) -> None:
        """See Method."""
        self._keep_early(0)

    def after_forward(
        self, inputs: Tensor, targets: Any, outputs: Any, *, weight: float, last: bool
    ) -> None:
        """See Method: how sensitive the outputs are to the neurons."""
        if self._sensitivity is not None and self._shrink is not None and self._shrink.active:
            self._sensitivity.add(outputs)
            self._classes = outputs.shape[1]

    def after_backward(self) -> None:
        """See Method: gradients are unscaled, and not clipped yet."""
        if self._shrink is not None and self._shrink.active:
            self._shrink.read()

    def end_epoch(self, epoch: int) -> None:
        """See Method: prune, if it is time."""
        done = epoch + 1
        if self._plateau is not None:
            self._prune_at_plateau(self._plateau)
        elif self._schedule is not None:
            target = self._schedule.target(done)
            if target is not None:
                self._prune_to(target, epoch)
        self._keep_early(done)
        self._shrunk = self._shrink is not None and self._shrink.active
        self._set_active(done)

    def _set_active(self, done: int) -> None:
        """With a schedule shrinking ends with it: what is left has the other epochs to recover."""
        if self._shrink is not None and self._schedule is not None:
            self._shrink.active = done < self._schedule.end
            self._record()

    def _record(self) -> None:
        """Whether forwards are recorded: while there is somebody to ask for it."""
        if self._sensitivity is not None and self._shrink is not None:
            self._sensitivity.recording = self._shrink.active

    def _evaluate(self) -> float:
        self._evaluations += 1
        return self.training.evaluate("validation")

    def _prune_at_plateau(self, plateau: Plateau) -> None:
        spec, best = self._spec, self.training.best
        assert isinstance(spec, ShrinkSpec)
        assert spec.twt is not None
        assert spec.evaluations is not None
        reached = plateau.step(self._evaluate())
        if plateau.improved:
            best.keep()
        if reached and best.state_dict():
            best.bring_back()
            self.masks.apply()  # they may be of before the last pruning, if the loss was not finite
            found = self.pruner.bisect(self._evaluate, spec.twt, spec.evaluations)
            self._threshold = found.threshold or self._threshold
            self._would_empty = found.emptied

    def _prune_to(self, sparsity: float, epoch: int) -> None:
        random = isinstance(self._spec, RandomPruningSpec)
        stream = self.training.generator("random pruning", epoch) if random else None
        try:
            threshold = self.pruner.prune(sparsity, stream)
        except EmptiedLayerError as error:  # what was pruned before stays
            self._would_empty = error.layer
            return
        self._threshold = None if random else threshold
        if self._rewind is not None:
            self.pruner.rewind(self._early)
            self._early = {}

    def _keep_early(self, done: int) -> None:
        """The weights that the survivors of a lottery go back to."""
        if done == self._rewind:
            self._early = copy.deepcopy(dict(self.training.model.state_dict()))

    def flops(self, usual: Mapping[str, int]) -> Mapping[str, int | None]:
        """See Method: with the passes back that tell the sensitivity of neurons."""
        kind = None if self._sensitivity is None else self._sensitivity.kind
        passes = {"lower": 1, "exact": self._classes}.get(kind or "", 0) * self._shrunk
        if not passes or self._sensitivity is None:
            return {}
        samples = self.training.samples["train"]
        each = self.training.costs.derivatives(self._sensitivity.layers, samples)
        return {"overhead": usual["overhead"] + passes * each}

    def measures(self) -> Measures:
        """See Sized; and how it was pruned last. `evaluations`: of the validation loss, so far."""
        found = dict(super().measures())
        threshold = math.nan if self._threshold is None else self._threshold
        found |= {"threshold": threshold, "evaluations": self._evaluations}
        if self._would_empty is not None:
            found["would_empty", self._would_empty] = 1
        return found

    def state_dict(self) -> dict[str, Any]:
        """See Method."""
        return {
            "masks": self.pruner.state_dict(),
            "plateau": None if self._plateau is None else self._plateau.state_dict(),
            "active": self._shrink is not None and self._shrink.active,
            "threshold": self._threshold,
            "evaluations": self._evaluations,
            "would_empty": self._would_empty,
            "early": dict(self._early),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See Method."""
        self.pruner.load_state_dict(state["masks"])
        if self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])
        if self._shrink is not None:
            self._shrink.active = state["active"]
            self._record()
        self._threshold, self._evaluations = state["threshold"], state["evaluations"]
        self._would_empty, self._early = state["would_empty"], dict(state["early"])


def _plateau(spec: PruningSpec, epochs: int) -> Plateau | None:
    if not isinstance(spec, ShrinkSpec) or spec.pwe is None:
        return None
    if spec.pwe >= epochs:
        raise ValueError(
            f"pwe is {spec.pwe}: no plateau can come within {epochs} epochs, and nothing would be "
            "pruned; lower it, or train longer"
        )
    return Plateau(spec.pwe)


def _check_sparsity(sparsity: float, pruner: MagnitudePruner) -> None:
    units = pruner.count
    left, layers = units - round(sparsity * units), len(pruner.masks.layers)
    if left < layers:
        raise ValueError(
            f"sparsity {sparsity:g} leaves {left} of {units} {pruner.units}, and {layers} layers "
            "need one each; lower it"
        )


def _rewind(spec: PruningSpec, schedule: Schedule | None, epochs: int) -> int | None:
    """After how many epochs the weights are kept that the survivors of a lottery go back to."""
    if not isinstance(spec, LotterySpec) or schedule is None:
        return None
    if schedule.end >= epochs:
        raise ValueError(
            f"at: of {epochs} epochs none would be left to train after rewinding; lower it, or "
            "train longer"
        )
    return min(round(spec.rewind * epochs), schedule.end - 1)


def _sensitivity(
    spec: PruningSpec, model: nn.Module, exclude: Iterable[str]
) -> NeuronSensitivity | None:
    if isinstance(spec, SereneSpec):
        return NeuronSensitivity(model, spec.bound, positions=spec.positions, exclude=exclude)
    if isinstance(spec, SereneLocalSpec):
        return NeuronSensitivity(model, "local", exclude=exclude)
    return None


def _shrink(
    spec: PruningSpec,
    training: Training,
    neurons: NeuronSensitivity | None,
    exclude: Iterable[str],
) -> Shrink | None:
    if not isinstance(spec, ShrinkSpec):
        return None
    by_gradient: Literal["gradient", "none"]
    by_gradient = "gradient" if isinstance(spec, LobsterSpec) else "none"
    sensitivity = neurons or by_gradient
    return Shrink(training.model, training.optimizer, sensitivity, spec.lam, exclude=exclude)
