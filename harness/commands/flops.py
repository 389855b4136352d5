"""`neqbench flops`: the accounting of one model, with a share of its neurons frozen at random."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from harness.errors import UserError
from harness.flops.oracle import backward_flops_by_torch, forward_flops_by_torch
from harness.flops.subject import Subject
from neq.required import BATCH

_PASSES = {
    "backward": "",
    "forward": ", forward in train mode",
    "evaluation": ", forward in eval mode",
}


@dataclass(frozen=True, slots=True)
class Counted:
    """A model with a mask, counted.

    `measured`: what PyTorch's counter saw in a backward over a batch of `BATCH`; `forwards`: in a
    forward in train mode and in one in eval mode; None where it was not asked. `compiled`: whether
    the backward was, or is in the suite's recipe.
    """

    subject: Subject
    frozen: Tensor
    measured: list[int] | None
    forwards: tuple[int, int] | None = None
    compiled: bool = False

    @property
    def agrees(self) -> bool:
        """Whether what was measured is what was counted, and required ≤ executed ≤ dense."""
        whole = self.subject.costs.backward(self.frozen, BATCH)
        ordered = whole.required <= whole.executed <= whole.dense
        backward = all(count == whole.executed for count in self.measured or [])
        forward = all(part["counted"] == part["measured"] for part in self._forwards().values())
        return ordered and backward and forward

    @property
    def uncounted(self) -> list[str]:
        """What multiplies and is in no count."""
        return self.subject.costs.left_out(compiled=self.compiled)

    def _forwards(self) -> dict[str, dict[str, int]]:
        """Counted and measured, over a batch; a product that no output depends on is done, too."""
        done = self.subject.costs.forwards
        pairs = zip(("forward", "evaluation"), (done.train, done.evaluation), strict=True)
        return {
            name: {"counted": forward.done, "measured": measured}
            for (name, forward), measured in zip(pairs, self.forwards or (), strict=False)
        }

    def json(self) -> dict[str, Any]:
        """The documented JSON, per sample; `frozen` and `fixed` (by the model itself) are shares
        of all neurons.
        """
        costs = self.subject.costs
        verify: dict[str, Any] | None = None
        if self.measured is not None:
            counted = costs.backward(self.frozen, BATCH).executed
            wrong = [count for count in self.measured if count != counted]
            verify = {"batch": BATCH, "counted": counted, "measured": (wrong or self.measured)[0]}
            verify |= self._forwards()
        return {
            "forward": costs.forward(),
            "backward": asdict(costs.backward(self.frozen)),
            "overhead_per_validation_sample": costs.overhead(),
            "neurons": len(self.frozen),
            "frozen": float(self.frozen.double().mean()),
            "fixed": float(costs.neurons.fixed.double().mean()),
            "uncounted": self.uncounted,
            "verify": verify,
        }


def count(
    subject: Subject, share: float, seed: int, verify: bool, compile: bool = False
) -> Counted:
    """Count a model with a share of its neurons frozen; `verify`: beside a real backward, compiled
    where the suite's recipe compiles, or with `compile`.

    Raises UserError for a share outside of 0 to 1, and for a model that does not run so.
    """
    if not 0 <= share <= 1:
        raise UserError(f"--frozen {share}: write a share from 0 to 1, such as 0.5")
    if compile and subject.suite is not None:
        raise UserError("--compile belongs to --model; for a suite: --set recipe.compile=true")
    if compile and not verify:
        raise UserError("--compile says how --verify runs a backward: give both, or none")
    compile |= subject.suite is not None and subject.suite.recipe.compile
    frozen = subject.draw(share, seed)
    if not verify:
        return Counted(subject, frozen, None, None, compile)
    with torch.random.fork_rng([]):
        inputs = subject.inputs.random(BATCH)
    try:
        module, foreign = subject.module, subject.costs.foreign
        forwards = forward_flops_by_torch(module, inputs, foreign)
        seen = backward_flops_by_torch(module, inputs, frozen, "exact", None, compile, foreign)
        return Counted(subject, frozen, seen, forwards, compile)
    except Exception as error:
        raise UserError(
            f"--verify: a backward of {subject.name} fails ({type(error).__name__}: {error})"
        ) from error


def print_counts(counted: Counted, console: Console) -> None:
    """Print the numbers for people, with the layers that never freeze."""
    numbers = counted.json()
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=None)
    table.add_column("FLOPs per sample")
    table.add_column(counted.subject.name, justify="right")
    rows = {"forward": numbers["forward"]}
    backward = {name: n for name, n in numbers["backward"].items() if n or name != "recomputed"}
    rows |= {f"backward, {name}": value for name, value in backward.items()}
    rows["deciding, per validation sample"] = numbers["overhead_per_validation_sample"]
    for title, value in rows.items():
        table.add_row(title, f"{value:,}")
    table.add_row("neurons", f"{numbers['neurons']:,}")
    table.add_row("frozen", f"{numbers['frozen']:.2%}")
    if numbers["fixed"]:
        table.add_row("fixed by the model (requires_grad=False)", f"{numbers['fixed']:.2%}")
    console.print(table)
    if numbers["verify"]:
        seen = numbers["verify"]
        for name, words in _PASSES.items():
            pair = seen if name == "backward" else seen[name]
            agrees = pair["counted"] == pair["measured"]
            console.print(
                f"verified on a batch of {seen['batch']}{words}: counted {pair['counted']:,}, "
                f"measured {pair['measured']:,}: {'agrees' if agrees else 'does NOT agree'}",
                soft_wrap=True,
            )
    dense = counted.subject.costs.dense_only
    for name, reason in list(dense.items())[:5]:
        console.print(f"never frozen: {name or '(the model itself)'}: {reason}", style="dim")
    if len(dense) > 5:
        console.print(f"never frozen: {len(dense) - 5} more", style="dim")
    for name in counted.uncounted:
        console.print(f"not counted: {name}", style="red")
