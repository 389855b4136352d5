"""What can be checked before the first step, so that it shows before hours are spent."""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import neq
from harness import parallel
from harness.data.dataset import Batch, Dataset
from harness.data.load import load_data
from harness.errors import UserError, with_origin
from harness.flops.costs import Costs
from harness.flops.subject import costs_of
from harness.methods.training import Training, Weights
from harness.run.beginnings import check_beginnings
from harness.run.rehearsal import rehearse
from harness.run.routes import check_routes
from harness.seeds import restored
from harness.suite import parts
from harness.suite.config import Suite, TrialSpec
from harness.tasks import Task, build_task
from harness.train import weights
from harness.train.analysis import check_sharpness
from harness.train.compiling import build
from harness.train.optimizers import build_optimizer, check_followed
from harness.train.probe import check_probe

SAMPLES = 2  # that are run through the model

FirstSamples = dict[str, list[Batch]]  # by part: "training", "validation", "test"
Warn = Callable[[str], None]


def preflight(trials: Sequence[TrialSpec], warn: Warn = lambda text: None) -> Dataset:
    """Build everything once and run a few samples of every part of the data, before hours are
    spent.

    `trials`: of one group; `warn`: is told, in a line each, what is not wrong and yet to be known.
    Returns the data that it opened. Raises UserError for what is wrong.
    """
    suite, folder = trials[0].suite, trials[0].folder
    with restored():
        data = load_data(suite, folder)
        check_size(suite, data)
        samples = few(suite, data)
        check_inputs(suite, samples)
        model = parts.build_model(suite.model.build, folder, suite.model.arguments)
        weights.load_weights(model, suite.model)
        costs = costs_of(model, suite.model.input, suite.model.unpublished)
        check_model(suite, folder, model, costs, warn)
        task = build_task(suite, folder)
        check_outputs(suite, task, model, samples, data.labels())
        check_analysis(suite, folder, task, model, data, samples)
        check_methods(trials, model, costs)
        for trial in _each_method(trials):
            if trial.method_spec.model_changes:
                other, counted = _other_model(trial)
                _tell_uncounted(suite, f": method {trial.method}", counted, warn)
                check_outputs(suite, task, other, samples, data.labels())
                check_analysis(suite, folder, task, other, data, samples)
        if suite.resources.world_size > 1:
            check_gradients(suite, task, model, samples)
    return data


def check_model(
    suite: Suite, folder: Path | str, model: nn.Module, costs: Costs, warn: Warn
) -> None:
    """Raises UserError where forwards of the suite's model differ by chance, or its builder seeds
    the random streams; `warn` is told of other seeds that begin alike, and of FLOPs in no count.
    """
    parts_ = suite.model
    try:
        check_routes(model, parts_.input)
        alike = check_beginnings(
            parts_, lambda: parts.build_model(parts_.build, folder, parts_.arguments)
        )
    except UserError as error:
        raise _named(suite, error) from None
    if alike:
        warn(f"suite {suite.name}: {alike}")
    _tell_uncounted(suite, "", costs, warn)


def _tell_uncounted(suite: Suite, where: str, costs: Costs, warn: Warn) -> None:
    uncounted = costs.left_out(compiled=suite.recipe.compile)
    if uncounted:
        warn(
            f"suite {suite.name}{where}: the FLOPs of {', '.join(uncounted)} are in no count: "
            "what is saved is told without them"
        )


def check_size(suite: Suite, data: Dataset) -> None:
    """Raises UserError where a batch is larger than what there is to train on, or too small."""
    count, world = len(data.indices[0]), suite.resources.world_size
    if world > 1 and suite.recipe.batch_size < 2 * world:
        raise UserError(
            f"suite {suite.name}: recipe.batch_size is {suite.recipe.batch_size}, and each of "
            f"{world} workers needs two samples; raise it"
        )
    if suite.recipe.batch_size > count:
        raise UserError(
            f"suite {suite.name}: recipe.batch_size is {suite.recipe.batch_size}, and there are "
            f"{count} images to train on; lower it"
        )


def check_methods(trials: Sequence[TrialSpec], model: nn.Module, costs: Costs) -> None:
    """Raises UserError where a method, the optimizer or the schedule does not fit the model, and
    for what is wrong in a method of the user's own, and where no neuron may freeze for one of
    neqbench's.
    """
    for trial in _each_method(trials):
        suite = trial.trained_suite
        check_followed(suite)
        try:
            mine, counted = copy.deepcopy(model), costs  # the method may hook it
            if trial.method_spec.model_changes:
                mine, counted = _other_model(trial)
            optimizer, _ = build_optimizer(suite.name, suite.recipe, mine)
            if trial.method_spec.foreign:
                rehearse(trial, SAMPLES * parallel.workers())
            else:
                build(trial, _untrained(suite, mine, optimizer, counted))
                if trial.method_spec.may_freeze:
                    _check_freezable(suite, counted)
        except UserError as error:
            raise _named(suite, error) from None


def _check_freezable(suite: Suite, costs: Costs) -> None:
    fixed = costs.neurons.fixed
    if not bool((costs.called & ~costs.neurons.select(suite.model.exclude) & ~fixed).any()):
        why = "model.exclude names every supported layer"
        if bool(fixed.any()):
            why += " that the model does not fix itself (requires_grad=False)"
        raise UserError(f"no neuron may freeze: {why}")


