"""A model evaluated without a trace: modes, precision and random streams are as before."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from neq.calls import Run

State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """All parameters and buffers, by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def arguments(model: nn.Module, state: Mapping[str, Tensor]) -> State:
    """`state` without half precision; buffers, which a forward may change in place, are copies."""
    buffers = dict(model.named_buffers())
    return {
        name: full_precision(tensor.clone() if name in buffers else tensor)
        for name, tensor in state.items()
    }


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor, as float32 where it is in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _Holder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Run) -> Any:
        return run(self.model)


def run_with(model: nn.Module, state: Mapping[str, Tensor], run: Run) -> Any:
    """`run(model)`, in which the model's parameters and buffers are those of `state`."""
    held = {f"model.{name}": tensor for name, tensor in state.items()}
    return functional_call(_Holder(model), held, (run,))


Hook = Callable[[nn.Module, Any, Tensor], None]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Inside, each module calls its hook with (itself, arguments, output) after its forward."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _ieee() -> Iterator[None]:
    """No TF32 or bf16 inside float32 products: they put phi off by 5e-4, against an eps of 1e-3."""
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    cpu: Any = torch.backends.mkldnn
    products = (cuda.matmul, cudnn.conv, cudnn.rnn, cpu.matmul, cpu.conv, cpu.rnn)
    before = [product.fp32_precision for product in products]
    convolution = _older(lambda: cudnn.allow_tf32)
    product_precision = _older(torch.get_float32_matmul_precision)
    try:
        if convolution is not None:
            cudnn.allow_tf32 = False
        if product_precision is not None:
            torch.set_float32_matmul_precision("highest")
        for product in products:
            product.fp32_precision = "ieee"
        yield
    finally:
        if convolution is not None:
            cudnn.allow_tf32 = convolution
        if product_precision is not None:
            torch.set_float32_matmul_precision(product_precision)
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision


@contextmanager
def unfused() -> Iterator[None]:
    """Inside, torch's encoders call their parts: fused, they skip them, and hand nested tensors to
    them under a padding mask.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _older(read: Callable[[], Any]) -> Any:
    """torch's older settings, which must agree with the newer or a model that reads them fails.

    None where the process has set only the newer ones.
    """
    try:
        return read()
    except RuntimeError:
        return None


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what torch.compile was applied to runs as it is written, and nothing is compiled."""
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled, and it loads slowly
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _unpatched(model: nn.Module) -> Iterator[None]:
    """Inside, a model has the forward that it had before Accelerate put an autocast around it."""
    both = {"forward", "_original_forward"}
    patched = [vars(module) for module in model.modules() if both <= vars(module).keys()]
    forwards = [attributes["forward"] for attributes in patched]
    try:
        for attributes in patched:
            attributes["forward"] = attributes["_original_forward"]
        yield
    finally:
        for attributes, forward in zip(patched, forwards, strict=True):
            attributes["forward"] = forward


@contextmanager
def evaluation(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode, no gradients, plain float32, not compiled, and every random stream restored
    afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state() if numpy else None
    cuda = [device] if device.type == "cuda" else []
    try:
        model.eval()
        half = torch.autocast(device.type, enabled=False)
        plain = uncompiled(), _unpatched(model), half, _ieee(), unfused()
        with torch.random.fork_rng(cuda), torch.no_grad(), ExitStack() as stack:
            for each in plain:
                stack.enter_context(each)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
