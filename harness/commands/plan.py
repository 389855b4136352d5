"""`neqbench plan`: the trials of a suite with their keys, and how far each one is."""

from rich.console import Console

from harness.commands.options import TrialOptions
from harness.console import table, write_json
from harness.run.trials import TrialState, states
from harness.suite.config import Suite
from harness.suite.sweep import point_label


def plan(options: TrialOptions, format: str, console: Console) -> None:
    """List the trials that are meant; `format`: "rich" or "json".

    Raises UserError for anything wrong in suite, choice or data.
    """
    trials = options.trials()
    listed = states(trials, options.results)
    suites = {group[0].group: group[0].suite for group in trials.groups()}
    if format == "json":
        write_json([_to_json(trial, suites[trial.group]) for trial in listed])
        return
    swept = len(suites) > 1
    shown = table("trial", *(["point"] if swept else []), "method", "seed", "state", "epochs")
    for trial in listed:
        suite = suites[trial.group]
        point = [point_label(suite.point)] if swept else []
        done = f"{trial.epochs_done}/{suite.recipe.epochs}"
        shown.add_row(trial.key, *point, trial.method, str(trial.seed), trial.state, done)
    console.print(shown)


def _to_json(trial: TrialState, suite: Suite) -> dict[str, object]:
    return {
        "trial": trial.key,
        "group": trial.group,
        "point": point_label(suite.point),
        "method": trial.method,
        "seed": trial.seed,
        "state": trial.state,
        "epochs_done": trial.epochs_done,
        "epochs": suite.recipe.epochs,
    }
