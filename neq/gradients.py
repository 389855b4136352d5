"""Gradients for the rows that train, and for no others: plans each layer's backward for a mask.

README.md beside this file tells how the parts work together.
"""

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from neq.compiled import is_compiled, make_room
from neq.kernels import Kept, rows_for
from neq.neurons import Layer, NeuronIndex, unwrapped
from neq.plain import Hook, is_resting, leave_out, let_in
from neq.selective import (
    assign,
    geometry,
    hold,
    is_prepared,
    prepare,
    release,
    selecting,
    tracing,
    transformed,
)
from neq.timings import Timings
from neq.work import Work

Gradient = Literal["exact", "cut"]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer's backward is computed.

    `kernel`: "dense" (all rows), "skip" (none) or a name of neq.kernels; `rows`: how many rows of
    the weight gradient that computes; `cut`: whether the input gradient comes from the same rows
    alone.
    """

    kernel: str
    rows: int
    cut: bool


class SelectiveGradients:
    """Makes the backward of a model's layers skip frozen rows, and clears what they got elsewhere.

    Right after the backward the rows of frozen neurons are zero, and a parameter whose every row
    is frozen has no gradient at all. `plan`: what is computed in each layer; `trained`: whether
    frozen rows have been in a backward since they froze.
    """

    def __init__(
        self, model: nn.Module, neurons: NeuronIndex, gradient: Gradient, hold: bool = False
    ) -> None:
        """`model`: as it is called, wrapped or not; `neurons`: of the bare one; `hold`: whether
        running statistics stand still with their neurons.
        """
        self._called, self._layers = model, neurons.layers
        self.check_at_work()
        self._cut, self._hold = gradient == "cut", hold
        self._rows: dict[Tensor, Tensor] = {}
        self._whole: dict[Tensor, None] = {}
        self._kept: dict[Tensor, Kept] = {}  # of weights whose backward computes some rows
        self._cleared: dict[Tensor, tuple[Tensor, int]] = {}  # gradients and versions, until a step
        self._handles: list[RemovableHandle] = []
        self._hook = torch.compiler.disable(self._accumulated)  # type: ignore[no-untyped-call]
        self._tie = _Tie([p for p in model.parameters() if p.requires_grad])
        self._root = unwrapped(model)
        self._tied = self._root.register_forward_hook(self._tie)
        leave_out(self._root)
        self._sets: set[frozenset[str]] = set()  # of layers frozen whole, since there was room
        self.plan: dict[str, LayerPlan] = {}
        self.trained = False
        self._prepared = [prepare(layer.module, self._cut) for layer in self._layers]

    def freeze(self, frozen: Tensor, timings: Timings) -> None:
        """Plan the backward of every layer for `frozen`, bool [neurons of the whole index]."""
        self.check_at_work()
        self._forget()
        self.plan, self.trained = {}, False
        compiled = not self._cut and (self._tie.traced or is_compiled(self._called))
        for place, layer in enumerate(self._layers):
            mask = frozen[layer.neurons]
            rows = mask.nonzero().squeeze(1)
            for parameter in layer.parameters if len(rows) else ():
                self._watch(parameter)
                if len(rows) == layer.size:
                    self._whole[parameter] = None
                else:
                    self._rows[parameter] = rows.to(parameter.device)
            work = _choose_work(layer, mask, self._cut, timings)
            if self._owns(place, bool(len(rows))):
                assign(layer.module, work)
                if self._hold:
                    hold(layer.module, mask)
            if work is not None and work.rows is not None:
                self._kept[layer.parameters[0]] = work.rows.kept
            norm = geometry(layer.module) is None and not isinstance(layer.module, nn.Linear)
            # Compiled code sums over all rows of a normalisation layer, unless nothing passes it.
            executed = None if norm and compiled else work
            self.plan[layer.name] = _plan(layer, executed, self._cut)
        # The graph reaches these no more, and DistributedDataParallel waits for their hooks.
        self._tie.parameters = [p for p in (*self._whole, *self._loose) if p.requires_grad]
        self._tie.needed = bool(self._tie.parameters)
        self._make_room(frozenset(x.name for x in self._layers if bool(frozen[x.neurons].all())))

    def check_at_work(self) -> None:
        """Raises RuntimeError inside `plain`, where nothing is to change."""
        if self._rests():
            raise RuntimeError(
                "inside `with freezer.plain():` the model is plain and stays so: make, update, "
                "freeze, load or remove a freezer after that block"
            )

    def _rests(self) -> bool:
        return is_resting(self._layers[0].module)  # as all others of the model

    def _owns(self, place: int, wanted: bool) -> bool:
        """Whether the layer does what it is told here, and not by another freezer; where that is
        `wanted`, from now on.
        """
        module = self._layers[place].module
        if is_prepared(module, self._prepared[place]):
            return True
        if wanted:
            self._prepared[place] = prepare(module, self._cut)
        return wanted

    def _make_room(self, whole: frozenset[str]) -> None:
        """Layers frozen `whole` may need another graph: beyond its limit dynamo compiles none."""
        if whole not in self._sets and make_room():
            self._sets.clear()
        self._sets.add(whole)

    @property
    def _loose(self) -> list[nn.Parameter]:
        """Trainable ones that a layer frozen whole may have cut off."""
        if not (self._cut and self._whole):
            return []
        found = (p for layer in self._layers for p in layer.parameters)
        return [p for p in found if p.requires_grad and p not in self._whole]

    def _watch(self, parameter: nn.Parameter) -> None:
        """Hook it, if it needs a gradient by now."""
        if parameter.requires_grad:
            hook = parameter.register_post_accumulate_grad_hook(self._hook)  # type: ignore[no-untyped-call]
            self._handles.append(hook)

    def partly_frozen(self) -> Iterable[tuple[Tensor, Tensor]]:
        """(parameter, indices of its frozen rows) for each parameter with rows of both kinds."""
        return ((p, rows.to(p.device)) for p, rows in self._rows.items())

    def apply(self, held: Collection[Tensor] | None = None) -> None:
        """Clear gradients that the hooks could not see: those that were there before, or assigned.

        A gradient that a hook has cleared, and nobody has touched since, is passed over. `held`:
        the parameters that are about to be stepped, None for all.
        """
        for parameter in (*self._whole, *self._rows):
            if held is not None and parameter not in held:
                continue
            gradient, version = self._cleared.pop(parameter, (None, 0))
            if gradient is None or gradient is not parameter.grad or gradient._version != version:
                self._clear(parameter)
                self._cleared.pop(parameter, None)

    def complete(self, held: Collection[Tensor]) -> None:
        """Give zeros as gradient to trainable parameters that a layer frozen whole has cut off, of
        those `held`.
        """
        for parameter in self._loose:
            if parameter.grad is None and parameter in held:
                parameter.grad = torch.zeros_like(parameter)

    def _accumulated(self, parameter: Tensor) -> None:
        self.trained = True
        if not self._rests():
            self._clear(parameter)

    def _clear(self, parameter: Tensor) -> None:
        gradient, rows = parameter.grad, self._rows.get(parameter)
        if gradient is None:
            return
        if rows is None:
            if parameter in self._whole:
                parameter.grad = None  # not zeros: the optimizer then leaves its state alone, too
            return
        kept = self._kept.get(parameter)
        if kept is None or not kept.holds(gradient):  # else those rows are zero already
            gradient.detach().index_fill_(0, rows.to(gradient.device), 0)
            if kept is not None:
                kept.cleared(gradient)
        self._cleared[parameter] = gradient, gradient._version

    def remove(self) -> None:
        """Make layers and gradients plain again."""
        for layer, prepared in zip(self._layers, self._prepared, strict=True):
            release(layer.module, prepared)
        self._forget()
        self._tied.remove()
        let_in(self._root)

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._rows.clear()
        self._whole.clear()
        self._kept.clear()
        self._cleared.clear()


def _choose_work(layer: Layer, frozen: Tensor, cut: bool, timings: Timings) -> Work | None:
    """Which kernel computes which rows of `layer`; None where all are computed as ever.

    `frozen`: bool [neurons of the layer].
    """
    if not bool(frozen.any()):
        return None
    frozen, shape = frozen.to(layer.parameters[0].device), geometry(layer.module)
    if bool(frozen.all()):
        return Work("skip", None, cut, shape)
    linear = isinstance(layer.module, nn.Linear)
    if shape is None and not linear:
        return Work("dense", rows_for("dense", frozen, None), cut, None) if cut else None
    fewest = len(rows_for("gather", frozen, shape).index)
    choose = timings.cut_kernel if cut else timings.kernel
    kernel = choose(layer.name, fewest, layer.size)
    if kernel == "dense" and not cut:
        return None
    return Work(kernel, rows_for(kernel, frozen, shape), cut, shape)


def _plan(layer: Layer, work: Work | None, cut: bool) -> LayerPlan:
    if work is None:
        return LayerPlan("dense", layer.size, cut)
    return LayerPlan(work.kernel, 0 if work.rows is None else len(work.rows.index), cut)


def plan(
    neurons: NeuronIndex,
    frozen: Tensor,
    gradient: Gradient = "exact",
    timings: Timings | None = None,
) -> dict[str, LayerPlan]:
    """How a NeuronFreezer computes each layer, by name, while `frozen` (bool [neurons]) stand
    still.

    Not so for a layer whose own forward is never called because a function uses its weight: there
    all rows are computed, and the frozen ones cleared afterwards.
    """
    timings, cut = timings or Timings(), gradient == "cut"
    return {
        layer.name: _plan(layer, _choose_work(layer, frozen[layer.neurons], cut, timings), cut)
        for layer in neurons.layers
    }


class _Tie(Hook):
    """Ties parameters that the graph does not reach to a model's output, without a gradient.

    DistributedDataParallel waits for each parameter's hook, and `backward` needs a graph even
    where everything is frozen. `parameters`: those; `needed`: whether there are any; `traced`:
    whether any forward was compiled code.
    """

    def __init__(self, everyone: list[nn.Parameter]) -> None:
        """`everyone`: all that may be among them, as traced code ties them: it is to be the same
        code whoever is frozen.
        """
        self.everyone, self.needed, self.traced = everyone, False, False
        self.parameters: list[Tensor] = []

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        traced = tracing()
        if traced:
            self.traced = True
        if not traced and (torch.compiler.is_compiling() or not (self.needed and selecting())):
            return output
        graph = any(t.requires_grad for t in _tensors(output))
        # With a graph and one process nothing waits for these parameters.
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if (not parallel and (graph or not self.needed)) or transformed():
            return output
        parameters = self.everyone if traced else self.parameters

        def tied(value: Tensor) -> Tensor:
            if not value.is_floating_point():
                return value
            return _tie(value, *parameters) if value.requires_grad or not graph else value

        return _mapped(tied, output)


def _mapped(change: Callable[[Tensor], Tensor], output: Any) -> Any:
    """A model's output with its tensors changed: in tuples, lists, dicts and data classes, as
    DistributedDataParallel looks for them.
    """

    def leaf(value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(value)
        if not is_dataclass(value) or isinstance(value, type):
            return value
        other = copy.copy(value)
        for field in fields(value):  # a frozen data class, too; not all need be in its __init__
            object.__setattr__(other, field.name, _mapped(change, getattr(value, field.name)))
        return other

    return tree_map(leaf, output)


def _tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output."""
    found: list[Tensor] = []
    for value in tree_leaves(output):
        if isinstance(value, Tensor):
            found.append(value)
        elif is_dataclass(value) and not isinstance(value, type):
            found += _tensors([getattr(value, field.name) for field in fields(value)])
    return found


class _TieFunction(Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = len(parameters)
        return output.clone()  # a view of a function's output can't be changed in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], *[None] * ctx.parameters


_tie: Any = _TieFunction.apply
