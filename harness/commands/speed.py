"""`neqbench speed`: does freezing pay on this machine? Real steps, frozen and dense by turns."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import mean, median, quantiles
from typing import Any, Literal

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import neq
from harness.console import say
from harness.errors import UserError
from harness.flops.costs import Backward
from harness.flops.subject import Subject
from harness.storage.provenance import hardware
from harness.suite.config import Recipe, Suite, TorchClass
from harness.train.optimizers import build_optimizer
from harness.train.tuning import Tuning, autocast, numerics, square, tune

PAIRS = (8, 60)  # of dense and frozen steps for each row; the first pair warms up
SECONDS = 3.0  # after which the smaller number of pairs is enough
STEPS = 3  # on each side; the first one still finds the memory of the other side
Granularity = Literal["neuron", "layer"]
Precision = Literal["float32", "bf16", "fp16"]
KINDS: tuple[tuple[Granularity, neq.Gradient], ...] = (
    ("neuron", "exact"),
    ("layer", "exact"),
    ("neuron", "cut"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """One share of frozen neurons: times and FLOPs over those of the dense model.

    `backward_ratio` is the median over pairs of steps, low and high are the quartiles.
    `floor_ratio`: time with all weight gradients left out and all input gradients kept.
    """

    granularity: Granularity
    gradient: neq.Gradient
    frozen: float
    backward_ratio: float
    backward_ratio_low: float
    backward_ratio_high: float
    step_ratio: float
    required_ratio: float
    executed_ratio: float
    floor_ratio: float


@dataclass(frozen=True, slots=True)
class Speed:
    """What was timed: rows of one model on one device."""

    name: str
    device: str
    batch: int
    precision: str
    channels_last: bool
    rows: list[Row]

    def json(self) -> dict[str, Any]:
        """The documented JSON, as plain values."""
        return asdict(self)


def parse_shares(text: str) -> list[float]:
    """The shares that "0,0.5,1" names; raises UserError for anything outside of 0 to 1."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise UserError(f"--frozen {text}: write shares from 0 to 1, such as 0,0.5,1")
    return values


def speed(
    subject: Subject,
    batch: int | None,
    shares: Sequence[float],
    seed: int,
    precision: Precision | None,
    progress: Callable[[str], None],
) -> Speed:
    """Time a model in its suite's recipe, or with SGD, frozen and dense steps by turns.

    `batch` and `precision`: where it is no suite's; `progress` is told what is being done. Raises
    UserError where the model can't be trained so.
    """
    recipe = _recipe(subject.suite, batch, precision)
    if not bool(subject.freezable.any()):
        raise UserError(f"{subject.name} has no neuron that may freeze")
    try:
        with numerics(recipe.precision):
            return _timed(subject, recipe, shares, seed, progress)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{subject.name} can't be trained with a batch of {recipe.batch_size} and "
            f"{recipe.optimizer.name} ({type(error).__name__}: {error})"
        ) from error


def _timed(
    subject: Subject,
    recipe: Recipe,
    shares: Sequence[float],
    seed: int,
    progress: Callable[[str], None],
) -> Speed:
    gpu = torch.cuda.is_available() and (subject.suite is None or subject.suite.resources.gpus != 0)
    device = torch.device("cuda" if gpu else "cpu")
    model = subject.module.to(device).train()
    progress("choosing memory format and kernels")
    tuning = tune(model, subject.shape, recipe.batch_size, recipe.precision)
    bench = _Bench(tuning.convert(model), subject, recipe, tuning, device)
    floor = median(pair[0] for pair in bench.pairs(subject.freezable, floor=True))
    rows = []
    for granularity, gradient in KINDS:
        for share in shares:
            progress(f"{share:.0%} of the {granularity}s frozen, {gradient} gradient")
            mask = _mask(subject, granularity, share, seed)
            rows.append(bench.row(granularity, gradient, share, mask, floor))
    return Speed(
        subject.name,
        hardware(device.type == "cuda"),
        recipe.batch_size,
        recipe.precision,
        tuning.channels_last,
        rows,
    )


def _recipe(suite: Suite | None, batch: int | None, precision: Precision | None) -> Recipe:
    if suite is not None and (batch is not None or precision is not None):
        raise UserError("--batch and --precision belong to --model; a suite's recipe has its own")
    if suite is not None:
        torch.set_num_threads(suite.resources.cpus)
        size = suite.recipe.forward_size(suite.resources.world_size)
        return suite.recipe.model_copy(update={"batch_size": size})
    if batch is not None and batch < 1:
        raise UserError(f"--batch {batch}: must be at least 1")
    arguments: Any = {"momentum": 0.9, "weight_decay": 5e-4, "lr": 0.1}
    return Recipe(
        epochs=1,
        batch_size=batch or 32,
        precision=precision or "float32",
        optimizer=TorchClass(name="SGD", **arguments),
    )


def _mask(subject: Subject, granularity: Granularity, share: float, seed: int) -> Tensor:
    """Frozen at random: single neurons, or whole layers until the next would be too many."""
    if granularity == "neuron":
        return subject.draw(share, seed)
    mask = torch.zeros_like(subject.freezable)
    layers = [layer.neurons for layer in subject.costs.neurons.layers]
    wanted = round(share * int(subject.freezable.sum()))
    generator = torch.Generator().manual_seed(seed)
    for position in torch.randperm(len(layers), generator=generator).tolist():
        part = layers[position]
        if int(mask.sum()) + int(subject.freezable[part].sum()) <= wanted:
            mask[part] = subject.freezable[part]
    return mask


