"""`neqbench prepare`: fetch what a suite needs, and check what is there."""

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from harness.console import say
from harness.errors import UserError
from harness.run.preflight import check
from harness.run.trials import located, specs
from harness.suite import files, parts
from harness.suite.config import Data, Suite


def prepare(name: str, settings: Sequence[str], console: Console) -> None:
    """Download where the suite knows how, then load, decode and try a sample of each part.

    Raises UserError for what is missing, and where to get it.
    """
    suite, folder = located(*files.load(name, settings), synthetic=False)
    if suite.data.download is not None:
        _download(suite, parts.part(suite.data.download, folder))
    trials = specs(name, settings)
    data, *_ = [check(group) for group in trials.groups()]
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
        raise UserError(f"{suite.data.download!r} failed: {parts.said(error)}") from error
