"""Training by torch.compile: the model compiled, and what can't be."""

import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.errors import UserError
from harness.methods import Method, Training
from harness.methods.building import build_method
from harness.suite.config import TrialSpec
from neq.compiled import forgotten

BACKEND = "inductor"  # of torch.compile
CAPABILITY = 7  # of a GPU, for Triton
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def compiled(model: nn.Module) -> nn.Module:
    """The model as torch.compile makes it, with the same parameters.

    Each shape of a batch has a graph of its own. With one for all of them, made when a second shape
    comes, a resumed trial would begin by another graph than an uninterrupted one, which may round
    otherwise.
    """
    # Inductor advises TensorFloat32 wherever it is off; the recipe's precision decides.
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    module: Any = torch.compile(model, backend=BACKEND, dynamic=False)
    assert isinstance(module, nn.Module)
    return module


def start_anew() -> None:
    """Forget what this process has compiled: other trials' graphs count among those that torch
    keeps of a function, and it looks at no hooks when it takes one of them.
    """
    torch.compiler.reset()
    forgotten()


@contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, models are compiled to graphs of torch's own operators, which needs no compiler."""
    global BACKEND
    before, BACKEND = BACKEND, "aot_eager"
    try:
        yield
    finally:
        BACKEND = before


def build(spec: TrialSpec, training: Training) -> Method:
    """As build_method; where the recipe compiles, raises UserError for a method that hooks layers
    of the model, too.
    """
    before = list(_hooks(training.model))
    method = build_method(spec, training)
    if not spec.suite.recipe.compile:
        return method
    if list(_hooks(training.model)) != before:
        raise UserError(
            f"method {spec.method} looks at layers one by one, and can't be trained with "
            "recipe.compile, which makes one graph of them; drop it from the methods"
        )
    from torch._functorch import config

    # One that looks at a forward may go back through its graph, and the backward after it.
    config.donated_buffer = getattr(method.after_forward, "__func__", None) is Method.after_forward
    return method


def _hooks(model: nn.Module) -> Iterator[tuple[str, str, int]]:
    for name, module in model.named_modules():
        for kind in HOOKS if name else ():  # those of the whole model are not inside a graph
            yield name, kind, len(getattr(module, kind))


def check_compiler(device: torch.device) -> None:
    """Raises UserError where torch.compile lacks what it needs to compile for the device."""
    lacking = _lacking(device) if BACKEND == "inductor" else ""
    if lacking:
        raise UserError(f"torch.compile {lacking}, or do without recipe.compile (--compile)")


def _lacking(device: torch.device) -> str:
    """What the matter is and how to mend it; empty where nothing is."""
    if device.type == "cuda":
        return _lacking_gpu(device)
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:  # its type is not public
        named = os.environ.get("CXX", "g++")
        return f"needs a C++ compiler, and {named} does not run here; install g++, set CXX"
    headers = Path(sysconfig.get_path("include"))
    if sys.platform == "linux" and not (headers / "Python.h").exists():
        return f"needs Python.h, and {headers} has none; install python3-dev"
    return ""


def _lacking_gpu(device: torch.device) -> str:
    from torch.utils._triton import has_triton_package

    amd = torch.version.hip is not None
    if not amd and torch.cuda.get_device_capability(device) < (CAPABILITY, 0):
        return f"has no use for {torch.cuda.get_device_name(device)}, too old; take another GPU"
    if not has_triton_package():
        return "needs Triton on a GPU, and it is not installed; pip install triton"
    if not (os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang", "cc")))):
        return "needs a C compiler for Triton, and there is none; install gcc, set CC"
    return ""
