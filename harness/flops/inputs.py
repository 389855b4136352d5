"""What a bare model is called with, as users write it: ids:int64:128,attention_mask:int64:128."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.errors import UserError
from neq.calls import Arguments

DTYPES = {
    "float32": torch.float32,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
EXAMPLE = "3x224x224, or input_ids:int64:128,attention_mask:int64:128"


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """One of them; `shape`: of a sample. Without a name it is given by its place."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    name: str | None = None

    def make(self, samples: int, device: torch.device | str, fill: Callable[..., Tensor]) -> Tensor:
        """For so many samples: a mask, which it is by its name, leaves nothing out; other integers
        are 0, and `fill` makes what is of floating point.
        """
        size, name = (samples, *self.shape), self.name or ""
        if "padding" in name:
            fill = torch.zeros
        elif self.dtype == torch.bool or "mask" in name:
            fill = torch.ones
        elif not self.dtype.is_floating_point:
            fill = torch.zeros
        return fill(size, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [self.name, None if self.dtype == torch.float32 and self.shape else dtype]
        return ":".join([*filter(None, words), "x".join(map(str, self.shape))])


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that a model is called with."""

    parts: tuple[Input, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "Inputs":
        """One input, of floating point."""
        return cls((Input(shape=shape),))

    @property
    def floating(self) -> bool:
        """Whether all are of floating point."""
        return all(part.dtype.is_floating_point for part in self.parts)

    def zeros(self, samples: int) -> Arguments:
        """On the CPU, to be counted."""
        return self._make(samples, "cpu", torch.zeros)

    def random(self, samples: int, device: torch.device | str = "cpu") -> Arguments:
        """What is of floating point is drawn from the global random stream."""
        return self._make(samples, device, torch.randn)

    def _make(
        self, samples: int, device: torch.device | str, fill: Callable[..., Tensor]
    ) -> Arguments:
        made = [(part.name, part.make(samples, device, fill)) for part in self.parts]
        return Arguments(
            args=tuple(tensor for name, tensor in made if name is None),
            kwargs={name: tensor for name, tensor in made if name is not None},
        )

    def __str__(self) -> str:
        return ",".join(map(str, self.parts))


def parse_inputs(text: str | None) -> Inputs:
    """The inputs that "3x224x224" or "input_ids:int64:128,attention_mask:int64:128" names.

    Of each the name and the dtype, float32, may be left out. Raises UserError for anything else.
    """
    parts = tuple(_parsed(text or "", part.strip()) for part in (text or "").split(","))
    names = [part.name for part in parts if part.name is not None]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--input {text}: {twice} is given twice")
    return Inputs(parts)


def _parsed(text: str, part: str) -> Input:
    *words, size = part.split(":")
    try:
        shape = tuple(int(axis) for axis in size.split("x")) if size or not words else ()
    except ValueError:
        shape = (0,)
    if min(shape, default=1) < 1:
        raise UserError(
            f"--input {text}: give one sample's shape, such as {EXAMPLE}; of one number: t:int64:"
        )
    given: dict[str, Any] = {}
    if words and (words[-1] in DTYPES or len(words) > 1):
        given["dtype"] = _dtype(text, words.pop())
    if words:
        given["name"] = _name(text, words.pop())
    if words:
        raise UserError(f"--input {text}: each is NAME:DTYPE:SHAPE, such as {EXAMPLE}")
    return Input(shape=shape, **given)


def _dtype(text: str, word: str) -> torch.dtype:
    if word not in DTYPES:
        raise UserError(f"--input {text}: {word!r} is no dtype here; it is {_any_of(DTYPES)}")
    return DTYPES[word]


def _name(text: str, word: str) -> str:
    if isinstance(getattr(torch, word, None), torch.dtype):
        _dtype(text, word)
    if not word.isidentifier():
        raise UserError(f"--input {text}: {word!r} is no name of an argument, such as {EXAMPLE}")
    return word


def _any_of(words: Any) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
