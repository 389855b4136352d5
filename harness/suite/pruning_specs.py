"""Training methods that prune, with their parameters; the methods themselves are in neq.pruning.

Times are shares of a training's epochs, so that they stay valid with other `recipe.epochs`.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from harness.suite.spec import Spec

if TYPE_CHECKING:
    from neq.pruning import Schedule

Sparsity = Annotated[float, Field(gt=0, lt=1, strict=True)]
Share = Annotated[float, Field(ge=0, strict=True)]
Rate = Annotated[float, Field(ge=0, lt=1, strict=True)]
Units = Literal["weights", "neurons"]
Shape = Literal["cubic", "linear", "cycles"]


class PruningSpec(Spec):
    """A method that prunes `units`, by one threshold for all layers."""

    in_question: ClassVar[bool] = True
    may_prune: ClassVar[bool] = True
    units: Units = "weights"

    @property
    def work(self) -> tuple[str, dict[str, Any]]:
        """See Spec."""
        return "harness.methods.pruning:Pruning", {"spec": self}

    def schedule(self, epochs: int) -> "Schedule | None":
        """When how much is pruned in a training of so many epochs; None: at plateaus."""
        return None


def _epochs(share: float, epochs: int) -> int:
    return round(share * epochs)


def _check_end(name: str, share: float) -> None:
    if share > 1:
        raise ValueError(
            f"{name}: {share:g} is after the last epoch; give a share of them, up to 1"
        )


def _check_order(begin: float, end: float) -> None:
    _check_end("end", end)
    if begin >= end:
        raise ValueError(f"begin: {begin:g} must be before end, {end:g}")


class OneShotSpec(PruningSpec):
    """One-shot pruning: train, prune by magnitude to `sparsity` after the share `at` of the epochs,
    train on.
    """

    kind: Literal["one-shot"]
    sparsity: Sparsity
    at: Share = 0.5

    @model_validator(mode="after")
    def _in_time(self) -> "OneShotSpec":
        _check_end("at", self.at)
        return self

    def schedule(self, epochs: int) -> "Schedule | None":
        """See PruningSpec."""
        from neq.pruning import Schedule

        at = max(_epochs(self.at, epochs), 1)
        return Schedule(sparsity=self.sparsity, begin=at - 1, end=at)


class LotterySpec(OneShotSpec):
    """Control of the lottery ticket: one-shot pruning, then the survivors go back to what they were
    after the share `rewind` of the epochs (default: as initialised).
    """

    in_question: ClassVar[bool] = False
    kind: Literal["lottery"]  # type: ignore[assignment]
    rewind: Share = 0.0

    @model_validator(mode="after")
    def _back(self) -> "LotterySpec":
        if self.rewind >= self.at:
            raise ValueError(f"rewind: {self.rewind:g} must be before at, {self.at:g}")
        return self


class GradualSpec(PruningSpec):
    """Gradual pruning by magnitude, from the share `begin` to `end` of the epochs, to `sparsity`.

    `shape` and `prunings` (default: one after each epoch) as of neq.pruning.Schedule.
    """

    kind: Literal["gradual"]
    sparsity: Sparsity
    begin: Share = 0.0
    end: Share = 0.6
    shape: Shape = "cubic"
    prunings: Annotated[int, Field(ge=1, strict=True)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "GradualSpec":
        _check_order(self.begin, self.end)
        return self

    def schedule(self, epochs: int) -> "Schedule | None":
        """See PruningSpec."""
        return _schedule(self, self.sparsity, epochs)


def _schedule(spec: Any, sparsity: float, epochs: int) -> "Schedule":
    """That of a spec with begin, end, shape and prunings, of which few epochs have fewer."""
    from neq.pruning import Schedule

    begin = min(_epochs(spec.begin, epochs), epochs - 1)
    end = max(_epochs(spec.end, epochs), begin + 1)
    prunings = None if spec.prunings is None else min(spec.prunings, end - begin)
    return Schedule(sparsity=sparsity, begin=begin, end=end, shape=spec.shape, prunings=prunings)


class RandomPruningSpec(GradualSpec):
    """Control: the same schedule, with what is pruned drawn at random."""

    in_question: ClassVar[bool] = False
    kind: Literal["random-pruning"]  # type: ignore[assignment]


PLATEAUS = {"twt": 0.05, "pwe": 20, "evaluations": 12}  # the first two as in the authors' README
WITHOUT = "; with a sparsity leave it out"
SCHEDULE = {"begin": 0.0, "end": 0.6, "shape": "cubic", "prunings": None}


class ShrinkSpec(PruningSpec):
    """A method that shrinks by `lam` in each step what the outputs do not depend on, and prunes.

    At a plateau of the validation loss (`pwe`, plateau waiting epochs: so many bad ones) the best
    weights are brought back and everything below the largest threshold pruned with which the loss
    rises by the share `twt` (threshold worsening tolerance) at the most, found in `evaluations` of
    it. With `sparsity` it is pruned by the schedule of gradual pruning instead, and shrinking ends
    with that. What belongs to the other way is None.
    """

    lam: Rate = 1e-4
    twt: Annotated[float, Field(ge=0, strict=True)] | None = None
    pwe: Annotated[int, Field(ge=0, strict=True)] | None = None
    evaluations: Annotated[int, Field(ge=2, strict=True)] | None = None
    sparsity: Sparsity | None = None
    begin: Share | None = None
    end: Share | None = None
    shape: Shape | None = None
    prunings: Annotated[int, Field(ge=1, strict=True)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        at_plateaus = values.get("sparsity") is None
        for name in SCHEDULE if at_plateaus else PLATEAUS:
            if values.get(name) is not None:
                other = "a schedule, which needs a sparsity" if at_plateaus else "plateaus"
                raise ValueError(f"{name}: is of {other}{'' if at_plateaus else WITHOUT}")
        return (PLATEAUS if at_plateaus else SCHEDULE) | values

    @model_validator(mode="after")
    def _in_order(self) -> "ShrinkSpec":
        if self.begin is not None and self.end is not None:
            _check_order(self.begin, self.end)
        return self

    @property
    def needs_validation(self) -> bool:
        """See Spec: at plateaus it does."""
        return self.sparsity is None

    def schedule(self, epochs: int) -> "Schedule | None":
        """See PruningSpec."""
        return None if self.sparsity is None else _schedule(self, self.sparsity, epochs)


class SereneSpec(ShrinkSpec):
    """SeReNe (arXiv 2102.03773): neurons on which the outputs do not depend shrink; by the lower
    bound of the sensitivity. `positions` of a convolution: see neq.pruning.neuron_sensitivity.
    """

    bound: ClassVar[Literal["lower", "exact"]] = "lower"
    kind: Literal["serene"]
    positions: Literal["sum", "mean"] = "sum"


class SereneExactSpec(SereneSpec):
    """SeReNe by the exact sensitivity: a pass back for each class."""

    bound: ClassVar[Literal["lower", "exact"]] = "exact"
    kind: Literal["serene-exact"]  # type: ignore[assignment]


class SereneLocalSpec(ShrinkSpec):
    """SeReNe by the sign of a neuron's mean output: no pass back."""

    kind: Literal["serene-local"]


