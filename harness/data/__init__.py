"""Data sets: what a suite's data part returns, and the batches that a trial takes from it.

`Data` are the options that a suite's file gives; `Images` (of a `Split` each for training and test)
fit into memory; `Samples` (of a `Source` each, with a `Transform`) are decoded one by one.
"""

from harness.data.memory import Images, Split
from harness.data.streamed import Samples, Source, Transform
from harness.suite.config import Data

__all__ = ["Data", "Images", "Samples", "Source", "Split", "Transform"]
