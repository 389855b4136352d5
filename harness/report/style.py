"""How figures look: one set of colours for the page, light or dark, and for print."""

import io
import math
import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours without yellow and black, which vanish on one of two backgrounds.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
BASELINE = "#7f7f7f"
LINES = (
    "-",
    (0, (6, 1.5)),
    (0, (1, 1)),
    (0, (6, 1.5, 1, 1.5)),
    (0, (3, 1)),
    (0, (8, 2, 1, 2, 1, 2)),
)
MARKERS = "sD^vPX*<>"
INK = "#123457"  # replaced by the colour of the text around
WIDTH = 5.8  # inches
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "neqbench",
}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")


@dataclass(frozen=True, slots=True)
class Look:
    """How a method looks in all figures: methods can be told apart without colours, too."""

    colour: Any
    line: Any
    marker: str


def looks(labels: Sequence[str], plain: Container[str]) -> dict[str, Look]:
    """The look of each method, in their order; `plain`: which of them are baselines.

    Where there are many, their colours are shades in that order.
    """
    others = [label for label in labels if label not in plain]
    shades: list[Any] = list(COLOURS)
    if len(others) > len(COLOURS):
        viridis = mpl.colormaps["viridis"]
        shades = [viridis(0.9 * position / (len(others) - 1)) for position in range(len(others))]
    lines, markers = ("--", *LINES), ("o", *MARKERS)
    found = {
        label: Look(BASELINE, lines[position % len(lines)], markers[position % len(markers)])
        for position, label in enumerate(label for label in labels if label in plain)
    }
    for position, label in enumerate(others):
        line, marker = LINES[position % len(LINES)], MARKERS[position % len(MARKERS)]
        found[label] = Look(shades[position], line, marker)
    return found


def plain_name(name: str) -> str:
    """A name for a file, of letters, digits and a few signs."""
    return re.sub(r"[^\w.=-]+", "-", name)


def from_zero(axis: Axes, values: Iterable[float]) -> None:
    """Let the vertical axis begin at zero and hold all of `values` that are finite."""
    axis.set_ylim(0, 1.08 * max(filter(math.isfinite, values), default=1.0) or 1)


def look_closer(axis: Axes, rows: pd.DataFrame) -> None:
    """Let the vertical axis hold what the metric is past the first fifth of the epochs, when
    differences begin to show. `rows`: of trials, an epoch each.
    """
    later = rows.loc[rows["epoch"] >= rows["epoch"].max() / 5, "test_metric"]
    low, high = later.quantile(0.01), later.max()
    if high > low:
        axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def legend(figure: Figure, axis: Axes) -> None:
    """Draw the legend of `axis` above the figure, in as many columns as there is room for."""
    handles, labels = axis.get_legend_handles_labels()
    columns = min(columns_of(labels), len(labels) or 1)
    figure.legend(handles, labels, loc="outside upper left", ncols=columns)


def columns_of(labels: Iterable[str]) -> int:
    """How many columns of a legend with these labels there is room for."""
    return max(1, int(15 * WIDTH / (max(map(len, labels), default=1) + 6)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure: its file's name, the group whose section it stands in, and what it shows."""

    name: str
    group: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The figure as PNG, on white, with 200 dots per inch."""
        return _drawn(self.figure, "png", dpi=200, facecolor="white")

    def svg(self) -> str:
        """The figure as SVG, without background, in the colour of the text around it."""
        text = _drawn(self.figure, "svg", transparent=True, metadata={"Date": None}).decode()
        text = text[text.index("<svg") :].replace(INK, "currentColor")
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(href="|url\()#', rf"\1#{self.name}-", text)
        return re.sub(r'<svg ([^>]*?)width="[^"]*" height="[^"]*"', r"<svg \1", text, count=1)


@dataclass(frozen=True, slots=True)
class GroupLabel:
    """What the figures of a group have in common: its hash, the start of their names, a title."""

    group: str
    name: str
    title: str

    def picture(self, kind: str, caption: str, figure: Figure) -> Picture:
        """A figure of this group; `kind` ends its name."""
        return Picture(
            name=f"{self.name}-{kind}",
            group=self.group,
            caption=f"{self.title}: {caption}",
            figure=figure,
        )


def style() -> mpl.RcParams:
    """matplotlib's settings for all figures, to be used as `with rc_context(style())`."""
    return mpl.RcParams(STYLE | dict.fromkeys(_INKED, INK))


def _drawn(figure: Figure, form: str, **options: Any) -> bytes:
    data = io.BytesIO()
    with mpl.rc_context(style()):
        figure.savefig(data, format=form, **options)
    return data.getvalue()
