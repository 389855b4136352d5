"""`python -m harness` is `neqbench`."""

import sys

try:
    from harness.cli import main

    if __name__ == "__main__":
        main()
except ModuleNotFoundError as error:
    print(
        f"error: {sys.executable} has no module {error.name}; install neqbench there (on a "
        "cluster: activate its environment before `ray start`)",
        file=sys.stderr,
    )
    sys.exit(2)
