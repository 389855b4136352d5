"""`neqbench prepare`: fetch what a suite needs, and check what is there."""

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from harness.console import say
from harness.errors import UserError, with_origin
from harness.run.preflight import preflight
from harness.run.trials import resolved, specs
from harness.suite import files, parts
from harness.suite.config import Data, Suite


def prepare(name: str, settings: Sequence[str], console: Console) -> None:
    """Download a suite's data where it knows how, then load, decode and try samples of each part.

    `name`, `settings`: as on the command line. Raises UserError, which says where to get them, for
    data that are missing.
    """
    suite, folder = resolved(*files.load_suite(name, settings), synthetic=False)
    if suite.data.download is not None:
        _download(suite, parts.load_part(suite.data.download, folder))
    trials = specs(name, settings)
    data, *_ = [preflight(group) for group in trials.groups()]
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("part")
    table.add_column("images", justify="right")
    for part, (_, indices) in data.parts().items():
        table.add_row(part, f"{len(indices):,}")
    say(f"{suite.name}: {data.name}, ready", console, "bold")
    console.print(table)
    where = f" below {suite.data.root}" if suite.data.root else ""
    say(
        f"Samples of each part{where} decode, and fit the model and its task. "
        f"Fingerprint {trials[0].fingerprint}.",
        console,
    )


def _download(suite: Suite, download: Callable[[Data], None]) -> None:
    try:
        download(suite.data)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{suite.data.download!r} failed: {with_origin(error)}") from error
