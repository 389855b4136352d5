"""What the least exact backward of a model costs while some of its neurons stand still."""

import copy
from collections import defaultdict
from typing import Any, Self

import torch
from torch import Tensor, nn

from neq.autograd_graph import Graph, trace
from neq.batches import Forward, few, read_batch
from neq.calls import Arguments, Run
from neq.evaluation import uncompiled
from neq.neurons import NeuronIndex

BATCH = 2  # some heads exist only in train mode, and pooled BatchNorm needs two samples


class RequiredFlops:
    """FLOPs (2 × multiply-accumulates) of the least exact backward, for any mask.

    Those are the weight gradients of the rows that train, and an input gradient wherever a
    parameter that trains lies upstream. `dense`: with every row training. `rows`: of the weight
    gradient of each neuron's row, float64 [neurons]. `order`: names of the layers in the order in
    which a forward calls them. All counts are of a batch of two samples.
    """

    def __init__(self, neurons: NeuronIndex, graph: Graph, numbers: dict[int, int]) -> None:
        """`numbers`: id of each parameter of the model → its bit in `graph`."""
        calls, self._products = graph.calls_and_products()
        self.order = list(dict.fromkeys(call.layer for call in calls))
        self._parameters = len(numbers)
        self._bits: list[int] = []
        self._weight = torch.zeros(len(neurons.layers), dtype=torch.int64)
        self._inputs: list[tuple[int, int]] = []  # bits upstream, FLOPs of the input gradient
        sizes: dict[str, int] = defaultdict(int)
        upstream: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for call in calls:
            if call.reached:
                sizes[call.layer] += call.elements
                upstream[call.layer].append((call.upstream, call.elements))
        for place, layer in enumerate(neurons.layers):
            trainable = [p for p in layer.parameters if p.requires_grad]
            self._bits.append(sum(1 << numbers[id(p)] for p in trainable))
            weight = layer.parameters[0]
            per_element = 2 * weight[0].numel() if weight.dim() > 1 else 0
            if weight.requires_grad:
                self._weight[place] = sizes[layer.name] * per_element
            self._inputs += [(bits, n * per_element) for bits, n in upstream[layer.name]]
        self._sizes = torch.tensor([layer.size for layer in neurons.layers])
        self._owner = torch.arange(len(neurons.layers)).repeat_interleave(self._sizes)
        self.rows = (self._weight.double() / self._sizes)[self._owner]
        self.dense = self(torch.zeros(len(neurons), dtype=torch.bool))

    @classmethod
    def count(
        cls,
        model: nn.Module,
        example: Any,
        neurons: NeuronIndex,
        forward: Forward | None = None,
    ) -> Self:
        """Count on a copy of `model`, on the CPU, whose index `neurons` is.

        `example`: the shape of one float32 sample, or a batch of one or more, of which the first
        is taken; `forward`: as of NeuronFreezer.update. Random streams are left as they were.
        Raises what the model raises on such an input, and ValueError for a batch without a sample.
        """
        run = _run(example, forward)
        copied = copy.deepcopy(model).cpu().float().train()
        numbers = {id(p): i for i, p in enumerate(copied.parameters())}
        mine = NeuronIndex(copied)
        with uncompiled(), torch.random.fork_rng([]):
            graph = trace(copied, run, mine, numbers)
        here = {id(p): i for i, p in enumerate(model.parameters())}
        return cls(neurons, graph, here)

    def __call__(self, frozen: Tensor) -> int:
        """FLOPs while the neurons of `frozen`, bool [neurons], stand still."""
        trains = torch.zeros_like(self._sizes).index_add_(0, self._owner, (~frozen).long())
        live = (1 << self._parameters) - 1
        for bits, count in zip(self._bits, trains.tolist(), strict=True):
            if not count:
                live &= ~bits
        weights = int((self._weight * trains // self._sizes).sum())
        inputs = sum(flops for bits, flops in self._inputs if bits & live)
        elsewhere = sum(p.flops for p in self._products if p.upstream & live)
        return weights + inputs + elsewhere


def _run(example: Any, forward: Forward | None) -> Run:
    if isinstance(example, (tuple, list)) and all(isinstance(size, int) for size in example):
        return Arguments(args=(torch.zeros(BATCH, *example),))
    batch = few(example, BATCH, forward)
    if batch is None:
        raise ValueError("FLOPs are counted on one sample at least, and the batch has none")
    return read_batch(batch, torch.device("cpu"), forward).run
