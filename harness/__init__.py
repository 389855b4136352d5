"""Benchmark harness: what freezing neurons saves in training, and what it costs in accuracy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.results import Results, load_results

__all__ = ["Results", "load_results"]


def __getattr__(name: str) -> Any:
    """Imported when asked for: `neqbench --help` needs no pandas."""
    if name in __all__:
        from harness import results

        return getattr(results, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
