"""What runs were asked for, kept beside the results: `plans/<group>.<checksum>.json`.

`neqbench status` shows from it what is still to do, and the report learns what its trials are to be
judged by, without the suite's file.
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from time import time
from typing import Any, Self

from harness.errors import UserError
from harness.storage.locations import Location, checksum
from harness.suite.config import Published, TrialSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The trials of one group that a run was asked for.

    `trials`: (key, method, seed) of each. What the suite said of them: `point`, in a sweep the
    values that were chosen, by path; `margin` in percentage points; `published` figures. `written`:
    Unix time, in seconds.
    """

    group: str
    trials: list[tuple[str, str, int]]
    suite: str = ""
    point: dict[str, Any] = field(default_factory=dict)
    margin: float | None = None
    published: Published = field(default_factory=Published)
    written: float = 0.0

    @classmethod
    def of(cls, spec: TrialSpec, trials: list[tuple[str, str, int]]) -> Self:
        """A request for `trials`, all of the group of `spec`."""
        suite = spec.suite
        return cls(
            group=spec.group,
            suite=suite.name,
            trials=trials,
            point=suite.point,
            margin=suite.margin,
            published=suite.published,
        )

    def to_json(self) -> bytes:
        """The request as it is stored."""
        rows = [dict(zip(("trial", "method", "seed"), row, strict=True)) for row in self.trials]
        published = self.published.model_dump(mode="json")
        return json.dumps(asdict(self) | {"trials": rows, "published": published}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The inverse of `to_json`. Files of earlier versions have no more than group and trials.

        Raises ValueError, TypeError, KeyError or AttributeError for what is no request.
        """
        value = json.loads(data)
        rows = [(str(r["trial"]), str(r["method"]), int(r["seed"])) for r in value["trials"]]
        margin, point = value.get("margin"), value.get("point")
        if margin is not None and not 0 < margin < math.inf:
            raise ValueError("margin")
        return cls(
            group=str(value["group"]),
            trials=rows,
            suite=str(value.get("suite", "")),
            point=point if isinstance(point, dict) else {},
            margin=None if margin is None else float(margin),
            published=Published.model_validate(value.get("published", {})),
            written=float(value.get("written", 0.0)),
        )


def keep_request(location: Location, request: Request) -> None:
    """Store a request; the same one replaces its file, with the time of now."""
    name = f"plans/{request.group}.{checksum(request.to_json())}.json"
    location.write(name, replace(request, written=time()).to_json())


def read_requests(location: Location) -> list[Request]:
    """All requests, the oldest first; raises UserError where a file is damaged."""
    found = []
    for name in location.names("plans"):
        try:
            found.append(Request.from_json(location.read(f"plans/{name}") or b""))
        except (ValueError, TypeError, KeyError, AttributeError):
            path = location.path(f"plans/{name}")
            raise UserError(
                f"{path} is damaged, or of a newer neqbench; delete it: runs write it anew"
            ) from None
    return sorted(found, key=lambda request: request.written)
