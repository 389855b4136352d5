"""Import torchvision, or timm, on any build of torch."""

import importlib
from types import ModuleType

import torch

# torchvision's wheels link their operators to CUDA; on a CPU-only torch they do not load, and the
# import fails because it registers shapes for these two. Declaring them is enough for models,
# datasets and transforms.
_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def torchvision(module: str = "torchvision") -> ModuleType:
    """The imported `module`: torchvision, a part of it, or timm, which needs it."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name, schema in _OPERATORS.items():
            torch.library.define(f"torchvision::{name}", schema)
        importlib.import_module("torchvision")
    return importlib.import_module(module)
