"""The Ray cluster: how to reach it, what fits on it, and whether it is still there."""

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from harness import parallel
from harness.errors import UserError, one_line
from harness.run.ray_folder import check_ray_folder, ray_folder
from harness.storage.provenance import Slot
from harness.suite.config import Recipe, TrialSpec
from harness.train.tuning import check_recipe

MAX_RETRIES = 3  # of a trial whose workers die again and again at the same epoch
KNOCK = 5.0  # seconds between looks whether the head is there
BUSY = 60.0  # seconds after which a GPU that is not free is not waited for
WAIT = 600.0  # beyond its own time, for a node to be free and its work to be built
GONE = 30.0  # after so many without an answer it is lost; Ray itself ends the driver after 60


@contextlib.contextmanager
def connected(address: str | None) -> Iterator["Head"]:
    """Join the cluster at `address` or in RAY_ADDRESS, or start one on this machine.

    Raises UserError where none answers.
    """
    _connect(address)
    import ray

    head = Head()
    try:
        yield head
    finally:
        if head.answers():  # else Ray would wait for it
            ray.shutdown()


class Head:
    """The cluster's first node, which knows all others.

    `nodes`: what Ray says of each, as of a few seconds ago.
    """

    def __init__(self) -> None:
        import ray

        context = ray.get_runtime_context()
        self._address, self._node = context.gcs_address, context.get_node_id()
        self._asked = self._answered = time.monotonic()
        self.nodes: list[dict[str, Any]] = ray.nodes()

    def check(self) -> None:
        """Raises UserError where the head has not answered for GONE seconds."""
        now = time.monotonic()
        if now - self._asked < KNOCK:
            return
        self._asked = now
        if self.answers():
            self._answered = time.monotonic()
        elif now - self._answered > GONE:
            raise UserError(
                f"the Ray head at {self._address} is gone; every trial is committed up to its last "
                "epoch: start the cluster again and run the same command"
            )

    def answers(self) -> bool:
        """Whether the head answers now, and this machine's node is alive."""
        import ray

        try:
            knock(self._address)
            self.nodes = ray.nodes()
            return any(node["Alive"] for node in self.nodes if node["NodeID"] == self._node)
        except (OSError, ray.exceptions.RayError):
            return False


def task(function: Callable[..., Any], spec: TrialSpec, slot: Slot) -> Any:
    """`function` as a Ray task with the resources of one trial; where a trial has several workers,
    it only watches over them and needs none.

    On a GPU the process ends with its trial, and gives its memory back; on a CPU the next one
    starts without a wait. Nothing is retried by Ray, which would give up on a trial that makes
    progress between deaths.
    """
    import ray

    resources = spec.suite.resources
    alone = resources.world_size == 1
    return ray.remote(max_calls=1 if slot.gpu else 0)(function).options(
        num_cpus=resources.cpus if alone else 0,
        num_gpus=resources.gpus_each if slot.gpu and alone else 0,
        num_returns="streaming",
        max_retries=0,
    )


