"""The command line: verbs, options, exit codes.

Heavy imports happen inside commands, so that `--help` answers at once.
"""

import gc
import os
import shlex
import sys
from typing import Annotated, Literal, NoReturn

import typer

from harness.commands.examples import Verb, Verbs
from harness.commands.options import (
    Address,
    Results,
    RunOptions,
    SeenResults,
    Settings,
    SuiteName,
    TrialOptions,
    takes,
)
from harness.console import console, progress_line, write_json
from harness.errors import UserError

INTERRUPTED = 130

app = typer.Typer(
    name="neqbench",
    cls=Verbs,
    context_settings={"max_content_width": 100},
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

AnySuite = Annotated[str | None, typer.Argument(help="A suite; or give --model.")]
Model = Annotated[str | None, typer.Option(metavar="MODULE:CALLABLE", help="Any model.")]
Input = Annotated[
    str | None,
    typer.Option(
        metavar="3x224x224",
        help="A sample, for --model; several as ids:int64:128,attention_mask:int64:128.",
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="With torch.compile, for --model; a recipe says it.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the draw of frozen neurons.")]
Format = Annotated[Literal["rich", "json"], typer.Option(help="For people, or for programs.")]


def main() -> NoReturn:
    """Run the command line and exit with its code; a wrong input is one line and exit code 2."""
    try:
        code = app(prog_name="neqbench", standalone_mode=False) or 0
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        usage = getattr(error, "format_message", None)  # what Typer refuses
        if usage is None:
            raise
        context = getattr(error, "ctx", None)
        whose = context.command_path if context else "neqbench"
        _refuse(f"{usage().replace('Value error, ', '')} (see {whose} --help)")
    if code == INTERRUPTED and os.environ.get("RANK", "0") == "0":
        again = shlex.join(["neqbench", *sys.argv[1:]])
        if "TORCHELASTIC_RUN_ID" in os.environ:
            again = "the same torchrun command"
        print(f"interrupted; go on with: {again}", file=sys.stderr)
    sys.exit(code)


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@app.callback(invoke_without_command=True)
def _help(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Say what it runs on.")] = False,
) -> None:
    """What does freezing neurons at equilibrium save in training, and what does it cost?"""
    if version:
        from harness.storage.provenance import runs_on

        print("\n".join(runs_on()))
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command(cls=Verb)
def suites(
    suite: Annotated[str | None, typer.Argument(help="A suite; without, all of them.")] = None,
    format: Format = "rich",
) -> None:
    """List the suites that can be run, or the methods of one."""
    from harness.commands.suites import suites as show

    show(suite, format, console())


@app.command(cls=Verb)
def doctor(
    suite: Annotated[str | None, typer.Argument(help="A suite; without, this machine.")] = None,
    settings: Settings = None,
    results: Results = "results",
    address: Address = None,
) -> None:
    """Say what this machine lacks, or what is wrong in a suite."""
    from harness.commands.doctor_machine import examine_machine, print_finding, print_verdict

    seen = []
    findings = examine_machine(results, address)
    if suite is not None:
        from harness.commands.doctor_suite import examine_suite

        findings = examine_suite(suite, settings or [])
    for finding in findings:
        print_finding(finding, console())
        seen.append(finding)
    if suite is None:
        print_verdict(seen, console())
    if any(finding.wrong for finding in seen):
        raise typer.Exit(1)


@app.command(cls=Verb)
def prepare(suite: SuiteName, settings: Settings = None) -> None:
    """Fetch or check a suite's data. Layout, counts, and whether samples decode."""
    from harness.commands.prepare import prepare as fetch

    fetch(suite, settings or (), console())


@app.command(cls=Verb)
@takes(TrialOptions)
def plan(options: TrialOptions, format: Format = "rich") -> None:
    """List a suite's trials with key and state; nothing is run. Missing data are fetched."""
    from harness.commands.plan import plan as list_trials

    gc.disable()  # a tenth of the time: there is nothing to collect
    list_trials(options, format, console())


@app.command(cls=Verb)
@takes(RunOptions)
def run(
    options: RunOptions,
    executor: Annotated[
        Literal["ray", "inline"], typer.Option(help="Ray tasks, or this process.")
    ] = "ray",
    address: Address = None,
) -> None:
    """Run what is not done yet, then print the report. The same command resumes."""
    from harness.commands.run import run as run_suite

    if run_suite(options, executor, address, console()):
        raise typer.Exit(1)


@app.command(cls=Verb)
def status(
    what: Annotated[
        str | None, typer.Argument(help="A suite, or results (all below --results).")
    ] = None,
    results: Results = "results",
    watch: Annotated[bool, typer.Option("--watch", help="Until nothing is left to do.")] = False,
    format: Format = "rich",
) -> None:
    """Show what became of every trial, from the results alone. On any machine that sees them."""
    from harness.commands import status as module
    from harness.storage.store import Store, find_stores

    def find() -> list[Store]:
        return find_stores(what or results, results)

    if watch:
        module.watch(find, console())
    elif format == "json":
        write_json(module.to_json(module.Reader(find).read()))
    else:
        module.print_status(module.Reader(find).read(), console())


@app.command(cls=Verb)
def report(
    what: Annotated[
        list[str], typer.Argument(help="Suites, results roots or suites' results; taken together.")
    ],
    results: Results = "results",
    format: Annotated[
        Literal["rich", "html", "md", "latex", "csv", "json"],
        typer.Option(help="For a terminal, a page, a paper, or programs."),
    ] = "rich",
    figures: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Write the figures there, too, as PNG.")
    ] = None,
) -> None:
    """Compare the methods of stored runs with the baseline."""
    from harness.report.forms import render
    from harness.report.model import load_report
    from harness.storage.frames import stores_named

    gc.disable()  # a tenth of the time: there is nothing to collect
    for path in render(load_report(stores_named(what, results)), format, console(), figures):
        print(path, file=sys.stderr)


