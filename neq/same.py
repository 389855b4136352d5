"""Whether a model is one that can be worked on, and still the one that was begun with."""

import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from neq.neurons import Layer, NeuronIndex, lazy_layers, owners_of, why_unsupported


def check_whole(model: nn.Module) -> None:
    """Raises ValueError where a layer has no size yet, or a process only a part of a parameter."""
    if lazy := lazy_layers(model):
        raise ValueError(
            f"layer {lazy[0]} has no size yet: run one forward first, then make optimizer and "
            "freezer"
        )
    if (name := _sharded(model)) is not None:
        raise ValueError(
            f"NeuronFreezer needs whole parameters, and {name} is sharded (FSDP, tensor "
            "parallelism): use DistributedDataParallel"
        )


def _sharded(model: nn.Module) -> str | None:
    """The name of a parameter that is there in part, None where there is none."""
    sharding: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    wrapping: Any = getattr(
        sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ()
    )
    wrapped = [module for module in model.modules() if isinstance(module, wrapping)]
    inside = {id(parameter) for module in wrapped for parameter in module.parameters()}
    found = (
        name
        for name, parameter in model.named_parameters()
        if isinstance(parameter, sharding) or id(parameter) in inside
    )
    return next(found, None)


class Structure:
    """The layers of `model`, and their parameters, when `neurons` was made of it."""

    def __init__(self, model: nn.Module, neurons: NeuronIndex) -> None:
        self._model, self._layers = model, neurons.layers
        self._modules = set(_with_parameters(model))
        self._parameters = {layer.name: layer.parameters for layer in neurons.layers}
        self._shapes = {layer.name: _shape(layer.module) for layer in neurons.layers}

    def check(self, by_name: bool) -> None:
        """Raises ValueError where layers are others than they were, or of other sizes; `by_name`:
        or have other names. What is moved to another device, or cast, is the same.
        """
        check_whole(self._model)
        names = {module: name for name, module in self._model.named_modules()}
        owners = owners_of(self._model)
        for layer in self._layers:
            reason = why_unsupported(layer.module, owners)
            if change := self._change(layer, layer.module in names, reason):
                raise ValueError(f"layer {layer.name} {change}: make a new freezer")
            if by_name and names[layer.module] != layer.name:
                now = names[layer.module]
                raise ValueError(f"layer {layer.name} is called {now} now: make a new freezer")
        for module in _with_parameters(self._model):
            if module not in self._modules and not why_unsupported(module, owners):
                raise ValueError(f"layer {names[module]} is new: make a new freezer")

    def _change(self, layer: Layer, present: bool, reason: str) -> str:
        """What has become of `layer`, empty where nothing has; `reason`: why it can't freeze."""
        if not present:
            modules = dict(self._model.named_modules())
            if layer.name not in modules:
                return "is gone"
            resized = _resized(self._shapes[layer.name], _shape(modules[layer.name]))
            return resized or "has been replaced"
        if reason:
            return f"can't freeze any more, since {reason}"
        if resized := _resized(self._shapes[layer.name], _shape(layer.module)):
            return resized
        now, then = layer.parameters, self._parameters[layer.name]
        same = len(now) == len(then) and all(a is b for a, b in zip(now, then, strict=True))
        return "" if same else "has other parameters than it had"


def _with_parameters(model: nn.Module) -> Iterator[nn.Module]:
    return (m for m in model.modules() if any(True for _ in m.parameters(recurse=False)))


def _shape(module: nn.Module) -> tuple[int, ...]:
    """Of a layer: neurons, inputs, and the size of a kernel."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.dim():
        return ()
    neurons, *rest = weight.shape
    return (neurons, *(n * getattr(module, "groups", 1) for n in rest[:1]), *rest[1:])


def _resized(then: tuple[int, ...], now: tuple[int, ...]) -> str:
    """How a layer's shape has changed, empty where it has not."""
    if now in (then, ()):
        return ""
    for what, before, after in zip(("neurons", "inputs"), then, now, strict=False):
        if before != after:
            return f"had {before} {what} and has {after}"
    return f"had weights of shape {list(then)} and has {list(now)}"
