"""`neqbench suites`: what can be run, what it needs, and which methods a suite has."""

from collections.abc import Sequence
from textwrap import shorten

from rich.console import Console
from rich.text import Text

from harness.console import say, table, write_json
from harness.report.words import counted, listed
from harness.suite.config import Suite
from harness.suite.files import load_experiments, shipped_suites

NEEDS = (
    "Run anywhere, with data included",
    "Run anywhere, with data that neqbench prepare fetches",
    "For a GPU, with data that neqbench prepare fetches, or says where to get",
)
NUMBERS = 10  # columns for "28 × 250"
LEAST = 20  # columns for what a suite is


def suites(name: str | None, format: str, console: Console) -> None:
    """List the suites, or one suite's methods; `format`: "rich" or "json".

    `name`: of a suite, or a folder with a suite.toml. Raises UserError where there is none.
    """
    found = [load_experiments(each)[0] for each in ([name] if name else shipped_suites())]
    if format == "json":
        write_json([suite.model_dump(mode="json") for points in found for suite in points])
    elif name:
        _print_methods(found[0], console)
    else:
        _print_suites(found, console)


def _print_suites(found: Sequence[list[Suite]], console: Console) -> None:
    """A line for each suite, those that need the least first; `found`: the points of each."""
    names = max(len(points[0].name) for points in found) + 2
    longest = max(len(points[0].title) for points in found)
    room = max(min(console.width - names - NUMBERS, longest), LEAST)
    console.print(Text(f"{'suite':{names}}{'trials × epochs':>{room + NUMBERS}}", "dim"))
    for need, title in enumerate(NEEDS):
        console.print(Text(title, "bold"))
        before = ""
        for points in (points for points in found if _need(points[0]) == need):
            suite = points[0]
            what, _, rest = suite.title.partition(": ")
            told = f"… {rest}" if rest and what == before else suite.title
            told, before = shorten(told, room, placeholder="…"), what
            numbers = f"{_trials(points)} × {suite.recipe.epochs}"
            console.print(Text(f"{suite.name:{names}}{told:{room}}{numbers:>{NUMBERS}}"))
    say("neqbench suites NAME shows a suite's methods.", console, "dim")


def _need(suite: Suite) -> int:
    """The place of what the suite needs in `NEEDS`."""
    if not suite.data.root:
        return 0
    return 1 if suite.recipe.precision == "float32" else 2


def _trials(points: Sequence[Suite]) -> int:
    """How many trials a run of the whole suite has."""
    return sum(len(suite.seeds) * len(_chosen(suite)) for suite in points)


def _chosen(suite: Suite) -> Sequence[str]:
    return suite.default_methods or list(suite.methods)


def _print_methods(points: Sequence[Suite], console: Console) -> None:
    """What a suite trains, and its methods with their parameters."""
    suite, of = points[0], f", at {counted(len(points), 'point')}" * (len(points) > 1)
    say(f"{suite.name}: {suite.title}", console, "bold")
    facts = (
        f"data in {suite.data.root}" if suite.data.root else "data included",
        f"seeds {', '.join(map(str, suite.seeds))}",
        counted(suite.recipe.epochs, "epoch"),
        f"batch {suite.recipe.batch_size}",
        suite.recipe.precision,
        f"{counted(_trials(points), 'trial')}{of}",
    )
    say(" · ".join(facts), console)
    shown = table("method", "by default", "parameters")
    shown.columns[0].no_wrap = True
    for method, spec in suite.methods.items():
        values = spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        kind = values.pop("kind", method)
        values = ({} if kind == method else {"kind": kind}) | values
        shown.add_row(method, "yes" if method in _chosen(suite) else "", listed(values))
    console.print(shown)
    say(f"neqbench run {suite.name} --methods … runs those that you name.", console, "dim")
