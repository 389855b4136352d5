"""What a trial runs on: its slot, the hardware, the code and its versions. No host names."""

import json
import os
import platform
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

OTHER_LOAD = 0.5  # CPUs, or processes on a GPU: with more of others, seconds have no verdict
PACKAGES = ("neqbench", "torch", "torchvision", "fvcore", "ray", "numpy", "pyarrow")


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for one trial: on a GPU or on the CPU, and how many trials share that at a time."""

    gpu: bool
    sharing: int

    @property
    def device(self) -> str:
        """Name of the torch device: cuda or cpu."""
        return "cuda" if self.gpu else "cpu"


def alone(trials: int, load: float | None) -> bool:
    """Whether seconds are a measurement, by `trials_on_device` and `other_load` (None: unknown)."""
    return trials == 1 and not (load or 0.0) > OTHER_LOAD


@cache
def provenance(gpu: bool) -> dict[str, Any]:
    """Columns of `trials`: hardware, commit and versions; None for what can't be told.

    `gpu`: whether the trial computes on one; else its model and driver are None.
    """
    return {
        "cpu": _cpu(),
        "gpu": _gpu() if gpu else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        **_code(),
        "versions": json.dumps(
            {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
        ),
    }


def code() -> str | None:
    """The commit of this code, with + where it has uncommitted changes, or its version."""
    known = provenance(gpu=False)
    sha = known["git_sha"]
    return sha and f"{sha}{'+' if known['git_dirty'] else ''}"


def is_commit(code: str) -> bool:
    """Whether what `code` returned is a commit, and no version."""
    return re.fullmatch(r"[0-9a-f]{7,}\+?", code) is not None


def runs_on() -> list[str]:
    """Lines of `neqbench --version`: this code, its versions, the machine. Imports no torch."""
    known, commit = provenance(gpu=False), code()
    dirty = " with uncommitted changes" if known["git_dirty"] else ""
    head = f", commit {known['git_sha'][:7]}{dirty}" if commit and is_commit(commit) else ""
    versions = json.loads(known["versions"])
    named = {name: f"{name} {versions[name] or 'not installed'}" for name in PACKAGES}
    gpus = _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    counts = Counter(gpu.replace(", ", ", driver ") for gpu in gpus or ()).items()
    machine = "; ".join(f"{n} × {gpu}" for gpu, n in counts) or "no NVIDIA GPU"
    return [
        f"{named['neqbench']}{head}",
        f"Python {versions['python']}, {platform.platform()}",
        f"{named['torch']}{_torch_build()}, {named['torchvision']}",
        ", ".join(named[name] for name in ("ray", "fvcore", "numpy", "pyarrow")),
        f"{known['cpu']}, {machine}",
    ]


def hardware(gpu: bool) -> str:
    """The model of the device that this process computes on; of a CPU with its number of
    threads.
    """
    import torch

    if gpu:
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_cpu()}, {threads} thread{'s' if threads > 1 else ''}"


def _code() -> dict[str, Any]:
    """The commit: of the checkout, or "SHA" or "SHA dirty" in NEQBENCH_CODE. Where this file is no
    part of a checkout, the installed version: a repository around it is somebody else's.
    """
    given = os.environ.get("NEQBENCH_CODE", "").split()
    if given:
        return {"git_sha": given[0], "git_dirty": "dirty" in given[1:]}
    if _git("ls-files", "--error-unmatch", __file__) is None:
        return {"git_sha": _version("neqbench"), "git_dirty": None}
    status = _git("status", "--porcelain")
    return {
        "git_sha": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _torch_build() -> str:
    """What the installed torch is built for, by its version file: to import it takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    built = run_path(str(Path(spec.origin).with_name("version.py")))
    kinds = (("CUDA", built.get("cuda")), ("ROCm", built.get("hip")), ("XPU", built.get("xpu")))
    found = next((f"{name} {version}" for name, version in kinds if version), "the CPU")
    return f" built for {found}"


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str | None:
    lines = _lines(*command)
    return None if lines is None else "".join(lines[:1])


def _lines(*command: str) -> list[str] | None:
    """What a command prints, without blanks around; None where it can't be run, or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()
