"""The data of a suite, by the function that it names."""

from pathlib import Path

from harness.data.dataset import Dataset
from harness.data.synthetic import synthetic
from harness.errors import UserError, with_origin
from harness.suite.config import Suite
from harness.suite.imports import importing
from harness.suite.parts import load_part


def load_data(suite: Suite, folder: Path | str) -> Dataset:
    """What the function at `data.load` returns, or noise where the suite asks for that.

    `folder`: of the suite's own modules. Raises UserError where the function fails, or returns
    neither Images nor Samples.
    """
    if suite.data.synthetic:
        return synthetic(suite, folder)
    try:
        load = load_part(suite.data.load, folder)
        with importing(folder):
            data = load(suite.data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{suite.data.load!r} failed: {with_origin(error)}") from error
    if not isinstance(data, Dataset):
        raise UserError(
            f"{suite.data.load!r} returned {type(data).__name__}, not Images or Samples"
        )
    return data
