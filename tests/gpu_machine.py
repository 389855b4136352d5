"""What a machine is, as JSON, from a process of its own: who asks must not hold the GPU."""

import json
from datetime import UTC, datetime
from importlib import metadata

import torch

from harness.storage.provenance import provenance

MORE = ("scipy", "pandas", "timm", "nvidia-ml-py")


def machine() -> dict[str, object]:
    """Device, driver, versions and code; `device` is None where torch sees no GPU."""
    gpu = torch.cuda.is_available()
    found = provenance(gpu)
    versions = json.loads(found["versions"]) | {name: _version(name) for name in MORE}
    properties = torch.cuda.get_device_properties(0) if gpu else None
    return {
        "device": found["gpu"],
        "memory_bytes": properties and properties.total_memory,
        "capability": properties and f"{properties.major}.{properties.minor}",
        "driver": found["driver"],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "cpu": found["cpu"],
        "code": found["git_sha"],
        "uncommitted": found["git_dirty"],
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(machine(), indent=1))
