"""How values are written in every form."""

import math
from typing import Any

NONE = "–"


def arguments(named: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a torch class that is given as a table with its name."""
    return {key: value for key, value in named.items() if key != "name"}


def listed(values: dict[str, Any]) -> str:
    """Values in a list, as "lr 0.1, momentum 0.9"."""
    return ", ".join(f"{key} {as_text(value)}" for key, value in values.items())


def as_text(value: Any) -> str:
    """A value of a suite, as text; a torch class is written as "SGD (lr 0.1)"."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return " then ".join(as_text(item) for item in value)
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({listed(arguments(value))})"
    return "none" if value is None else str(value)


def spread(mean: float | None, std: float | None) -> str:
    """A share and its standard deviation, in per cent: "99.26 ± 0.39"."""
    if mean is None or not math.isfinite(mean):
        return NONE
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def interval_text(low: float | None, high: float | None) -> str:
    """An interval of shares, in per cent: "[98.77, 99.75]"."""
    if low is None or high is None:
        return NONE
    return f"[{100 * low:.2f}, {100 * high:.2f}]".replace("-", "−")


def signed_interval(low: float | None, high: float | None) -> str:
    """An interval of differences of shares, in points: "[−0.21, +0.21]"."""
    return NONE if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference of shares, in points: "+0.12"."""
    return points(None if value is None else 100 * value, digits)


def points(value: float | None, digits: int = 2) -> str:
    """A number with its sign: "+0.12"."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float) -> str:
    """A share in per cent: "18.3"."""
    return f"{100 * value:.1f}".replace("-", "−") if math.isfinite(value) else NONE


def flops_text(value: float) -> str:
    """FLOPs with a unit that fits: "138.94 MFLOPs"."""
    if not math.isfinite(value):
        return NONE
    unit, scale = flops_unit(value)
    return f"{value / scale:.2f} {unit}FLOPs"


def counted(number: int, what: str) -> str:
    """A number of things: "1 epoch", "2 epochs"."""
    return f"{number} {what}{'s' * (number != 1)}"


def flops_unit(flops: float) -> tuple[str, float]:
    """The prefix of a unit that fits so many FLOPs, and its factor: ("M", 1e6)."""
    units = (("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next(((unit, scale) for unit, scale in units if flops >= scale), ("", 1.0))
