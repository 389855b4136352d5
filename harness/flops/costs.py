"""FLOP accounting: counted once per model with fvcore, then arithmetic on the mask.

FLOPs = 2 × multiply-accumulates. Of a backward there are four counts. `dense`: weight and input
gradients of convolution, linear, matmul and attention, with nothing frozen. `paper`: the published
convention (NEq, section 4), 2 × forward operations × the share that trains, summed over layers.
`required`: the least that an exact backward can do. `executed`: what its kernels really do.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import neq
from harness.flops.fvcore_counts import ForwardCounts
from neq import Layer, LayerPlan, NeuronIndex
from neq.autograd_graph import Call, Graph, Product, trace
from neq.evaluation import uncompiled
from neq.neurons import unwrapped
from neq.required import BATCH

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """FLOPs of one backward, by each count; required ≤ executed ≤ dense."""

    dense: int
    paper: int
    required: int
    executed: int

    def __add__(self, other: "Backward") -> "Backward":
        return Backward(
            dense=self.dense + other.dense,
            paper=self.paper + other.paper,
            required=self.required + other.required,
            executed=self.executed + other.executed,
        )

    def times(self, samples: int) -> "Backward":
        """The FLOPs for so many samples, where these are of a batch of `BATCH`."""
        return Backward(**{name: n * samples // BATCH for name, n in asdict(self).items()})


@dataclass(frozen=True, slots=True)
class _LayerCost:
    """What one supported layer that was called costs, over a batch of `BATCH`.

    `flops`: of its forward; `operations`: what the paper's convention counts of that; `bits`: its
    trainable parameters, `learns`: whether its weight is one of them.
    """

    layer: Layer
    flops: int
    operations: int
    calls: tuple[Call, ...]
    bits: int
    learns: bool

    def dense(self) -> int:
        """Weight gradient, and input gradient wherever a parameter lies upstream."""
        return sum(
            share * (self.learns + bool(call.upstream)) for share, call in self._shares(self.calls)
        )

    def paper(self, trainable: int) -> int:
        """By the published rule, with so many of its neurons training."""
        return 2 * self.operations * trainable // self.layer.size

    def computed(self, rows: int, calls: Iterable[Call], live: int, through: int) -> int:
        """With `rows` of the weight gradient and an input gradient through `through` of the rows,
        where a parameter that trains lies upstream: bit i of `live` for parameter i.
        """
        return sum(
            share * (rows * self.learns + through * bool(call.upstream & live)) // self.layer.size
            for share, call in self._shares(calls)
        )

    def passed(self, bits: int) -> Iterator[int]:
        """FLOPs of the input gradient of each call whose input depends on a parameter of `bits`."""
        return (share for share, call in self._shares(self.calls) if call.upstream & bits)

    def _shares(self, calls: Iterable[Call]) -> Iterator[tuple[int, Call]]:
        """(FLOPs of its forward, call) for each of the calls that a backward visits."""
        elements = sum(call.elements for call in self.calls)
        for call in calls if self.flops else ():
            if call.reached:
                yield self.flops * call.elements // elements, call


LayerPlans = Mapping[str, LayerPlan]


@dataclass(frozen=True, slots=True)
class _State:
    """A mask, and what follows from it: the plan, the calls and products that are left, and
    bit i of `live` where parameter i has a row that trains.
    """

    frozen: Tensor
    plan: LayerPlans
    calls: dict[str, list[Call]]
    products: list[Product]
    live: int


class Costs:
    """What a model's passes cost; FLOPs are per sample unless a method takes `samples`.

    `neurons`: its index; `called`: bool [neurons], False for the layers of `uncalled`, whose weight
    a function uses, beside or without their own forward: they must not freeze. `dense_only` names
    those and all other modules with parameters that can't freeze, with the reason. `uncounted`:
    operators with parameters that fvcore can't count, such as recurrent ones.
    """

    def __init__(
        self,
        neurons: NeuronIndex,
        graph: Graph,
        train: ForwardCounts,
        evaluation: ForwardCounts,
        numbers: dict[int, int],
        unpublished: Iterable[str],
    ) -> None:
        self.neurons = neurons
        self._unpublished = neurons.select(unpublished)
        self._graph = graph
        self._calls, self._products = graph.calls_and_products()
        self._numbers = numbers
        self._train, self._evaluation = train, evaluation
        self._layers = [
            self._layer_cost(layer) for layer in neurons.layers if self._of_layer(layer.name)
        ]
        elsewhere = graph.elsewhere
        reasons = dict.fromkeys(
            (name for name in neurons if not self._of_layer(name)), "its forward is not called"
        )
        reasons |= {
            cost.layer.name: "a function uses its weight, too"
            for cost in self._layers
            if cost.bits & elsewhere
        }
        self.uncalled = list(reasons)
        self.called = torch.ones(len(neurons), dtype=torch.bool)
        for name in self.uncalled:
            self.called[neurons[name]] = False
        self.dense_only = neurons.unsupported | reasons
        in_layers = sum(train.by_layer[cost.layer.name]["rule"] for cost in self._layers)
        self._paper_elsewhere = 2 * (train.rule - in_layers)
        self.uncounted = train.uncounted

    def _of_layer(self, name: str) -> tuple[Call, ...]:
        return tuple(call for call in self._calls if call.layer == name)

    def _layer_cost(self, layer: Layer) -> _LayerCost:
        calls = self._of_layer(layer.name)
        elements = sum(call.elements for call in calls)
        count = self._train.by_layer[layer.name]
        operations = count["rule"]
        if isinstance(layer.module, CONVOLUTIONS):
            operations += elements * (layer.module.bias is not None)
        elif not isinstance(layer.module, nn.Linear):
            operations = 2 * elements
        learns = layer.parameters[0].requires_grad
        flops = 2 * count["all"]
        if bool(self._unpublished[layer.neurons].all()):
            operations = 0
        return _LayerCost(layer, flops, operations, calls, self._bits(layer), learns)

    def _bits(self, layer: Layer) -> int:
        trainable = (p for p in layer.parameters if p.requires_grad)
        return sum(1 << self._numbers[id(p)] for p in trainable)

    def positions(self) -> dict[str, list[int]]:
        """Places of a sample at which a layer has an output, by the name of each that is called: a
        number for each of its calls.
        """
        return {
            cost.layer.name: [call.elements // BATCH // cost.layer.size for call in cost.calls]
            for cost in self._layers
        }

    def required(self) -> neq.RequiredFlops:
        """What policies ask that hold the backward to a share of its FLOPs."""
        return neq.RequiredFlops(self.neurons, self._graph, self._numbers)

    @property
    def execution_order(self) -> list[str]:
        """Names of the layers that a forward calls, in the order of their first call."""
        return list(dict.fromkeys(call.layer for call in self._calls))

    def batch_within(self, memory: int, most: int) -> int:
        """Samples, 1 to `most`, whose outputs of all layers fit into `memory` bytes as float32."""
        elements = sum(call.elements for call in self._calls)
        return min(max(memory * BATCH // (4 * elements), 1), most)

    @property
    def entrances(self) -> list[str]:
        """Names of the layers with no parameter upstream: none needs an input gradient."""
        return list(dict.fromkeys(call.layer for call in self._calls if not call.upstream))

    def forward(self, samples: int = 1) -> int:
        """FLOPs of a forward in train mode."""
        return 2 * self._train.total * samples // BATCH

    def evaluation(self, samples: int = 1) -> int:
        """FLOPs of a forward in eval mode."""
        return 2 * self._evaluation.total * samples // BATCH

    def overhead(self, samples: int = 1) -> int:
        """FLOPs of deciding on so many validation samples: forwards of last epoch's model and of
        this.
        """
        return 2 * 2 * self._evaluation.total * samples // BATCH

    def derivatives(self, layers: Iterable[str], samples: int = 1) -> int:
        """FLOPs of one pass back from the outputs to the outputs of these layers, which computes
        no gradient of a parameter.
        """
        wanted = set(layers)
        bits = 0
        for cost in self._layers:
            bits |= cost.bits * (cost.layer.name in wanted)
        through = sum(share for cost in self._layers for share in cost.passed(bits)) + sum(
            p.flops for p in self._products if p.triggers & bits
        )
        return through * samples // BATCH

    def backward(
        self, frozen: Tensor, samples: int = 1, plan: LayerPlans | None = None
    ) -> Backward:
        """FLOPs of a backward while the neurons of `frozen` (bool [neurons]) stand still.

        `plan`: how each layer is computed (default: as neq does it for an exact gradient where no
        kernel was timed).
        """
        state = self._state(frozen, plan)
        return sum((self._of(cost, state) for cost in self._layers), self._elsewhere(state)).times(
            samples
        )

    def layers(
        self, frozen: Tensor, samples: int, plan: LayerPlans | None = None
    ) -> dict[str, tuple[int, Backward]]:
        """By the name of each layer that is called: (FLOPs of its forward, its Backward)."""
        state = self._state(frozen, plan)
        return {
            cost.layer.name: (
                cost.flops * samples // BATCH,
                self._of(cost, state).times(samples),
            )
            for cost in self._layers
        }

    def _state(self, frozen: Tensor, plan: LayerPlans | None) -> "_State":
        plan = neq.plan(self.neurons, frozen) if plan is None else plan
        calls, products = self._calls, self._products
        cut = any(part.cut for part in plan.values())
        if cut:
            whole = [cost.layer for cost in self._layers if frozen[cost.layer.neurons].all()]
            names = frozenset(layer.name for layer in whole)
            calls, products = self._graph.calls_and_products(names)
        by_layer: dict[str, list[Call]] = {}
        for call in calls:
            by_layer.setdefault(call.layer, []).append(call)
        return _State(frozen, plan, by_layer, products, self._live(frozen))

    def _of(self, cost: _LayerCost, state: "_State") -> Backward:
        layer, plan = cost.layer, state.plan[cost.layer.name]
        trainable = layer.size - int(state.frozen[layer.neurons].sum())
        calls, live = state.calls[layer.name], state.live
        return Backward(
            dense=cost.dense(),
            paper=cost.paper(trainable),
            required=cost.computed(trainable, calls, live, trainable if plan.cut else layer.size),
            executed=cost.computed(plan.rows, calls, live, plan.rows if plan.cut else layer.size),
        )

    def _elsewhere(self, state: "_State") -> Backward:
        """FLOPs of products outside supported layers: attention, parameters used by functions."""
        return Backward(
            dense=sum(p.flops for p in self._products if p.triggers),
            paper=self._paper_elsewhere,
            required=sum(p.flops for p in state.products if p.upstream & state.live),
            executed=sum(p.flops for p in state.products if p.triggers & state.live),
        )

    def _live(self, frozen: Tensor) -> int:
        """Bit i: parameter i has a row that trains."""
        live = (1 << len(self._numbers)) - 1
        for cost in self._layers:
            if bool(frozen[cost.layer.neurons].all()):
                live &= ~cost.bits
        return live


def count_costs(model: nn.Module, shape: tuple[int, ...], unpublished: Iterable[str] = ()) -> Costs:
    """Count what the passes of `model` cost, on a copy of it.

    `shape`: of one float32 input, without the batch dimension. `unpublished`: names of layers, or
    dotted prefixes, that the published count leaves out. What a model does once per batch, whatever
    its size, is charged to the samples of a batch of two. Random streams are left as they were.
    Raises whatever the model raises on such an input.
    """
    model = copy.deepcopy(unwrapped(model)).cpu().float()
    for part in model.modules():
        inner: Any = getattr(part, "_orig_mod", None)
        if inner is not None:  # compiled, which fvcore can't trace: what it was made of
            part.forward = inner.__call__
    inputs = torch.zeros(BATCH, *shape)
    neurons = NeuronIndex(model)
    numbers = {id(p): i for i, p in enumerate(model.parameters())}
    with uncompiled(), torch.random.fork_rng([]):
        graph = trace(model.train(), inputs, neurons, numbers)
        train = ForwardCounts(model, inputs, neurons)
        evaluation = ForwardCounts(model.eval(), inputs, neurons)
    return Costs(neurons, graph, train, evaluation, numbers, unpublished)
