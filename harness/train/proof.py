"""Proof, on one's own training, that what is frozen stands still and costs no backward work."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import neq
from harness.console import as_text, table
from harness.errors import one_line
from harness.flops.costs import Backward, Costs, count_costs
from harness.flops.watched import Loss, Watched
from harness.train.untouched import untouched
from neq import Layer, LayerPlan
from neq.batches import few
from neq.calls import Arguments, changed
from neq.evaluation import uncompiled
from neq.moved import listed
from neq.required import BATCH


class VerificationError(AssertionError):
    """A step did otherwise than it was to: the message says in which layers, and how."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerProof:
    """One layer in the step: its neurons, those frozen, the rows of its weight gradient that were
    to be computed and that were, and its rows that have moved.

    Rows are None where nothing tells them: in a layer without products, one that the backward does
    not come to, and where activation checkpointing computes layers again.
    """

    name: str
    neurons: int
    frozen: int
    planned: int | None
    computed: int | None
    moved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What one real step did, over `samples` samples: FLOPs of its backward, `counted` and
    `measured` by PyTorch's counter, those of a `dense` one, and `layers` in the model's order.

    `uncounted`: what multiplies and is in no count; where there is any, FLOPs were not compared.
    """

    samples: int
    counted: int
    measured: int
    dense: int
    layers: tuple[LayerProof, ...]
    uncounted: list[str]

    def __str__(self) -> str:
        shown = table("layer", "neurons", "frozen", "rows planned", "computed", "moved")
        for column in shown.columns[1:]:
            column.justify = "right"
        for part in self.layers:
            cells = (part.neurons, part.frozen, part.planned, part.computed, part.moved)
            shown.add_row(part.name, *("–" if n is None else f"{n:,}" for n in cells))
        neurons = sum(part.neurons for part in self.layers)
        frozen = sum(part.frozen for part in self.layers)
        share = (
            f", {self.measured / self.dense:.1%} of a dense one"
            if self.dense and not self.uncounted
            else ""
        )
        lines = [
            f"Of {neurons:,} neurons {frozen:,} are frozen; none of these has moved.",
            f"FLOPs of a backward over {self.samples} samples: counted {self.counted:,}, ",
            f"measured {self.measured:,}{share}.",
        ]
        lines += [
            f"Not counted, so that FLOPs were not compared: {name}." for name in self.uncounted
        ]
        return as_text(shown, *lines)


def verify(freezer: neq.NeuronFreezer, batch: Any, loss: Loss) -> Proof:
    """Prove on one real step of a training that frozen rows stand still and are not computed.

        from harness import verify

        print(verify(freezer, batch, lambda model, batch: criterion(model(batch[0]), batch[1])))

    `batch`: as the loss takes it, moved to the model's device; `loss(model, batch)` is called with
    the freezer's model, in train mode and not compiled. It calls the model once, and returns a
    tensor of one number; products of its own, behind what the model returns, are left out of what
    is measured. All of the freezer's optimizers step; afterwards weights, buffers, gradients,
    optimizers, modes and random streams are as before.

    Raises VerificationError where frozen rows have moved, before or in the step, or have a
    gradient; where the state of an optimizer has moved for a layer frozen whole; where no row has
    moved at all, as with a learning rate of 0 in the first step of a warm-up; where other rows of a
    weight gradient were computed than planned; and where the backward's FLOPs are not those that
    are counted. Raises ValueError for a loss that is no single number, or that does not call the
    model once, for inputs that need a gradient, and for a batch without samples.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(freezer.rehearsal())
        except ValueError as error:
            raise VerificationError(str(error)) from None
        for optimizer in freezer.optimizers:
            stack.enter_context(untouched(freezer.model, optimizer))
        stack.enter_context(uncompiled())
        stack.enter_context(torch.enable_grad())
        return _Step(freezer, batch, loss).proof()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counted:
    """What the backward was to cost, and the rows of each layer: (planned, computed); `wrong`: the
    first thing that is not as counted, in words.
    """

    whole: Backward
    rows: Mapping[str, tuple[int, int]]
    uncounted: list[str]
    wrong: str | None


