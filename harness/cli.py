"""The command line. Heavy imports happen inside commands: `--help` answers at once."""

import json
import os
import sys
from typing import Annotated, Any, Literal, NoReturn

import typer

from harness.errors import UserError

INTERRUPTED = 130

app = typer.Typer(
    name="neqbench",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

SuiteName = Annotated[str, typer.Argument(help="A suite's name, or a folder with a suite.toml.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the suite: recipe.epochs=5."),
]
AnySuite = Annotated[str | None, typer.Argument(help="A suite; or give --model.")]
Model = Annotated[str | None, typer.Option(metavar="MODULE:CALLABLE", help="Any model.")]
Input = Annotated[
    str | None, typer.Option(metavar="3x224x224", help="Shape of a sample, for --model.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draw of frozen neurons.")]
Methods = Annotated[str | None, typer.Option(help="Which methods: baseline,neq.")]
Seeds = Annotated[str | None, typer.Option(help="Which seeds: 0-4 or 0,2.")]
Synthetic = Annotated[bool, typer.Option("--synthetic", help="On noise of the right shape.")]
Results = Annotated[str, typer.Option(metavar="ROOT", help="Where results lie.")]
Format = Annotated[Literal["rich", "json"], typer.Option(help="For people, or for programs.")]


def main() -> NoReturn:
    """Entry point: a wrong input is one line and exit code 2."""
    try:
        code = app(standalone_mode=False) or 0
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        usage = getattr(error, "format_message", None)  # what Typer refuses
        if usage is None:
            raise
        _refuse(f"{usage()} (see neqbench --help)")
    if code == INTERRUPTED:
        print("interrupted: the same command goes on from the last epoch", file=sys.stderr)
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    """What does freezing neurons at equilibrium save in training, and what does it cost?"""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def suites(format: Format = "rich") -> None:
    """List the suites that can be run."""
    from harness.suites import builtin, load

    loaded = [load(name)[0] for name in builtin()]
    if format == "json":
        _json([suite.model_dump(mode="json") for suite in loaded])
        return
    table = _table("suite", "what", "methods", "seeds", "epochs")
    for suite in loaded:
        chosen = suite.default_methods or tuple(suite.methods)
        more = [name for name in suite.methods if name not in chosen]
        methods = ", ".join(chosen) + (f" (also {', '.join(more)})" if more else "")
        cells = [suite.name, suite.title, methods, len(suite.seeds), suite.recipe.epochs]
        table.add_row(*map(str, cells))
    _console().print(table)


@app.command()
def plan(
    suite: SuiteName,
    settings: Settings = None,
    methods: Methods = None,
    seeds: Seeds = None,
    synthetic: Synthetic = False,
    results: Results = "results",
    format: Format = "rich",
) -> None:
    """Show the trials of a suite with key and state; nothing is run, missing data are fetched."""
    from harness.plan import specs, states

    planned = states(specs(suite, settings or (), methods, seeds, synthetic=synthetic), results)
    if format == "json":
        _json(
            [
                {
                    "trial": p.spec.key,
                    "group": p.spec.group,
                    "method": p.spec.method,
                    "seed": p.spec.seed,
                    "state": p.state,
                    "epochs_done": p.epochs_done,
                    "epochs": p.spec.suite.recipe.epochs,
                }
                for p in planned
            ]
        )
        return
    table = _table("trial", "method", "seed", "state", "epochs")
    for p in planned:
        epochs = f"{p.epochs_done}/{p.spec.suite.recipe.epochs}"
        table.add_row(p.spec.key, p.spec.method, str(p.spec.seed), p.state, epochs)
    _console().print(table)


@app.command()
def run(
    suite: SuiteName,
    settings: Settings = None,
    methods: Methods = None,
    seeds: Seeds = None,
    synthetic: Synthetic = False,
    results: Results = "results",
    executor: Annotated[
        Literal["ray", "inline"], typer.Option(help="Ray tasks, or this process.")
    ] = "ray",
    address: Annotated[
        str | None, typer.Option(help="Join the Ray cluster at this address.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also try failed trials again.")
    ] = False,
) -> None:
    """Run what is not done yet, then print the report. The same command resumes."""
    from harness.run import Wanted
    from harness.run import run as run_suite

    wanted = Wanted(
        suite=suite,
        settings=settings or (),
        methods=methods,
        seeds=seeds,
        synthetic=synthetic,
        root=results,
        executor=executor,
        address=address,
        retry_failed=retry_failed,
    )
    failed = run_suite(wanted, _console())
    if failed:
        raise typer.Exit(1)


@app.command()
def prepare(suite: SuiteName, settings: Settings = None) -> None:
    """Fetch or check a suite's data: layout, counts, and whether samples decode."""
    from harness.prepare import prepare as fetch

    fetch(suite, settings or (), _console())


@app.command()
def doctor(suite: SuiteName, settings: Settings = None) -> None:
    """Say what a suite of one's own gets wrong."""
    from harness.doctor import doctor as examine
    from harness.doctor import show

    console, wrong = _console(), False
    for finding in examine(suite, settings or []):
        show(finding, console)
        wrong |= bool(finding.wrong)
    if wrong:
        raise typer.Exit(1)


@app.command()
def report(
    what: Annotated[str, typer.Argument(help="A suite, a results root, or a suite's results.")],
    results: Results = "results",
    format: Format = "rich",
) -> None:
    """Compare the methods of stored runs with the baseline."""
    from harness.report import model, terminal

    tables = model.load(model.folders(what, results))
    if format == "json":
        _write(model.to_json(tables))
    else:
        terminal.show(tables, _console())


@app.command()
def flops(
    suite: AnySuite = None,
    settings: Settings = None,
    model: Model = None,
    input: Input = None,
    frozen: Annotated[float, typer.Option(help="Share of the freezable neurons.")] = 0.0,
    seed: Seed = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hold it against PyTorch's counter in a real backward.")
    ] = False,
    format: Format = "rich",
) -> None:
    """Count a model's forward and backward FLOPs per sample."""
    from harness.count import count, show, subject

    counted = count(subject(suite, settings or (), model, input), frozen, seed, verify)
    if format == "json":
        _json(counted.json())
    else:
        show(counted, _console())
    if not counted.agrees:
        raise typer.Exit(1)


