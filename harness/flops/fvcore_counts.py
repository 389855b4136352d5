"""Multiply-accumulates of a forward, from fvcore: three of its rules replaced, three added.

Nothing else imports fvcore, which traces with torch.jit, and torch has deprecated that. On a torch
without it no FLOPs are counted: `run` and `flops` end with one line that says so. `neq`, seconds,
memory, stored results and the oracle (torch's own counter) do without fvcore.
"""

import importlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.random import fork_rng
from torch.utils._pytree import tree_flatten, tree_unflatten

from harness.errors import UserError
from neq import NeuronIndex
from neq.calls import Arguments, tensors

UNCOUNTED = {"aten::lstm", "aten::gru", "aten::rnn_tanh", "aten::rnn_relu", "aten::bilinear"}
PRODUCTS = ("conv", "linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "attention")


class ForwardCounts:
    """fvcore's multiply-accumulates of one forward of `call(model)`, over the whole batch.

    `total`: of all products; `rule`: what the paper's convention counts of them (convolution and
    linear); `by_layer`: the same by layer, under "all" and "rule". `uncounted`: operators with
    parameters that fvcore can't count.
    """

    def __init__(self, model: nn.Module, call: Arguments, neurons: NeuronIndex) -> None:
        by_module, skipped = _fvcore(model, call)
        self.uncounted = sorted(skipped & UNCOUNTED)
        self.total, self.rule = _products(by_module[""]), _ruled(by_module[""])
        self.by_layer = {
            name: {"all": _products(by_module[inner]), "rule": _ruled(by_module[inner])}
            for name, inner in ((name, f"model.{name}".rstrip(".")) for name in neurons)
        }


def _products(count: Counter[str]) -> int:
    return int(sum(count[name] for name in PRODUCTS))


def _ruled(count: Counter[str]) -> int:
    return int(count["conv"] + count["linear"] + count["addmm"])


class _Traceable(nn.Module):
    """A model as fvcore's tracer wants one: of some tensors, and returning a tuple of them."""

    def __init__(self, model: nn.Module, call: Arguments) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._structure = tree_flatten((call.args, dict(call.kwargs)))
        self.inputs = tuple(leaf for leaf in self._leaves if isinstance(leaf, Tensor))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = iter(inputs)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return tuple(tensors(self.model(*args, **kwargs)))


def _fvcore_nn() -> ModuleType:
    """fvcore's module, imported without the warning that torch.jit is going."""
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):
                warnings.filterwarnings("ignore", ".*torch.jit", category)
            return importlib.import_module("fvcore.nn")
    except (ImportError, AttributeError) as error:
        missing = getattr(error, "name", None) or ""
        if isinstance(error, ModuleNotFoundError) and not missing.startswith("torch"):
            raise UserError(
                f"FLOPs can't be counted: {missing}, which that needs, is not installed; "
                "pip install fvcore"
            ) from error
        reason = str(error).partition(" (")[0]  # what follows is a path
        raise UserError(
            f"FLOPs can't be counted: fvcore, which counts them, does not load on torch "
            f"{torch.__version__} ({reason}); it needs torch.jit: install an older torch"
        ) from error


def _fvcore(model: nn.Module, call: Arguments) -> tuple[dict[str, Counter[str]], set[str]]:
    """By name of the module, "model.…" but for the whole, and the operators without a rule."""
    traceable = _Traceable(model, call)
    analysis = _fvcore_nn().FlopCountAnalysis(traceable, traceable.inputs)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention)
    analysis.set_op_handle("aten::_convolution_mode", _convolution_mode)
    analysis.set_op_handle("aten::baddbmm", _baddbmm)
    analysis.set_op_handle("aten::matmul", _matmul)
    analysis.set_op_handle("aten::linear", _linear)
    analysis.set_op_handle("aten::einsum", _einsum)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.tracer_warnings("none")
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    torch.clear_autocast_cache()  # a weight that was cast before would be a constant to the tracer
    try:
        with fork_rng([]), _seen_through():
            counted = dict(analysis.by_module_and_operator())
            return counted, set(analysis.unsupported_ops())
    except RuntimeError as error:
        if "unordered_map::at" not in str(error):
            raise
        raise RuntimeError(
            "a custom autograd.Function calls a module in its forward, which can't be traced: call "
            "the module outside, or hand the function its weights"
        ) from error


@contextmanager
def _seen_through() -> Iterator[None]:
    """Inside, regions with reentrant checkpointing are called as if they had none."""
    module: Any = torch.utils.checkpoint
    before, module.CheckpointFunction = module.CheckpointFunction, _Called
    try:
        yield
    finally:
        module.CheckpointFunction = before


class _Called:
    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        return function(*args)


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _attention(inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
    """Queries by keys, probabilities by values."""
    query, key, value = (_shape(v) for v in inputs[:3])
    return Counter(attention=prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))


def _matmul(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """fvcore's own handle knows no vectors and no batch on the right alone."""
    return Counter(matmul=prod(_shape(outputs[0])) * _shape(inputs[0])[-1])


def _linear(inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
    """fvcore's own handle knows no weight of one dimension, which is one row."""
    weight = _shape(inputs[1])
    return Counter(linear=prod(_shape(inputs[0])) * prod(weight[:-1]))


def _einsum(inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
    """Products of all indices; fvcore's own handle reads the figure from rounded text."""
    left, arrow, output = inputs[0].toIValue().replace(" ", "").partition("->")
    operands: list[set[str]] = []
    sizes: dict[str, int] = {}
    for letters, operand in zip(left.split(","), inputs[1].node().inputs(), strict=True):
        shape = _shape(operand)
        named = len(letters.replace("...", ""))
        batch = "".join(chr(0x400 + i) for i in range(len(shape) - named, 0, -1))
        operands.append(set(letters.replace("...", batch)))
        for letter, size in zip(letters.replace("...", batch), shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    if not arrow:
        output = "".join(letter for letter in sizes if left.count(letter) == 1)
    kept = set(output) | {letter for letter in sizes if ord(letter) > 0x400}
    total, done = 0, operands[0]
    for position, right in enumerate(operands[1:], start=1):  # two at a time, as torch does
        later = kept.union(*operands[position + 1 :])
        both = (done & (right | later)) | (right & (done | later))
        if done & right - later:  # else torch multiplies element by element
            total += prod(sizes[letter] for letter in both)
        done = both & later
    return Counter(einsum=total)


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    """A convolution with padding="same" or "valid"."""
    return Counter(conv=prod(_shape(outputs[0])) * prod(_shape(inputs[1])[1:]))


def _baddbmm(inputs: list[Any], _outputs: list[Any]) -> Counter[str]:
    left, right = (_shape(v) for v in inputs[1:3])
    return Counter(baddbmm=prod(left) * right[-1])
