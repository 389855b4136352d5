"""Benchmark harness: what freezing neurons saves in training, and what it costs in accuracy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.storage.frames import Results, load_results

__all__ = ["Results", "load_results"]


def __getattr__(name: str) -> Any:
    """Import `Results` and `load_results` when asked for: `neqbench --help` needs no pandas."""
    if name in __all__:
        from harness.storage import frames

        return getattr(frames, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
