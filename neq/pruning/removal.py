"""Removes what pruning has left dead, so that the model is smaller and not merely emptier."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neq.neurons import unwrapped
from neq.pruning.coupled import Channel, RemovalError, one_line, rows, weighted
from neq.pruning.going import Going, Plan, dead, remove

AGREE = 1e-9  # in float64, of the largest output: what rounding in another order may do
UNSEEN = "the model's forward does not come by"
Row = tuple[str, int]  # layer, and number of the row before anything was removed


@dataclass(frozen=True, slots=True, kw_only=True)
class Stuck:
    """Dead neurons of `layer` that could not be removed, how many, and why."""

    layer: str
    neurons: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk:
    """A model without what was dead.

    `model`: smaller, of the same class, on the same device and in the same mode, with the same
    hooks; it shares no tensor with the model that it was made of. `removed`: by layer, the rows
    that went, as they were numbered before. `dead`: neurons that had no weight; `stuck`: those of
    them that stay. `difference`, `difference_float64`: the largest by which an output differs from
    the model's before, on `example`, in the model's own precision; and on that and on noise, in
    float64.
    """

    model: nn.Module
    removed: Mapping[str, tuple[int, ...]]
    dead: int
    stuck: tuple[Stuck, ...]
    difference: float
    difference_float64: float

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """By name of each convolution and linear layer: (inputs, outputs) that it has now."""
        return {
            name: (rows(module).shape[1], rows(module).shape[0])
            for name, module in self.model.named_modules()
            if weighted(module)
        }


def shrunk(model: nn.Module, example: Any) -> Shrunk:
    """Remove dead neurons from a copy of `model`, and prove that it computes the same.

    A neuron, a row of a convolution or linear layer, is dead when all its weights are zero. What
    it says is then a constant, its bias or what a norm's shift makes of it. Zero goes without a
    trace. Any other is folded into the bias of the layers that read it, where these add it
    everywhere alike; at zero-padded borders they don't, and one neuron stays that says what all of
    its kind said. Neurons that nobody reads go as well.
    Where a sum, as in a residual network, joins neurons of several layers, they go together or not
    at all. `example`: an input of the model, or a tuple of all its arguments, as it is in
    evaluation; batches of two samples or more.

    The graph is torch-pruning's (Fang et al., CVPR 2023). Channels that are padded with zeros, as
    by a shortcut without parameters, can go where nn.ZeroPad3d does it. Raises ImportError without
    torch-pruning, and RemovalError, a ValueError, where it can't trace the model, or the model
    can't be evaluated on `example` in float64.
    """
    inputs = example if isinstance(example, tuple) else (example,)
    search = _Search(unwrapped(model), inputs)
    while search.step():
        pass
    return search.result()


class _Search:
    """Removes round after round, in float64, what agrees with the model as it was given."""

    def __init__(self, given: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._given, self._inputs = given, inputs
        self._model = copy.deepcopy(given).requires_grad_(True).eval().double()
        self._probes = list(_probes(inputs))
        try:
            self._before = [_outputs(self._model, probe) for probe in self._probes]
        except Exception as error:  # of any kind, from a model that is not neq's
            raise RemovalError(
                f"the model can't be evaluated on the example in float64: {one_line(error)}"
            ) from error
        layers = {name: m for name, m in self._model.named_modules() if weighted(m)}
        self._left = {name: list(range(rows(m).shape[0])) for name, m in layers.items()}
        self._removed: dict[str, list[int]] = {name: [] for name in layers}
        self._dead = {(name, i) for name, m in layers.items() for i in _true(dead(m))}
        self._names: dict[nn.Module, str] = {}
        self._staying: dict[Row, str] = {}
        self._refused: dict[Row, str] = {}
        self._one_by_one = False
        self._difference = 0.0

    def step(self) -> bool:
        """Remove what can go; whether there may be more."""
        found = Plan(self._model, self._probes)
        self._names = {module: name for name, module in self._model.named_modules()}
        going = [one for one in found.going if not self._rows(one.channel) & self._refused.keys()]
        if not going:
            self._staying = {
                row: why for channel, why in found.staying for row in self._rows(channel)
            }
            return False
        if self._one_by_one:
            first = self._layers(going[0].channel)
            going = [one for one in going if self._layers(one.channel) == first]
        gone = set().union(*(self._rows(one.channel) for one in going))
        before = copy.deepcopy(self._model)
        why = self._tried(going)
        if why is None:
            self._forget(gone)
            return True
        self._model = before
        if self._one_by_one:
            self._refused |= dict.fromkeys(gone, why)
        self._one_by_one = True
        return True

    def _rows(self, channel: Channel) -> set[Row]:
        """Those of a channel, as they were numbered at first."""
        return {
            (name, self._left[name][i])
            for part in (*channel.sources(), *channel.between())
            for name in [self._names[part.module]]
            for i in part.indices
        }

    def _layers(self, channel: Channel) -> set[str]:
        return {layer for layer, _ in self._rows(channel)}

    def _tried(self, going: list[Going]) -> str | None:
        """Remove these; why that was wrong, if it was."""
        try:
            remove(going)
            now = [_outputs(self._model, probe) for probe in self._probes]
            difference = max(map(_difference, self._before, now))
        except Exception as error:  # of any kind: its forward may count on widths
            return f"the model fails without it: {one_line(error)}"
        scale = max(float(out.abs().max()) for before in self._before for out in before)
        if not difference <= AGREE * scale:
            return f"outputs would differ by {difference:.1e} without it"
        self._difference = difference
        return None

    def _forget(self, gone: Iterable[Row]) -> None:
        for layer, row in gone:
            self._left[layer].remove(row)
            self._removed[layer].append(row)

    def result(self) -> Shrunk:
        """What is left, in the precision and mode of the model that was given."""
        gone = {(layer, row) for layer, found in self._removed.items() for row in found}
        reasons = Counter(
            (row[0], self._refused.get(row) or self._staying.get(row, UNSEEN))
            for row in sorted(self._dead - gone)
        )
        before = _outputs(copy.deepcopy(self._given).eval(), self._inputs)
        model = self._as_given().eval()
        now = _outputs(model, self._inputs)
        for module, given in zip(model.modules(), self._given.modules(), strict=True):
            module.training = given.training
        return Shrunk(
            model=model,
            removed={name: tuple(sorted(found)) for name, found in self._removed.items() if found},
            dead=len(self._dead),
            stuck=tuple(
                Stuck(layer=layer, neurons=n, reason=why) for (layer, why), n in reasons.items()
            ),
            difference=_difference(before, now),
            difference_float64=self._difference,
        )

    def _as_given(self) -> nn.Module:
        """The model, with types and what needs gradients as in the one that was given."""
        model = copy.deepcopy(self._model)
        like = dict(self._given.named_parameters())
        for name, parameter in model.named_parameters():
            known = like.get(name, next(self._given.parameters()))  # a bias may be new
            parameter.data = parameter.data.to(known.dtype)
            parameter.requires_grad_(known.requires_grad)
        buffers = dict(self._given.named_buffers())
        for name, buffer in model.named_buffers():
            buffer.data = buffer.data.to(buffers[name].dtype)
        return model


def _true(mask: Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found


def _probes(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The example in float64, and noise in its place where it holds numbers."""
    yield tuple(_double(value) for value in inputs)
    generator = torch.Generator().manual_seed(0)
    yield tuple(_noise(value, generator) for value in inputs)


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def _noise(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return (3 * drawn).to(value.device)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]


def _difference(before: list[Tensor], now: list[Tensor]) -> float:
    """The largest; raises ValueError for other shapes."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in now]:
        raise ValueError("its outputs have other shapes")
    return max(float((b - n).abs().max()) for b, n in zip(before, now, strict=True))
