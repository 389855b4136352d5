"""`neqbench submit`: run a suite as a job of a Ray cluster, on whose nodes the results are seen."""

import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from harness.commands.options import RunOptions
from harness.errors import UserError, one_line
from harness.paths import lost_link
from harness.run.trials import chosen_methods, chosen_seeds
from harness.storage.locations import open_location
from harness.storage.provenance import provenance
from harness.suite import files
from harness.suite.config import Suite, digest
from harness.suite.imports import SHIPPED
from harness.train.weights import LIBRARIES

CODE = ("harness", "neq", "suites")
OPEN = ("PENDING", "RUNNING")
LARGE = 50 * 2**20  # bytes; Ray refuses twice as much
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")  # never keys: a job shows them


def submit(options: RunOptions, address: str, console: Console) -> None:
    """Send code and suite to the cluster and start the run there.

    `address`: of the cluster's dashboard. The job's id follows from what is asked for, so that the
    same command finds the job that is still running. Raises UserError where nobody answers, and for
    what only this machine has.
    """
    suite, folder = files.load_suite(options.suite, options.settings or ())
    _check(options, address, suite)
    asked = {"suite": suite.name, "options": shlex.join(options.words())}
    name = f"neqbench-{suite.name}-{digest(asked)[:8]}"
    client = _client(address)
    with _answering(address):
        earlier = {
            known.submission_id: known.status in OPEN
            for known in client.list_jobs()
            if re.fullmatch(f"{name}-[0-9]+", known.submission_id or "")
        }
    running = [known for known, is_open in earlier.items() if is_open]
    if running:
        how = "is running already"
        _tell(how, running[0], suite.name, options.results, address, console)
        return
    number = max((int(known.rpartition("-")[2]) for known in earlier), default=0) + 1
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as staging:
        where = _stage(Path(staging), options.suite, folder)
        with _answering(address):
            sent = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "harness", "run", where, *options.words()]),
                submission_id=f"{name}-{number}",
                runtime_env={"working_dir": staging, "env_vars": _environment()},
                metadata=asked,
            )
    _tell("is submitted", sent, suite.name, options.results, address, console)


def _check(options: RunOptions, address: str, suite: Suite) -> None:
    """Raises UserError for what can be seen to be wrong from here."""
    chosen_methods(suite, options.methods)
    if options.seeds is not None:
        chosen_seeds(options.seeds)
    if not address.startswith(("http://", "https://")) or "@" in address:
        raise UserError("--address: give the cluster's dashboard, such as http://head:8265")
    open_location(options.results)
    data = "" if options.synthetic or suite.data.synthetic else suite.data.root
    weights = suite.model.weights
    local = {
        "--results": options.results if "://" not in options.results else "",
        "--set data.root": data,
        "--set model.weights": "" if weights.partition(":")[0] in LIBRARIES else weights,
    }
    for place in options.log or ():
        kind, _, rest = place.partition(":")
        if "@" in rest:
            raise UserError("--log: a job shows its options; set user and password on the cluster")
        if kind != "wandb" and not rest.startswith(("http://", "https://", "databricks")):
            local[f"--log {kind}"] = rest.removeprefix("sqlite:///").removeprefix("file://")
    for name, value in local.items():
        if value and not Path(value).is_absolute():
            raise UserError(
                f"{name}={value}: every node of the cluster must see it; give "
                + ("s3://…, gs://… or " if name == "--results" else "")
                + "an absolute path there"
            )


@contextmanager
def _answering(address: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # requests', Ray's, and plain RuntimeError
        raise UserError(
            f"no Ray dashboard answers as it should at {address} ({one_line(error)}); check "
            "--address (http://head:8265) and, where the cluster asks for one, the token "
            "(RAY_AUTH_MODE=token, RAY_AUTH_TOKEN)"
        ) from None


def _client(address: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ray.job_submission import JobSubmissionClient

    with _answering(address):
        client = JobSubmissionClient(address)
        client.get_version()
    for name in (
        "ray",
        "ray.dashboard.modules.dashboard_sdk",
        "ray._private.runtime_env.packaging",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    return client


def _stage(staging: Path, suite: str, folder: Path) -> str:
    """What the job needs and no more: no .git, data or results. Returns what to call the suite."""
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for package in CODE:
        shutil.copytree(SHIPPED.parent / package, staging / package, ignore=skipped)
    if suite in files.shipped_suites():
        return suite
    where = Path("own") / folder.name
    _copy(folder, staging / where)
    file = where / files.suite_file(suite).name
    files.load_suite(str(staging / file))  # what it extends must be there, too
    return str(file)


def _copy(folder: Path, to: Path) -> None:
    """Copy a suite's own folder, links as what they point to; raises UserError where it can't be
    copied, or is too large to be sent.
    """
    size = 0

    def copied(source: str, target: str) -> None:
        nonlocal size
        size += Path(source).stat().st_size
        if size > LARGE:
            raise UserError(
                f"{folder} holds more than {LARGE / 2**20:.0f} MiB besides data/ and results/, up "
                f"to {source}; move what is no code out of it, to where every node sees it"
            )
        shutil.copy2(source, target)

    try:
        shutil.copytree(folder, to, ignore=_unsent, copy_function=copied)
    except OSError as error:
        where, why = folder, one_line(error)
        if isinstance(error, shutil.Error):  # one entry for each file
            where, _, why = error.args[0][0]
        why = lost_link(Path(where)) or why
        raise UserError(f"{folder} can't be copied to be sent: {why}") from None


def _unsent(folder: str, names: list[str]) -> set[str]:
    """What is no code, and links that lead back to where they are met."""
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "data", "results")(folder, names)
    above = {path.resolve() for path in (Path(folder), *Path(folder).parents)}
    paths = [Path(folder, name) for name in names if name not in skipped]
    return skipped | {
        p.name for p in paths if p.is_symlink() and p.exists() and p.resolve() in above
    }


def _environment() -> dict[str, str]:
    """What the job can't know: which code this is, and which object store."""
    known = provenance(gpu=False)
    code = f"{known['git_sha'] or ''}{' dirty' if known['git_dirty'] else ''}"
    return {"NEQBENCH_CODE": code, "RAY_USAGE_STATS_ENABLED": "0"} | {
        name: os.environ[name] for name in PASSED_ON if name in os.environ
    }


def _tell(how: str, job: str, suite: str, results: str, address: str, console: Console) -> None:
    where = shlex.join(["--results", results])
    at = shlex.join([job, "--address", address])
    commands = {
        f"neqbench status {suite} {where} --watch": "follow its trials",
        f"ray job logs {at} --follow": "read what it prints",
        f"ray job stop {at}": "stop it; submit again to go on",
        f"neqbench report {suite} {where}": "compare the methods",
    }
    console.print(Text(f"{job} {how}"), soft_wrap=True)
    for command, why in commands.items():
        console.print(Text(f"  {command}  # {why}"), soft_wrap=True)
