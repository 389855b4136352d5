"""Which channels can go without changing what a model computes, and why others can't."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from neq.pruning.coupled import (
    CONVOLUTIONS,
    NORMS,
    TRANSPOSED,
    Channel,
    Part,
    channels,
    depthwise,
    fresh,
    rows,
    weighted,
)

CONSTANT = 1e-9  # in float64, of a channel's largest value: what rounding may do
LAST = "a layer keeps one neuron"
BORDERS = "its bias, or a norm's shift, reaches the zero-padded borders of"


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """A constant that a channel says to a reader: `values`, by column of `part`."""

    part: Part
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Going:
    """A channel that can go.

    `folded`: what it says that becomes a bias; `carried`: what another channel of the same layers
    says in its place, from now on, with what that one says itself.
    """

    channel: Channel
    folded: tuple[Said, ...] = ()
    carried: tuple[tuple[Said, Said], ...] = ()


class Plan:
    """What can go of `model`, in float64 and evaluation, and of what is dead why it can't.

    `probes`: inputs that show which channels are constant. `going`: what can go; `staying`: the
    others with dead rows, each with the reason. `names`: of the model's modules.
    """

    def __init__(self, model: nn.Module, probes: Sequence[tuple[Any, ...]]) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self._dead = {m: dead(m) for m in self.names if weighted(m)}
        self._unread = {m: ~rows(m).ne(0).any(2).any(0) for m in self.names if weighted(m)}
        self._ends = _seen(model, self._dead, probes)
        self._left: Counter[tuple[Any, str]] = Counter()
        self.going: list[Going] = []
        self.staying: list[tuple[Channel, str]] = []
        self._bordering: dict[Any, list[tuple[Going, list[Said]]]] = {}
        for channel in channels(model, probes[0]):
            self._take(channel, self._judged(channel))
        for alike in self._bordering.values():
            self._carry(alike)

    def _take(self, channel: Channel, found: Going | str | None) -> None:
        if isinstance(found, Going):
            found = self._unless_last(found)
        if isinstance(found, Going):
            self.going.append(found)
        elif found is not None:
            self.staying.append((channel, found))

    def _judged(self, channel: Channel) -> Going | str | None:
        """Whether it can go; why not, if it has dead rows; None: it lives."""
        dying = [part for part in _written(channel) if self._is_dead(part)]
        readers = list(channel.readers())
        if channel.unknown or not readers:
            return (channel.unknown or "it is an output of the model") if dying else None
        if all(self._reads_nothing(part) for part in readers):
            return Going(channel)
        if not dying:
            return None
        alive = [part for part in channel.sources() if not self._is_dead(part)]
        if alive and not self._cut_off(channel):
            names = ", ".join(dict.fromkeys(self.names[part.module] for part in alive))
            return f"it is joined with neurons that live, of {names}"
        return self._foldable(channel, readers)

    def _is_dead(self, part: Part) -> bool:
        return bool(self._dead[part.module][list(part.indices)].all())

    def _cut_off(self, channel: Channel) -> bool:
        """Whether it passes dead rows of a depthwise convolution, and nothing is added to it."""
        return any(map(self._is_dead, channel.between())) and len(list(channel.sources())) == 1

    def _reads_nothing(self, part: Part) -> bool:
        return bool(self._unread[part.module][list(part.indices)].all())

    def _foldable(self, channel: Channel, readers: Iterable[Part]) -> Going | str | None:
        """As `_judged`, of a channel that says nothing but constants; None: `_carry` decides."""
        folded: list[Said] = []
        at_borders: list[Said] = []
        for part in readers:
            found = None if self._reads_nothing(part) else self._said(part)
            if isinstance(found, str):
                return found
            if found is not None:
                (folded if _adds_alike(part.module) else at_borders).append(found)
        going = Going(channel, tuple(folded))
        if not at_borders:
            return going
        alike = frozenset((part.module, part.side) for part in channel.parts)
        self._bordering.setdefault(alike, []).append((going, at_borders))
        return None

    def _said(self, part: Part) -> Said | str | None:
        """What it says to a reader; why that is not known, or None where it is zero."""
        name = self.names[part.module]
        if part.module not in self._ends:
            return f"what {name} reads was not seen"
        low, high = (ends[list(part.indices)] for ends in self._ends[part.module])
        size = float(torch.maximum(low.abs(), high.abs()).max())
        if float((high - low).max()) > CONSTANT * size:
            return f"what {name} reads of it is no constant"
        return Said(part, (low + high) / 2) if size else None

    def _carry(self, alike: list[tuple[Going, list[Said]]]) -> None:
        """Let one of these channels, which some readers see at zero-padded borders, say what all of
        them say: planes of constants are alike but for their height.
        """
        told = [{said.part.module: said for said in borders} for _, borders in alike]
        readers = {module for borders in told for module in borders}

        def least(borders: dict[Any, Said]) -> float:
            return min(
                float(borders[m].values.abs().min()) if m in borders else 0.0 for m in readers
            )

        carrier = max(told, key=least)
        for (going, _), borders in zip(alike, told, strict=True):
            if borders is carrier or not least(carrier):
                names = ", ".join(self.names[module] for module in borders)
                self._take(going.channel, f"{BORDERS} {names}; one neuron says it for all")
                continue
            carried = tuple((said, carrier[module]) for module, said in borders.items())
            self._take(going.channel, Going(going.channel, going.folded, carried))

    def _unless_last(self, going: Going) -> Going | str | None:
        """As given, if its layers keep others; else why not, where it has dead rows."""
        needed = [(p, p.side) for p in going.channel.parts if weighted(p.module)]
        for part, side in needed:
            size = rows(part.module).shape[1 if side == "in" else 0]
            if self._left[part.module, side] + len(part.indices) >= size:
                return LAST if any(map(self._is_dead, _written(going.channel))) else None
        for part, side in needed:
            self._left[part.module, side] += len(part.indices)
        return going


def _written(channel: Channel) -> Iterator[Part]:
    """All rows of a channel."""
    return chain(channel.sources(), channel.between())


def dead(module: Any) -> Tensor:
    """Bool [rows]: which have no weight but zeros."""
    return ~rows(module).ne(0).any(2).any(1)


def _seen(
    model: nn.Module, modules: Iterable[Any], probes: Sequence[tuple[Any, ...]]
) -> dict[Any, tuple[Tensor, Tensor]]:
    """By module the least and the greatest value of each of its input channels."""
    ends: dict[Any, tuple[Tensor, Tensor]] = {}

    def look(module: Any, inputs: tuple[Any, ...]) -> None:
        if not inputs:  # given by name
            return
        axis = -1 if isinstance(module, nn.Linear) else -1 - len(module.kernel_size)
        values = inputs[0].detach().movedim(axis, 0).flatten(1)
        low, high = values.amin(1), values.amax(1)
        if module in ends:
            low = torch.minimum(low, ends[module][0])
            high = torch.maximum(high, ends[module][1])
        ends[module] = low, high

    with ExitStack() as hooks, torch.no_grad():
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(look).remove)
        for probe in probes:
            model(*fresh(probe))
    return ends


def _adds_alike(module: Any) -> bool:
    """Whether a constant input adds a constant to its output."""
    if isinstance(module, nn.Linear):
        return True
    if not isinstance(module, CONVOLUTIONS) or depthwise(module):
        return False
    return module.padding_mode != "zeros" or module.padding == "valid" or not _padded(module)


def _padded(module: Any) -> bool:
    padding = module.padding
    return any(k > 1 for k in module.kernel_size) if isinstance(padding, str) else any(padding)


@torch.no_grad()
def remove(going: Sequence[Going]) -> None:
    """Fold what these channels say into those that read it, and remove them."""
    for one in going:
        for said in one.folded:
            _fold(said.part, said.values)
        for said, carrier in one.carried:
            columns = _columns(said.part.module)
            factor = said.values / carrier.values
            said_by = columns[:, list(said.part.indices)]
            factor = factor.view(-1, *[1] * (columns.dim() - 2))
            columns[:, list(carrier.part.indices)] += said_by * factor
    together: dict[tuple[Any, str], set[int]] = {}
    dependencies: dict[tuple[Any, str], Any] = {}
    for one in going:
        for part in one.channel.parts:
            together.setdefault((part.module, part.side), set()).update(part.indices)
            dependencies[part.module, part.side] = part.dependency
    for key, indices in together.items():
        dependencies[key](sorted(indices))


def _columns(module: Any) -> Tensor:
    """Its weight with inputs as second axis, to be changed in place."""
    weight: Tensor = module.weight.detach()
    return weight.transpose(0, 1) if isinstance(module, TRANSPOSED) else weight


def _fold(part: Part, values: Tensor) -> None:
    """Add what the columns of `part` make of constant `values`."""
    module = part.module
    shift = rows(module)[:, list(part.indices)].sum(2) @ values
    followers = part.dependency.target.outputs
    norm = followers[0].module if len(followers) == 1 else None
    if module.bias is not None:
        module.bias += shift
    elif isinstance(norm, NORMS) and norm.running_mean is not None:
        norm.running_mean -= shift
    else:
        module.bias = nn.Parameter(shift)
