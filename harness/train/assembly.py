"""All that one trial trains with, built from its spec: model, optimizer, method, data and task."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import neq
from harness import parallel
from harness.data.dataset import Batches
from harness.data.load import load_data
from harness.flops.costs import Backward, Costs, count_costs
from harness.methods import Method, Training
from harness.methods.building import (
    COUNTS,
    checked_mask,
    checked_readings,
    checked_size,
    epoch_flops,
    measure_rows,
)
from harness.methods.training import Weights
from harness.seeds import seed_globals
from harness.storage.locations import Location
from harness.storage.masks import layer_mask
from harness.storage.schema import flops_columns, quantiles
from harness.suite.config import TrialSpec
from harness.suite.parts import build_model
from harness.tasks import Task, build_task
from harness.train.analysis import Analysis, analysis_of
from harness.train.compiling import build, compiled
from harness.train.evaluation import Evaluator
from harness.train.optimizers import build_optimizer, check_followed
from harness.train.tuning import Tuning, tuning_for
from harness.train.weights import load_weights
from neq.momentum import complete_momentum

EVALUATION_BYTES = 2**31  # for the outputs of one batch that are kept while deciding
EVALUATION_BATCH = 500  # samples, at the most


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What a trial trains with, on its device.

    `name`: of the method; `model`: the bare module; `trained`: the module whose forward is called
    in training, compiled where the recipe says so, which averages gradients over workers where
    there are several. `scheduler`: None where the recipe has none. `training`: what the `method` is
    given. `tuning`: memory format and kernels in use. `analysis`: what the suite wants to know
    whatever the method.
    """

    name: str
    device: torch.device
    batches: Batches
    task: Task
    model: nn.Module
    trained: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    evaluator: Evaluator
    training: Training
    method: Method
    tuning: Tuning
    analysis: Analysis

    @property
    def costs(self) -> Costs:
        """FLOPs of the model's passes."""
        return self.training.costs

    def start(self) -> None:
        """Before epoch 0."""
        self.training.count()
        self.method.start()

    def begin_epoch(self) -> tuple[Tensor, Mapping[str, neq.LayerPlan]]:
        """Who stands still now, bool [neurons], and how the layers' backwards are computed; the
        model's own fixed layers are not the method's.
        """
        self.training.count()
        neurons = self.costs.neurons
        frozen = checked_mask(self.name, self.method, len(neurons)) & ~neurons.fixed
        plan = self.method.plan
        if plan is None:  # whatever stands still, all rows are computed
            plan = neq.plan(neurons, torch.zeros_like(frozen))
        return frozen, plan

    def flops(self, frozen: Tensor, plan: Mapping[str, neq.LayerPlan]) -> dict[str, int | None]:
        """FLOPs by name of an epoch in which mask and plan were in force."""
        samples = self.training.samples["train"]
        backward = self.costs.backward(frozen, samples, plan)
        usual = _by_name(self.costs.forward(samples), backward)
        usual["overhead"] = self.training.overhead()
        return epoch_flops(self.name, self.method, usual)

    def layer_rows(self, frozen: Tensor, plan: Mapping[str, neq.LayerPlan]) -> list[dict[str, Any]]:
        """Rows of `layers` of such an epoch; FLOPs of layers that are never called are left out."""
        called = self.costs.layers(frozen, self.training.samples["train"], plan)
        readings = checked_readings(self.name, self.method, len(self.costs.neurons))
        rows = []
        for layer in self.costs.neurons.layers:
            name, part = layer.name, layer.neurons
            row = {"layer": name, "neurons": layer.size, "mask": layer_mask(layer, frozen[part])}
            row["frozen"] = int(frozen[part].sum())
            if name in called:
                row |= flops_columns(_by_name(*called[name]))
            rows.append(row | {f"{k}_quantiles": quantiles(v[part]) for k, v in readings.items()})
        return rows

    def measure_rows(self) -> list[dict[str, Any]]:
        """Rows of `measures`: what the method records of the epoch."""
        return measure_rows(self.name, self.method, dict(self.model.named_modules()))

    def size(self) -> int | None:
        """Parameters that are left, of a method that prunes."""
        return checked_size(self.name, self.method)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: state dicts by name, and the tuning."""
        states = {name: part.state_dict() for name, part in self._stateful().items()}
        return states | {"tuning": self.tuning.to_json()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; the tuning was taken from it when this was built."""
        for name, part in self._stateful().items():
            if name != "best" or name in state:  # it came with schema version 3
                part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "method": self.method,
            "best": self.training.best,
        }
        return {name: part for name, part in parts.items() if part is not None}


