"""Benchmark harness: what freezing neurons saves in training, and what it costs in accuracy."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.flops.counted import FlopCount, count_flops
    from harness.storage.frames import Results, load_results
    from harness.train.pays import pays
    from harness.train.proof import Proof, VerificationError, verify

__all__ = [
    "FlopCount",
    "Proof",
    "Results",
    "VerificationError",
    "count_flops",
    "load_results",
    "pays",
    "verify",
]

_ROOMS = {
    "FlopCount": "harness.flops.counted",
    "Proof": "harness.train.proof",
    "Results": "harness.storage.frames",
    "VerificationError": "harness.train.proof",
    "count_flops": "harness.flops.counted",
    "load_results": "harness.storage.frames",
    "pays": "harness.train.pays",
    "verify": "harness.train.proof",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: `neqbench --help` needs no pandas and no torch."""
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
