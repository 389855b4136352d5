"""The data of a suite, by the function that it names."""

from pathlib import Path

from harness.data.dataset import Dataset
from harness.data.synthetic import synthetic
from harness.errors import UserError
from harness.suite.config import Suite
from harness.suite.parts import part, said


def load_data(suite: Suite, folder: Path | str) -> Dataset:
    """What the suite's data part returns; raises UserError where that is no Dataset."""
    if suite.data.synthetic:
        return synthetic(suite, folder)
    try:
        data = part(suite.data.load, folder)(suite.data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{suite.data.load!r} failed: {said(error)}") from error
    if not isinstance(data, Dataset):
        raise UserError(
            f"{suite.data.load!r} returned {type(data).__name__}, not Images or Samples"
        )
    return data
