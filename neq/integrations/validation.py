"""The samples that a callback decides on: a few of those that the loop validates on."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import distributed, nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from neq.batches import check_batches
from neq.parallel import workers
from neq.policies import Policy, check_policy

BATCH = 32  # samples, where a loader does not say


def check_choice(policy: Policy | None, samples: int, batches: Iterable[Any] | None) -> None:
    """Raises TypeError and ValueError for what no callback can decide by, or on."""
    check_policy(policy)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    check_batches(batches)
    if isinstance(batches, Iterator):
        raise ValueError(
            "validation_batches can be read only once: give a list or a DataLoader, since "
            "every epoch begins with them"
        )


def validation_batches(loader: Any, samples: int) -> DataLoader[Any]:
    """This process's share of `samples` samples of a loader's data, at equal distances.

    They are read in order, in this process and put together as the loader does it; samples of all
    processes are other ones, and none is repeated. Raises ValueError where there is no loader, or
    where its data have no samples that can be counted.
    """
    data = getattr(loader, "dataset", None)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if data is None and loader is not None:
        raise ValueError(
            f"the eval loader ({type(loader).__name__}) is no DataLoader, so that a part of its "
            "data can't be read: give one, or pass validation_batches=…"
        )
    if data is None:
        raise ValueError(
            "neurons are frozen by what they do on validation samples, and there is no eval set: "
            "give the trainer one, or pass validation_batches=…"
        )
    if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
        raise ValueError(
            f"the eval set ({type(data).__name__}) is iterable, so that a part of it can't be read "
            "again: give one with a length, or pass validation_batches=…"
        )
    if not len(data):
        raise ValueError("the eval set is empty: give one with samples, or validation_batches=…")
    count = min(samples, len(data))
    first = distributed.get_rank() if workers() > 1 else 0
    chosen = [i * len(data) // count for i in range(first, count, workers())]
    whole = loader.batch_size is None and loader.batch_sampler is None  # its samples are batches
    size = None if whole else loader.batch_size or BATCH
    return DataLoader(Subset(data, chosen), batch_size=size, collate_fn=loader.collate_fn)


def taken(model: nn.Module, batch: Any) -> Any:
    """`batch` without the items that the model's forward does not take, such as labels."""
    if not isinstance(batch, Mapping):
        return batch
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return batch
    return {name: value for name, value in batch.items() if name in parameters}
