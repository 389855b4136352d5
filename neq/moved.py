"""Whether rows have moved while they were frozen: somebody else steps them, and nobody would see.

No copies are kept, but a fingerprint of each frozen row. Weights that are loaded or cast are not
moved, and those of an average that has been swapped in will be swapped back: see Record.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from neq.changes import changes
from neq.neurons import Layer, NeuronIndex
from neq.optimizers import parameters_of

CHUNK = 2**18  # elements of a parameter that are looked at at a time
SAMPLES = 3  # parameters whose rows that train tell whether all weights have been swapped
ELEMENTS = 4096  # of each of them that are looked at, unless a single row has more
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Rows:
    """Frozen `rows` of a `parameter` of a `layer`, and their fingerprints: int64 [rows] each.

    `state`: of the layer when they were taken; in another one there is nothing to compare.
    """

    layer: Layer
    parameter: Tensor
    rows: Tensor
    prints: Tensor
    state: tuple[Any, ...]

    def differ(self) -> Tensor:
        """Whether any of them is another now: bool []."""
        return (fingerprints(self.parameter, self.rows) != self.prints).any()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Sample:
    """The `values` of some `rows` of a `parameter` after the last step; one of them trained then.

    A slice: an index would have to be brought to the device in a step, which would wait for it.
    """

    parameter: Tensor
    rows: slice
    values: Tensor

    @classmethod
    def of(cls, parameter: Tensor, frozen: Tensor) -> Self:
        """From the first row on that is not `frozen`, bool [rows]."""
        most = max(ELEMENTS * len(parameter) // parameter.numel(), 1)
        first = int((~frozen).nonzero()[0])
        rows = slice(first, first + most)
        return cls(parameter=parameter, rows=rows, values=parameter.detach()[rows].clone())

    def taken(self) -> "_Sample":
        """The same rows, as they are now."""
        return replace(self, values=self.parameter.detach()[self.rows].clone())

    def differs(self, frozen: Tensor) -> bool:
        """Whether a row that trains is another now; `frozen`: bool [rows]."""
        now, then = self.parameter.detach()[self.rows], self.values
        if (now.dtype, now.device, now.shape) != (then.dtype, then.device, then.shape):
            return True
        trains = (~frozen[self.rows]).to(now.device)
        return not torch.equal(now[trains], then[trains])


class Record:
    """Fingerprints of the frozen rows of a `model` that the optimizers `given` step.

    An average of the weights may be swapped in between two steps, for an evaluation or for
    deciding. That moves rows that train as well: a sample of them, taken after each step, tells.
    Frozen rows that differ during a swap are looked at again before the next step, when it is over;
    rows that freeze during one are recorded then. What other optimizers do is looked at after some
    of their steps. No step waits for a GPU. In torch.distributed all ranks find the same, as their
    rows are the same.
    """

    def __init__(self, model: nn.Module, neurons: NeuronIndex, given: Iterable[Optimizer]) -> None:
        self._model, self._layers = model, neurons.layers
        self._optimizers = [*given]
        self._given = {id(optimizer) for optimizer in self._optimizers}
        self._frozen: dict[Tensor, Tensor] = {}  # bool [rows] of each parameter with any
        self._rows: dict[Tensor, _Rows] = {}
        self._late: dict[Tensor, _Rows] = {}  # froze during a swap: fingerprints are still to come
        self._sample: list[_Sample] = []
        self._choose = True  # another sample, at the next step
        self._found: list[tuple[_Rows, Tensor]] = []  # have moved for certain where it is true
        self._doubtful = False  # whether rows differed during a swap
        self._stepped = False  # by a given optimizer, since rows froze
        self._under_way: set[int] = set()  # given optimizers that are stepping, by their ids
        self._others: dict[int, int] = {}  # steps of other optimizers of these rows, by their ids
        _watch_steps()
        _records.add(self)

    @torch.no_grad()
    def freeze(self, frozen: Tensor) -> None:
        """Record the rows of `frozen`, bool [neurons]; those that were so keep their prints."""
        swapped, before = self._swapped() or bool(self._late), self._rows
        self._frozen, self._rows, self._late = {}, {}, {}
        for layer in self._layers:
            mask = frozen[layer.neurons]
            for parameter in layer.parameters if bool(mask.any()) else ():
                if parameter.requires_grad:
                    self._frozen[parameter] = mask
                    self._add(layer, parameter, before.get(parameter), swapped)
        sample = [s for s in self._sample if not bool(self._mask(s.parameter)[s.rows].all())]
        self._sample = sample or [*self._chosen()]
        self._choose, self._stepped = True, False
        self._others.clear()

    def _add(self, layer: Layer, parameter: Tensor, old: _Rows | None, swapped: bool) -> None:
        state, new = _state(layer, parameter), self._frozen[parameter].clone()
        rows = new.nonzero().squeeze(1)[:0].to(parameter.device)
        prints = torch.zeros_like(rows)
        if old is not None and old.state == state:
            places = old.rows.cpu()
            stay = new[places].nonzero().squeeze(1).to(parameter.device)
            rows, prints = old.rows[stay], old.prints[stay]
            new[places] = False
        fresh = new.nonzero().squeeze(1).to(parameter.device)
        found = _Rows(layer=layer, parameter=parameter, rows=rows, prints=prints, state=state)
        self._rows[parameter] = found
        if not len(fresh):
            return
        late = replace(found, rows=fresh, prints=torch.zeros_like(fresh))
        if swapped:
            self._late[parameter] = late
        else:
            self._rows[parameter] = _joined(found, late)

    def check(self, trained: bool) -> None:
        """Raises ValueError where rows have moved since they froze, with their layers' names.

        Those are then forgotten, until rows freeze again. `trained`: whether there was a backward
        since then; where no given optimizer has stepped after it, another one has.
        """
        found = [rows for rows, moved in self._found if bool(moved) and _holds(rows)]
        self._found.clear()
        differing = [rows for rows in self._rows.values() if _holds(rows) and bool(rows.differ())]
        if differing and self._swapped() and (self._stepped or not trained):
            self._doubtful = True
        else:
            found += differing
        if not found:
            return
        names = list(dict.fromkeys(rows.layer.name for rows in found))
        self.forget(names)
        raise ValueError(
            f"rows moved while they were frozen, in {listed(names)}: give NeuronFreezer every "
            "optimizer that steps, as a list, and make a new freezer where one is rebuilt"
        )

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer) -> None:
        """To be called before a given `optimizer` steps."""
        self._under_way.add(id(optimizer))
        self._end_swap()

    def _end_swap(self) -> None:
        for parameter, late in self._late.items():
            self._rows[parameter] = _joined(self._rows[parameter], late)
        self._late.clear()
        if self._doubtful:
            self._doubtful = False
            self._look()

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer) -> None:
        """To be called after a given `optimizer` has stepped."""
        self._under_way.discard(id(optimizer))
        self._stepped = True
        if self._choose:
            self._choose, self._sample = False, [*self._chosen()]
            return
        self._sample = [sample.taken() for sample in self._sample]

    def _chosen(self) -> Iterator[_Sample]:
        """Of the smallest parameters that the given optimizers step, with rows that train, of
        several modules; where there are gradients by now, of those that have some.
        """
        held = set(parameters_of(self._optimizers))
        trains = [p for p in self._model.parameters() if p in held and p.requires_grad and p.dim()]
        trains = [p for p in trains if p.numel() and not bool(self._mask(p).all())]
        among = {p for p in trains if p.grad is not None} or set(trains)
        found = []
        for module in self._model.modules():
            mine = [p for p in module.parameters(recurse=False) if p in among]
            found += [min(mine, key=Tensor.numel)] if mine else []
        for parameter in sorted(found, key=Tensor.numel)[:SAMPLES]:
            yield _Sample.of(parameter, self._mask(parameter))

    def _mask(self, parameter: Tensor) -> Tensor:
        """Which of its rows are frozen: bool [rows]."""
        nobody = torch.zeros(len(parameter), dtype=torch.bool)
        return self._frozen.get(parameter, nobody)

    def _swapped(self) -> bool:
        """Whether all weights have changed since the last step, as far as anybody can tell: more
        than one module's, at least.
        """
        if not self._sample:
            return self._stepped
        differing = sum(s.differs(self._mask(s.parameter)) for s in self._sample)
        return differing >= min(len(self._sample), 2)

    def _look(self) -> None:
        self._found += [(rows, rows.differ()) for rows in self._rows.values() if _holds(rows)]

    @torch.no_grad()
    def before_other(self, optimizer: Optimizer) -> None:
        """To be called before any optimizer steps."""
        if self._rows and self._is_other(optimizer):
            self._end_swap()

    @torch.no_grad()
    def after_other(self, optimizer: Optimizer) -> None:
        """To be called after any optimizer has stepped: one that is not given may move rows."""
        if not (self._rows and self._is_other(optimizer)):
            return
        self._others[id(optimizer)] = steps = self._others[id(optimizer)] + 1
        if not steps & (steps - 1):  # 1, 2, 4, 8 …: it costs as much as a step
            self._look()

    def _is_other(self, optimizer: Optimizer) -> bool:
        """Whether `optimizer` was not given, holds recorded rows, and no given one calls it."""
        if id(optimizer) in self._given or self._under_way:
            return False
        if id(optimizer) not in self._others:
            held = any(parameter in self._rows for parameter in parameters_of([optimizer]))
            self._others[id(optimizer)] = 0 if held else -1
        return self._others[id(optimizer)] >= 0

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """What steps inside leave here is forgotten afterwards: they have been taken back."""
        kinds = dict, list, set
        before = {k: copy.copy(v) if isinstance(v, kinds) else v for k, v in vars(self).items()}
        try:
            yield
        finally:
            vars(self).update(before)

    def layers_that_differ(self) -> set[str]:
        """The layers with rows that are others now than when they were recorded."""
        return {r.layer.name for r in self._rows.values() if _holds(r) and bool(r.differ())}

    def forget(self, layers: Iterable[str]) -> None:
        """Have nothing to compare the rows of `layers` with until rows freeze again."""
        names = set(layers)
        self._rows = {p: rows for p, rows in self._rows.items() if rows.layer.name not in names}

    def remove(self) -> None:
        """Watch nobody any more."""
        _records.discard(self)


_records: WeakSet[Record] = WeakSet()


@cache
def _watch_steps() -> None:
    """Let records see the steps of all optimizers, from now on.

    torch goes through these hooks while they are called: none is taken away again.
    """

    def before(optimizer: Optimizer, *_: Any) -> None:
        for record in () if torch.compiler.is_compiling() else [*_records]:
            record.before_other(optimizer)

    def after(optimizer: Optimizer, *_: Any) -> None:
        for record in () if torch.compiler.is_compiling() else [*_records]:
            record.after_other(optimizer)

    register_optimizer_step_pre_hook(before)
    register_optimizer_step_post_hook(after)


def _joined(rows: _Rows, late: _Rows) -> _Rows:
    """`rows`, and `late` ones with their fingerprints of now."""
    return _Rows(
        layer=rows.layer,
        parameter=rows.parameter,
        rows=torch.cat([rows.rows, late.rows]),
        prints=torch.cat([rows.prints, fingerprints(late.parameter, late.rows)]),
        state=rows.state,
    )


def _state(layer: Layer, parameter: Tensor) -> tuple[Any, ...]:
    return changes(layer.module), parameter.dtype, parameter.device, parameter.shape


def _holds(rows: _Rows) -> bool:
    """Whether the layer has been neither loaded nor cast since."""
    return rows.state == _state(rows.layer, rows.parameter)


def fingerprints(parameter: Tensor, rows: Tensor) -> Tensor:
    """A number for each of the `rows` of `parameter`: another one, where a value is another.

    Their bits as integers, summed with weights by their places; −0.0 is 0.0. int64 [rows].
    """
    if not parameter.numel():
        return torch.zeros_like(rows)
    width = parameter.numel() // len(parameter)
    size = width * parameter.element_size()
    bits = torch.int64 if size % 8 == 0 else _INTEGERS[parameter.element_size()]
    weights, found = _weights(size // bits.itemsize, parameter.device), []
    for part in torch.split(rows, max(CHUNK // width, 1)):
        values = parameter.detach().index_select(0, part).reshape(len(part), width).add_(0)
        numbers = values.view(bits).long()
        numbers ^= numbers >> 32  # the highest bit alone would be lost in a product
        found.append(numbers.mul_(weights).sum(1))
    return torch.cat(found)


def _weights(width: int, device: torch.device) -> Tensor:
    """Odd numbers without an order (splitmix64), so that no pattern of changes adds up to zero."""
    mixed = torch.arange(1, width + 1, device=device) * (0x9E3779B97F4A7C15 - 2**64)
    mixed = (mixed ^ (mixed >> 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    return (mixed ^ (mixed >> 27)) | 1


def listed(names: list[str], most: int = 8) -> str:
    """Layers for a message, of many the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"layer{'s' if len(names) > 1 else ''} {', '.join(names[:most])}{more}"