def _each_method(trials: Sequence[TrialSpec]) -> list[TrialSpec]:
    """One trial of each method."""
    return list({trial.method: trial for trial in trials}.values())


def _other_model(trial: TrialSpec) -> tuple[nn.Module, Costs]:
    """The model that the method wants otherwise than the suite; raises UserError where its
    arguments build none, or one with a layer of no neurons or whose forwards differ by chance.
    """
    parts_, changes = trial.trained_suite.model, trial.method_spec.model_changes
    where = f"methods.{trial.method}: the model with {changes}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on tensors without elements
            model = parts.build_model(parts_.build, trial.folder, parts_.arguments)
        weights.load_weights(model, parts_)
        empty = [name for name, p in model.named_parameters() if p.numel() == 0]
        if empty:
            raise UserError(f"{empty[0]} has no elements; widths must be 1 or more")
        costs = costs_of(model, parts_.input, parts_.unpublished)
        check_routes(model, parts_.input)
        return model, costs
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _untrained(suite: Suite, model: nn.Module, optimizer: Optimizer, costs: Costs) -> Training:
    return Training(
        model=model,
        optimizer=optimizer,
        exclude=suite.model.exclude,
        costs=costs,
        epochs=suite.recipe.epochs,
        samples={"train": 0, "validation": suite.data.validation_size},
        seed=0,
        timings=neq.Timings(),
        best=Weights(model),
        validation_batches=tuple,
        validation_loss=float,
    )


def few(suite: Suite, data: Dataset) -> FirstSamples:
    """The first samples of each part, as this worker would see them.

    Raises UserError where they can't be read or transformed.
    """
    count = SAMPLES * parallel.workers()
    recipe = suite.recipe.model_copy(update={"batch_size": count, "forward_batch": None})
    try:
        batches = data.open(torch.device("cpu"), 0, recipe, most=count)
        held_out = {part: list(batches.evaluate(part, SAMPLES)) for part in ("validation", "test")}
        return {"training": [(f.inputs, f.targets) for f in batches.train(0)]} | held_out
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{suite.data.load!r}: samples fail: {with_origin(error)}") from error


def check_inputs(suite: Suite, samples: FirstSamples) -> None:
    """Raises UserError where training or validation images have another size than `model.input`.

    Test images may have sizes of their own: the accounting is of the others.
    """
    for part in ("training", "validation"):
        for inputs, _ in samples[part]:
            if tuple(inputs.shape[1:]) != suite.model.input:
                raise UserError(
                    f"suite {suite.name}: model.input is {list(suite.model.input)}, "
                    f"the {part} images are {list(inputs.shape[1:])}; make them alike"
                )


@torch.no_grad()
def check_outputs(
    suite: Suite, task: Task, model: nn.Module, samples: FirstSamples, labels: Sequence[Tensor]
) -> None:
    """Raises UserError where the model does not run, or the task does not on its outputs.

    `labels`: all labels that are known without decoding.
    """
    for part, loaded in samples.items():
        for inputs, targets in loaded:
            outputs = _outputs(suite, model, inputs)
            with _blaming(suite):
                task.check(outputs, targets)
                task.loss(outputs, targets)
                if part == "training":
                    task.loss(outputs, task.mix(inputs, targets)[1])
    with _blaming(suite):
        for known in labels:
            task.check_labels(outputs, known)


def check_analysis(
    suite: Suite,
    folder: Path | str,
    task: Task,
    model: nn.Module,
    data: Dataset,
    samples: FirstSamples,
) -> None:
    """Raises UserError where what the suite wants to know of a model can't be told of this one."""
    if suite.sharpness is not None:
        check_sharpness(suite, data, task, model, samples["training"][0])
    if suite.probe is not None:
        check_probe(suite, folder, model)


def check_gradients(suite: Suite, task: Task, model: nn.Module, samples: FirstSamples) -> None:
    """Raises UserError where a parameter gets no gradient: several workers would wait for it."""
    for inputs, targets in samples["training"]:
        with _blaming(suite):
            torch.autograd.backward(task.loss(model.train()(inputs), targets))
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if without:
        raise UserError(
            f"suite {suite.name}: {without[0]} gets no gradient, which several workers can't "
            "train; leave it out of the model, or set requires_grad to False"
        )


def _outputs(suite: Suite, model: nn.Module, inputs: Tensor) -> Any:
    try:
        return model.eval()(inputs)
    except Exception as error:
        raise UserError(
            f"suite {suite.name}: the model does not run on images of {list(inputs.shape[1:])} "
            f"({type(error).__name__}: {error})"
        ) from error


def _named(suite: Suite, error: UserError) -> UserError:
    """The error with the suite's name in front, which some have already."""
    where = f"suite {suite.name}: "
    return UserError(where + str(error).removeprefix(where))


@contextmanager
def _blaming(suite: Suite) -> Iterator[None]:
    """Inside, errors of the task become UserErrors with the suite's name."""
    try:
        yield
    except UserError as error:
        raise _named(suite, error) from None
    except Exception as error:
        raise UserError(f"suite {suite.name}: {suite.task} failed: {with_origin(error)}") from error
