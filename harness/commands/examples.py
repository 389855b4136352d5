"""What `--help` ends with: commands that a newcomer can copy."""

from typing import Any

from typer.core import TyperCommand, TyperGroup

BEGIN = (
    "neqbench doctor         # does this machine have what a run needs?",
    "neqbench run digits     # a first run: data included, minutes on two CPU cores",
    "neqbench report digits  # its report again; --format html makes a page of it",
)
EXAMPLES = {
    "suites": ("neqbench suites", "neqbench suites digits"),
    "doctor": ("neqbench doctor", "neqbench doctor digits"),
    "prepare": (
        "neqbench prepare mnist-lenet300",
        "neqbench prepare imagenet --set data.root=/mnt/imagenet",
    ),
    "plan": (
        "neqbench plan digits --seeds 0-1",
        "neqbench plan digits --set 'methods.neq.eps=[1e-3, 1e-2]'",
    ),
    "run": (
        "neqbench run digits",
        "neqbench run digits --methods baseline,neq --seeds 0-1 --set recipe.epochs=10",
    ),
    "status": ("neqbench status", "neqbench status digits --watch"),
    "report": (
        "neqbench report digits",
        "neqbench report digits --format html > digits.html",
    ),
    "compare": ("neqbench compare before/digits after/digits --fail-on 'metric<-0.5pp'",),
    "flops": (
        "neqbench flops digits --frozen 0.5 --verify",
        "neqbench flops --model torchvision.models:resnet18 --input 3x224x224",
    ),
    "speed": (
        "neqbench speed digits",
        "neqbench speed --model torchvision.models:resnet18 --input 3x224x224",
    ),
    "submit": ("neqbench submit cifar10 --address http://head:8265 --results s3://bucket/runs",),
}


class Verb(TyperCommand):
    """A command whose help ends with its examples."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the examples, each on a line of its own."""
        _write("Examples", EXAMPLES[self.name or ""], formatter)


class Verbs(TyperGroup):
    """The command line itself, whose help ends with where to begin."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the first commands, each on a line of its own."""
        _write("Begin here", BEGIN, formatter)


def _write(title: str, lines: tuple[str, ...], formatter: Any) -> None:
    with formatter.section(title):
        for line in lines:
            formatter.write(f"{'':{formatter.current_indent}}{line}\n")
