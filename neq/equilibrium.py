"""How much each neuron's output has changed since the last epoch: phi, delta-phi, velocity.

phi is the cosine between a neuron's outputs on the validation set now and one epoch ago (NEq,
equation 2). Nothing is stored between epochs but last epoch's parameters and buffers: both models
run on each batch and per-neuron sums are accumulated in float64.
"""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from neq.batches import Batch, Forward, masks_of_call, read_batch
from neq.cka import CkaSums
from neq.evaluation import Hook, State, arguments, evaluation, hooked, run_with, state_of
from neq.moved import listed
from neq.neurons import Layer, NeuronIndex
from neq.parallel import add_up
from neq.positions import by_sample, unmatched

CHUNK = 2**22  # elements of an output that are compared in float64 at a time

Similarity = Literal["dataset", "sample"]
Recursion = Literal["paper", "reference"]


@dataclass(frozen=True, slots=True)
class Reading:
    """phi, delta-phi and velocity of all neurons after an epoch: float64 [neurons] each.

    They are NaN until they are defined.
    """

    phi: Tensor
    delta_phi: Tensor
    velocity: Tensor

    @classmethod
    def undefined(cls, neurons: int) -> Self:
        """The reading of so many neurons before any epoch: all NaN."""
        return cls(*(torch.full((neurons,), torch.nan, dtype=torch.float64) for _ in range(3)))

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Self:
        """The reading that `state_dict` gave."""
        names = ("phi", "delta_phi", "velocity")
        return cls(*(state[name].to("cpu", copy=True) for name in names))

    def state_dict(self) -> State:
        """Its tensors by name, as copies."""
        return {
            "phi": self.phi.clone(),
            "delta_phi": self.delta_phi.clone(),
            "velocity": self.velocity.clone(),
        }

    def advance(self, phi: Tensor, *, mu: float, recursion: Recursion) -> "Reading":
        """The reading after the next epoch, from its `phi`: float64 [neurons].

        "paper" (section 3.2): v = delta − mu · v_before, the first v being the first delta.
        "reference" (the authors' code): v = delta − delta_before + mu · v_before, starting from
        phi = 1, delta = 0, v = 0.
        """
        velocity = self.velocity.nan_to_num(0.0)
        if recursion == "paper":
            delta = phi - self.phi
            return Reading(phi, delta, delta - mu * velocity)
        delta = phi - self.phi.nan_to_num(1.0)
        return Reading(phi, delta, delta - self.delta_phi.nan_to_num(0.0) + mu * velocity)


def snapshot(model: nn.Module) -> State:
    """Copies of all parameters and buffers, by name, to be given to `phi` one epoch later."""
    with torch.inference_mode(False):
        return {name: tensor.detach().clone() for name, tensor in state_of(model).items()}


def phi(
    model: nn.Module,
    before: Mapping[str, Tensor],
    batches: Iterable[Any],
    neurons: NeuronIndex,
    similarity: Similarity,
    cka: CkaSums | None = None,
    forward: Forward | None = None,
) -> Tensor:
    """phi of each neuron: the cosine of its outputs now and in the state `before`. float64
    [neurons].

    "dataset" (the paper): all outputs concatenated, one cosine. "sample" (the authors' code): the
    mean of one cosine per sample, samples being the outermost axis of every output. Both outputs
    zero: 1; exactly one: 0. NaN for a layer that was not called. `batches` and `forward`: see
    neq.batches; positions that a mask leaves out don't count. The model's training modes, buffers
    and every global random stream are left as they were. `cka` is given the same outputs.

    Raises ValueError where `batches` is empty or `forward` calls no layer of the model,
    TypeError for what is no batch, or does not fit the model.
    """
    device = next(model.parameters()).device
    outputs = _OutputSums(neurons, similarity, cka)
    with evaluation(model, device), outputs.hooks(model, device):
        for batch in batches:
            given = read_batch(batch, device, forward)
            if not given.samples:
                continue
            outputs.begin(given)
            run_with(model, arguments(model, before), given.run)
            outputs.recording = False
            run_with(model, arguments(model, state_of(model)), given.run)
            outputs.end()
    return outputs.result(device, forward)


