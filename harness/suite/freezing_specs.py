"""Training methods that freeze, with their parameters; what they do is in neq."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from harness.suite.fields import added
from harness.suite.spec import Spec

if TYPE_CHECKING:
    import neq

Keep = Annotated[float, Field(ge=0, le=1, strict=True)]
Mu = Annotated[float, Field(ge=0, lt=1, strict=True)]
Eps = Annotated[float, Field(ge=0, strict=True)]
Flops = Annotated[float, Field(gt=0, le=1, strict=True)]
Rows = Annotated[int, Field(ge=1, strict=True)]
Recursion = Literal["paper", "reference"]


def _groups(value: Any) -> Any:
    named = isinstance(value, str) and value.split()
    if named or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(
        'write "layers", a number of rows from 1 on, or names of modules with blanks between'
    )


Groups = Annotated[int | str, BeforeValidator(_groups)]  # no list: that would be a sweep


class PolicySpec(Spec):
    """A method that freezes by a policy of neq."""

    @property
    def work(self) -> tuple[str, dict[str, Any]]:
        """See Spec."""
        return "harness.methods.freezing:by_policy", {"spec": self}

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that says who stands still, in a trial with this seed."""
        raise NotImplementedError


class FreezingSpec(PolicySpec):
    """A method that freezes. `gradient="cut"`: no gradient flows through frozen neurons, an
    approximation. `hold_statistics`: the running statistics of frozen neurons stand still, too.
    """

    may_freeze: ClassVar[bool] = True
    gradient: Literal["exact", "cut"] = "exact"
    hold_statistics: Annotated[bool, Field(strict=True)] = added(False)


class VelocitySpec(FreezingSpec):
    """A method that decides by velocity, with momentum `mu`. `recursion="reference"` and
    `similarity="sample"` follow the authors' code where it departs from the paper.
    """

    mu: Mu = 0.5
    recursion: Recursion = "paper"
    similarity: Literal["dataset", "sample"] = "dataset"

    @property
    def needs_validation(self) -> bool:
        """See Spec."""
        return True


class AlignedSpec(VelocitySpec):
    """A method that may round what trains in each layer to a multiple of `align`, the rows that
    kernels compute at once: "down" by freezing more, "up" by letting more train.
    """

    align: Rows = added(1)
    rounding: Literal["down", "up"] = added("down")


class BaselineSpec(PolicySpec):
    """Plain training: what every other method is compared with."""

    is_baseline: ClassVar[bool] = True
    kind: Literal["baseline"]

    def policy(self, seed: int) -> "neq.Policy":
        """The policy under which every neuron trains."""
        import neq

        return neq.Everyone()


class NeqSpec(AlignedSpec):
    """NEq (NeurIPS 2022): neurons whose |velocity| is below `eps` stand still."""

    in_question: ClassVar[bool] = True
    kind: Literal["neq"]
    eps: Eps = 1e-3

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes neurons at equilibrium."""
        import neq

        return neq.AtEquilibrium(self.eps, self.mu, self.recursion, self.align, self.rounding)


class RandomSpec(FreezingSpec):
    """Control: in each layer the share `keep` trains, drawn at random anew each epoch."""

    kind: Literal["random"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """The policy whose draws depend on (`seed`, epoch) alone."""
        import neq
        from harness.seeds import derive

        return neq.Random(self.keep, seed=derive(seed, "masks"))


class SmallestVelocitySpec(AlignedSpec):
    """Control: in each layer the share `keep` with the largest |velocity| trains."""

    kind: Literal["smallest_velocity"]
    keep: Keep

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes by rank instead of by a threshold."""
        import neq

        return neq.SmallestVelocity(
            self.keep,
            mu=self.mu,
            recursion=self.recursion,
            align=self.align,
            rounding=self.rounding,
        )


