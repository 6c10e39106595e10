"""Charts as inline SVG, drawn with matplotlib's ``Figure`` (no pyplot, no figure manager).

Colours leave here as CSS variables (``var(--s0)`` …), so that one picture follows the page into dark mode and print;
``report.css`` holds the palette. Texts stay texts: they use the page's font, can be searched and read aloud.
A function takes plain numbers and returns the ``<svg>`` element; what the numbers mean is the caller's business.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, SymmetricalLogLocator

# Placeholders that no colour map produces; ``as_svg`` replaces them with CSS variables.
INK, MUTED, GRID, PAPER = "#010203", "#020304", "#030405", "#040506"
SERIES = tuple(f"#0a0b{index:02x}" for index in range(6))
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--paper"} | {
    colour: f"--s{index}" for index, colour in enumerate(SERIES)
}
DASHES = ("", "5 2.5", "1.5 2")  # of line styles; a seventh series repeats the first colour in the second style
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.6,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 9,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.7,
}
_WIDTH = 390  # points; all charts are equally wide, so their texts are equally large on the page


@dataclass(frozen=True)
class Series:
    """One line: points ``(x, y)``, a style number (colour, then dashes), and the point to mark with its text."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int = 0
    dashed: bool = False
    mark: float | None = None


@dataclass(frozen=True)
class Bar:
    """One bar: its text is written behind it; ``style`` None draws it muted; ``guide`` extends its end upwards."""

    label: str
    value: float
    text: str
    style: int | None = 0
    interval: tuple[float, float] | None = None
    guide: bool = False


def curves(
    name: str,
    alt: str,
    series: Sequence[Series],
    *,
    x_label: str = "round",
    y_label: str = "",
    reference: tuple[str, float] | None = None,
    best: float | None = None,
    y_format: Callable[[float], str] | None = None,
    from_zero: bool = False,
    height: float = 215,
) -> str:
    """Lines over a common axis, labelled at their ends.

    ``reference`` draws a labelled horizontal line, ``best`` a labelled vertical one. Points that are not finite are
    left out and the first of them is marked; a range over many orders of magnitude gets a symmetric log scale.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        finite = [_finite(one) for one in series]
        shown = [y for _, ys in finite for y in ys] + ([reference[1]] if reference else [])
        typical = max(float(np.median(np.abs(shown))), 1e-3) if shown else 1.0
        wide = max(map(abs, shown), default=0.0) > 1e4 * typical
        if wide:
            axes.set_yscale("symlog", linthresh=typical)
            locator = SymmetricalLogLocator(base=10, linthresh=typical)
            locator.set_params(numticks=6)
            axes.yaxis.set_major_locator(locator)
        right = max((x for one in series for x in one.x if math.isfinite(x)), default=1.0)
        for one, (xs, ys) in zip(series, finite, strict=True):
            _line(axes, one, xs, ys, right)
        axes.set_xlim(right=right)
        if from_zero and shown:
            axes.set_ylim(0, max(*shown, 1e-12) * 1.08)
        if reference is not None:
            axes.axhline(reference[1], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        if best is not None:
            axes.axvline(best, color=MUTED, linewidth=0.7, zorder=1)
            axes.annotate(f"best round {best:.0f}", (best, 1.0), (0, 3), color=MUTED, ha="center", **_AT_TOP)
        ends = [(one.label, ys[-1], _colour(one.style)) for one, (_, ys) in zip(series, finite, strict=True) if ys]
        _end_labels(axes, [*ends, (*reference, MUTED)] if reference else ends)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=x_label == "round"))
        form = y_format or ((lambda value: _power(value, typical)) if wide else None)
        if form is not None:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
        return as_svg(figure, name, alt)


_AT_TOP: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 8.5}
_AT_RIGHT: dict[str, Any] = {
    "xycoords": "axes fraction",
    "xytext": (5, 0),
    "textcoords": "offset points",
    "va": "center",
}


def _power(value: float, smallest: float) -> str:
    """A power of ten for the symmetric log axis; no text inside its linear middle, where labels would overlap."""
    if abs(value) < smallest:
        return "" if value else "0"
    return f"{value:.0e}".replace("e+0", "e").replace("e+", "e").replace("-", "−")


def _finite(one: Series) -> tuple[list[float], list[float]]:
    pairs = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _line(axes: Axes, one: Series, xs: Sequence[float], ys: Sequence[float], right: float) -> None:
    colour, dashes = _colour(one.style), DASHES[1 if one.dashed else line_style(one.style)[1]]
    style = (0, tuple(float(length) for length in dashes.split())) if dashes else "-"
    axes.plot(xs, ys, color=colour, linestyle=style)
    if len(xs) == 1:  # an algorithm of one round: a point, carried on to its label
        axes.plot(xs, ys, "o", color=colour, markersize=5)
        axes.plot([xs[0], right], [ys[0]] * 2, color=colour, linewidth=0.9, linestyle=(0, (1, 2)))
    if one.mark is not None and one.mark in xs:
        at = ys[list(xs).index(one.mark)]
        axes.plot([one.mark], [at], "o", color=colour, markersize=5.5, markeredgecolor=PAPER, zorder=4)
    lost = next((x for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and not math.isfinite(y)), None)
    if lost is not None:
        late = lost > right / 2
        side: dict[str, Any] = {"ha": "right" if late else "left", "xytext": (-4 if late else 4, -9)}
        axes.axvline(lost, color=SERIES[1], linewidth=1.0, linestyle=(0, (4, 2)))
        axes.annotate(f"not finite from round {lost:.0f}", (lost, 1.0), color=SERIES[1], **_AT_TOP, **side)


def line_style(style: int) -> tuple[int, int]:
    """Colour number and dash number of a style number; the report's legend uses the same."""
    return style % len(SERIES), style // len(SERIES) % len(DASHES)


