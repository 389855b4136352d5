"""What a GradScaler refuses: to step an optimizer none of whose parameters has a gradient."""

from typing import Any

from neq.freezer import NeuronFreezer
from neq.moved import listed
from neq.optimizers import parameters_of


def check_scaled(freezer: NeuronFreezer, scaler: Any) -> None:
    """Raises ValueError where `scaler`, a GradScaler or None, would refuse a step of an optimizer
    of the freezer's because all that it holds is frozen.
    """
    if scaler is None or not scaler.is_enabled():
        return
    layers = [x for x in freezer.neurons.layers if bool(freezer.frozen[x.neurons].all())]
    whole = {parameter for layer in layers for parameter in layer.parameters}
    for optimizer in freezer.optimizers:
        held = {p for p in parameters_of([optimizer]) if p.requires_grad}
        if held and held <= whole:
            names = [x.name for x in layers if any(p in held for p in x.parameters)]
            raise ValueError(
                f"all that an optimizer ({type(optimizer).__name__}) holds is frozen "
                f"({listed(names)}), and a GradScaler refuses such a step: exclude one of these "
                "layers, or train in bf16"
            )