class _Bench:
    """A model and its optimizer to be timed; no weight moves, for the learning rate is zero."""

    def __init__(
        self, model: nn.Module, subject: Subject, recipe: Recipe, tuning: Tuning, device: Any
    ) -> None:
        self.model, self.costs, self.tuning, self.device = model, subject.costs, tuning, device
        self.precision = recipe.precision
        self.optimizer, _ = build_optimizer(subject.name, recipe, model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        images = torch.randn(recipe.batch_size, *subject.shape, device=device)
        self.images = tuning.apply(images)

    def row(
        self,
        granularity: Granularity,
        gradient: neq.Gradient,
        share: float,
        mask: Tensor,
        floor: float,
    ) -> Row:
        """Time one mask against the dense model, and count it."""
        pairs = self.pairs(mask, gradient)
        ratios = [backward for backward, _ in pairs]
        low, _, high = quantiles(ratios, n=4, method="inclusive")
        backward = self._counted(mask, gradient)
        return Row(
            granularity=granularity,
            gradient=gradient,
            frozen=share,
            backward_ratio=median(ratios),
            backward_ratio_low=low,
            backward_ratio_high=high,
            step_ratio=median(step for _, step in pairs),
            required_ratio=backward.required / max(backward.dense, 1),
            executed_ratio=backward.executed / max(backward.dense, 1),
            floor_ratio=floor,
        )

    def _counted(self, mask: Tensor, gradient: neq.Gradient) -> Backward:
        plan = neq.plan(self.costs.neurons, mask, gradient, self.tuning.timings)
        return self.costs.backward(mask, plan=plan)

    def pairs(
        self, mask: Tensor, gradient: neq.Gradient = "exact", floor: bool = False
    ) -> list[tuple[float, float]]:
        """(backward, step) seconds, frozen over dense, pair by pair; `floor`: input gradients
        kept.
        """
        freezer = neq.NeuronFreezer(
            self.model,
            self.optimizer,
            neq.Everyone(),
            gradient=gradient,
            timings=self.tuning.timings,
        )
        ratios: list[tuple[float, float]] = []
        least, most = PAIRS
        start = time.perf_counter()
        while len(ratios) < least or (len(ratios) < most and time.perf_counter() - start < SECONDS):
            sides = {}
            for side in ("dense", "frozen")[:: -1 if len(ratios) % 2 else 1]:
                freezer.freeze(mask if side == "frozen" else torch.zeros_like(mask))
                with self._input_gradients() if floor and side == "frozen" else nullcontext():
                    sides[side] = self._steps()
            dense, frozen = sides["dense"], sides["frozen"]
            ratios.append((frozen[0] / dense[0], frozen[1] / dense[1]))
        freezer.remove()
        return ratios[1:]

    @contextmanager
    def _input_gradients(self) -> Iterator[None]:
        """Inside, all layers but the first ones pass a gradient on, whatever is frozen."""
        modules = dict(self.model.named_modules())
        handles = [
            modules[name].register_forward_hook(_require_gradient) for name in self.costs.entrances
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _steps(self) -> tuple[float, float]:
        """Mean seconds of backward and step."""
        backward, step = zip(*[self._step() for _ in range(STEPS)][1:], strict=True)
        return mean(backward), mean(step)

    def _step(self) -> tuple[float, float]:
        """Seconds of the backward, and of the whole step."""
        self.optimizer.zero_grad()
        with neq.stopwatch(self.device) as step:
            with autocast(self.device.type, self.precision):
                loss = square(self.model(self.images))
            with neq.stopwatch(self.device) as backward:
                torch.autograd.backward(loss)
            self.optimizer.step()
        return backward[0], step[0]


def _require_gradient(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output if output.requires_grad else output.requires_grad_().clone()


BAR = 16  # characters for the time of the dense model
TITLES = {
    ("neuron", "exact"): "neurons at random",
    ("layer", "exact"): "whole layers at random",
    ("neuron", "cut"): "neurons at random, gradient cut (an approximation)",
}


def print_speed(speed: Speed, console: Console) -> None:
    """Print a table for each way of freezing, with a bar for the time of each row."""
    layout = ", channels_last" if speed.channels_last else ""
    say(f"{speed.name}: batch {speed.batch}, {speed.precision}{layout}", console, "bold")
    say(speed.device, console, "dim")
    for kind in KINDS:
        rows = [row for row in speed.rows if (row.granularity, row.gradient) == kind]
        console.print(_grid(TITLES[kind], rows))
    say(
        "Times and FLOPs over those of the dense model: medians over pairs of frozen and dense "
        "steps, with quartiles. With every input gradient, but the head's weight gradient alone, "
        f"the backward takes {speed.rows[0].floor_ratio:.2f}.",
        console,
    )


def _grid(title: str, rows: list[Row]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, show_edge=False, title=title, title_justify="left"
    )
    for heading in ("frozen", "backward", "quartiles", "step", "required", "executed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row.frozen:.0%}",
            f"{row.backward_ratio:.2f}",
            f"{row.backward_ratio_low:.2f}–{row.backward_ratio_high:.2f}",
            f"{row.step_ratio:.2f}",
            f"{row.required_ratio:.2f}",
            f"{row.executed_ratio:.2f}",
            "█" * round(BAR * min(row.backward_ratio, 1.2)),
        )
    return table
