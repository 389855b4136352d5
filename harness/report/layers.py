"""Figures of single layers: what is frozen where, and how phi, delta-phi and velocity spread."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from numpy.typing import NDArray

from harness.report.style import COLOURS, WIDTH, GroupLabel, Picture
from harness.storage.frames import Results
from harness.storage.schema import QUANTILES

MOST = 6  # methods of a group that are shown
LABELS = 20  # layers that are named beside a map
BETWEEN = np.linspace(0, 1, 41)  # where a layer's distribution is read off between its quantiles
BANDS = ((0.05, 0.95, 0.15), (0.25, 0.75, 0.3))
TINY = 1e-9
READINGS = {"phi": "φ", "delta_phi": "Δφ", "velocity": "velocity"}

Array = NDArray[np.float64]


def layer_pictures(
    done: pd.DataFrame, labels: list[str], results: Results, of: GroupLabel
) -> Iterator[Picture]:
    """The figures of layers for the methods in question that freeze, each by its first seed.

    `done`: finished trials of a group; `labels`: of its methods, in their order.
    """
    firsts = done[done["in_question"]].drop_duplicates("label").set_index("label")
    deciding = [label for label in labels if label in firsts.index]
    if not deciding:
        return
    firsts = firsts.loc[deciding[:MOST]]
    layers = results.layers_of(set(firsts["trial"]))
    parts = {
        f"{row.Index}, seed {row.seed}": layers[layers["trial"] == row.trial]
        for row in firsts.itertuples()
    }
    parts = {label: rows for label, rows in parts.items() if _freezes(rows)}
    if not parts:
        return
    yield _frozen(parts, of, len(deciding))
    label = list(parts)[len(parts) // 2]  # of a sweep, from its middle
    if parts[label]["velocity_quantiles"].notna().any():
        yield _distributions(parts[label], label, of)


def _freezes(rows: pd.DataFrame) -> bool:
    return bool(rows["frozen"].any() or rows["velocity_quantiles"].notna().any())


def _frozen(parts: dict[str, pd.DataFrame], of: GroupLabel, count: int) -> Picture:
    figure = Figure(figsize=(WIDTH, 1.0 + 2.6 * len(parts)))
    axes = np.atleast_1d(figure.subplots(len(parts), 1))
    for axis, (label, rows) in zip(axes, parts.items(), strict=True):
        share = _grid(rows.assign(share=rows["frozen"] / rows["neurons"]), "share")
        drawn = axis.imshow(
            share, aspect="auto", vmin=0, vmax=1, cmap="cividis", interpolation="nearest"
        )
        _name_layers(axis, list(share.index), share.columns)
        axis.set_title(label)
        axis.set_xlabel("epoch")
    bar = figure.colorbar(drawn, ax=list(axes), aspect=15 + 10 * len(parts))
    bar.set_label("frozen share of the layer's neurons")
    some = f" The first {len(parts)} of {count} methods." if len(parts) < count else ""
    caption = f"the share of each layer that is frozen, by epoch; layers in their order.{some}"
    return of.picture("frozen", caption, figure)


def _grid(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """[layers, epochs], layers in the model's order."""
    order = list(dict.fromkeys(rows["layer"]))
    return rows.pivot(index="layer", columns="epoch", values=column).reindex(order)


def _name_layers(axis: Any, names: list[str], epochs: "pd.Index[Any]") -> None:
    every = -(-len(names) // LABELS)
    axis.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
    ticks = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), 7)).round().astype(int))
    axis.set_xticks(ticks, [str(epochs[tick]) for tick in ticks])
    axis.grid(visible=False)


def _distributions(rows: pd.DataFrame, label: str, of: GroupLabel) -> Picture:
    figure = Figure(figsize=(WIDTH, 8.6))
    axes = figure.subplots(3, 2, width_ratios=[1.1, 1])
    for (overall, by_layer), (column, sign) in zip(axes, READINGS.items(), strict=True):
        known = rows[rows[f"{column}_quantiles"].notna()]
        quantiles = np.stack(known[f"{column}_quantiles"].to_list())
        _fan(overall, known, quantiles, column, sign)
        _map(figure, by_layer, known, quantiles, column, sign)
    caption = (
        f"{label}: φ, Δφ and velocity by epoch. Left, over all neurons: median, middle 50 "
        "and 90 %, interpolated between each layer's stored quantiles. Right, layer by layer: the "
        "median of 1 − φ, and the width of the middle 90 %."
    )
    return of.picture("distributions", caption, figure)


def _fan(axis: Any, rows: pd.DataFrame, quantiles: Array, column: str, sign: str) -> None:
    epochs = np.unique(rows["epoch"])
    at = [low for low, _, _ in BANDS] + [0.5] + [high for _, high, _ in reversed(BANDS)]
    spread = np.array([_mixed(rows, quantiles, epoch, at) for epoch in epochs])
    if column == "phi":
        spread = np.maximum(1 - spread, TINY)
    for position, (_, _, alpha) in enumerate(BANDS):
        low, high = spread[:, position], spread[:, -1 - position]
        axis.fill_between(epochs, low, high, color=COLOURS[0], alpha=alpha, linewidth=0)
    marker = "o" if len(epochs) == 1 else None
    axis.plot(epochs, spread[:, len(BANDS)], color=COLOURS[0], marker=marker)
    if column == "phi":
        axis.set_yscale("log")
    else:
        axis.set_yscale("symlog", linthresh=1e-3)
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_title("1 − φ, all neurons" if column == "phi" else f"{sign}, all neurons")
    axis.set_xlabel("epoch")


def _mixed(rows: pd.DataFrame, quantiles: Array, epoch: int, at: list[float]) -> Array:
    """Quantiles over all layers, each weighted by its neurons."""
    mine = (rows["epoch"] == epoch).to_numpy()
    values = np.array([np.interp(BETWEEN, QUANTILES, q) for q in quantiles[mine]])
    weights = np.repeat(rows["neurons"].to_numpy()[mine] / len(BETWEEN), len(BETWEEN))
    flat = values.ravel()
    order = np.argsort(flat)
    cumulated = np.cumsum(weights[order])
    found: Array = np.interp(at, (cumulated - weights[order] / 2) / cumulated[-1], flat[order])
    return found


def _map(
    figure: Figure, axis: Any, rows: pd.DataFrame, quantiles: Array, column: str, sign: str
) -> None:
    """The median of 1 − phi, the width of the middle 90 % of the others."""
    middle = QUANTILES.index(0.5)
    low, high = QUANTILES.index(0.05), QUANTILES.index(0.95)
    shown = 1 - quantiles[:, middle] if column == "phi" else quantiles[:, high] - quantiles[:, low]
    grid = _grid(rows.assign(shown=np.maximum(shown, TINY)), "shown")
    drawn = axis.imshow(
        grid, aspect="auto", norm=LogNorm(), cmap="cividis", interpolation="nearest"
    )
    _name_layers(axis, list(grid.index), grid.columns)
    axis.set_xlabel("epoch")
    axis.set_title("1 − φ, median" if column == "phi" else f"{sign}, width of the middle 90 %")
    figure.colorbar(drawn, ax=axis).minorticks_off()
