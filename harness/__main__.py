"""`python -m harness` is `neqbench`."""

from harness.cli import main

if __name__ == "__main__":
    main()
