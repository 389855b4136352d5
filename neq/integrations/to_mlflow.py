"""Runs of MLflow: on a server, in a database or in a folder."""

import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from neq.integrations import missing

# A server that does not answer is asked seven times by default, for minutes.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",  # it is drawn from the training's random numbers
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}.items():
    os.environ.setdefault(_name, _value)

try:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param
except ImportError as error:
    raise missing("mlflow", "mlflow") from error

logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)  # it tells of new tables
RUN = "neq.run"  # the tag by which a run is found again
MOST = 1000  # metrics, or 100 parameters, of one request
LONGEST = 500  # characters of a parameter's value, by MLflow's older servers


class _Run:
    def __init__(self, client: Any, name: str, config: Mapping[str, Any], project: str) -> None:
        self._client = client
        found = client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else client.create_experiment(project)
        quoted = name.replace("'", "").replace('"', "")
        runs = client.search_runs([experiment], f"tags.`{RUN}` = '{quoted}'")
        run = runs[0] if runs else client.create_run(experiment, run_name=name, tags={RUN: quoted})
        self._id, self._last = run.info.run_id, run.data.to_proto().metrics
        if runs:
            client.update_run(self._id, status="RUNNING")
        known = run.data.params
        named = {_named(name): str(value)[:LONGEST] for name, value in config.items()}
        new = [Param(name, value) for name, value in named.items() if name not in known]
        for first in range(0, len(new), 100):
            client.log_batch(self._id, params=new[first : first + 100])

    def read(self) -> Iterator[tuple[str, int, float | None]]:
        # All that a server tells at once is the last epoch of each name; what lies before it was
        # logged before it. A history is a request for each name.
        for metric in self._last:
            yield from ((metric.key, epoch, None) for epoch in range(metric.step))
            yield metric.key, metric.step, metric.value

    def write(self, epoch: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        there = {metric.key: metric.step for metric in self._last}
        named = {_named(name): value for name, value in values.items()}
        metrics = [Metric(n, v, now, epoch) for n, v in named.items() if epoch > there.get(n, -1)]
        for first in range(0, len(metrics), MOST):
            self._client.log_batch(self._id, metrics=metrics[first : first + MOST])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _named(name: str) -> str:
    """With the characters that MLflow allows."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def open_place(uri: str, run: str, config: Mapping[str, Any], project: str) -> _Run:
    """The run called `run` in the experiment `project`."""
    local = str(Path(uri).expanduser()) if uri.startswith("~") else uri
    return _Run(MlflowClient(tracking_uri=local), run, config, project)
