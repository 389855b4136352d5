"""FLOP accounting: counted once per model with fvcore, then arithmetic on the mask.

FLOPs = 2 × multiply-accumulates. Of a backward there are four counts. `dense`: weight and input
gradients of convolution, linear, matmul and attention, with nothing frozen. `paper`: the published
convention (NEq, section 4), 2 × forward operations × the share that trains, summed over layers.
`required`: the least that an exact backward can do. `executed`: what its kernels really do.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import neq
from harness.flops.backwards import Backwards
from harness.flops.executed import Executed
from harness.flops.forwards import Forwards
from harness.flops.functions import Functions
from harness.flops.fvcore_counts import ForwardCounts
from harness.flops.layer_costs import CONVOLUTIONS, LayerCost
from harness.flops.recomputed import COMPILED, Recomputed
from neq import Layer, LayerPlan, NeuronIndex
from neq.autograd_graph import Call, Graph, Product, trace
from neq.calls import Arguments
from neq.compiled import is_compiled
from neq.evaluation import uncompiled, unfused
from neq.neurons import unwrapped
from neq.required import BATCH


@dataclass(frozen=True, slots=True, kw_only=True)
class Backward:
    """FLOPs of one backward, by each count; required ≤ executed ≤ dense.

    `recomputed`: of `executed`, products of the forward that activation checkpointing does again.
    `dense` holds those of a backward with nothing frozen.
    """

    dense: int
    paper: int
    required: int
    executed: int
    recomputed: int = 0

    def __add__(self, other: "Backward") -> "Backward":
        return Backward(
            dense=self.dense + other.dense,
            paper=self.paper + other.paper,
            required=self.required + other.required,
            executed=self.executed + other.executed,
            recomputed=self.recomputed + other.recomputed,
        )

    def times(self, samples: int) -> "Backward":
        """The FLOPs for so many samples, where these are of a batch of `BATCH`."""
        return Backward(**{name: n * samples // BATCH for name, n in asdict(self).items()})


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
    names of what multiplies and can't be counted, such as recurrent operators. `forwards`: what was
    executed in train and in eval mode; `foreign`: operators whose bodies were counted.
    """

    def __init__(
        self,
        neurons: NeuronIndex,
        graph: Graph,
        train: ForwardCounts,
        forwards: Forwards,
        numbers: dict[int, int],
        unpublished: Iterable[str],
        recomputed: Recomputed | None,
    ) -> None:
        self.neurons = neurons
        self._unpublished = neurons.select(unpublished)
        self._graph = graph
        self._calls, self._products = graph.calls_and_products()
        self._numbers = numbers
        self._train, self.forwards, self._recomputed = train, forwards, recomputed
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
        self.uncounted, self.foreign = sorted(forwards.names), forwards.foreign

    def compare(self, seen: Backwards) -> None:
        """Name what `seen`, a backward with nothing frozen, did in which these counts are wrong."""
        state = self._state(torch.zeros(len(self.neurons), dtype=torch.bool), None)
        kept = sum((self._of(cost, state) for cost in self._layers), self._elsewhere(state))
        self.uncounted = sorted({*self.uncounted, *seen.differences(kept.executed)})
        self.foreign |= seen.opened

    def _of_layer(self, name: str) -> tuple[Call, ...]:
        return tuple(call for call in self._calls if call.layer == name)

    def _layer_cost(self, layer: Layer) -> LayerCost:
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
        return LayerCost(layer, flops, operations, calls, self._bits(layer), learns)

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

    def left_out(self, *, compiled: bool) -> list[str]:
        """`uncounted`, and what else is not where the backward is `compiled`."""
        chosen = [COMPILED] if compiled and self._recomputed is not None else []
        return sorted({*self.uncounted, *chosen})

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
        return self.forwards.train.flops * samples // BATCH

    def evaluation(self, samples: int = 1) -> int:
        """FLOPs of a forward in eval mode."""
        return self.forwards.evaluation.flops * samples // BATCH

    def overhead(self, samples: int = 1) -> int:
        """FLOPs of deciding on so many validation samples: forwards of last epoch's model and of
        this.
        """
        return 2 * self.forwards.evaluation.flops * samples // BATCH

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
        rest = self._elsewhere(state) + self._again(state)
        return sum((self._of(cost, state) for cost in self._layers), rest).times(samples)

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

    def _of(self, cost: LayerCost, state: "_State") -> Backward:
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

    def _again(self, state: "_State") -> Backward:
        """FLOPs of what activation checkpointing computes once more."""
        if self._recomputed is None:
            return Backward(dense=0, paper=0, required=0, executed=0)
        nobody = torch.zeros_like(state.frozen)
        dense = self._recomputed(nobody, neq.plan(self.neurons, nobody))
        here = self._recomputed(state.frozen, state.plan)
        return Backward(dense=dense, paper=0, required=0, executed=here, recomputed=here)

    def _live(self, frozen: Tensor) -> int:
        """Bit i: parameter i has a row that trains."""
        live = (1 << len(self._numbers)) - 1
        for cost in self._layers:
            if bool(frozen[cost.layer.neurons].all()):
                live &= ~cost.bits
        return live


def count_costs(
    model: nn.Module, example: tuple[int, ...] | Arguments, unpublished: Iterable[str] = ()
) -> Costs:
    """Count what the passes of `model` cost, on a copy of it.

    `example`: the shape of one float32 input, without the batch dimension, or the arguments of a
    forward over `BATCH` samples, on the CPU. `unpublished`: names of layers, or
    dotted prefixes, that the published count leaves out. What a model does once per batch, whatever
    its size, is charged to the samples of a batch of two. Random streams are left as they were.
    Raises ValueError where it returns no tensor, and whatever it raises on such an input.
    """
    compiled = is_compiled(model)
    model = copy.deepcopy(unwrapped(model)).cpu().float()
    for part in model.modules():
        inner: Any = getattr(part, "_orig_mod", None)
        if inner is not None:  # compiled, which fvcore can't trace: what it was made of
            part.forward = inner.__call__
    if not isinstance(example, Arguments):
        example = Arguments(args=(torch.zeros(BATCH, *example),))
    neurons = NeuronIndex(model)
    numbers = {id(p): i for i, p in enumerate(model.parameters())}
    model.zero_grad()
    with uncompiled():
        functions, train = Functions(model), Executed(example)
        seen = Backwards(train)
        with torch.random.fork_rng([]):
            graph = trace(model.train(), seen.forward, neurons, numbers, functions)
            seen.backward(model, known=bool(functions.names | train.names))
        with torch.enable_grad():
            by_layer = ForwardCounts(model, example, neurons)
        evaluation = Executed(example)
        with torch.random.fork_rng([]), torch.no_grad(), unfused():
            evaluation(model.eval())
            deciding = ForwardCounts(model, example, neurons)
    if graph.checkpointed and compiled:
        functions.names.add(COMPILED)
    pairs = (train, by_layer), (evaluation, deciding)
    forwards = Forwards(*pairs, functions.names, functions.opened)
    recomputed = Recomputed(model, example, neurons) if graph.checkpointed else None
    costs = Costs(neurons, graph, by_layer, forwards, numbers, unpublished, recomputed)
    costs.compare(seen)
    return costs
