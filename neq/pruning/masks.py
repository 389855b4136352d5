"""Weights that are pruned: zero for good, under any of torch's optimizers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neq.neurons import Layer, NeuronIndex, unwrapped
from neq.optimizers import bare
from neq.selective import plain_type

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element
PRUNABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def prunable(model: nn.Module, exclude: Iterable[str] = ()) -> tuple[Layer, ...]:
    """The linear and convolution layers of `model` whose weights can be pruned.

    Norms, biases, and weights that are shared or parametrised are never among them. `exclude`:
    names of layers, or dotted prefixes, to leave out. Raises ValueError for a name that matches no
    layer, and where nothing is left.
    """
    index = NeuronIndex(unwrapped(model))
    left_out = index.select(exclude)
    found = tuple(
        layer
        for layer in index.layers
        if plain_type(layer.module) in PRUNABLE and not left_out[layer.neurons].all()
    )
    if not found:
        raise ValueError("the model has no linear or convolution layer whose weights can be pruned")
    return found


def weight(layer: Layer) -> nn.Parameter:
    """The weight of a prunable layer: [neurons, inputs of a neuron, …]."""
    found = layer.module.weight
    assert isinstance(found, nn.Parameter)
    return found


@dataclass(frozen=True, slots=True)
class Size:
    """How large a layer or a model is, and what pruning has left of it.

    `parameters`: all of them, biases and norms too; `neurons`: rows of prunable weights. A neuron
    is left while one weight of its row is.
    """

    parameters: int
    parameters_left: int
    neurons: int
    neurons_left: int


class Masks:
    """Which weights of `model` are left: the others are zero after every step of `optimizer`.

    `kept`: by layer name, bool of the weight's shape, True where the weight is left. Raises
    ValueError for LBFGS, which moves all parameters along one direction.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, exclude: Iterable[str] = ()) -> None:
        optimizer = bare(optimizer)
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS moves all parameters along one direction: none can stay zero")
        self._model = unwrapped(model)
        self.layers = {layer.name: layer for layer in prunable(model, exclude)}
        self.kept = {
            name: torch.ones_like(weight(layer), dtype=torch.bool)
            for name, layer in self.layers.items()
        }
        self._bits: list[tuple[Tensor, Tensor]] = []
        self._handle = optimizer.register_step_post_hook(lambda *_: self.apply())

    def set(self, kept: Mapping[str, Tensor]) -> None:
        """In the layers of `kept` (as the attribute) leave these weights and no others.

        Raises ValueError for other layers or shapes.
        """
        for name, mask in kept.items():
            if name not in self.kept or mask.dtype != torch.bool:
                raise ValueError(f"mask of {name!r} must be bool, and the layer prunable")
            if mask.shape != self.kept[name].shape:
                raise ValueError(
                    f"mask of {name!r} must be {list(self.kept[name].shape)} as its weight, got "
                    f"{list(mask.shape)}"
                )
        for name, mask in kept.items():
            self.kept[name] = mask.to(self.kept[name].device, copy=True)
        part = [name for name, mask in self.kept.items() if not bool(mask.all())]
        self._bits = []
        for name in part:
            w = weight(self.layers[name])
            self._bits.append((w, -self.kept[name].to(_INTEGERS[w.element_size()])))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Make what is pruned zero again; a step of the optimizer calls it."""
        for parameter, bits in self._bits:
            # By bits, all or none: a product with zero is no zero where a gradient was not finite.
            parameter.detach().view(bits.dtype).bitwise_and_(bits)

    def sizes(self) -> dict[str, Size]:
        """The size of each prunable layer, by name."""
        found = {}
        for name, kept in self.kept.items():
            parameters = sum(p.numel() for p in self.layers[name].parameters)
            pruned = kept.numel() - int(kept.sum())
            rows = int(kept.flatten(1).any(1).sum())
            found[name] = Size(parameters, parameters - pruned, len(kept), rows)
        return found

    def size(self) -> Size:
        """The size of the whole model; its neurons are those of the prunable layers."""
        layers = self.sizes().values()
        pruned = sum(size.parameters - size.parameters_left for size in layers)
        parameters = sum(p.numel() for p in self._model.parameters())
        neurons = (sum(size.neurons for size in layers), sum(size.neurons_left for size in layers))
        return Size(parameters, parameters - pruned, *neurons)

    def forward_shares(self) -> dict[str, tuple[float, float]]:
        """By layer, shares of its multiply-accumulates: (of the surviving rows and columns, of the
        weights that are left).

        A row survives while one of its weights is left, a column while one weight reads it: what
        a dense kernel computes once both are removed. Of a grouped convolution each group has rows
        and columns of its own.
        """
        return {name: _shares(kept, self.layers[name].module) for name, kept in self.kept.items()}

    def state_dict(self) -> dict[str, Any]:
        """Which weights are left, by layer, where not all are; the weights are the model's."""
        return {name: mask.clone() for name, mask in self.kept.items() if not bool(mask.all())}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        every = {name: torch.ones_like(mask) for name, mask in self.kept.items()}
        self.set(every | dict(state))

    def remove(self) -> None:
        """Let go of the optimizer: from here on nothing is held at zero."""
        self._handle.remove()


def _shares(kept: Tensor, module: nn.Module) -> tuple[float, float]:
    used = kept.flatten(2).any(2) if kept.dim() > 2 else kept
    by_group = used.reshape(getattr(module, "groups", 1), -1, used.shape[1])
    rows, columns = by_group.any(2).sum(1), by_group.any(1).sum(1)
    structure = float((rows * columns).sum()) / used.numel()
    return structure, float(kept.sum()) / kept.numel()
