"""Neurons freeze in the Trainer of transformers: a callback, whose state is in the checkpoints."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from neq.batches import Forward
from neq.evaluation import evaluation
from neq.freezer import NeuronFreezer
from neq.integrations import missing
from neq.integrations.scaled import check_scaled
from neq.integrations.validation import check_choice, taken
from neq.integrations.validation import validation_batches as share_of
from neq.neurons import unwrapped
from neq.optimizers import bare
from neq.plain import OURS
from neq.policies import Policy

try:
    from transformers import Trainer, TrainerCallback, set_seed
except ImportError as error:
    raise missing("transformers", "transformers") from error

STATE = "neuron_freezer"  # in the first parameter group of a checkpoint's optimizer
AT_WORK = f"{OURS}callback"  # attribute of the model that one is at work on


class NeuronFreezerCallback(TrainerCallback):  # type: ignore[misc]
    """Freezes the neurons that `policy` names while a Trainer trains: `trainer.add_callback(…)`.

    A NeuronFreezer is made when `trainer.train()` begins, on the Trainer's model and optimizer,
    updated at the beginning of every epoch, and removed when the training ends; an exception leaves
    it at work until the model is next trained with such a callback. It decides on `samples` samples
    of the Trainer's eval set, at equal distances, or on `validation_batches`; `forward` says how
    the model is called with a batch (see NeuronFreezer.update). The samples are read once, collated
    under the Trainer's seed; what the model's forward does not take is left out. `options`: those
    of NeuronFreezer.

    Its state lies in the optimizer's file of each checkpoint, and goes on with
    `train(resume_from_checkpoint=…)`; in the middle of an epoch the mask goes on. From a checkpoint
    without one it begins as new, with a warning. The share of frozen neurons is logged as `frozen`,
    at the beginning of each epoch. One process and DistributedDataParallel.

    Raises ValueError for options that do not fit the Trainer's model, for sharded models, and, when
    the training begins, without an eval set that can be read by places, with several of them, and
    for the checkpoint of another policy or model; later, where a GradScaler would refuse a step,
    because all that one optimizer holds is frozen.
    """

    def __init__(
        self,
        trainer: Any,
        policy: Policy | None = None,
        *,
        samples: int = 50,
        validation_batches: Iterable[Any] | None = None,
        forward: Forward | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f"trainer must be the Trainer, not {type(trainer).__name__}: make it first, then "
                "trainer.add_callback(NeuronFreezerCallback(trainer, …))"
            )
        check_choice(policy, samples, validation_batches)
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "FSDP and DeepSpeed shard the parameters, whose rows then can't freeze: train in "
                "one process or with DistributedDataParallel"
            )
        if not isinstance(options.get("exclude", ""), str):
            options["exclude"] = [*options["exclude"]]
        self._trainer, self._policy, self._options = trainer, policy, options
        self._samples, self._given, self._forward = samples, validation_batches, forward
        self._freezer: NeuronFreezer | None = None
        self._saving: Any = None  # the handle of the hook that puts the state into checkpoints
        self._batches: Iterable[Any] = ()
        self._begun: int | None = None  # the step at which the mask's epoch began, or goes on
        stepped = torch.optim.SGD(trainer.model.parameters())
        NeuronFreezer(trainer.model, stepped, policy, **options).remove()  # are the options right?

    @property
    def freezer(self) -> NeuronFreezer:
        """The NeuronFreezer of the training that began last; after its end it has the last mask."""
        if self._freezer is None:
            raise RuntimeError(
                "the Trainer's optimizer is not made yet: there is a freezer from the beginning of "
                "trainer.train() on"
            )
        return self._freezer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Make the freezer; go on with the state of the checkpoint that the Trainer has loaded."""
        trainer = self._trainer
        # After an exception one is still at work: this one, or an older Trainer's.
        for each in (self, vars(unwrapped(trainer.model)).get(AT_WORK, self)):
            each._let_go()
        mine = [c for c in trainer.callback_handler.callbacks if isinstance(c, type(self))]
        if mine != [self] or trainer.state is not state:
            raise ValueError(
                "a Trainer takes one NeuronFreezerCallback, which was made for it: "
                "trainer.add_callback(NeuronFreezerCallback(trainer, …))"
            )
        group = bare(trainer.optimizer).param_groups[0]
        saved = group.pop(STATE, None)
        if saved is not None and saved["step"] != state.global_step:
            saved = None  # from before a training without this callback
        freezer = NeuronFreezer(
            trainer.model_wrapped, trainer.optimizer, self._policy, **self._options
        )
        self._freezer, self._begun = freezer, None
        self._saving = bare(trainer.optimizer).register_state_dict_post_hook(self._save)
        setattr(freezer.model, AT_WORK, self)
        try:
            self._batches = self._chosen_batches(args.seed)
            if saved is not None:
                self._load(saved)
        except Exception:
            self._let_go()
            raise
        if saved is not None and not float(state.epoch).is_integer():
            self._begun = state.global_step  # within an epoch, which goes on
        if saved is None and state.global_step:
            warnings.warn(
                "the checkpoint holds no state of a NeuronFreezer (it was saved without this "
                "callback, or without its optimizer): neurons freeze as in a training that begins",
                stacklevel=2,
            )

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Freeze for the coming epoch, unless a checkpoint's epoch goes on."""
        if state.global_step == self._begun:
            return
        self._begun = state.global_step
        self.freezer.update(self._batches, self._forward)
        check_scaled(self.freezer, self._trainer.accelerator.scaler)
        share = float(self.freezer.frozen.double().mean())
        self._trainer.log({"frozen": share})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the model be plain again."""
        self._let_go()

    def _let_go(self) -> None:
        if self._saving is None:
            return
        self._saving.remove()
        self._saving = None
        delattr(self.freezer.model, AT_WORK)
        frozen = self.freezer.frozen
        self.freezer.remove()
        self.freezer.frozen = frozen  # to be looked at

    def _chosen_batches(self, seed: int) -> Iterable[Any]:
        policy, model = self.freezer.policy, self._trainer.model
        if self._given is not None:
            return self._given
        if not (policy.needs_velocity or getattr(policy, "needs_flops", False)):
            return ()
        with evaluation(model, next(model.parameters()).device):
            set_seed(seed)  # a collate function that draws, draws the same after a resume
            batches = [*share_of(self._loader(), self._samples)]
        return [taken(model, batch) for batch in batches] if self._forward is None else batches

    def _loader(self) -> Any:
        """The Trainer's eval loader; None where it has no eval set."""
        data = self._trainer.eval_dataset
        if isinstance(data, dict) and data:
            one = f"trainer.get_eval_dataloader({next(iter(data))!r})"
            raise ValueError(
                f"the Trainer has several eval sets ({', '.join(map(str, data))}): name the one to "
                f"decide on, with validation_batches={one}"
            )
        try:
            return self._trainer.get_eval_dataloader()
        except ValueError:
            if data is not None:
                raise
            return None

    def _save(self, _optimizer: Any, state: dict[str, Any]) -> None:
        """Put the freezer's state into that of the optimizer: one file has both, or neither."""
        state["param_groups"][0][STATE] = {
            "step": self._trainer.state.global_step,
            "policy": type(self.freezer.policy).__name__,
            "state": self.freezer.state_dict(),
        }

    def _load(self, saved: dict[str, Any]) -> None:
        policy = type(self.freezer.policy).__name__
        if saved["policy"] != policy:
            raise ValueError(
                f"the checkpoint's neurons were frozen by the policy {saved['policy']}, not "
                f"{policy}: resume with that one"
            )
        self.freezer.load_state_dict(saved["state"])
