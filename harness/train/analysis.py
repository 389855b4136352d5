"""What a suite wants to know of a trained model, whatever the method: sharpness, gap, probe.

It is looking, like the test: it changes nothing, draws from no stream of the training, and is in
no column of FLOPs or seconds.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import neq
from harness.data.dataset import Batch, Dataset
from harness.errors import UserError, one_line
from harness.flops.costs import Costs
from harness.methods import Method
from harness.seeds import generator, restored
from harness.suite.config import Sharpness, Suite, TrialSpec
from harness.suite.parts import build_model
from harness.tasks import Task
from harness.train.evaluation import Evaluator
from harness.train.probe import probe_metric

BYTES = 2**28  # for the outputs of one batch, of which second derivatives keep several copies
BATCH = 500  # samples, at the most


@dataclass(frozen=True, slots=True, kw_only=True)
class Analysis:
    """Looks at the model of the trial `spec`, which `method` trains.

    `evaluator`: of that model, on samples of the training part that all trials have in common.
    """

    spec: TrialSpec
    evaluator: Evaluator
    method: Method

    def rows(self, epoch: int, test_metric: float) -> list[dict[str, Any]]:
        """Rows of `measures` of an epoch whose test gave `test_metric`; every worker must ask."""
        suite, done = self.spec.trained_suite, epoch + 1
        last = done == suite.recipe.epochs
        found: dict[str, float] = {}
        if suite.sharpness and (last or done % suite.sharpness.every == 0):
            found |= self._sharpness(suite.sharpness, epoch)
            metric = self.evaluator.loss_and_metric("train")[1]
            found |= {"train_metric": metric, "generalisation_gap": metric - test_metric}
        if suite.probe and last:
            tuning, size = self.evaluator.tuning, self.evaluator.batch_size
            found["probe_metric"] = probe_metric(
                suite, self.spec.folder, self._plain(), tuning, size
            )
        return [
            {"layer": None, "name": name, "value": value if math.isfinite(value) else None}
            for name, value in found.items()
        ]

    def _sharpness(self, wanted: Sharpness, epoch: int) -> dict[str, float]:
        """Of what the method has left; NaN and an interval where it did not converge."""
        work = self.evaluator
        samples = work.batches.evaluate("train", work.batch_size)
        top = neq.top_eigenvalue(
            self._plain(),
            [(work.tuning.apply(inputs), targets) for inputs, targets in samples],
            work.task.loss,
            kept=getattr(self.method, "kept_weights", {}),  # a method may be of no class of ours
            iterations=wanted.iterations,
            tolerance=wanted.tolerance,
            generator=generator(self.spec.seed, "sharpness", epoch),
        )
        value = top.value if top.converged else math.nan
        return {"sharpness": value, "sharpness_low": top.low, "sharpness_high": top.high}

    def _plain(self) -> nn.Module:
        """The model as the suite builds it, with these weights: without a method's hooks."""
        work, parts = self.evaluator, self.spec.trained_suite.model
        with restored():
            model = build_model(parts.build, self.spec.folder, parts.arguments)
        model.load_state_dict(work.model.state_dict())
        return work.tuning.convert(model.to(work.device))


def check_sharpness(suite: Suite, data: Dataset, task: Task, model: nn.Module, few: Batch) -> None:
    """Raises UserError where the suite asks for the sharpness of more samples than it trains on, or
    the loss of a `few` can't be differentiated twice.
    """
    assert suite.sharpness is not None
    asked, count = suite.sharpness.samples, len(data.indices[0])
    if asked > count:
        raise UserError(
            f"suite {suite.name}: sharpness.samples is {asked}, and there are {count} images to "
            "train on; lower it"
        )
    try:
        neq.top_eigenvalue(model, [few], task.loss, iterations=1)
    except Exception as error:
        raise UserError(
            f"suite {suite.name}: sharpness: it can't be found, for want of a second "
            f"derivative or otherwise ({one_line(error)}); leave [sharpness] out"
        ) from error


def analysis_of(
    spec: TrialSpec,
    data: Dataset,
    evaluator: Evaluator,
    costs: Costs,
    method: Method,
    most: int | None = None,
) -> Analysis:
    """The analysis of a trial on `data`; the other arguments are as of Assembly and `assemble`."""
    wanted = spec.suite.sharpness
    batches = evaluator.batches
    if wanted is not None:  # the order of `indices` follows from data.split_seed alone
        samples = min(wanted.samples, most or wanted.samples)
        batches = data.open(evaluator.device, 0, spec.suite.recipe, most=samples)
    size = costs.batch_within(BYTES, BATCH)
    evaluator = replace(evaluator, batches=batches, batch_size=size)
    return Analysis(spec=spec, evaluator=evaluator, method=method)
