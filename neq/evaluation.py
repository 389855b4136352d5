"""A model evaluated without a trace: modes, precision and random streams are as before."""

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


def inputs_of(batch: Any, device: torch.device) -> Tensor:
    """The inputs of a batch, a tensor or a tuple that begins with one, on `device` and not in half
    precision; raises TypeError for anything else.
    """
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(f"a validation batch must begin with a tensor, not {type(inputs).__name__}")
    return full_precision(inputs.to(device))


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor, as float32 where it is in half precision."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def by_sample(output: Tensor, axis: int, samples: int) -> Tensor:
    """A layer's output with its neurons, which lie at `axis`, last, and by sample: [samples, …,
    neurons]; one row of all where samples are not the outermost axis.
    """
    last = output.detach().movedim(axis, -1)
    rows = samples if last.dim() > 1 and last.shape[0] % samples == 0 else 1
    return torch.unflatten(last, 0, (rows, -1))


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
        with uncompiled(), torch.random.fork_rng(cuda), torch.no_grad(), half, _ieee():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