class _OutputSums:
    """Per-neuron sums over the outputs of two runs; holds the outputs of one batch at a time."""

    def __init__(self, neurons: NeuronIndex, similarity: Similarity, cka: CkaSums | None) -> None:
        self.neurons = neurons
        self.similarity = similarity
        self.cka = cka
        self.batches = 0
        self.recording = True
        self._given: Batch
        self._samples = 0
        self._masks: tuple[Tensor, ...] = ()
        self._before: dict[str, list[Tensor]] = {}
        self._batch: dict[str, Tensor] = {}
        self._seen: dict[str, Tensor] = {}  # bool: which rows have a position that counts
        self._total: dict[str, Tensor] = {}
        self._count: dict[str, int] = defaultdict(int)
        self._unmatched: set[str] = set()
        self._padded: dict[str, None] = {}  # layers in which padding may count

    @contextmanager
    def hooks(self, model: nn.Module, device: torch.device) -> Iterator[None]:
        def called(_module: nn.Module, args: Any, kwargs: Any) -> None:
            masks = masks_of_call(model, args, kwargs, device)
            samples = len(masks[0]) if masks else self._given.samples
            self._samples, self._masks = samples, masks or self._given.masks

        layers = ((layer.module, self._hook(layer)) for layer in self.neurons.layers)
        handle = model.register_forward_pre_hook(called, with_kwargs=True)
        try:
            with hooked(layers):
                yield
        finally:
            handle.remove()

    def _hook(self, layer: Layer) -> Hook:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            # An in-place activation overwrites the output next: copy or reduce at once.
            if self.recording:
                self._before.setdefault(layer.name, []).append(output.clone())
            else:
                self._compare(layer, output)

        return hook

    def begin(self, batch: Batch) -> None:
        self.batches += 1
        self.recording = True
        self._given = batch
        self._samples, self._masks = batch.samples, batch.masks
        self._before, self._batch, self._seen = {}, {}, {}

    def _compare(self, layer: Layer, output: Tensor) -> None:
        recorded = self._before.get(layer.name)
        if not recorded or recorded[0].shape != output.shape:
            self._miss(layer.name)  # routed by the data: no like to compare with
            return
        before = recorded.pop(0)
        if self.cka is not None:
            self.cka.add(layer, before, output, self._samples, self._masks)
        name, how = layer.name, (layer.axis, self._samples, self._masks)
        (a, counts), (b, _) = by_sample(before, *how), by_sample(output, *how)
        sums = _sums(a, b, counts)
        seen = torch.ones(len(a), dtype=torch.bool, device=a.device)
        if counts is not None:
            seen = counts.any(1)
        elif name not in self._padded and unmatched(output, layer.axis, self._masks):
            self._padded[name] = None
        if name in self._seen:  # by an earlier call, which may be on other samples
            same = len(seen) == len(self._seen[name])
            sums = sums + self._batch[name] if same else torch.cat([self._batch[name], sums], 1)
            seen = seen | self._seen[name] if same else torch.cat([self._seen[name], seen])
        self._batch[name], self._seen[name] = sums, seen

    def _miss(self, layer: str) -> None:
        self._unmatched.add(layer)
        if self.cka is not None:
            self.cka.miss(layer)

    def end(self) -> None:
        for name, left in self._before.items():
            if left:
                self._miss(name)
        for name, sums in self._batch.items():
            per_sample = sums if self.similarity == "dataset" else _cosine(sums).unsqueeze(0)
            per_sample = per_sample[:, self._seen[name]]
            self._total[name] = self._total.get(name, 0.0) + per_sample.sum(1)
            self._count[name] += per_sample.shape[1]

    def result(self, device: torch.device, forward: Forward | None) -> Tensor:
        """Over the samples of all ranks: float64 [neurons]."""
        layers = self.neurons.layers
        sums = torch.zeros(3, len(self.neurons), dtype=torch.float64, device=device)
        for layer in layers:
            if layer.name in self._total:
                total = self._total[layer.name]
                sums[: len(total), layer.neurons] = total
        counts = [self._count[layer.name] for layer in layers]
        missed = [int(layer.name in self._unmatched) for layer in layers]
        called = len(self._total) + sum(missed)
        seen = torch.tensor([*counts, *missed, called, self.batches], device=device)
        sums, seen = add_up(sums).cpu(), add_up(seen).cpu()
        if not seen[-1]:
            raise ValueError("the validation set is empty: phi needs at least one sample")
        if forward is not None and not seen[-2]:
            raise ValueError("forward= did not call the model that it was given")
        if self._padded:
            warnings.warn(
                f"padding counts in {listed([*self._padded])}, whose outputs have other positions "
                "than the masks of the batch",
                stacklevel=5,
            )
        sizes = torch.tensor([layer.size for layer in layers])
        count, missing = seen[:-2].view(2, -1).repeat_interleave(sizes, 1)
        values = _cosine(sums) if self.similarity == "dataset" else sums[0] / count
        return torch.where((count > 0) & (missing == 0), values, torch.nan)


def _sums(a: Tensor, b: Tensor, counts: Tensor | None) -> Tensor:
    """(a·b, a·a, b·b) by row and neuron of outputs [rows, …, neurons]: float64 [3, rows, neurons].

    `counts`: bool [rows, positions]; the outputs elsewhere are left out.
    """
    rows, parts = len(a), []
    length = max(CHUNK * rows // max(a.numel(), 1), 1)
    chunks = torch.split(a, length), torch.split(b, length)
    counted = [None] * len(chunks[0]) if counts is None else torch.split(counts, length)
    for part, other, of in zip(*chunks, counted, strict=True):
        x, y = _flat(part, of), _flat(other, of)
        parts.append(torch.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)]))
    return torch.cat(parts, dim=1)


def _flat(outputs: Tensor, counts: Tensor | None) -> Tensor:
    """float64 [rows, positions, neurons], zero where a position does not count."""
    if counts is not None:
        counts = counts.view(*counts.shape, *(1,) * (outputs.dim() - 2))
        outputs = outputs.masked_fill(~counts, 0)
    return outputs.to(torch.float64).reshape(len(outputs), -1, outputs.shape[-1])


def _cosine(sums: Tensor) -> Tensor:
    """Cosine from stacked (a·b, a·a, b·b), with 0/0 = 1 and x/0 = 0."""
    dot, aa, bb = sums
    cosine = (dot / (aa.sqrt() * bb.sqrt())).clamp(-1.0, 1.0)
    cosine = torch.where((aa == 0) | (bb == 0), 0.0, cosine)
    return torch.where((aa == 0) & (bb == 0), 1.0, cosine)
