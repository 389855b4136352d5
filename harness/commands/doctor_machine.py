"""`neqbench doctor` without a suite: what this machine and its cluster lack."""

import contextlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.text import Text

from harness.console import say
from harness.errors import UserError, one_line
from harness.paths import is_there, lost_link
from harness.report.words import counted
from harness.run.ray_folder import check_ray_folder, ray_folder
from harness.storage import leases
from harness.storage.locations import open_location
from harness.storage.provenance import PACKAGES

SPACE = 5 * 2**30  # bytes of results, below which a note is made of it


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    `wrong`: what is the matter and how to mend it, empty where nothing is; `found`: what was found;
    `note`: whether it is no error, and yet stops some suites.
    """

    what: str
    wrong: str = ""
    found: str = ""
    note: bool = False


def print_finding(finding: Finding, console: Console) -> None:
    """Print the finding as one line."""
    word, style = ("wrong", "red") if finding.wrong else ("ok", "green")
    if finding.note:
        word, style = "note", "yellow"
    text = finding.wrong or finding.found
    head = Text.assemble((f"{word:5} ", style), finding.what)
    console.print(head.append(f": {text}" if text else ""), soft_wrap=True)


def print_verdict(findings: Sequence[Finding], console: Console) -> None:
    """Print what the findings about a machine come to."""
    wrong = sum(bool(finding.wrong) for finding in findings)
    if wrong:
        say(f"{counted(wrong, 'finding')} wrong: mend that first.", console, "bold")
    else:
        say("Nothing is wrong here. A note is of what some suites need.", console, "bold")


def examine_machine(results: str, address: str | None) -> Iterator[Finding]:
    """Findings about each part of this machine; a part that is wrong does not stop the others.

    `results`: the results root to try; `address`: of a Ray cluster to try.
    """
    looks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "torch and torchvision": _torch,
        "GPU": _gpu,
        "compiler": _compiler,
        "Ray": lambda: _ray(address),
        "results": lambda: _results(results),
        "space": lambda: _space(results),
        "data": _data,
    }
    for what, look in looks.items():
        try:
            yield from look()
        except UserError as error:
            yield Finding(what, " ".join(str(error).split()))
        except Exception as error:
            yield Finding(what, f"{type(error).__name__}: {one_line(error)}")


def _versions() -> Iterator[Finding]:
    found, missing = [f"python {platform.python_version()}"], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if [name for name in missing if name != "neqbench"]:  # which a job brings along
        mend = "run make setup in a checkout, else pip install neqbench again"
        yield Finding("versions", f"{', '.join(missing)} not installed; {mend}")
    else:
        yield Finding("versions", found=", ".join(found))


def _torch() -> Iterator[Finding]:
    from harness.vision import torchvision

    have = metadata.version("torch").partition("+")[0]
    asked = [re.match(r"torch\b\W*==([\d.]+)", r) for r in metadata.requires("torchvision") or []]
    wanted = next((match[1] for match in asked if match), have)
    if wanted != have:
        vision = metadata.version("torchvision")
        yield Finding(
            "torch and torchvision",
            f"torchvision {vision} is built for torch {wanted}, and {have} is installed; "
            f"pip install torch=={wanted}, or the torchvision for {have}",
        )
        return
    torchvision()
    yield Finding("torch and torchvision", found="belong together")


def _gpu() -> Iterator[Finding]:
    import torch

    from harness.storage.provenance import provenance

    driver = provenance(gpu=True)["driver"]
    if not torch.cuda.is_available():
        if driver:
            yield Finding(
                "GPU",
                f"the machine has one (driver {driver}), torch {torch.__version__} can't use it; "
                "install a torch built for CUDA, or a newer driver",
            )
        else:
            yield Finding("GPU", found="none: trials run on the CPU")
        return
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = properties.total_memory / 2**30
        bf16 = "" if torch.cuda.is_bf16_supported(including_emulation=False) else ", no bf16"
        found = f"{properties.name}, {memory:.0f} GiB, driver {driver}{bf16}"
        yield Finding(f"GPU {number}", found=found)


def _compiler() -> Iterator[Finding]:
    """Of torch.compile, which a suite may ask for."""
    import torch

    from harness.train.compiling import check_compiler

    gpu = torch.cuda.is_available()
    try:
        check_compiler(torch.device("cuda" if gpu else "cpu"))
    except UserError as error:
        yield Finding("compiler", found=str(error), note=True)
    else:
        where = "GPU" if gpu else "CPU"
        yield Finding("compiler", found=f"torch.compile finds what it needs for the {where}")


def _ray(address: str | None) -> Iterator[Finding]:
    from harness.run import ray_cluster

    where = address or os.environ.get("RAY_ADDRESS")
    mode = os.environ.get("RAY_AUTH_MODE") or "as Ray finds it (RAY_AUTH_MODE is not set)"
    given = [
        bool(os.environ.get("RAY_AUTH_TOKEN")),
        Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser().is_file(),
    ]
    token = "a token is there" if any(given) else "no token"
    if not where:
        check_ray_folder()
        yield Finding(
            "Ray",
            found="a run starts its own on this machine; --address or RAY_ADDRESS joins a cluster "
            f"(authentication: {mode}, {token})",
        )
        return
    with ray_cluster.connected(where) as head:
        alive = [node["Resources"] for node in head.nodes if node["Alive"]]
        cpus, gpus = (sum(node.get(kind, 0) for node in alive) for kind in ("CPU", "GPU"))
        yield Finding(
            "Ray",
            found=f"{where} answers: {len(alive)} nodes, {cpus:g} CPUs, {gpus:g} GPUs "
            f"(authentication: {mode}, {token})",
        )


def _results(results: str) -> Iterator[Finding]:
    """Written, and with one owner: of two who create a file, one must fail."""
    location, name = open_location(results), f".doctor.{leases.new_owner()}"
    made = "://" not in results and not is_there(Path(results))
    try:
        location.write(name, b"")
        location.remove(name)
        if not location.create(name, b"first") or location.create(name, b"second"):
            yield Finding(
                "results",
                f"{location.uri} lets two create the same file: two runs could have the same "
                "trial; choose another with --results",
            )
            return
    finally:
        with contextlib.suppress(UserError, OSError):
            location.remove(name)
            if made:
                Path(results).rmdir()
    yield Finding("results", found=f"{location.uri} can be written")


def _space(results: str) -> Iterator[Finding]:
    spots = {} if "://" in results else {"space for results": Path(results).absolute()}
    with contextlib.suppress(UserError):
        check_ray_folder()
        spots["space for Ray"] = ray_folder()
    for what, path in spots.items():
        there = next(p for p in (path, *path.parents) if is_there(p))
        usage = shutil.disk_usage(there)
        found = f"{usage.free / 2**30:.0f} GiB free of {usage.total / 2**30:.0f} at {there}"
        little = usage.free < SPACE or usage.free < 0.05 * usage.total  # Ray refuses to work then
        yield Finding(what, found=found + "; make room" * little, note=little)


def _data() -> Iterator[Finding]:
    from harness.suite import files

    roots: dict[str, list[str]] = {}
    for name in files.shipped_suites():
        root = files.load_suite(name)[0].data.root
        if root:
            roots.setdefault(root, []).append(name)
    for root, names in roots.items():
        what = f"data of {names[0]}"
        if len(names) > 1:
            what += f" and {counted(len(names) - 1, 'more suite')}"
        if Path(root).is_dir() and any(Path(root).iterdir()):
            yield Finding(what, found=f"in {root}")
        else:
            mend = f"neqbench prepare {names[0]}, --set data.root=…, or --synthetic"
            lost = lost_link(Path(root))
            yield Finding(what, found=lost or f"none in {root}; {mend}", note=True)
    for extra, module in {
        "swin": "timm",
        "coco": "pycocotools",
        "cloud": "obstore",
        "pruning": "torch_pruning",
    }.items():
        if find_spec(module) is None:
            found = f"not installed; pip install 'neqbench[{extra}]' where it is needed"
            yield Finding(module, found=found, note=True)
