"""Figures of methods that prune: neurons left by layer, entropy and sharpness over training."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from harness.report.style import WIDTH, GroupLabel, Look, Picture, legend
from harness.storage.frames import Results

NAMED = 24  # layers, up to which each is named
BANDS = 4  # methods, up to which the spread over seeds can be told apart
DECADES = 100  # between the least and the greatest value: from there on powers of ten are enough


def pruning_pictures(
    done: pd.DataFrame, looks: dict[str, Look], results: Results, of: GroupLabel
) -> Iterator[Picture]:
    """The figures of a group with `done` trials (`per_trial`), of what these have recorded.

    `looks`: of its methods, by label.
    """
    measures = results.measures_of(set(done["trial"]))
    known = measures.merge(done[["trial", "label"]], on="trial")
    known = known[known["label"].isin(list(looks))]
    of_layers, of_model = known[known["layer"].notna()], known[known["layer"].isna()]
    if (of_layers["name"] == "neurons_left").any():
        yield _neurons(of_layers, looks, of)
    entropy = of_model[(of_model["name"] == "psp_entropy") & of_model["value"].notna()]
    if len(entropy):
        what = "PSP-entropy of the neurons that are left, in bits"
        yield _course(entropy, looks, of, "entropy", what, "PSP-entropy, bits")
    sharp = of_model[(of_model["name"] == "sharpness") & (of_model["value"] > 0)]
    if len(sharp):
        what = "sharpness, the largest eigenvalue of the loss's Hessian, where it was found"
        yield _course(sharp, looks, of, "sharpness", what, "sharpness", log=True)


def _neurons(layers: pd.DataFrame, looks: dict[str, Look], of: GroupLabel) -> Picture:
    """After the last epoch, of the neurons of the widest of these models."""
    last = layers[layers["epoch"] == layers.groupby("trial")["epoch"].transform("max")]
    left, whole = (last[last["name"] == name] for name in ("neurons_left", "neurons"))
    names = list(dict.fromkeys(left["layer"]))
    wide = whole.groupby("layer")["value"].max()
    means = left.groupby(["label", "layer"])["value"].mean()
    figure = Figure(figsize=(WIDTH, 3.8))
    axis: Any = figure.subplots()
    for label in (label for label in looks if label in means.index.get_level_values("label")):
        look = looks[label]
        share = (means.loc[label] / wide).reindex(names)
        style = {"color": look.colour, "linestyle": look.line, "linewidth": 0.8}
        axis.plot(range(len(names)), share, label=label, marker=look.marker, markersize=4, **style)
    axis.set_ylim(-0.03, 1.05)
    axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axis.set_ylabel("neurons left")
    if len(names) <= NAMED:
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
    else:
        axis.set_xlabel("layers, in the model's order")
    legend(figure, axis)
    caption = (
        "the share of each layer's neurons that still hold a weight after the last epoch, of the "
        "widest of these models; means over seeds."
    )
    return of.picture("neurons", caption, figure)


def _course(
    rows: pd.DataFrame,
    looks: dict[str, Look],
    of: GroupLabel,
    kind: str,
    what: str,
    title: str,
    *,
    log: bool = False,
) -> Picture:
    figure = Figure(figsize=(WIDTH, 3.4))
    axis: Any = figure.subplots()
    rows = rows.assign(middle=np.log(rows["value"]) if log else rows["value"])
    spread = rows.groupby(["label", "epoch"]).agg(
        middle=("middle", "mean"), min=("value", "min"), max=("value", "max")
    )
    if log:
        spread["middle"] = np.exp(spread["middle"])
    labels = [label for label in looks if label in spread.index.get_level_values("label")]
    for label in labels:
        course, look = spread.loc[label], looks[label]
        marker = look.marker if len(course) <= 1 or log else None
        style = {"color": look.colour, "linestyle": look.line, "marker": marker, "markersize": 4}
        axis.plot(course.index, course["middle"], label=label, **style)
        if len(labels) <= BANDS:
            low, high = course["min"], course["max"]
            axis.fill_between(course.index, low, high, color=look.colour, alpha=0.12)
    if log:
        axis.set_yscale("log")
        if spread["max"].max() < DECADES * spread["min"].min():
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("epoch")
    axis.set_ylabel(title)
    legend(figure, axis)
    bands = ", bands from the lowest to the highest" if len(labels) <= BANDS else ""
    means = "geometric means" if log else "means"
    return of.picture(kind, f"{what}, by epoch; {means} over seeds{bands}.", figure)
