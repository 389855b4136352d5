"""Benchmark harness: what freezing neurons saves in training, and what it costs in accuracy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.storage.frames import Results, load_results
    from harness.train.pays import pays

__all__ = ["Results", "load_results", "pays"]

_ROOMS = {
    "Results": "harness.storage.frames",
    "load_results": "harness.storage.frames",
    "pays": "harness.train.pays",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: `neqbench --help` needs no pandas and no torch."""
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