def _by_name(forward: int, backward: Backward) -> dict[str, int]:
    """FLOPs by the names that methods and columns have for them."""
    counts = {f"backward_{name}": n for name, n in asdict(backward).items()}
    return {"forward": forward} | {name: counts[name] for name in COUNTS}


def assemble(
    spec: TrialSpec,
    device: torch.device,
    location: Location | None,
    state: Mapping[str, Any] | None,
    *,
    most: int | None = None,
) -> Assembly:
    """Build all that the trial trains with.

    `location`: of the suite's results, where the tuning for this kind of machine is kept; a trial
    with a checkpoint's `state` keeps the tuning that it has begun with. `most`: samples of each
    part of the data (default: all). Raises UserError for what is wrong in the suite or its data.
    """
    suite, seed, folder = spec.trained_suite, spec.seed, spec.folder
    recipe, parts = suite.recipe, suite.model
    check_followed(suite)
    loaders = suite.resources.cpus if device.type == "cuda" else 0
    data = load_data(suite, folder)
    batches = data.open(device, seed, recipe, loaders=loaders, most=most)
    task = build_task(suite, folder)
    seed_globals(seed, "initialisation")
    model = build_model(parts.build, folder, parts.arguments)
    load_weights(model, parts)
    costs = count_costs(model, parts.input, parts.unpublished)
    model = model.to(device)
    tuning = _tuning(spec, location, model, state)
    tuning.convert(model)
    optimizer, scheduler = build_optimizer(suite.name, recipe, model, batches.steps)
    evaluator = Evaluator(
        model=model,
        task=task,
        batches=batches,
        tuning=tuning,
        device=device,
        precision=recipe.precision,
        batch_size=costs.batch_within(EVALUATION_BYTES, EVALUATION_BATCH),
    )
    training = Training(
        model=model,
        optimizer=optimizer,
        exclude=(*parts.exclude, *costs.uncalled),
        costs=costs,
        epochs=recipe.epochs,
        samples={part: batches.size(part) for part in ("train", "validation")},
        seed=seed,
        timings=tuning.timings,
        best=Weights(model),
        validation_batches=partial(evaluator.part, "validation"),
        validation_loss=partial(evaluator.loss, "validation"),
    )
    method = build(spec, training)
    # After a freezer's own hook, which clears what stands still; and also where there is none.
    optimizer.register_step_pre_hook(complete_momentum)
    trained = compiled(model) if recipe.compile else model
    return Assembly(
        name=spec.method,
        device=device,
        batches=batches,
        task=task,
        model=model,
        trained=trained if parallel.workers() == 1 else DistributedDataParallel(trained),
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16"),
        evaluator=evaluator,
        training=training,
        method=method,
        tuning=tuning,
        analysis=analysis_of(spec, data, evaluator, costs, method, most),
    )


def _tuning(
    spec: TrialSpec, location: Location | None, model: nn.Module, state: Mapping[str, Any] | None
) -> Tuning:
    """That of the checkpoint; or measured, or looked up, by one process for all of them."""
    if state is not None:
        return Tuning.from_json(state["tuning"])
    assert location is not None
    leads = parallel.leads()
    tuned = tuning_for(location, spec.trained_suite, model).to_json() if leads else None
    return Tuning.from_json(parallel.shared(tuned))
