"""What a run was asked for, kept beside its results."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from harness.suite.config import Published, TrialSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run was asked for: trials of one group as (key, method, seed), and what its suite said
    of them: the `point` of a sweep, the `margin` in percentage points, the `published` figures.
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
        """Of a trial's suite."""
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
        """As it is stored."""
        rows = [dict(zip(("trial", "method", "seed"), row, strict=True)) for row in self.trials]
        published = self.published.model_dump(mode="json")
        return json.dumps(asdict(self) | {"trials": rows, "published": published}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """The inverse; earlier ones had no more than group and trials."""
        plan = json.loads(data)
        rows = [(str(r["trial"]), str(r["method"]), int(r["seed"])) for r in plan["trials"]]
        margin, point = plan.get("margin"), plan.get("point")
        if margin is not None and not 0 < margin < math.inf:
            raise ValueError("margin")
        return cls(
            group=str(plan["group"]),
            trials=rows,
            suite=str(plan.get("suite", "")),
            point=point if isinstance(point, dict) else {},
            margin=None if margin is None else float(margin),
            published=Published.model_validate(plan.get("published", {})),
            written=float(plan.get("written", 0.0)),
        )
