"""What is to be run, as a user says it: declared once for `plan`, `run` and `submit`.

Nothing heavy is imported here: the command line reads it before it answers `--help`.
"""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

if TYPE_CHECKING:
    from harness.run.trials import Trials

SuiteName = Annotated[str, typer.Argument(help="A suite's name, or a folder with a suite.toml.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PATH=VALUE", help="Change the suite: recipe.epochs=5."),
]
Results = Annotated[str, typer.Option(metavar="ROOT", help="Where results lie.")]
SeenResults = Annotated[
    str, typer.Option(metavar="ROOT", help="Where every node sees it: s3://…, gs://…, /mnt/….")
]
Address = Annotated[str | None, typer.Option(help="Join the Ray cluster at this address.")]

REPLAY_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialOptions:
    """Which trials of which suite, and where their results lie."""

    suite: SuiteName
    settings: Settings = None
    methods: Annotated[str | None, typer.Option(help="Which methods: baseline,neq.")] = None
    seeds: Annotated[str | None, typer.Option(help="Which seeds: 0-4 or 0,2.")] = None
    synthetic: Annotated[bool, typer.Option("--synthetic", help="On noise of the right shape.")] = (
        False
    )
    results: Results = "results"

    def trials(self) -> "Trials":
        """The trials that are meant; raises UserError for anything wrong in suite, choice or
        data.
        """
        from harness.run.trials import specs

        return specs(
            self.suite, self.settings or (), self.methods, self.seeds, synthetic=self.synthetic
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions(TrialOptions):
    """Trials to be run; `retry_failed`: those that have failed, too.

    Afterwards their masks are replayed for `replay_seconds` a group, unless `no_replay`, and what
    pruning left dead is removed; `save_shrunk`: the smaller networks are kept with the results.
    `log`: places where what trials have committed is logged, too.
    """

    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also try failed trials again.")
    ] = False
    no_replay: Annotated[
        bool, typer.Option("--no-replay", help="Don't time the masks alone on the device.")
    ] = False
    replay_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="For timing the masks of a group.")
    ] = REPLAY_SECONDS
    save_shrunk: Annotated[
        bool,
        typer.Option("--save-shrunk", help="Keep pruned networks without what is dead."),
    ] = False
    log: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE", help="tensorboard:FOLDER, mlflow:URI, wandb[:offline]."),
    ] = None

    def words(self) -> list[str]:
        """The options as words of a command line, without the suite."""
        given = {"--methods": self.methods, "--seeds": self.seeds}
        words = [word for name, value in given.items() if value for word in (name, value)]
        words += [word for setting in self.settings or () for word in ("--set", setting)]
        words += [word for place in self.log or () for word in ("--log", place)]
        words += ["--synthetic"] * self.synthetic + ["--retry-failed"] * self.retry_failed
        words += ["--no-replay"] * self.no_replay + ["--save-shrunk"] * self.save_shrunk
        if self.replay_seconds != REPLAY_SECONDS:
            words += ["--replay-seconds", f"{self.replay_seconds:g}"]
        return ["--results", self.results, *words]


def takes(
    options: type[TrialOptions], **required: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a command whose first parameter is `options`: Typer sees their fields in its place.

    `required`: fields without a default here, and how they are annotated.
    """
    hints = get_type_hints(options, include_extras=True) | required

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def called(**given: Any) -> Any:
            chosen = options(**{f.name: given.pop(f.name) for f in fields(options)})
            return command(chosen, **given)

        own = list(inspect.signature(command).parameters.values())[1:]
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [
            inspect.Parameter(f.name, kind, default=default, annotation=hints[f.name])
            for f in fields(options)
            for default in [inspect.Parameter.empty if f.name in required else _default(f)]
        ]
        parameters += [parameter.replace(kind=kind) for parameter in own]
        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def _default(option: Any) -> Any:
    return inspect.Parameter.empty if option.default is MISSING else option.default
