"""Charts as inline SVG: colours and letters are the page's own, so light and dark both look right."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

Floats = npt.NDArray[np.float64]

# matplotlib needs colours it can parse; the page's CSS variables take their places in the SVG.
INK, GRID = "#010100", "#010200"
SERIES = tuple(f"#0101{number:02x}" for number in range(1, 7))
VARIABLES = {
    INK: "var(--muted)",
    GRID: "var(--line)",
    **{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)},
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
}


@dataclass(frozen=True)
class Line:
    """One curve; `colour` counts from 0, curves of one colour belong together."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def line_chart(lines: Sequence[Line], *, y_label: str, y_from_zero: bool = False) -> Markup:
    """Curves over pair visits."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas()
        for line in lines:
            axes.plot(
                line.x,
                line.y,
                label=line.name,
                color=SERIES[line.colour % len(SERIES)],
                linestyle="--" if line.dashed else "-",
                marker="o" if len(line.x) < 15 else "",
                markersize=3,
            )
        axes.set_xlim(left=0)
        if y_from_zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("pair visits")
        axes.set_ylabel(y_label)
        if len(lines) > 1:
            axes.legend(loc="best")
        return _svg(figure)


def histogram(groups: Mapping[str, Floats], *, x_label: str, bins: int = 60) -> Markup:
    """Counts of one or more groups over common bins."""
    with mpl.rc_context(STYLE):
        figure, axes = _canvas()
        limits = np.histogram_bin_edges(np.concatenate(list(groups.values())), bins).tolist()
        for number, (name, values) in enumerate(groups.items()):
            colour = SERIES[number]
            axes.hist(values, limits, histtype="stepfilled", color=colour, alpha=0.25)
            axes.hist(values, limits, histtype="step", color=colour, linewidth=1.4, label=name)
        axes.set_xlabel(x_label)
        axes.set_ylabel("pairs")
        if len(groups) > 1:
            axes.legend(loc="best")
        return _svg(figure)


def sparkline(score_E: npt.NDArray[Any], kept_E: npt.NDArray[Any]) -> Markup:
    """A pair's scores by epoch, from -3 to +3 (NaN: none), over a bar that tells where it was kept."""
    left, width, middle = 3.0, 94.0, 15.0
    step = width / max(len(score_E) - 1, 1)
    points = [
        (left + step * epoch, middle - 4 * float(np.clip(score, -3, 3)))
        for epoch, score in enumerate(score_E)
        if np.isfinite(score)
    ]
    told = "; ".join(
        f"epoch {epoch}: {f'{score:+.2f}' if np.isfinite(score) else 'no score'}, {'kept' if kept else 'dropped'}"
        for epoch, (score, kept) in enumerate(zip(score_E.tolist(), kept_E.tolist(), strict=True))
    )
    band = 100 / len(kept_E)
    changes = [0, *(np.flatnonzero(np.diff(kept_E)) + 1).tolist(), len(kept_E)]
    bars = "".join(
        f'<rect class="{"kept" if kept_E[first] else "dropped"}" x="{band * first:.1f}" y="31"'
        f' width="{band * (last - first):.1f}" height="3"></rect>'
        for first, last in pairwise(changes)
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6"></circle>' for x, y in points)
    return Markup(
        f'<svg class="spark" viewBox="0 0 100 35" role="img"><title>{told}</title>'
        f'<path d="M0 {middle}H100"></path><polyline points="{line}"></polyline>{dots}{bars}</svg>'
    )


def _canvas() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 2.8), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure) -> Markup:
    """The bare <svg> element: no XML head, no metadata, no fixed size."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' width="[^"]*" height="[^"]*"', "", svg, count=1)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)
