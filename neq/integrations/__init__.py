"""NeuronFreezer in loops that others wrote: Lightning, the Trainer of transformers; and loggers.

Each module needs a package of its own, and is imported only when it is asked for.
"""


def missing(package: str, extra: str) -> ImportError:
    """What to raise where `package` is not installed; `extra`: of neqbench, which brings it."""
    return ImportError(f"{package} is not installed: pip install 'neqbench[{extra}]'")
