"""Every neuron of a model in one flat index.

A neuron is one output channel of a convolution or linear layer and, separately, one channel of a
normalisation layer (NEq, section 3; the reference code counts them the same way).
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from neq.selective import plain_type

if TYPE_CHECKING:
    from neq.required import RequiredFlops

# Layers whose neurons can freeze, with the axis of their output that holds the neurons.
# By exact type: a subclass may mean something else (torchvision's LayerNorm2d norms axis 1).
NEURON_AXIS: dict[type[nn.Module], int] = {
    nn.Linear: -1,
    nn.Conv1d: -2,
    nn.Conv2d: -3,
    nn.Conv3d: -4,
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 1,
    nn.BatchNorm3d: 1,
    nn.SyncBatchNorm: 1,
    nn.GroupNorm: 1,
    nn.LayerNorm: -1,
}


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """One layer of the index.

    `neurons`: its slice of the index; row i of each of its parameters belongs to neuron
    `neurons.start + i`. `axis`: the axis of its output that holds its neurons.
    """

    name: str
    module: nn.Module
    neurons: slice
    axis: int

    @property
    def size(self) -> int:
        """How many neurons the layer has."""
        return int(self.neurons.stop - self.neurons.start)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weight and, where there is one, bias; both have one row per neuron."""
        return list(self.module.parameters(recurse=False))


def lazy_layers(model: nn.Module) -> list[str]:
    """The names of the layers of `model` whose sizes only a first forward tells (nn.LazyLinear)."""
    return [
        name
        for name, module in model.named_modules()
        if any(is_lazy(t) for t in (*module._parameters.values(), *module._buffers.values()))
    ]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel or torch.compile's wrapper."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = getattr(model, "_orig_mod", model)
        inner = inner.module if isinstance(inner, wrappers) else inner
        if inner is model:
            return model
        model = inner


class NeuronIndex:
    """All neurons of a model in one flat index, in the order in which its modules are registered.

    `len()` is the number of neurons; `index["layer1.0.conv1"]` is that layer's slice;
    `.items()` yields (layer name, slice). `.unsupported` maps the other modules that hold
    parameters to the reason why their neurons never freeze. `.fixed`, bool [neurons]: whose layers
    the user keeps from training; `.excluded`, bool [neurons]: who is never to freeze; `.freezable`,
    bool [neurons]: who may, neither fixed nor excluded; `.flops`: what a backward costs, None until
    somebody has counted it.
    """

    def __init__(self, model: nn.Module) -> None:
        owners = owners_of(model)
        self.unsupported: dict[str, str] = {}
        self.layers: tuple[Layer, ...] = ()
        start = 0
        for name, module in model.named_modules():
            if not any(True for _ in module.parameters(recurse=False)):
                continue
            reason = why_unsupported(module, owners)
            if reason:
                self.unsupported[name] = reason
                continue
            weight = module.weight
            assert isinstance(weight, Tensor)
            neurons = slice(start, start + weight.shape[0])
            self.layers += (Layer(name, module, neurons, NEURON_AXIS[plain_type(module)]),)
            start = neurons.stop
        self._size = start
        self.excluded = torch.zeros(start, dtype=torch.bool)
        self.flops: RequiredFlops | None = None
        self._slices = {layer.name: layer.neurons for layer in self.layers}

    def __len__(self) -> int:
        return self._size

    def __bool__(self) -> bool:
        return self._size > 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __contains__(self, name: object) -> bool:
        return name in self._slices

    def __getitem__(self, name: str) -> slice:
        return self._slices[name]

    @property
    def freezable(self) -> Tensor:
        """bool [neurons]: who may freeze now."""
        return ~(self.excluded | self.fixed)

    @freezable.setter
    def freezable(self, mask: Tensor) -> None:
        self.excluded = ~mask

    @property
    def fixed(self) -> Tensor:
        """bool [neurons]: True where, now, no parameter of the neuron's layer needs a gradient.

        Such a neuron is the user's to keep: it never freezes.
        """
        mask = torch.zeros(len(self), dtype=torch.bool)
        for layer in self.layers:
            mask[layer.neurons] = not any(p.requires_grad for p in layer.parameters)
        return mask

    def items(self) -> Iterable[tuple[str, slice]]:
        """(layer name, slice of its neurons) in order."""
        return self._slices.items()

    def select(self, names: Iterable[str]) -> Tensor:
        """A mask, bool [neurons]: True for the layers named, by their names or dotted prefixes.

        Raises ValueError for a name that matches no layer.
        """
        mask = torch.zeros(len(self), dtype=torch.bool)
        for prefix in names:
            found = [part for name, part in self.items() if _below(name, prefix)]
            if not found and not any(_below(name, prefix) for name in self.unsupported):
                raise ValueError(f"no layer is called {prefix!r}; layers: {', '.join(self)}")
            for neurons in found:
                mask[neurons] = True
        return mask


def _below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def owners_of(model: nn.Module) -> Counter[int]:
    """How many modules of `model` have each parameter, by its id."""
    return Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))


def why_unsupported(module: nn.Module, owners: Counter[int]) -> str:
    """Empty where every row of the module's parameters belongs to one neuron, else the reason."""
    parameters = dict(module.named_parameters(recurse=False))
    if plain_type(module) not in NEURON_AXIS:
        return f"{type(module).__name__} is not a supported layer"
    if not parameters.keys() <= {"weight", "bias"} or "weight" not in parameters:
        return "its weight is parametrised"
    if any(p.is_complex() for p in parameters.values()):
        return "its parameters are complex"
    if any(owners[id(p)] > 1 for p in parameters.values()):
        return "its parameters are shared with another module"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        return "it normalises over more than the last axis"
    return ""