@app.command(cls=Verb)
def compare(
    a: Annotated[str, typer.Argument(help="A suite, a results root, or a suite's results.")],
    b: Annotated[str, typer.Argument(help="The same, of another run.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option("--fail-on", metavar="GATE", help="Exit 1 on it: 'metric<-0.5pp'."),
    ] = None,
    results: Results = "results",
    format: Format = "rich",
) -> None:
    """Show what changed from run A to run B. What can't be compared is said."""
    from harness.report.changes import print_comparison
    from harness.report.compare import compare as compared
    from harness.report.gates import gates
    from harness.storage.store import find_stores

    bounds = gates(fail_on or [])
    found = compared(find_stores(a, results), find_stores(b, results), bounds)
    if format == "json":
        write_json(found.to_json())
    else:
        print_comparison(found, console())
    if found.missed:
        raise typer.Exit(1)


@app.command(cls=Verb)
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
    compile: Compile = False,
    format: Format = "rich",
) -> None:
    """Count a model's forward and backward FLOPs per sample."""
    from harness.commands.flops import count, print_counts
    from harness.flops.subject import subject

    found = subject(suite, settings or (), model, input)
    counted = count(found, frozen, seed, verify, compile)
    if format == "json":
        write_json(counted.json())
    else:
        print_counts(counted, console())
    if not counted.agrees:
        raise typer.Exit(1)


@app.command(cls=Verb)
def speed(
    suite: AnySuite = None,
    settings: Settings = None,
    model: Model = None,
    input: Input = None,
    batch: Annotated[int | None, typer.Option(help="Samples, for --model (32).")] = None,
    precision: Annotated[
        Literal["float32", "bf16", "fp16"] | None, typer.Option(help="For --model (float32).")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Your own training: it returns (model, optimizer, step); step() does one step "
            "and returns the loss.",
        ),
    ] = None,
    frozen: Annotated[str, typer.Option(help="Shares of the freezable neurons.")] = "0.5,0.75,0.9",
    seed: Seed = 0,
    seconds: Annotated[
        float,
        typer.Option(
            min=0,
            help="How long it may take, about, without compiling; each mask is timed twice anyway.",
        ),
    ] = 55,
    compile: Compile = False,
    format: Format = "rich",
) -> None:
    """Time steps with frozen neurons, to say from when on it pays here."""
    from time import perf_counter

    ends = perf_counter() + seconds
    from harness.commands.speed import own_speed, parse_shares
    from harness.commands.speed import speed as measure
    from harness.commands.speed_view import print_speed
    from harness.flops.subject import subject
    from harness.train.pays import Asked

    wanted = parse_shares(frozen)
    others = [suite, settings or None, model, input, batch, precision, compile or None]
    if step is not None and others.count(None) < len(others):
        raise UserError(
            "--step brings its own model, data and precision: give no suite, --set, --model, "
            "--input, --batch, --precision or --compile with it"
        )
    with progress_line() as shown:
        if step is not None:
            timed = own_speed(step, wanted, seed, ends - perf_counter(), shown.update)
        else:
            found = subject(suite, settings or (), model, input)
            asked = Asked(wanted, seed, ends, shown.update)
            timed = measure(found, batch, precision, asked, compile)
    if format == "json":
        write_json(timed.json())
    else:
        print_speed(timed, console())


@app.command(cls=Verb)
@takes(RunOptions, results=SeenResults)
def submit(
    options: RunOptions,
    address: Annotated[str, typer.Option(help="Of the cluster's dashboard: http://head:8265.")],
) -> None:
    """Run a suite as a job on a Ray cluster. Submitted again, it goes on where it stopped."""
    from harness.commands.submit import submit as send

    send(options, address, console())
