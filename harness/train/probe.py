"""A linear probe: what a model's features are good for on data that it was not trained on."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import parallel
from harness.data.dataset import Dataset
from harness.data.load import load_data
from harness.errors import UserError
from harness.suite.config import Data, Suite
from harness.train.tuning import Tuning
from neq.evaluation import evaluation

STEPS = 1000  # of the solver, at the most


def probe_data(suite: Suite, folder: Path | str) -> Dataset:
    """The data of the suite's probe; noise where those of the suite are.

    Raises UserError where they can't be loaded.
    """
    assert suite.probe is not None
    options = Data(
        load=suite.probe.load,
        arguments=suite.probe.arguments,
        root=suite.probe.root,
        synthetic=suite.data.synthetic,
        validation_size=0,
    )
    return load_data(suite.model_copy(update={"data": options}), folder)


def check_probe(suite: Suite, folder: Path | str, model: nn.Module) -> None:
    """Raises UserError where the suite's probe fits neither its data nor this model."""
    probed_layer(suite, model)
    data, name = probe_data(suite, folder), f"suite {suite.name}: probe"
    if not suite.data.synthetic:
        _check_classes(name, data)
    counts, world = (len(data.indices[0]), len(data.sources[1])), suite.resources.world_size
    if min(counts) < world:
        raise UserError(f"{name}: {min(counts)} images for {world} workers; load more")
    recipe = suite.recipe.model_copy(update={"batch_size": 2, "forward_batch": None})
    batches = data.open(torch.device("cpu"), 0, recipe, most=2 * parallel.workers())
    for part in ("train", "test"):
        for inputs, _ in batches.evaluate(part, 2):
            if tuple(inputs.shape[1:]) != suite.model.input:
                raise UserError(
                    f"{name}: model.input is {list(suite.model.input)}, images of {data.name} are "
                    f"{list(inputs.shape[1:])}; let {data.options.load} bring them to that size"
                )
            features(suite, model, inputs)


def _check_classes(name: str, data: Dataset) -> None:
    """Raises UserError unless the test images are of classes that can be learnt."""
    labels = data.labels()
    if len(labels) < 2 or any(known.dim() != 1 or known.is_floating_point() for known in labels):
        raise UserError(
            f"{name}: {data.name} has no class for each image; let the labels of both sets be "
            "int64 tensors [images]"
        )
    train, test = (set(known.tolist()) for known in labels)
    if len(train) < 2:
        raise UserError(f"{name}: the training images of {data.name} are of one class")
    if unknown := sorted(test - train):
        raise UserError(
            f"{name}: classes differ: test images of {data.name} are of class "
            f"{', '.join(map(str, unknown[:5]))}, of which there is no training image"
        )


def probed_layer(suite: Suite, model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the layer whose inputs are the features; raises UserError."""
    assert suite.probe is not None
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if name := suite.probe.layer:
        if name in linear:
            return name, linear[name]
        known = ", ".join(linear) or "none"
        what = "is no Linear" if name in dict(model.named_modules()) else "does not exist"
        raise UserError(f"suite {suite.name}: probe.layer: {name!r} {what}; there are: {known}")
    heads = suite.model.exclude
    found = [n for n in linear if any(n == head or n.startswith(f"{head}.") for head in heads)]
    if len(found) != 1:
        raise UserError(
            f"suite {suite.name}: probe.layer: model.exclude names {len(found)} Linear layers, not "
            f"one; name the one whose inputs are the features: {', '.join(linear) or 'none'}"
        )
    return found[0], linear[found[0]]


@contextmanager
def _inputs(layer: nn.Linear) -> Iterator[list[Tensor]]:
    """Inside, what the layer is called with is put into the list."""
    seen: list[Tensor] = []

    def look(_layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(given[0] if given else named["input"])

    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def features(suite: Suite, model: nn.Module, inputs: Tensor) -> Tensor:
    """What the probed layer gets for a batch: float32 [samples, features].

    Raises UserError where it is not called once, with a vector for each sample.
    """
    name, layer = probed_layer(suite, model)
    with evaluation(model, inputs.device), _inputs(layer) as seen:
        model(inputs)
    shapes = [list(found.shape) for found in seen]
    if shapes != [[len(inputs), layer.in_features]]:
        raise UserError(
            f"suite {suite.name}: probe.layer: {name!r} gets {shapes or 'nothing'} of a batch of "
            f"{len(inputs)}, not one vector for each sample; name another Linear"
        )
    return seen[0]


def probe_metric(
    suite: Suite, folder: Path | str, model: nn.Module, tuning: Tuning, batch_size: int
) -> float:
    """The share of the probe's test samples that a logistic regression on its training samples
    classifies right, from the features of `model` as it is.

    Features are standardised. Every worker must ask; each computes its share of the features.
    """
    data, device = probe_data(suite, folder), next(model.parameters()).device
    batches = data.open(device, 0, suite.recipe)
    counts = {"train": len(data.indices[0]), "test": len(data.sources[1])}
    tables = []
    for part, count in counts.items():
        found = [
            (features(suite, model, tuning.apply(inputs)), labels)
            for inputs, labels in batches.evaluate(part, batch_size)
        ]
        tables += [_whole([x for x, _ in found], count), _whole([y for _, y in found], count)]
    fitted = _accuracy(*tables) if parallel.leads() else None
    return float(parallel.shared(fitted))


def _whole(mine: list[Tensor], count: int) -> Any:
    """Rows of all workers, [count, …] in order, from this one's share of them."""
    rows = torch.cat(mine)
    whole = torch.zeros(count, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
    whole[parallel.rank() :: parallel.workers()] = rows
    return parallel.add_up(whole).cpu().numpy()


def _accuracy(x: Any, y: Any, test_x: Any, test_y: Any) -> float:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # One thread: with more of them sums round otherwise, and a trial has only its own CPUs.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS)).fit(x, y)
        if max(fitted[-1].n_iter_) >= STEPS:  # it has not converged: no number
            return math.nan
        return float(fitted.score(test_x, test_y))