class LobsterSpec(ShrinkSpec):
    """LOBSTER (arXiv 2011.09905): weights on which the loss does not depend shrink."""

    kind: Literal["lobster"]


class DecaySpec(ShrinkSpec):
    """Control of SeReNe and LOBSTER: every weight shrinks by `lam`, whatever depends on it."""

    in_question: ClassVar[bool] = False
    kind: Literal["decay"]


class SmallerSpec(Spec):
    """Control: a dense model with other `arguments`, such as fewer channels, trained plainly."""

    may_prune: ClassVar[bool] = True
    kind: Literal["smaller"]
    arguments: Annotated[dict[str, Any], Field(min_length=1)]

    @property
    def work(self) -> tuple[str, dict[str, Any]]:
        """See Spec."""
        return "harness.methods.pruning:Smaller", {}

    @property
    def model_changes(self) -> dict[str, Any]:
        """See Spec."""
        return self.arguments


PruningMethodSpec = (
    SereneSpec
    | SereneExactSpec
    | SereneLocalSpec
    | LobsterSpec
    | DecaySpec
    | OneShotSpec
    | GradualSpec
    | RandomPruningSpec
    | LotterySpec
    | SmallerSpec
)
PRUNING: dict[str, type[Spec]] = {
    "serene": SereneSpec,
    "serene-exact": SereneExactSpec,
    "serene-local": SereneLocalSpec,
    "lobster": LobsterSpec,
    "decay": DecaySpec,
    "one-shot": OneShotSpec,
    "gradual": GradualSpec,
    "random-pruning": RandomPruningSpec,
    "lottery": LotterySpec,
    "smaller": SmallerSpec,
}
