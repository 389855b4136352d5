"""Weights that training starts from: of a file, or by a name that torchvision or timm knows."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import UserError, one_line
from harness.suite.config import Model
from harness.vision import torchvision

LIBRARIES = ("torchvision", "timm")


def weights_identity(weights: str) -> str:
    """What a trial's key knows of its weights: their name, or the hash of a file.

    Raises UserError for a file that can't be read.
    """
    if not weights or weights.partition(":")[0] in LIBRARIES:
        return weights
    try:
        with Path(weights).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(
            f"model.weights: {weights} cannot be read ({error.strerror}); give a file, "
            "torchvision:NAME or timm:NAME"
        ) from None


def load_weights(model: nn.Module, parts: Model) -> None:
    """Fill `model` with the weights that the suite's model table (`parts`) names, if any.

    Every parameter and buffer must be there in its shape, but for excluded layers (a head for
    other classes starts anew); what the weights have beyond the model must be whole parts of their
    own (a head that the model has not). Raises UserError for weights of another architecture.
    """
    if not parts.weights:
        return
    try:
        target = model.get_submodule(parts.weights_into)
    except AttributeError:
        raise UserError(
            f"model.weights_into: no part of the model is called {parts.weights_into!r}"
        ) from None
    wanted = target.state_dict()
    state = _converted(_read(parts.weights), target)
    head = tuple(f"{name}." for name in parts.exclude)
    prefix = f"{parts.weights_into}." if parts.weights_into else ""
    fitting = {k: v for k, v in state.items() if k in wanted and v.shape == wanted[k].shape}
    missing = [k for k in wanted if k not in fitting and not _optional(prefix + k, head)]
    known = {key.partition(".")[0] for key in wanted}
    beyond = [k for k in state if k not in wanted and k.partition(".")[0] in known]
    if wrong := missing or beyond:
        raise UserError(
            f"model.weights: {parts.weights} belongs to another architecture: {len(wrong)} tensors "
            f"{'are missing or have another shape' if missing else 'are too many'}, "
            f"such as {wrong[0]}"
        )
    target.load_state_dict(fitting, strict=False)


def _optional(name: str, head: tuple[str, ...]) -> bool:
    """A head starts anew; older files do not have the counter, which torch fills in."""
    return name.startswith(head) or name.endswith(".num_batches_tracked")


def _converted(state: dict[str, Tensor], target: nn.Module) -> dict[str, Tensor]:
    """timm's models know the layout in which their authors published them."""
    module = sys.modules[type(target).__module__]
    if not module.__name__.startswith("timm.") or state.keys() == target.state_dict().keys():
        return state
    convert = getattr(module, "checkpoint_filter_fn", None)
    converted: dict[str, Tensor] = convert(state, target) if convert else state
    return converted


def _read(weights: str) -> dict[str, Tensor]:
    library, _, name = weights.partition(":")
    try:
        if library == "torchvision":
            chosen = torchvision("torchvision.models").get_weight(name)
            state = chosen.get_state_dict(progress=False, check_hash=True)
        elif library == "timm":
            state = torchvision("timm").create_model(name, pretrained=True).state_dict()
        elif weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(weights)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"model.weights: {weights} cannot be loaded "
            f"({type(error).__name__}: {one_line(error)}); "
            "give a file of tensors, torchvision:NAME or timm:NAME"
        ) from None
    return _tensors(state, weights)


def _tensors(state: Any, weights: str) -> dict[str, Tensor]:
    """A state dict, also inside a checkpoint that keeps it under a usual name."""
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"model.weights: {weights} holds no state dict")
    return {key.removeprefix("module."): value for key, value in state.items()}
