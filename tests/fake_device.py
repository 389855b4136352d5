"""An accelerator that is none: tensors say that they lie on it, and the CPU computes them.

Values are real, so that trials run there and must give what they give on the CPU. Operands on two
devices are refused, as by a GPU; inside `strict()` also what would make the host wait for one.
`install` is for the rest of a process: let it be one of the tests' own.
"""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretended"
aten = torch.ops.aten
# What tells the host a value, or has a shape that depends on values.
READS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
    aten.repeat_interleave,
}
COPIES = {aten._to_copy, aten.copy_}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
MAKERS = (torch.tensor, torch.as_tensor)  # they don't ask the dispatcher


class WaitedError(RuntimeError):
    """The host would have waited for the device."""


class OnDevice(Tensor):
    """A tensor on the device; `held`: its values, on the CPU."""

    @staticmethod
    def __new__(cls, held):
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), keywords=None):
        return _compute(operation, arguments, keywords or {})

    def __repr__(self):
        return f"OnDevice({self.held})"


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        return _compute(operation, arguments, keywords or {})


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if function in MAKERS and _is_ours(keywords.get("device")):
            device = keywords.pop("device")
            return function(*arguments, **keywords).to(device)
        if function is Tensor.tolist:
            return arguments[0].cpu().tolist()
        return function(*arguments, **keywords)


class _Rules:
    strict = False


@contextmanager
def strict():
    """Inside, WaitedError is raised where the host would wait for the device."""
    _Rules.strict = True
    try:
        yield
    finally:
        _Rules.strict = False


def _compute(operation, arguments, keywords):
    """The operation on the CPU; its result lies where a GPU would have it."""
    given = [t for t in tree_leaves((arguments, keywords)) if isinstance(t, Tensor)]
    here = any(isinstance(t, OnDevice) for t in given)
    wanted = keywords.get("device")
    there = here if wanted is None else _is_ours(wanted)
    if here or there:
        _check(operation.overloadpacket, given, here, there)
    if wanted is not None:
        keywords = keywords | {"device": torch.device("cpu") if there else wanted}
    result = operation(*_held(arguments), **_held(keywords))
    if not there:
        return result
    wrapped = tree_map(lambda t: OnDevice(t) if isinstance(t, Tensor) else t, result)
    return return_and_correct_aliasing(operation, arguments, keywords, wrapped)


def _check(kind, given, here, there):
    """Raises what a GPU would raise, or WaitedError; as there, a CPU's scalar may be an operand."""
    others = [t for t in given if not isinstance(t, OnDevice)]
    moves = kind in COPIES and (others or here != there)
    if here and kind not in COPIES | INDEXING and any(t.dim() for t in others):
        shapes = [tuple(t.shape) for t in others]
        raise RuntimeError(f"{kind}: expected all tensors on the device, but {shapes} are not")
    masks = any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])
    looks = kind in READS or (kind in INDEXING and (others or masks))
    if _Rules.strict and (moves or looks):
        raise WaitedError(f"{kind}: the host would wait for the device")


def _is_ours(device):
    return device is not None and torch.device(device).type == NAME


def _held(tree):
    return tree_map(lambda t: t.held if isinstance(t, OnDevice) else t, tree)


class _Module:
    """What torch asks of an accelerator."""

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    manual_seed_all = staticmethod(lambda _seed: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    _is_in_bad_fork = staticmethod(lambda: False)


def install():
    """Make the device known to torch, for the rest of this process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())


@contextmanager
def present():
    """Inside, tensors can be made on the device: yields it. Nothing can be traced meanwhile."""
    with _Operations(), _Functions():
        yield torch.device(NAME, 0)
