"""Neurons freeze in Lightning's Trainer: a callback, whose state is in the checkpoints."""

import importlib
import random
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neq.batches import Forward
from neq.evaluation import evaluation
from neq.freezer import NeuronFreezer
from neq.integrations import missing
from neq.integrations.scaled import check_scaled
from neq.integrations.validation import check_choice, taken
from neq.integrations.validation import validation_batches as share_of
from neq.policies import Everyone, Policy
from neq.required import RequiredFlops
from neq.timings import Timings

NAMES = ("lightning.pytorch", "pytorch_lightning")  # of one package, which is installed as either


def _callback() -> Any:
    """The class of Lightning's callbacks: of the package in use, else of the one installed."""
    for name in sorted(NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name).Callback
        except ImportError as error:
            failed = error
    raise missing("lightning", "lightning") from failed


class NeuronFreezerCallback(_callback()):  # type: ignore[misc]
    """Freezes the neurons that `policy` names while a Trainer fits: `Trainer(callbacks=[…])`.

    A NeuronFreezer is made when `trainer.fit` begins, on the LightningModule and all of its
    optimizers, updated before every epoch, and removed when the fit ends or fails. It decides on
    `samples` samples of the validation data, at equal distances, or on `validation_batches`, each
    process on its share; they go through the LightningModule's own `forward`, or `forward(module,
    batch)` (see NeuronFreezer.update). The samples are read once, under a fixed seed, and put
    together by the loader's collate function; hooks that change batches on their way to the device
    are not called, and of mappings what `forward` does not take is left out. `options`: those of
    NeuronFreezer.

    Its state lies in every checkpoint of the Trainer, and `fit(ckpt_path=…)` goes on exactly; in
    the middle of an epoch the mask goes on. From a checkpoint without one it begins as new, with a
    warning. The share of frozen neurons is logged as `frozen`, at the end of each epoch. One
    process and DistributedDataParallel.

    Raises TypeError and ValueError for options that no NeuronFreezer takes, and, when the fit
    begins, ValueError for those that do not fit the model, for sharded ones, for a LightningModule
    without `forward`, without validation data that can be read by places, with several loaders of
    them, and for the checkpoint of another policy or model; later, where a GradScaler would refuse
    a step, because all that one optimizer holds is frozen.
    """

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        samples: int = 50,
        validation_batches: Iterable[Any] | None = None,
        forward: Forward | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_choice(policy, samples, validation_batches)
        _check_options(**options)
        if "exclude" in options:
            options["exclude"] = [*options["exclude"]]
        self._policy, self._options = policy, options
        self._samples, self._given, self._forward = samples, validation_batches, forward
        self._freezer: NeuronFreezer | None = None
        self._at_work = False
        self._batches: Iterable[Any] = ()
        self._begun: int | None = None  # so many batches were done when the mask was decided
        self._state: dict[str, Any] = {}  # that goes into checkpoints while no freezer is at work

    @property
    def freezer(self) -> NeuronFreezer:
        """The NeuronFreezer of the fit that began last; after its end it has the last mask."""
        if self._freezer is None:
            raise RuntimeError(
                "no training has begun yet: there is a freezer from the beginning of trainer.fit()"
            )
        return self._freezer

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the freezer's state, of tensors and plain values."""
        return self._now() if self._at_work else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint: the freezer takes it over when the fit begins."""
        self._state = state_dict

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Forget the last fit: a checkpoint's state comes after this."""
        if stage == "fit":
            self._let_go()
            self._state, self._begun = {}, None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the freezer, with the state of the checkpoint: models and optimizers are loaded."""
        freezer = NeuronFreezer(
            trainer.strategy.model, trainer.optimizers, self._policy, **self._options
        )
        self._freezer, state = freezer, self._state
        self._at_work = True
        if state:
            self._load(state, trainer.ckpt_path)
        elif trainer.ckpt_path is not None and trainer.global_step:
            warnings.warn(
                f"{trainer.ckpt_path} holds no state of a NeuronFreezerCallback: neurons freeze as "
                "in a training that begins",
                stacklevel=2,
            )
        self._batches = self._chosen_batches(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Freeze for the coming epoch, unless that of a checkpoint goes on."""
        # Not the steps: those that a loop takes by itself are not counted.
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        if self._begun == done:
            return
        self.freezer.update(self._batches, self._forward)
        self._begun = done
        check_scaled(self.freezer, getattr(trainer.precision_plugin, "scaler", None))

    def on_train_batch_start(
        self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int
    ) -> None:
        """Do so here where a fit goes on after an epoch's last batch, which skips the start."""
        if batch_idx == 0:
            self.on_train_epoch_start(trainer, pl_module)

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: Tensor) -> None:
        """Let `loss` have a backward where all that it depends on is frozen."""
        if not loss.requires_grad and bool(self.freezer.frozen.any()):
            loss.requires_grad_()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log the share of the neurons that were frozen."""
        if not trainer.barebones:
            share = float(self.freezer.frozen.double().mean())
            pl_module.log("frozen", share, prog_bar=True, sync_dist=True)

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Let the model be plain again; say in a line where a checkpoint is of another model."""
        lines = str(exception).split("\n\t")
        if not self._at_work and len(lines) > 1 and "loading state_dict" in lines[0]:
            exception.args = (
                f"{trainer.ckpt_path} is of another model ({lines[1].strip()[:200]}): fit the one "
                "that it was saved with",
            )
        self._let_go()

    def teardown(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Let the model be plain again."""
        self._let_go()

    def _let_go(self) -> None:
        if not self._at_work:
            return
        self._state, self._at_work = self._now(), False
        frozen = self.freezer.frozen
        self.freezer.remove()
        self.freezer.frozen = frozen  # to be looked at

    def _now(self) -> dict[str, Any]:
        return {
            "step": self._begun,
            "policy": type(self.freezer.policy).__name__,
            "freezer": self.freezer.state_dict(),
        }

    def _load(self, state: dict[str, Any], path: Any) -> None:
        policy = type(self.freezer.policy).__name__
        if state["policy"] != policy:
            raise ValueError(
                f"{path}: its neurons were frozen by the policy {state['policy']}, not {policy}: "
                "fit with that one"
            )
        try:
            self.freezer.load_state_dict(state["freezer"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}: fit the one that it was saved with") from error
        self._begun = state["step"]

    def _chosen_batches(self, trainer: Any, module: nn.Module) -> Iterable[Any]:
        policy = self.freezer.policy
        if not (policy.needs_velocity or getattr(policy, "needs_flops", False)):
            return ()
        if self._forward is None:
            _check_forward(module)
        if self._given is not None:
            return self._given
        with evaluation(module, next(module.parameters()).device):
            random.seed(0)
            torch.manual_seed(0)
            if "numpy" in sys.modules:
                sys.modules["numpy"].random.seed(0)
            batches = [*share_of(_loader(trainer), self._samples)]
        batches = [*map(trainer.precision_plugin.convert_input, batches)]
        return [taken(module, batch) for batch in batches] if self._forward is None else batches


def _check_options(
    *,
    exclude: Iterable[str] = (),
    flops: RequiredFlops | None = None,
    timings: Timings | None = None,
    **options: Any,
) -> None:
    """Raises what a NeuronFreezer does for options that are wrong whatever the model."""
    for given, kind in ((flops, RequiredFlops), (timings, Timings)):
        if not (given is None or isinstance(given, kind)):
            raise TypeError(f"{given!r} is given where a neq.{kind.__name__} is wanted")
    model, names = nn.Linear(1, 1), exclude if isinstance(exclude, str) else ()
    stepped = torch.optim.SGD(model.parameters())
    NeuronFreezer(model, stepped, Everyone(), exclude=names, **options)


def _check_forward(module: nn.Module) -> None:
    """Raises ValueError for a LightningModule that has no `forward` of its own."""
    kind = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
    if kind.__name__ == "LightningModule" and "forward" not in vars(module):
        raise ValueError(
            f"{type(module).__name__} has no forward to decide with: define one, or say how "
            "samples go through it, with forward=lambda module, batch: module.net(batch[0])"
        )


def _loader(trainer: Any) -> Any:
    """The Trainer's validation loader, loaded yet or not; None where there is none."""
    loaders = trainer.val_dataloaders
    if loaders is None:
        source = trainer.fit_loop.epoch_loop.val_loop._data_source
        there = source.instance is not None and source.is_defined()
        loaders = source.dataloader() if there else None
    found = tree_leaves(getattr(loaders, "iterables", loaders))
    if len(found) > 1:
        raise ValueError(
            f"there are {len(found)} validation loaders: name the one to decide on, with "
            "validation_batches=…"
        )
    return found[0] if found else None
