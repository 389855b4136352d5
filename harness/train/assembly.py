"""All that one trial trains with, built from its spec: model, optimizer, method, data and task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from harness import parallel
from harness.data.dataset import Batches
from harness.data.load import load_data
from harness.flops.costs import Costs, count_costs
from harness.methods.freezing import Freezing
from harness.seeds import seed_globals
from harness.storage.locations import Location
from harness.suite.config import TrialSpec
from harness.suite.parts import build_model
from harness.tasks import Task, build_task
from harness.train.optimizers import build_optimizer
from harness.train.tuning import Tuning, tuning_for
from harness.train.weights import load_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Assembly:
    """What a trial trains with, on its device.

    `model`: the bare module; `trained`: the module whose forward is called in training, which
    averages gradients over workers where there are several. `scheduler`: None where the recipe has
    none. `costs`: FLOPs of the model's passes. `tuning`: memory format and kernels in use.
    """

    device: torch.device
    batches: Batches
    task: Task
    model: nn.Module
    trained: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    method: Freezing
    costs: Costs
    tuning: Tuning

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: state dicts by name, and the tuning."""
        states = {name: part.state_dict() for name, part in self._stateful().items()}
        return states | {"tuning": self.tuning.to_json()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; the tuning was taken from it when this was built."""
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        parts = {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "method": self.method,
        }
        return {name: part for name, part in parts.items() if part is not None}


def assemble(
    spec: TrialSpec, device: torch.device, location: Location, state: Mapping[str, Any] | None
) -> Assembly:
    """Build all that the trial trains with.

    `location`: of the suite's results, where the tuning for this kind of machine is kept; a trial
    with a checkpoint's `state` keeps the tuning that it has begun with. Raises UserError for what
    is wrong in the suite or its data.
    """
    suite, seed, folder = spec.suite, spec.seed, spec.folder
    recipe, parts = suite.recipe, suite.model
    loaders = suite.resources.cpus if device.type == "cuda" else 0
    batches = load_data(suite, folder).open(device, seed, recipe, loaders=loaders)
    task = build_task(suite, folder)
    seed_globals(seed, "initialisation")
    model = build_model(parts.build, folder, parts.arguments)
    load_weights(model, parts)
    costs = count_costs(model, parts.input, parts.unpublished)
    model = model.to(device)
    tuning = Tuning.from_json(state["tuning"]) if state else _shared_tuning(spec, location, model)
    tuning.convert(model)
    optimizer, scheduler = build_optimizer(suite.name, recipe, model, batches.steps)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    trained = model if parallel.workers() == 1 else DistributedDataParallel(model)
    fixed = [*parts.exclude, *costs.uncalled]
    return Assembly(
        device=device,
        batches=batches,
        task=task,
        model=model,
        trained=trained,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=scaler,
        method=Freezing(spec.method_spec, model, optimizer, fixed, seed, tuning.timings),
        costs=costs,
        tuning=tuning,
    )


def _shared_tuning(spec: TrialSpec, location: Location, model: nn.Module) -> Tuning:
    """Measured, or looked up, by one process for all of them."""
    leads = parallel.leads()
    tuned = tuning_for(location, spec.suite, model).to_json() if leads else None
    return Tuning.from_json(parallel.shared(tuned))
