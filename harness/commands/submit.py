"""`neqbench submit`: run a suite as a job of a Ray cluster, on whose nodes the results are seen."""

import logging
import os
import re
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from harness.errors import UserError, line
from harness.run.trials import chosen_methods, chosen_seeds
from harness.storage.locations import place
from harness.storage.provenance import provenance
from harness.suite import files
from harness.suite.config import Suite, digest
from harness.train.weights import LIBRARIES

CODE = ("harness", "neq", "suites")
OPEN = ("PENDING", "RUNNING")
LARGE = 50 * 2**20  # bytes; Ray refuses twice as much
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION")  # never keys: a job shows them


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the command line asks for."""

    suite: str
    settings: Sequence[str]
    methods: str | None
    seeds: str | None
    synthetic: bool
    retry_failed: bool
    results: str
    address: str

    @property
    def options(self) -> list[str]:
        """Of `neqbench run`."""
        given = {"--methods": self.methods, "--seeds": self.seeds}
        words = [word for name, value in given.items() if value for word in (name, value)]
        words += [word for setting in self.settings for word in ("--set", setting)]
        words += ["--synthetic"] * self.synthetic + ["--retry-failed"] * self.retry_failed
        return ["--results", self.results, *words]


def submit(job: Job, console: Console) -> None:
    """Send code and suite to the cluster and start the run there.

    The job's id follows from what is asked for, so that the same command finds the job that is
    still running. Raises UserError where nobody answers, and for what only this machine has.
    """
    suite, folder = files.load(job.suite, job.settings)
    _check(job, suite)
    asked = {"suite": suite.name, "options": shlex.join(job.options)}
    name = f"neqbench-{suite.name}-{digest(asked)[:8]}"
    client = _client(job.address)
    with _answering(job.address):
        earlier = {
            known.submission_id: known.status in OPEN
            for known in client.list_jobs()
            if re.fullmatch(f"{name}-[0-9]+", known.submission_id or "")
        }
    running = [known for known, is_open in earlier.items() if is_open]
    if running:
        _tell(f"{running[0]} is running already", running[0], suite.name, job, console)
        return
    number = max((int(known.rpartition("-")[2]) for known in earlier), default=0) + 1
    with tempfile.TemporaryDirectory() as staging:
        where = _stage(Path(staging), job.suite, folder)
        with _answering(job.address):
            sent = client.submit_job(
                entrypoint=shlex.join(["python", "-m", "harness", "run", where, *job.options]),
                submission_id=f"{name}-{number}",
                runtime_env={"working_dir": staging, "env_vars": _environment()},
                metadata=asked,
            )
    _tell(f"{sent} is submitted", sent, suite.name, job, console)


def _check(job: Job, suite: Suite) -> None:
    """Raises UserError for what can be seen to be wrong from here."""
    chosen_methods(suite, job.methods)
    if job.seeds is not None:
        chosen_seeds(job.seeds)
    if not job.address.startswith(("http://", "https://")) or "@" in job.address:
        raise UserError("--address: give the cluster's dashboard, such as http://head:8265")
    place(job.results)
    data = "" if job.synthetic or suite.data.synthetic else suite.data.root
    weights = suite.model.weights
    local = {
        "--results": job.results if "://" not in job.results else "",
        "--set data.root": data,
        "--set model.weights": "" if weights.partition(":")[0] in LIBRARIES else weights,
    }
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
            f"no Ray dashboard answers as it should at {address} ({line(error)}); check --address "
            "(http://head:8265) and, where the cluster asks for one, the token "
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
        shutil.copytree(str(resources.files(package)), staging / package, ignore=skipped)
    if suite in files.builtin():
        return suite
    own = shutil.ignore_patterns("__pycache__", "*.pyc", ".*", "data", "results")
    where = Path("own") / folder.name
    try:
        shutil.copytree(folder, staging / where, ignore=own)
    except (OSError, shutil.Error) as error:
        raise UserError(f"{folder} can't be copied to be sent: {line(error)}") from None
    size = sum(path.stat().st_size for path in (staging / where).rglob("*"))
    if size > LARGE:
        raise UserError(
            f"{folder} holds {size / 2**20:.0f} MiB besides data/ and results/; move what is no "
            "code out of it, to where every node sees it"
        )
    file = where / files.locate(suite).name
    files.load(str(staging / file))  # what it extends must be there, too
    return str(file)


def _environment() -> dict[str, str]:
    """What the job can't know: which code this is, and which object store."""
    known = provenance(gpu=False)
    code = f"{known['git_sha'] or ''}{' dirty' if known['git_dirty'] else ''}"
    return {"NEQBENCH_CODE": code, "RAY_USAGE_STATS_ENABLED": "0"} | {
        name: os.environ[name] for name in PASSED_ON if name in os.environ
    }


def _tell(what: str, sent: str, suite: str, job: Job, console: Console) -> None:
    where = shlex.join(["--results", job.results])
    at = shlex.join([sent, "--address", job.address])
    commands = {
        f"neqbench status {suite} {where} --watch": "follow its trials",
        f"ray job logs {at} --follow": "read what it prints",
        f"ray job stop {at}": "stop it; submit again to go on",
        f"neqbench report {suite} {where}": "compare the methods",
    }
    console.print(Text(what), soft_wrap=True)
    for command, why in commands.items():
        console.print(Text(f"  {command}  # {why}"), soft_wrap=True)
