"""Removes what pruning has left dead, so that the model is smaller and not merely emptier."""

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neq.neurons import unwrapped
from neq.pruning.coupled import Channel, RemovalError, fresh, one_line, rows, weighted
from neq.pruning.going import Going, Plan, dead, remove

AGREE = 1e-9  # in float64, of the largest output: what rounding in another order may do
SCALES = (0.1, 1.0, 10.0)  # of noise
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
    them that stay. `difference`: the largest by which an output differs from that of the model as
    it was, on `example` in the model's own precision; `difference_float64`: with the same weights
    in float64, on `example` and on noise. Folded weights are rounded to the model's precision.
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
            name: _widths(module) for name, module in self.model.named_modules() if weighted(module)
        }


def shrunk(model: nn.Module, example: Any) -> Shrunk:
    """Remove dead neurons from a copy of `model`, and prove that it computes the same.

    A neuron, a row of a convolution or linear layer, is dead when all its weights are zero. What
    it says is then a constant, its bias or what a norm's shift makes of it. Zero goes without a
    trace. Any other is folded into the bias of the layers that read it, where these add it
    everywhere alike; at zero-padded borders they don't, and one neuron stays that says what all of
    its kind said. Neurons that nobody reads go as well.
    Where a sum, as in a residual network, joins neurons of several layers, they go together or not
    at all.

    `example`: an input of the model, or a tuple of all its arguments, as they are in evaluation; of
    two samples or more, the more the better: that a dead neuron's constant arrives as one is seen
    on them, and on noise of several scales in their place.

    The graph is torch-pruning's (Fang et al., CVPR 2023). Channels that are padded with zeros, as
    by a shortcut without parameters, can go where nn.ZeroPad3d does it. Raises ImportError without
    torch-pruning, and RemovalError, a ValueError, where it can't trace the model, where weights
    are parametrised, and where the model can't be evaluated on `example`, or not in float64.
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
        _check_plain(given)
        try:
            self._before_as_given = _outputs(copy.deepcopy(given).eval(), inputs)
            self._model = copy.deepcopy(given).requires_grad_(True).eval().double()
            self._probes = [tuple(map(_double, inputs))]
            self._before = [_outputs(self._model, self._probes[0])]
        except Exception as error:  # of any kind, from a model that is not neq's
            raise RemovalError(
                f"the model can't be evaluated on the example, or not in float64: {one_line(error)}"
            ) from error
        for probe in _noisy(inputs):
            with suppress(Exception):  # it may take no such inputs
                outputs = _outputs(self._model, probe)
                if not any(bool(out.isnan().any()) for out in outputs):
                    self._probes.append(probe)
                    self._before.append(outputs)
        layers = {name: m for name, m in self._model.named_modules() if weighted(m)}
        self._left = {name: list(range(rows(m).shape[0])) for name, m in layers.items()}
        self._removed: dict[str, list[int]] = {name: [] for name in layers}
        self._dead = {(name, i) for name, m in layers.items() for i in _true(dead(m))}
        self._names: dict[nn.Module, str] = {}
        self._staying: dict[Row, str] = {}
        self._refused: dict[Row, str] = {}
        self._one_by_one = False

    def step(self) -> bool:
        """Remove what can go; whether there may be more."""
        found = Plan(self._model, self._probes)
        self._names = found.names
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
            wrong = [d for pair in zip(self._before, now, strict=True) for d in _disagree(*pair)]
        except Exception as error:  # of any kind: its forward may count on widths
            return f"the model fails without it: {one_line(error)}"
        if not wrong:
            return None
        return f"outputs would differ by {max(wrong):.1e} without it or another of its layer"

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
        model = self._as_given().eval()
        now = _outputs(model, self._inputs)
        rounded = copy.deepcopy(model).double()
        doubles = [_outputs(rounded, probe) for probe in self._probes]
        for module, given in zip(model.modules(), self._given.modules(), strict=True):
            module.training = given.training
        return Shrunk(
            model=model,
            removed={name: tuple(sorted(found)) for name, found in self._removed.items() if found},
            dead=len(self._dead),
            stuck=tuple(
                Stuck(layer=layer, neurons=n, reason=why) for (layer, why), n in reasons.items()
            ),
            difference=max(_differences(self._before_as_given, now), default=0.0),
            difference_float64=max(
                d for pair in zip(self._before, doubles, strict=True) for d in _differences(*pair)
            ),
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


def dead_neurons(model: nn.Module) -> dict[str, int]:
    """By name of each convolution and linear layer: how many of its neurons have no weight but
    zeros.
    """
    layers = {name: m for name, m in unwrapped(model).named_modules() if weighted(m)}
    return {name: int(dead(module).sum()) for name, module in layers.items()}


def _widths(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.in_channels, module.out_channels


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if weighted(module) and not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise RemovalError(
                f"the weight of {name!r} is parametrised: take that off first, by "
                "torch.nn.utils.prune.remove or parametrize.remove_parametrizations"
            )


def _true(mask: Tensor) -> list[int]:
    found: list[int] = mask.nonzero().flatten().tolist()
    return found


def _noisy(inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Noise in the place of the example, where that holds numbers."""
    generator = torch.Generator().manual_seed(0)
    for scale in SCALES:
        yield tuple(_noise(value, scale, generator) for value in inputs)


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def _noise(value: Any, scale: float, generator: torch.Generator) -> Any:
    """In every other sample the same number everywhere."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    drawn = scale * torch.randn(value.shape, generator=generator, dtype=torch.float64)
    if value.dim() > 1:
        drawn[1::2] = drawn[1::2].flatten(1)[:, 0].view(-1, *[1] * (value.dim() - 1)).clone()
    return drawn.to(value.device)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(model(*fresh(inputs))) if isinstance(leaf, Tensor)]


def _differences(before: list[Tensor], now: list[Tensor]) -> list[float]:
    """The largest of each output; raises ValueError for other shapes."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in now]:
        raise ValueError("its outputs have other shapes")
    found = []
    for b, n in zip(before, now, strict=True):
        alike = (b == n) | (b.isnan() & n.isnan())  # infinities, too
        found.append(float(torch.where(alike, 0, (b - n).abs()).max()) if b.numel() else 0.0)
    return found


def _disagree(before: list[Tensor], now: list[Tensor]) -> list[float]:
    """The differences that are more than rounding."""
    scales = [float(torch.where(b.isfinite(), b, 0).abs().max()) for b in before if b.numel()]
    differences = [d for d, b in zip(_differences(before, now), before, strict=True) if b.numel()]
    return [d for d, s in zip(differences, scales, strict=True) if not d <= AGREE * s]