class _Step:
    def __init__(self, freezer: neq.NeuronFreezer, batch: Any, loss: Loss) -> None:
        self._freezer, self._model = freezer, freezer.model
        self._layers, self._frozen = freezer.neurons.layers, freezer.frozen
        if not self._model.training:  # else parts that are in eval mode are so in the loop, too
            self._model.train()
        for optimizer in freezer.optimizers:
            optimizer.zero_grad()
        self._model.zero_grad()
        device = next(self._model.parameters()).device
        batch = changed(lambda v: v.to(device, copy=True) if isinstance(v, Tensor) else v, batch)
        self._seen = Watched(self._model, self._layers, batch, loss)

    def proof(self) -> Proof:
        """Do the step; raises VerificationError."""
        seen = self._seen
        call = few(seen.call, BATCH, lambda model, batch: None)
        if call is None:
            raise ValueError("the batch has no sample: give at least one")
        costs = self._costs(call)
        seen.backward(costs.foreign)
        self._check_gradients()
        moved = self._stepped()
        counted = self._counted(costs, seen.samples)
        if counted.wrong:  # products once a batch, or as many as its values ask for: it tells
            torch.set_rng_state(seen.stream)
            counted = self._counted(self._costs(_on_cpu(seen.call)), BATCH)
        if counted.wrong:
            raise VerificationError(counted.wrong)
        return Proof(
            samples=seen.samples,
            counted=counted.whole.executed,
            measured=seen.flops,
            dense=counted.whole.dense,
            layers=tuple(
                LayerProof(
                    name=layer.name,
                    neurons=layer.size,
                    frozen=int(self._frozen[layer.neurons].sum()),
                    planned=counted.rows.get(layer.name, (None, None))[0],
                    computed=counted.rows.get(layer.name, (None, None))[1],
                    moved=int(moved[layer.name].sum()),
                )
                for layer in self._layers
            ),
            uncounted=counted.uncounted,
        )

    def _costs(self, call: Arguments) -> Costs:
        with self._seen.as_used(self._model):
            try:
                return count_costs(self._model, call)
            except Exception as error:
                raise ValueError(
                    f"the model can't be counted ({type(error).__name__}: {one_line(error)})"
                ) from error

    def _frozen_rows(self) -> Iterator[tuple[Layer, Tensor, Tensor]]:
        """(layer, parameter, indices of its frozen rows)."""
        for layer in self._layers:
            rows = self._frozen[layer.neurons].nonzero().squeeze(1)
            for parameter in layer.parameters if len(rows) else ():
                if parameter.requires_grad:
                    yield layer, parameter, rows.to(parameter.device)

    def _check_gradients(self) -> None:
        wrong = [
            layer.name
            for layer, parameter, rows in self._frozen_rows()
            if parameter.grad is not None and bool(parameter.grad[rows].any())
        ]
        if wrong:
            raise VerificationError(f"frozen rows have a gradient, in {_names(wrong)}")

    def _stepped(self) -> dict[str, Tensor]:
        """Step, and compare the bits: which rows of each layer have moved."""
        before = [
            (layer, p, p.detach().clone()) for layer in self._layers for p in layer.parameters
        ]
        still = [*self._standing_states()]
        for optimizer in self._freezer.optimizers:
            optimizer.step()
        moved = {layer.name: torch.zeros(layer.size, dtype=torch.bool) for layer in self._layers}
        for layer, parameter, then in before:
            moved[layer.name] |= _differ(parameter.detach(), then)
        wrong = [
            f"{layer.name} ({int(rows.sum())} of {int(frozen.sum())})"
            for layer in self._layers
            for frozen in [self._frozen[layer.neurons]]
            for rows in [moved[layer.name] & frozen]
            if bool(rows.any())
        ]
        if wrong:
            raise VerificationError(f"frozen rows have moved in a step, in {_names(wrong)}")
        wrong = [layer.name for layer, state, then in still if not _same(state, then)]
        if wrong:
            raise VerificationError(
                f"the optimizer's state has moved for what is frozen whole, in {_names(wrong)}"
            )
        self._check_something_moved(moved)
        return moved

    def _check_something_moved(self, moved: Mapping[str, Tensor]) -> None:
        """Where nobody moves, that frozen rows do not move either proves nothing."""
        trains = [
            layer.name
            for layer in self._layers
            for parameter in layer.parameters
            if parameter.grad is not None and bool(parameter.grad.any())
        ]
        if trains and not any(bool(rows.any()) for rows in moved.values()):
            raise VerificationError(
                "no row has moved in a step, of those that train either: the learning rate is 0 "
                f"or too small, or the optimizers do not step {_names(trains)}"
            )

    def _standing_states(self) -> Iterator[tuple[Layer, Any, dict[str, Any]]]:
        """(layer, the optimizer's state of a parameter frozen whole, what it is now)."""
        for layer, parameter, rows in self._frozen_rows():
            for optimizer in self._freezer.optimizers if len(rows) == layer.size else ():
                state = optimizer.state.get(parameter, {})
                now = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
                yield layer, state, now

    def _counted(self, costs: Costs, samples: int) -> _Counted:
        # What functions compute with the weights of layers is computed whole, and cleared.
        mask, plan = self._frozen & costs.called, self._freezer.plan
        whole = costs.backward(mask, samples, plan)
        unknown = self._frozen_elsewhere(costs)
        uncounted = sorted({*costs.left_out(compiled=False), *unknown})
        rows = {} if whole.recomputed or unknown else self._rows(costs, mask, samples, plan)
        wrong = [
            f"{name} ({computed} computed, {planned} planned)"
            for name, (planned, computed) in rows.items()
            if planned != computed
        ]
        message = None
        if wrong:
            message = (
                f"other rows of a weight gradient were computed than planned, in {_names(wrong)}"
            )
        elif self._seen.flops != whole.executed and not uncounted:
            message = (
                f"a backward over {self._seen.samples} samples took {self._seen.flops:,} FLOPs by "
                f"PyTorch's counter, and {whole.executed:,} are counted"
            )
        return _Counted(whole=whole, rows=rows, uncounted=uncounted, wrong=message)

    def _frozen_elsewhere(self, costs: Costs) -> list[str]:
        """What is not known of layers that must not freeze (see Costs), where they are frozen
        whole: whether a function is left that asks for the gradient of what comes before them.
        """
        return [
            f"layer {name}, frozen whole though {costs.dense_only[name]}"
            for name in costs.uncalled
            if name in costs.execution_order and bool(self._frozen[costs.neurons[name]].all())
        ]

    def _rows(
        self, costs: Costs, mask: Tensor, samples: int, plan: Mapping[str, LayerPlan]
    ) -> dict[str, tuple[int, int]]:
        """(planned, computed) rows of each weight gradient: what is not the input gradient's of the
        FLOPs of the layer's nodes.
        """
        none = {name: replace(part, rows=0) for name, part in plan.items()}
        each = {layer.name: replace(plan[layer.name], rows=layer.size) for layer in self._layers}
        low, high = costs.layers(mask, samples, none), costs.layers(mask, samples, each)
        found = {}
        for layer in self._layers:
            name = layer.name
            least, most = (part[name][1].executed if name in part else 0 for part in (low, high))
            if most > least:
                share = (self._seen.by_layer[name] - least) / (most - least)
                found[name] = plan[name].rows, round(share * layer.size)
        return found


def _on_cpu(call: Arguments) -> Arguments:
    """The call as models are counted with it: on the CPU, in float32."""

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().to("cpu", copy=True)
        return value.float() if value.is_floating_point() else value

    return changed(moved, call)  # type: ignore[no-any-return]


def _differ(now: Tensor, then: Tensor) -> Tensor:
    """Which rows have other bits: bool [rows], on the CPU."""
    one, other = (t.reshape(len(t), -1).contiguous().view(torch.uint8) for t in (now, then))
    return (one != other).any(1).cpu()


def _same(state: Mapping[str, Any], then: Mapping[str, Any]) -> bool:
    return state.keys() == then.keys() and all(
        torch.equal(value, then[key]) if isinstance(value, Tensor) else value == then[key]
        for key, value in state.items()
    )


def _names(names: list[str]) -> str:
    return listed(list(dict.fromkeys(names)))