def alone_on(
    node: dict[str, Any], seconds: float, function: Callable[..., Any], *arguments: Any
) -> Any:
    """What `function`, which takes about so many seconds, returns as a task that has the whole of
    `node`; a line on why there is none where it fails, or the node is not free for long.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    resources = node["Resources"]
    remote = ray.remote(max_calls=1)(function).options(
        num_cpus=resources.get("CPU", 0),
        num_gpus=resources.get("GPU", 0),
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    )
    asked = remote.remote(*arguments)
    try:
        return ray.get(asked, timeout=WAIT + seconds)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(asked, force=True)
        return f"it was not free, or not done, within {WAIT + seconds:.0f} s"
    except ray.exceptions.RayError as error:
        return cause_of_death(error)


def slots(
    spec: TrialSpec, trials: int, nodes: list[dict[str, Any]], *, gpu: bool = False
) -> tuple[int, Slot]:
    """How many of so many `trials` like `spec` fit the nodes at a time, and the slot of each.

    `gpu`: whether they have run on GPUs so far. Raises UserError where not even one fits.
    """
    nodes = [node["Resources"] for node in nodes if node["Alive"]]
    wanted = spec.suite.resources
    any_gpu = any(node.get("GPU", 0) for node in nodes)
    gpus = wanted.gpus_each if any_gpu or gpu or wanted.gpus != "auto" else 0
    if gpus and not any_gpu:
        raise UserError(no_gpu(spec, "the Ray cluster"))
    fitting = [
        int(min(node.get("CPU", 0) / wanted.cpus, node.get("GPU", 0) / gpus if gpus else 1e9))
        for node in nodes
    ]
    world = wanted.world_size
    if sum(fitting) < world:
        each = f"{world} workers with {wanted.cpus} CPUs and {gpus:g} GPUs each"
        alone = f"{wanted.cpus} CPUs and {gpus:g} GPUs, more than any node of"
        total = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
        raise UserError(
            f"suite {spec.suite.name}: one trial asks for "
            + (alone if world == 1 else f"{each}, more than there are in")
            + f" the Ray cluster, with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs in all; "
            "lower them with --set resources.cpus=… or resources.gpus=…"
        )
    per_device = max(int(1 / gpus), 1) if gpus else max(max(fitting) // world, 1)
    return sum(fitting) // world, Slot(bool(gpus), min(per_device, trials))


def check_device(spec: TrialSpec, slot: Slot) -> None:
    """Raises UserError where a worker of the cluster lacks the recipe's precision or compiler."""
    import ray

    recipe = spec.suite.recipe
    if not (slot.gpu or recipe.compile):
        return
    gpus = spec.suite.resources.gpus_each if slot.gpu else 0
    look = ray.remote(max_calls=1)(_look).options(num_cpus=0, num_gpus=gpus)
    try:
        ray.get(look.remote(recipe, slot.gpu), timeout=BUSY)
    except ray.exceptions.GetTimeoutError:
        return  # all are busy: the trials look themselves
    except ray.exceptions.RayError as error:
        raise UserError(f"a worker of the Ray cluster fails: {cause_of_death(error)}") from None


def _look(recipe: Recipe, gpu: bool) -> None:
    check_recipe(recipe, parallel.device(gpu))


def no_gpu(spec: TrialSpec, where: str) -> str:
    """The message for a suite that asks for a GPU where there is none."""
    return (
        f"suite {spec.suite.name}: resources.gpus asks for {spec.suite.resources.gpus} and "
        f"{where} has none; run on the CPU with --set resources.gpus=0"
    )


def cause_of_death(error: Exception) -> str:
    """Why a worker died or failed, in a line, without Ray's pages around it."""
    import ray

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        whole = re.search(r"Memory usage (\d+)B .* of (\d+)B limit", str(error))
        own = re.search(r"actual memory used=([\d.]+)GB", str(error))
        used = [f"{int(whole[1]) / 2**30:.1f} of {int(whole[2]) / 2**30:.1f} GiB"] if whole else []
        used += [f"{own[1]} GB by this trial"] if own else []
        return (
            f"the machine's memory is full: {', '.join(used)}; lower recipe.forward_batch, or run "
            "fewer trials at a time with more resources.cpus"
        )
    if isinstance(error, ray.exceptions.RayTaskError):
        return one_line(error.cause) if error.cause else str(error).strip().splitlines()[-1]
    return type(error).__name__


def named(address: str | None) -> str | None:
    """The cluster that a user has named; None: Ray is to be started on this machine."""
    return address or os.environ.get("RAY_ADDRESS")


def _connect(address: str | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Else below `uv run` Ray would send all that lies in the working directory to its workers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Without "local" Ray would join whatever was last started on this machine, alive or not.
    address = named(address) or "local"
    if address == "local":
        check_ray_folder()
    import ray

    polite = signal.getsignal(signal.SIGTERM)
    answers = False
    try:
        knock(address)
        answers = address != "auto"
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="CRITICAL",
        )
        signal.signal(signal.SIGTERM, polite)  # Ray's own would print its stack and die
    except Exception as error:
        answers &= not isinstance(error, (ConnectionError, TimeoutError, ray.exceptions.RpcError))
        raise UserError(_refused(address, error, answers)) from None


def _refused(address: str, error: Exception, answers: bool) -> str:
    """Why there is no connection, in a line; `answers`: whether somebody is there."""
    if address == "local":
        return (
            f"Ray can't start on this machine ({one_line(error)}); its logs are below "
            f"{ray_folder()}, and --executor inline does without it"
        )
    what = f"no Ray cluster answers at {address}"
    if answers:
        what = f"the Ray cluster at {address} can't be joined"
    return (
        f"{what} ({one_line(error)}); check --address, RAY_ADDRESS and, where the cluster asks for "
        "one, the token (RAY_AUTH_MODE, RAY_AUTH_TOKEN)"
    )


def knock(address: str) -> None:
    """Raises OSError at once where nothing listens at `address`: Ray itself would try for
    minutes.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()
