"""Figures of methods that decide by groups: layers that stand still, and CKA beside phi."""

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from harness.report.layers import TINY
from harness.report.style import COLOURS, WIDTH, GroupLabel, Look, Picture, legend
from harness.storage.frames import Results
from harness.storage.schema import QUANTILES

BANDS = 4  # methods, up to which the spread over seeds can be told apart


def group_pictures(
    done: pd.DataFrame, looks: dict[str, Look], results: Results, of: GroupLabel
) -> Iterator[Picture]:
    """The figures of a group with `done` trials (`per_trial`): how many layers stand still, and for
    a method that reads CKA how that moves beside phi. `looks`: of its methods, by label.
    """
    layers = results.layers_of(set(done["trial"])).merge(done[["trial", "label"]], on="trial")
    labels = [label for label in looks if layers.loc[layers["label"] == label, "frozen"].any()]
    if labels:
        yield _still(layers, labels, looks, of)
    measures = results.measures_of(set(done["trial"]))
    kappa = measures[measures["name"] == "cka"].merge(done[["trial", "label"]], on="trial")
    if len(kappa):
        yield _beside_phi(layers, kappa, of)


def _still(
    layers: pd.DataFrame, labels: list[str], looks: dict[str, Look], of: GroupLabel
) -> Picture:
    figure = Figure(figsize=(WIDTH, 3.4))
    axis: Any = figure.subplots()
    whole = layers.assign(still=layers["frozen"] == layers["neurons"])
    by_trial = whole.groupby(["label", "trial", "epoch"])["still"].mean()
    spread = by_trial.groupby(["label", "epoch"]).agg(["mean", "min", "max"])
    for label in labels:
        course, look = spread.loc[label], looks[label]
        axis.plot(course.index, course["mean"], label=label, color=look.colour, linestyle=look.line)
        if len(labels) <= BANDS:
            low, high = course["min"], course["max"]
            axis.fill_between(course.index, low, high, color=look.colour, alpha=0.12)
    axis.set_ylim(-0.03, 1.05)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set_xlabel("epoch")
    axis.set_ylabel("layers that stand still whole")
    legend(figure, axis)
    caption = (
        "the share of all layers, the head included, of which every neuron stands still, by epoch: "
        "what any hardware saves; means over seeds"
        + (", bands from the lowest to the highest." if len(labels) <= BANDS else ".")
    )
    return of.picture("still", caption, figure)


def _beside_phi(layers: pd.DataFrame, kappa: pd.DataFrame, of: GroupLabel) -> Picture:
    """By its first seed, of the first method that reads CKA."""
    first = kappa["trial"].iloc[0]
    label = f"{kappa['label'].iloc[0]}, seed {kappa['seed'].iloc[0]}"
    mine = kappa[kappa["trial"] == first]
    phi = layers[(layers["trial"] == first) & layers["phi_quantiles"].notna()]
    middle = QUANTILES.index(0.5)
    medians = phi.assign(value=[quantiles[middle] for quantiles in phi["phi_quantiles"]])
    figure = Figure(figsize=(WIDTH, 3.4))
    axis: Any = figure.subplots()
    for position, (name, rows) in enumerate((("κ", mine), ("φ", medians))):
        known = rows[rows["value"].notna()].groupby("epoch")["value"]
        away = (1 - known.quantile([0.25, 0.5, 0.75]).unstack()).clip(lower=TINY)
        colour = COLOURS[position]
        axis.plot(away.index, away[0.5], color=colour, label=f"1 − {name}")
        axis.fill_between(away.index, away[0.25], away[0.75], color=colour, alpha=0.15)
    axis.set_yscale("log")
    axis.set_xlabel("epoch")
    axis.set_ylabel("1 − similarity to the epoch before")
    legend(figure, axis)
    caption = (
        f"{label}: how far layers have moved in an epoch, by the linear CKA κ of their outputs and "
        "by the median φ of their neurons; median over layers, bands over the middle half."
    )
    return of.picture("cka", caption, figure)
