"""How values are written in every form."""

import math
from typing import Any

NONE = "–"


def arguments(named: dict[str, Any]) -> dict[str, Any]:
    """Of a torch class that is given by name."""
    return {key: value for key, value in named.items() if key != "name"}


def listed(values: dict[str, Any]) -> str:
    """ "lr 0.1, momentum 0.9"."""
    return ", ".join(f"{key} {said(value)}" for key, value in values.items())


def said(value: Any) -> str:
    """A scheduler among another's arguments is a table with its name."""
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return " then ".join(said(item) for item in value)
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({listed(arguments(value))})"
    return "none" if value is None else str(value)


def spread(mean: float | None, std: float | None) -> str:
    """A share and its standard deviation, in per cent."""
    if mean is None or not math.isfinite(mean):
        return NONE
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def interval(low: float | None, high: float | None) -> str:
    """Of shares, in per cent."""
    return NONE if low is None or high is None else f"[{100 * low:.2f}, {100 * high:.2f}]"


def signed_interval(low: float | None, high: float | None) -> str:
    """Of differences of shares, in points."""
    return NONE if low is None or high is None else f"[{signed(low)}, {signed(high)}]"


def signed(value: float | None, digits: int = 2) -> str:
    """A difference of shares, in points."""
    return points(None if value is None else 100 * value, digits)


def points(value: float | None, digits: int = 2) -> str:
    """A difference as it is, with its sign."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(value: float) -> str:
    """A share."""
    return f"{100 * value:.1f}".replace("-", "−") if math.isfinite(value) else NONE


def flops(value: float) -> str:
    """ "138.94 MFLOPs"."""
    if not math.isfinite(value):
        return NONE
    unit, scale = flops_unit(value)
    return f"{value / scale:.2f} {unit}FLOPs"


def counted(number: int, what: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{number} {what}{'s' * (number != 1)}"


def flops_unit(flops: float) -> tuple[str, float]:
    """Prefix and factor."""
    units = (("G", 1e9), ("M", 1e6), ("k", 1e3))
    return next(((unit, scale) for unit, scale in units if flops >= scale), ("", 1.0))
