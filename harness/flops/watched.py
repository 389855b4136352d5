"""One real backward of somebody's loss, seen from outside: what it multiplies, and for whom."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from harness.flops.oracle import Rules
from neq import Layer
from neq.batches import read_batch
from neq.calls import Arguments, tensors

Loss = Callable[[nn.Module, Any], Tensor]


class Watched:
    """The forward of `loss(model, batch)`, done; and its backward, watched where it is run.

    `call`: the one of the model that it makes, over so many `samples`. After `backward`: `flops` of
    it by PyTorch's counter, without those that belong to the loss alone; `by_layer`: of the nodes
    in the graph that each layer has made, which one in a reentrant checkpoint has not.

    Raises ValueError for a loss that is no single number, that calls the model not once, or whose
    value does not depend on what the model returns, and for inputs that need a gradient.
    """

    def __init__(self, model: nn.Module, layers: Iterable[Layer], batch: Any, loss: Loss) -> None:
        self.flops = 0
        self.by_layer: Counter[str] = Counter()
        self._nodes: dict[str, set[Any]] = {}
        self._calls: list[Arguments] = []
        self._outputs: list[Any] = []
        with ExitStack() as stack:
            called = model.register_forward_pre_hook(self._called, with_kwargs=True)
            stack.callback(called.remove)
            for layer in layers:
                noting: Any = self._noting(layer)
                hook = layer.module.register_forward_hook(noting, with_kwargs=True)
                stack.callback(hook.remove)
            stack.callback(model.register_forward_hook(self._returned).remove)
            self.stream = torch.get_rng_state()
            self._loss = loss(model, batch)
        self._check()
        ends = [tensor.grad_fn for tensor in tensors(self._outputs.pop())]
        below = set(_nodes_from(self._loss.grad_fn))
        self._wanted = {number for number, end in enumerate(ends) if end in below}
        if not self._wanted:
            raise ValueError(
                "loss(model, batch) does not depend on what the model returns: compute it from that"
            )
        self.call = self._calls.pop()
        self.samples = read_batch(self.call, torch.device("cpu"), lambda model, batch: None).samples
        inside = {node for end in ends for node in _nodes_from(end)}
        self._of_loss = set(_nodes_from(self._loss.grad_fn, set(ends))) - inside

    @contextmanager
    def as_used(self, model: nn.Module) -> Iterator[None]:
        """Inside, `model`, and copies of it, return only the tensors that the loss makes use of."""

        def used(_module: nn.Module, _args: Any, output: Any) -> list[Tensor]:
            return [t for number, t in enumerate(tensors(output)) if number in self._wanted]

        hook = model.register_forward_hook(used)
        try:
            yield
        finally:
            hook.remove()

    def _called(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        self._calls.append(Arguments(args=args, kwargs=kwargs))

    def _returned(self, _module: nn.Module, _args: Any, output: Any) -> None:
        self._outputs.append(output)

    def _noting(self, layer: Layer) -> Callable[..., None]:
        def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            ends = {tensor.grad_fn for tensor in tensors((args, kwargs))}
            found = set(_nodes_from(next(tensors(output)).grad_fn, ends))
            if found:
                self._nodes.setdefault(layer.name, set()).update(found)

        return note

    def _check(self) -> None:
        loss = self._loss
        if len(self._calls) != 1:
            raise ValueError(
                f"loss(model, batch) must call the model once, and calls it {len(self._calls)} "
                "times: what one call costs is counted"
            )
        if any(tensor.requires_grad for tensor in tensors(self._calls[0])):
            raise ValueError(
                "an input of the model needs a gradient, whose cost is not counted: detach it"
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                "loss(model, batch) must return the tensor of one number that your loop calls "
                f"backward() on, not {found}"
            )
        if not loss.requires_grad:
            raise ValueError("the loss needs no gradient: nothing of the model trains")

    def backward(self, foreign: Iterable[Any]) -> None:
        """Run the backward; `foreign`: operators whose bodies are counted."""
        counter = FlopCounterMode(display=False, custom_mapping=Rules(foreign).mapping)
        of_loss: Counter[str] = Counter()
        with counter, ExitStack() as stack:
            for name, nodes in self._nodes.items():
                _put_down(nodes, name, self.by_layer, counter, stack)
            _put_down(self._of_loss, "", of_loss, counter, stack)
            self._loss.backward()  # type: ignore[no-untyped-call]
        self.flops = int(counter.get_total_flops()) - of_loss.total()


def _put_down(
    nodes: Iterable[Any],
    name: str,
    found: Counter[str],
    counter: FlopCounterMode,
    stack: ExitStack,
) -> None:
    """Add what happens in `nodes` to what is `found` under `name`, until `stack` ends."""
    begun: list[int] = []

    def before(*_: Any) -> None:
        begun.append(counter.get_total_flops())

    def after(*_: Any) -> None:
        found[name] += counter.get_total_flops() - begun.pop()

    for node in nodes:
        stack.callback(node.register_prehook(before).remove)
        stack.callback(node.register_hook(after).remove)


def _nodes_from(last: Any, ends: Iterable[Any] = ()) -> Iterator[Any]:
    """The nodes of a graph from `last` on, as far as those of `ends`; leaves are left out."""
    done = {None, *ends}
    left = [last]
    while left:
        node = left.pop()
        if node in done or hasattr(node, "variable"):
            continue
        done.add(node)
        yield node
        left += [inner for inner, _ in node.next_functions]
