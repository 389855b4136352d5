"""PSP-entropy: how far a neuron's being on or off follows from the class (arXiv 2004.14765)."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neq.batches import read_batch
from neq.evaluation import Hook, arguments, evaluation, hooked, run_with, state_of
from neq.neurons import Layer, unwrapped
from neq.parallel import add_up, largest
from neq.pruning.masks import prunable, weight

Granularity = Literal["channel", "unit"]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
LOWEST, HIGHEST = 1e-4, 0.9999  # of a share: a neuron that is always on has some entropy


class NoClassesError(ValueError):
    """Samples, or outputs of the model, have no classes."""


@dataclass(frozen=True, slots=True)
class PSPEntropy:
    """The entropy of post-synaptic potentials, in bits.

    `by_class`: layer name → float64 [classes, neurons], NaN for a class without a sample; of
    granularity "unit" [classes, neurons · positions]. `survivors`: layer name → bool of the last
    axis: whether a weight of the neuron's row is not zero. `missing`: the classes without a sample;
    while there are any, no mean is known.
    """

    by_class: dict[str, Tensor]
    survivors: dict[str, Tensor]
    missing: tuple[int, ...]

    def neurons(self, layer: str) -> Tensor:
        """Of each neuron of a layer: its entropies summed over classes."""
        return self.by_class[layer].sum(0)

    def layer(self, name: str) -> float:
        """Mean over the surviving neurons of a layer; NaN where there are none, or a class is
        missing.
        """
        return float(self.neurons(name)[self.survivors[name]].mean())

    def mean(self) -> float:
        """Mean over all surviving neurons; NaN as in `layer`."""
        found = [self.neurons(name)[alive] for name, alive in self.survivors.items()]
        return float(torch.cat(found).mean()) if found else float("nan")


def psp_entropy(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    granularity: Granularity = "channel",
    exclude: Iterable[str] = (),
) -> PSPEntropy:
    """The PSP-entropy of the neurons of `model` on labelled samples.

    A neuron's potential is what its activation gets: the output of its linear or convolution layer,
    or that of the BatchNorm which follows it. With P the share of a class's samples for which it is
    positive, clamped to [0.0001, 0.9999], the entropy is −P log2 P − (1 − P) log2 (1 − P): low
    where it is surely on or off for the class. `granularity` of a convolution: "channel" looks at
    the mean over positions, "unit" at each position by itself. Calls of a layer that is called
    several times count as further samples.

    `batches`: (inputs, labels int64 [samples]) each, of this process: sums are added up over all
    processes of torch.distributed. Inputs are a tensor, or a mapping of the model's arguments,
    without padding. `exclude`: layers to leave out, such as the head. The model, which must return
    logits [samples, classes], is left as it was. Raises NoClassesError, a ValueError, for other
    kinds of labels or outputs, and ValueError where they do not fit, where a mask leaves positions
    out, and without a sample. In several processes one may have none.
    """
    if granularity not in ("channel", "unit"):
        raise ValueError(f"granularity must be 'channel' or 'unit', got {granularity!r}")
    model = unwrapped(model)
    layers = {layer.name: layer for layer in prunable(model, exclude)}
    device = next(model.parameters()).device
    counter = _Counter(model, layers, granularity)
    with evaluation(model, device), counter.hooks():
        for batch in batches:
            given, labels = read_batch(batch, device), _labels(batch, device)
            if not all(bool(mask.all()) for mask in given.masks):
                raise ValueError(
                    "the entropy counts every position: give it batches without padding, of "
                    "samples of one length each"
                )
            if given.samples:
                state = arguments(model, state_of(model))
                counter.take(run_with(model, state, given.run), labels)
    return counter.result()


def _labels(batch: Any, device: torch.device) -> Tensor:
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(labels, Tensor) or labels.dim() != 1 or labels.is_floating_point():
        raise NoClassesError("the entropy by class needs batches (inputs, labels int64 [samples])")
    return labels.to(device)


class _Counter:
    """Counts, by layer, the samples of each class for which a neuron is on."""

    def __init__(
        self, model: nn.Module, layers: dict[str, Layer], granularity: Granularity
    ) -> None:
        self._model, self._layers, self._granularity = model, layers, granularity
        self._positive: dict[str, list[Tensor]] = {}  # of one forward: bool [samples, units] a call
        self._outputs: dict[int, tuple[str, int, Tensor, int]] = {}
        self._on: dict[str, Tensor] = {}
        self._samples: dict[str, Tensor] = {}
        self._classes = 0

    def hooks(self) -> AbstractContextManager[None]:
        layers = [(layer.module, self._hook(layer)) for layer in self._layers.values()]
        norms = (module for module in self._model.modules() if isinstance(module, NORMS))
        return hooked([*layers, *((norm, self._normalised) for norm in norms)])

    def _hook(self, layer: Layer) -> Hook:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            # At once: an activation may change the output in place.
            calls = self._positive.setdefault(layer.name, [])
            calls.append(self._is_on(output.movedim(layer.axis, 1)))
            # Kept, so that no other tensor takes its place in memory during this forward.
            self._outputs[id(output)] = layer.name, len(calls) - 1, output, output._version

        return hook

    def _normalised(self, _module: nn.Module, args: Any, output: Tensor) -> None:
        """The output of a BatchNorm that gets the very output of a layer stands in for it."""
        key = id(args[0]) if args else 0
        name, call, before, version = self._outputs.get(key, ("", 0, None, 0))
        if before is not None and before._version == version:
            self._positive[name][call] = self._is_on(output)

    def _is_on(self, potentials: Tensor) -> Tensor:
        """`potentials` [samples, neurons, …] → bool [samples, units]."""
        by_position = potentials.flatten(2) if potentials.dim() > 2 else potentials.unsqueeze(2)
        if self._granularity == "channel":
            return by_position.float().mean(2) > 0
        return by_position.flatten(1) > 0

    def take(self, outputs: Any, labels: Tensor) -> None:
        """Count in one forward, which gave `outputs`, on samples with these labels."""
        if not isinstance(outputs, Tensor) or outputs.dim() != 2:
            raise NoClassesError(
                "the entropy by class needs a model that returns logits [n, classes]"
            )
        if len(outputs) != len(labels):
            raise ValueError(f"{len(labels)} labels for {len(outputs)} outputs: one each is needed")
        self._classes = outputs.shape[1]
        if int(labels.min()) < 0 or int(labels.max()) >= self._classes:
            raise ValueError(f"labels must be 0 to {self._classes - 1}, the classes of the model")
        of_class = functional.one_hot(labels, self._classes).T.to(torch.float64)
        for name, calls in self._positive.items():
            for positive in calls:
                self._check(name, positive, len(labels))
                found = of_class @ positive.to(torch.float64)
                self._on[name] = self._on[name] + found if name in self._on else found
                seen = self._samples.get(name, torch.zeros_like(of_class[:, 0]))
                self._samples[name] = seen + of_class.sum(1)
        self._positive, self._outputs = {}, {}

    def _check(self, name: str, positive: Tensor, samples: int) -> None:
        units = self._on[name].shape[1] if name in self._on else positive.shape[1]
        if positive.shape != (samples, units):
            raise ValueError(
                f"{name!r}: outputs of {list(positive.shape)} samples and units, where "
                f"{[samples, units]} were expected; exclude it"
            )

    def _agree(self) -> None:
        """Give a process without samples zeros of the others' shapes, before sums are added up."""
        units = [self._on[n].shape[1] if n in self._on else 0 for n in self._layers]
        device = next(self._model.parameters()).device
        self._classes, *units = largest(torch.tensor([self._classes, *units], device=device))
        if not self._classes:
            raise ValueError("the entropy needs at least one sample")
        for name, count in zip(self._layers, units, strict=True):
            if count and name not in self._on:
                zeros = torch.zeros(self._classes, count, dtype=torch.float64, device=device)
                self._on[name], self._samples[name] = zeros, zeros[:, 0].clone()

    def result(self) -> PSPEntropy:
        """The entropies, of all processes' samples."""
        self._agree()
        by_class, survivors = {}, {}
        missing = torch.zeros(self._classes, dtype=torch.bool)
        for name in (name for name in self._layers if name in self._on):
            on = self._on[name]
            on, samples = add_up(on.contiguous()), add_up(self._samples[name].contiguous())
            share = (on / samples[:, None]).clamp(LOWEST, HIGHEST)  # 0 / 0 stays NaN
            by_class[name] = -(share * share.log2() + (1 - share) * (1 - share).log2()).cpu()
            missing |= (samples == 0).cpu()
            alive = weight(self._layers[name]).detach().flatten(1).ne(0).any(1).cpu()
            survivors[name] = alive.repeat_interleave(on.shape[1] // len(alive))
        return PSPEntropy(by_class, survivors, tuple(missing.nonzero().flatten().tolist()))
