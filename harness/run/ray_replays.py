"""Replays on a Ray cluster: on each of its nodes a task that has the node for itself."""

from collections.abc import Iterator, Sequence

from harness.run import ray_cluster
from harness.run.replays import Shown, Told, lacking, refused, replays, this_machine
from harness.storage.store import Store
from harness.suite.config import TrialSpec


def on_cluster(
    address: str | None, trials: Sequence[TrialSpec], root: str, seconds: float, shown: Shown
) -> Iterator[Told]:
    """Replay `trials`, of one group, node after node: each takes those that ran on its kind of
    machine, and have no replay yet.
    """
    told: list[Told] = []
    machines: dict[str, None] = {}
    store = Store(root, trials[0].suite.name)
    if not lacking(trials, store):
        return
    with ray_cluster.connected(address) as head:
        for node in [n for n in head.nodes if n["Alive"] and n["Resources"].get("CPU")]:
            known = {key for one in told for key in one.trials}
            left = [spec for spec, _ in lacking(trials, store) if spec.key not in known]
            if not left:
                break
            name = node["NodeManagerHostname"]
            shown(f"replaying on {name}")
            found = ray_cluster.alone_on(node, seconds, _on_this_node, left, root, seconds)
            if isinstance(found, str):
                yield Told(f"no replays on {name}: {found}", (), well=False)
                continue
            machine, lines = found
            machines[machine] = None
            told += lines
            yield from lines
    yield from refused(trials, root, told, list(machines))


def _on_this_node(trials: Sequence[TrialSpec], root: str, seconds: float) -> tuple[str, list[Told]]:
    """The kind of machine that this is, and what was replayed on it."""
    return this_machine(gpu=True), list(replays(trials, root, seconds))
