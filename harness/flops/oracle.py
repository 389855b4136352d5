"""The oracle: what PyTorch's own counter sees in one real backward."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import neq
from harness.compilations import room
from harness.flops.operators import added_rules, opened
from neq.calls import Arguments, tensors
from neq.compiled import flop_rules, is_compiled
from neq.evaluation import uncompiled, unfused
from neq.neurons import unwrapped
from neq.required import BATCH

aten = torch.ops.aten
FUSED = (
    *("flash_attention_for_cpu", "flash_attention", "efficient_attention"),
    "cudnn_attention",  # of half precision on recent GPUs
)
Shape = Sequence[int]

# Inductor computes the same products of the same graph. But of those with a dimension of one, such
# as the input gradient of a head with one output, it makes code of its own that no counter sees.
BACKEND = "aot_eager"


class Rules:
    """Replaces two rules of PyTorch's counter that are wrong or vary by device, and adds some.

    The weight gradient of a grouped convolution (torch 2.13 forgets to divide by the groups), and
    fused attention (not counted on the CPU, recomputed products counted on CUDA). Added are those
    of `operators`, and of the bodies of `foreign` ones. `mapping`: for FlopCounterMode; `needed`:
    whether any has occurred so far.
    """

    def __init__(self, foreign: Iterable[Any] = ()) -> None:
        self.needed = False
        self.mapping: dict[Any, Callable[..., int]] = {
            aten.convolution_backward: self._convolution_backward
        }
        self.mapping |= flop_rules(self.mapping)
        for name in FUSED:
            forward = getattr(aten, f"_scaled_dot_product_{name}")
            self.mapping[forward] = self._attention
            self.mapping[getattr(aten, f"_scaled_dot_product_{name}_backward")] = self._backward
        added = added_rules()
        added |= opened(foreign, self.mapping | added)
        self.mapping |= {operator: self._noted(rule) for operator, rule in added.items()}

    def _noted(self, rule: Callable[..., int]) -> Callable[..., int]:
        def noted(*args: Any, **keywords: Any) -> int:
            self.needed = True
            return rule(*args, **keywords)

        noted._get_raw = getattr(rule, "_get_raw", False)  # type: ignore[attr-defined]
        return noted

    def _convolution_backward(
        self, gradient: Shape, inputs: Shape, weight: Shape, *rest: Any, **_: Any
    ) -> int:
        transposed, groups, mask = rest[4], rest[6], rest[7]
        self.needed |= groups > 1
        positions = inputs if transposed else gradient
        each: int = 2 * positions[0] * prod(positions[2:]) * prod(weight)
        return each * (bool(mask[0]) + bool(mask[1]))

    def _attention(self, query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
        self.needed = True
        return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])

    def _backward(self, _gradient: Shape, *inputs: Any, **_: Any) -> int:
        return 2 * self._attention(*inputs)


def backward_flops_by_torch(
    model: nn.Module,
    example: tuple[int, ...] | Arguments,
    frozen: Tensor,
    gradient: neq.Gradient = "exact",
    timings: neq.Timings | None = None,
    compiled: bool = False,
    foreign: Iterable[Any] = (),
) -> list[int]:
    """FLOPs that PyTorch counts in a backward over `BATCH` samples.

    `example`: the shape of one float32 input, or the arguments of a forward over so many samples.
    `frozen`: bool [neurons], who stands still. `compiled`: of the backward that torch.compile makes
    of the model, as it is handed to a backend, operator by operator (see BACKEND); so it is of one
    that comes compiled. `foreign`: operators whose bodies are counted. Returns the count with the
    rules above, then the one by PyTorch's own rules where those are right. The model is converted
    for it and back again.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    freezer = neq.NeuronFreezer(
        model, optimizer, neq.Everyone(), gradient=gradient, timings=timings
    )
    freezer.freeze(frozen)
    rules, compiled = Rules(foreign), compiled or is_compiled(model)
    try:
        with room() if compiled else nullcontext():
            run: Any = model
            if compiled:
                run = torch.compile(unwrapped(model), backend=BACKEND, dynamic=False)
                _counted(run, example, {})  # a backward is compiled when it is first run
            counts = [_counted(run, example, rules.mapping)]
            if not rules.needed:
                counts.append(_counted(run, example, {}))
    finally:
        freezer.remove()
    return counts


def forward_flops_by_torch(
    model: nn.Module, example: tuple[int, ...] | Arguments, foreign: Iterable[Any] = ()
) -> tuple[int, int]:
    """FLOPs that PyTorch counts, with the rules above, in a forward in train mode and in one in
    eval mode without gradients, as deciding does it. Not compiled; see `backward_flops_by_torch`.
    """
    seen, modes = [], {module: module.training for module in model.modules()}
    try:
        for train in (True, False):
            model.train(train)
            mapping = Rules(foreign).mapping
            counter = FlopCounterMode(display=False, custom_mapping=mapping)
            gradients = torch.set_grad_enabled(train)
            with uncompiled(), unfused(), torch.random.fork_rng([]), gradients, counter:
                _called(model, example)
            seen.append(int(counter.get_total_flops()))
    finally:
        for module, training in modes.items():
            module.training = training
    return seen[0], seen[1]


def _called(model: nn.Module, example: tuple[int, ...] | Arguments) -> Any:
    if not isinstance(example, Arguments):
        example = Arguments(args=(torch.randn(BATCH, *example),))
    return example(model)


def _counted(
    model: nn.Module, example: tuple[int, ...] | Arguments, mapping: dict[Any, Any]
) -> int:
    with torch.random.fork_rng([]):
        outputs = tensors(_called(model.train(), example))
        losses = [o.sum() for o in outputs if o.requires_grad]
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        torch.autograd.backward(torch.stack(losses).sum())
    model.zero_grad()
    return int(counter.get_total_flops())