class FreezeAfterSpec(FreezingSpec):
    """Control: from `epoch` on everything stands still but the excluded layers.

    It shows what the remaining epochs are worth.
    """

    kind: Literal["freeze_after"]
    epoch: Annotated[int, Field(ge=1, strict=True)]

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes everything from that epoch on."""
        import neq

        return neq.FreezeAfter(self.epoch)


class GroupedSpec(AlignedSpec):
    """A method that may decide for whole `groups`: "layers", blocks of so many rows, or the modules
    named, with blanks between.
    """

    eps: Eps = 1e-3
    groups: Groups = "layers"

    def grouped(self, **arguments: Any) -> "neq.GroupEquilibrium":
        """The policy for these groups, with further arguments of neq.GroupEquilibrium."""
        import neq

        single = isinstance(self.groups, int) or self.groups == "layers"
        return neq.GroupEquilibrium(
            eps=self.eps,
            mu=self.mu,
            recursion=self.recursion,
            groups=self.groups if single else str(self.groups).split(),
            align=self.align,
            rounding=self.rounding,
            **arguments,
        )


class NeqGroupSpec(GroupedSpec):
    """Groups stand still whose members' |velocity| has its `quantile` below `eps`."""

    in_question: ClassVar[bool] = True
    kind: Literal["neq-group"]
    quantile: Annotated[float, Field(ge=0, le=1, strict=True)] = 0.5

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes groups at equilibrium."""
        return self.grouped(quantile=self.quantile)


class NeqCkaSpec(GroupedSpec):
    """Groups stand still whose outputs' linear CKA between epochs has a |velocity| below `eps`."""

    in_question: ClassVar[bool] = True
    kind: Literal["neq-cka"]

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that reads the CKA of groups."""
        return self.grouped(reading="cka")


class NeqBudgetSpec(GroupedSpec):
    """NEq, and more of the slowest, for what they save, until the backward keeps to the share
    `flops`; single neurons, or whole groups.
    """

    in_question: ClassVar[bool] = True
    kind: Literal["neq-budget"]
    flops: Flops
    groups: Groups = "neurons"

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that keeps the budget."""
        import neq

        if self.groups != "neurons":
            return neq.Budget(self.grouped(), self.flops)
        single = neq.AtEquilibrium(self.eps, self.mu, self.recursion, self.align, self.rounding)
        return neq.Budget(single, self.flops)


class RandomLayersSpec(FreezingSpec):
    """Control: whole layers stand still, drawn at random anew each epoch, as many as leave the
    share `flops` of the backward.
    """

    kind: Literal["random-layers"]
    flops: Flops

    def policy(self, seed: int) -> "neq.Policy":
        """The policy whose draws depend on (`seed`, epoch) alone."""
        import neq
        from harness.seeds import derive

        return neq.RandomLayers(self.flops, seed=derive(seed, "masks"))


class SlowestLayersSpec(VelocitySpec):
    """Control: the layers of the smallest median |velocity| stand still, as many as leave the share
    `flops` of the backward.
    """

    kind: Literal["slowest-layers"]
    flops: Flops

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes layers by rank instead of by a threshold."""
        import neq

        return neq.SlowestLayers(self.flops, mu=self.mu, recursion=self.recursion)


class FreezeFirstSpec(FreezingSpec):
    """Control: from epoch 1 on the layers nearest to the input stand still, as many as leave the
    share `flops` of the backward.
    """

    kind: Literal["freeze-first"]
    flops: Flops

    def policy(self, seed: int) -> "neq.Policy":
        """The policy that freezes the entrance."""
        import neq

        return neq.FreezeFirst(self.flops)


FreezingMethodSpec = (
    BaselineSpec
    | NeqSpec
    | RandomSpec
    | SmallestVelocitySpec
    | FreezeAfterSpec
    | NeqGroupSpec
    | NeqCkaSpec
    | NeqBudgetSpec
    | RandomLayersSpec
    | SlowestLayersSpec
    | FreezeFirstSpec
)
FREEZING: dict[str, type[Spec]] = {
    "baseline": BaselineSpec,
    "neq": NeqSpec,
    "random": RandomSpec,
    "smallest_velocity": SmallestVelocitySpec,
    "freeze_after": FreezeAfterSpec,
    "neq-group": NeqGroupSpec,
    "neq-cka": NeqCkaSpec,
    "neq-budget": NeqBudgetSpec,
    "random-layers": RandomLayersSpec,
    "slowest-layers": SlowestLayersSpec,
    "freeze-first": FreezeFirstSpec,
}