@app.command()
def speed(
    suite: AnySuite = None,
    settings: Settings = None,
    model: Model = None,
    input: Input = None,
    batch: Annotated[int | None, typer.Option(help="Samples, for --model (32).")] = None,
    precision: Annotated[
        Literal["float32", "bf16", "fp16"] | None, typer.Option(help="For --model (float32).")
    ] = None,
    frozen: Annotated[
        str, typer.Option(help="Shares of the freezable neurons.")
    ] = "0,0.25,0.5,0.75,0.9,1",
    seed: Seed = 0,
    format: Format = "rich",
) -> None:
    """Time steps with frozen neurons against dense ones, on this machine."""
    from harness.count import subject
    from harness.speed import shares, show
    from harness.speed import speed as measure

    wanted = shares(frozen)
    with _status() as status:
        found = subject(suite, settings or (), model, input)
        timed = measure(found, batch, wanted, seed, precision, status.update)
    if format == "json":
        _json(timed.json())
    else:
        show(timed, _console())


def _status() -> Any:
    """A line on the error stream, where that is a terminal."""
    from rich.console import Console

    return Console(stderr=True).status("reading the model")


def _console() -> Any:
    from rich.console import Console

    class Patient(Console):
        """Works on when nobody reads any more (`neqbench run … | head`)."""

        def on_broken_pipe(self) -> None:
            self.quiet = True
            _nobody_reads()

    return Patient(highlight=False)


def _table(*titles: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in titles:
        table.add_column(title)
    return table


def _json(value: Any) -> None:
    _write(json.dumps(value, indent=2))


def _write(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _nobody_reads()


def _nobody_reads() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