def _colour(style: int) -> str:
    return SERIES[line_style(style)[0]]


def _end_labels(axes: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """(text, height in data units, colour) at the right edge, pushed apart where texts would overlap."""
    rows = sorted((end for end in ends if end[0]), key=lambda end: end[1])
    to_axes = axes.transScale + axes.transLimits
    heights: list[float] = []
    for _, value, _ in rows:
        wanted = float(to_axes.transform((1.0, value))[1])
        heights.append(max(wanted, heights[-1] + 0.085) if heights else wanted)
    overflow = max(0.0, heights[-1] - 1.02) if heights else 0.0
    for (text, _, colour), height in zip(rows, heights, strict=True):
        axes.annotate(text, (1.0, height - overflow), color=colour, **_AT_RIGHT)


def bars(name: str, alt: str, rows: Sequence[Bar], *, limit: float | None = None) -> str:
    """Horizontal bars from zero, first row on top, each labelled with its text; no value axis is needed."""
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(_WIDTH / 72, (22 + 23 * max(len(rows), 1)) / 72), layout="constrained")
        axes = figure.add_subplot()
        top = limit or max([0.0, *(row.value for row in rows), *(row.interval[1] for row in rows if row.interval)])
        for place, row in enumerate(rows):
            colour = GRID if row.style is None else SERIES[line_style(row.style)[0]]
            axes.barh(place, row.value, height=0.62, color=colour)
            end = row.value
            if row.interval is not None:
                axes.plot(row.interval, [place, place], color=INK, linewidth=1.1, solid_capstyle="butt")
                end = max(end, row.interval[1])
            if row.guide:
                axes.plot([row.value] * 2, [-0.45, place], color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
            axes.annotate(row.text, (end, place), (5, 0), textcoords="offset points", va="center", **_QUIET)
        axes.set_yticks(range(len(rows)), [row.label for row in rows], color=INK)
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, (top or 1.0) * 1.02)
        axes.set_xticks([])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        return as_svg(figure, name, alt)


_QUIET: dict[str, Any] = {
    "fontsize": 9,
    "annotation_clip": False,
    "bbox": {"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
}


def histogram(name: str, alt: str, counts: Mapping[str, Sequence[float]], *, x_label: str) -> str:
    """Shares of users in equal bins of [0, 1], one outline per key, the last key filled.

    The first bin usually holds most users; where it is over three times the next it is cut off and says its share.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(_WIDTH / 72, 215 / 72), layout="constrained")
        axes = figure.add_subplot()
        shares = {key: np.asarray(c, dtype=float) / max(float(np.sum(c)), 1.0) for key, c in counts.items() if len(c)}
        rest = max((float(share[1:].max(initial=0.0)) for share in shares.values()), default=0.0)
        first = max((float(share[0]) for share in shares.values()), default=0.0)
        cut = rest * 1.35 if first > 3 * rest > 0 else max(first, rest, 1e-9) * 1.1
        for place, (label, share) in enumerate(shares.items()):
            last = place == len(shares) - 1
            edges = np.linspace(0.0, 1.0, share.size + 1)
            colour = SERIES[0 if last else 1]
            axes.stairs(np.minimum(share, cut), edges, color=colour, fill=last, alpha=0.85 if last else 1, lw=1.3)
            text = f"{label}: {100 * share[0]:.1f} % of users below {edges[1]:.2f}"
            axes.annotate(text, (edges[1], cut), (8, -10 - 13 * place), textcoords="offset points", color=colour)
        if first > cut:
            axes.plot([-0.006, 0.056], [cut * 0.93, cut * 0.97], color=PAPER, linewidth=3)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, cut)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of users")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        return as_svg(figure, name, alt)


def as_svg(figure: Figure, name: str, alt: str) -> str:
    """The figure as an ``<svg>`` element whose ids are unique to ``name`` and which repeats byte for byte."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # glyphs that the measuring font lacks; the page's font has them
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', svg)
    body = svg[svg.index(">", svg.index("<svg")) + 1 :]
    body = re.sub(
        r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->", "", body, flags=re.DOTALL
    )
    body = re.sub(r'<g id="[^"]*"/>', "", body)
    body = re.sub(r'<g id="[^"]*">', "<g>", body)
    body = re.sub(r'(<text style="[^"]*?)font-family: [^;"]*; ', r"\1", body)
    for placeholder, variable in _VARIABLES.items():
        body = body.replace(f": {placeholder}", f": var({variable})")
    label = html.escape(alt, quote=True)
    return f'<svg role="img" aria-label="{label}" {box[0] if box else ""}>{body}'
