"""The plot of a comparison of budgets: utility, attack success and noise against ε, one line a method.

ε of different adjacencies (a user, an interaction; added, replaced) are different quantities: each gets a column of
panels of its own, never one axis. Infinity stands apart at the right; points without a guarantee are hollow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedrec.experiment import plots
from fedrec.experiment.budgets import name_of_epsilon
from fedrec.experiment.budgets_points import Baseline, Point
from fedrec.experiment.budgets_values import CURVES, Spread


@dataclass(frozen=True)
class Palette:
    """Colours as matplotlib takes them; the report's page replaces those of ``plots.PAGE`` by its own."""

    ink: str
    muted: str
    grid: str
    paper: str
    series: tuple[str, ...]


PAPER = Palette("#1c1f23", "#5d656f", "#dfe3e8", "#ffffff",
                ("#0072b2", "#c85200", "#00855f", "#a8487f", "#a87400", "#4a5ab0"))  # fmt: skip
_PAGE = Palette(plots.INK, plots.MUTED, plots.GRID, plots.PAPER, plots.SERIES)
_MARKERS = ("o", "s", "D", "^", "v", "P")
_STEP = 1.0  # inches of the noise, attack and audit panels, relative to _TALL of the utility panel
_TALL = 2.3


@dataclass(frozen=True)
class Scale:
    """Where a budget stands on the axis: its binary logarithm, infinity apart to the right."""

    finite: tuple[float, ...]
    infinite: bool

    @classmethod
    def of(cls, found: Sequence[Point]) -> Scale:
        values = sorted({point.epsilon for point in found})
        return cls(tuple(value for value in values if math.isfinite(value)), any(map(math.isinf, values)))

    @property
    def gap(self) -> float:
        return max(1.0, 0.35 * (math.log2(self.finite[-1]) - math.log2(self.finite[0])))

    def place(self, epsilon: float) -> float:
        if math.isfinite(epsilon):
            return math.log2(epsilon)
        return math.log2(self.finite[-1]) + self.gap if self.finite else 0.0

    @property
    def limits(self) -> tuple[float, float]:
        ends = [self.place(value) for value in self.finite] + ([self.place(math.inf)] if self.infinite else [])
        room = 0.06 * max(ends[-1] - ends[0], 1.0)
        return ends[0] - room, ends[-1] + room


def facets(found: Sequence[Point]) -> dict[str, list[Point]]:
    """Points that may stand on one axis, by adjacency; those without a finished run are left out."""
    grouped: dict[str, list[Point]] = {}
    for point in found:
        if point.seeds:
            grouped.setdefault(point.adjacency, []).append(point)
    return grouped


def draw(
    found: Sequence[Point], lines: Sequence[Baseline], wanted: str, curve: str | None, title: str,
    palette: Palette = PAPER,
) -> Figure:  # fmt: skip
    """The figure of a comparison with at least one finished run."""
    columns = facets(found)
    told = [point for points in columns.values() for point in points]
    curve = curve if any(curve in point.curves for point in told) else None
    panels: list[tuple[float, Callable[[Axes, _Column], None]]] = [(_TALL, _utility)]
    panels += [(_STEP, _attack)] if curve else []
    panels += [(_STEP, _audit)] if any(point.bounds for point in told) else []
    panels += [(_STEP, _noise)] if any(point.signal_to_noise for point in told) else []
    methods = list(dict.fromkeys(point.method for point in found))
    style = {**plots.STYLE, **_colours(palette)}
    with matplotlib.style.context(["default", style]):
        size = (7.4 if len(columns) < 2 else 5.6 * len(columns), 0.75 + 1.25 * sum(height for height, _ in panels))
        figure = Figure(figsize=size)
        figure.set_layout_engine("constrained", h_pad=0.06, hspace=0.03, wspace=0.06)
        axes = figure.subplots(
            len(panels), max(len(columns), 1), squeeze=False, sharex="col",
            gridspec_kw={"height_ratios": [height for height, _ in panels]},
        )  # fmt: skip
        figure.suptitle(title, color=palette.ink, fontsize=11, x=0.01, ha="left")
        for place, (adjacency, points) in enumerate(columns.items()):
            column = _Column(points, lines, wanted, curve, methods, palette, Scale.of(points))
            for row, (_, panel) in enumerate(panels):
                panel(axes[row][place], column)
            if len(columns) > 1:
                axes[0][place].set_title(_unit(points[0]), fontsize=9.6, color=palette.ink, loc="left")
            _budgets_axis(axes[-1][place], column, f"ε ({adjacency})")
    return figure


def _colours(palette: Palette) -> dict[str, Any]:
    return {
        "text.color": palette.ink, "axes.labelcolor": palette.muted, "axes.edgecolor": palette.grid,
        "grid.color": palette.grid, "xtick.color": palette.grid, "ytick.color": palette.grid,
        "xtick.labelcolor": palette.muted, "ytick.labelcolor": palette.muted, "figure.facecolor": palette.paper,
        "axes.facecolor": palette.paper, "savefig.facecolor": palette.paper,
    }  # fmt: skip


def _unit(point: Point) -> str:
    if point.unit == "interaction":
        return f"ε of one interaction ({point.adjacency}): no guarantee for a user"
    return f"ε of one user ({point.adjacency})"


@dataclass(frozen=True)
class _Column:
    points: Sequence[Point]
    lines: Sequence[Baseline]
    wanted: str
    curve: str | None
    methods: Sequence[str]
    palette: Palette
    scale: Scale

    def of(self, method: str) -> list[Point]:
        return [point for point in self.points if point.method == method]

    def colour(self, method: str) -> str:
        return self.palette.series[self.methods.index(method) % len(self.palette.series)]

    def marker(self, method: str) -> str:
        return _MARKERS[self.methods.index(method) % len(_MARKERS)]

    @property
    def here(self) -> list[str]:
        return [method for method in self.methods if self.of(method)]


def _budgets_axis(axes: Axes, column: _Column, label: str) -> None:
    scale = column.scale
    values = [*scale.finite, *([math.inf] if scale.infinite else [])]
    texts = [name_of_epsilon(value) if math.isfinite(value) else "∞\n(no privacy)" for value in values]
    axes.set_xticks([scale.place(value) for value in values], texts)
    axes.set_xlim(*scale.limits)
    axes.set_xlabel(label)


def _curve(
    axes: Axes, column: _Column, method: str, value: Callable[[Point], Spread | None], told: bool = False
) -> float | None:
    """One method's line with its band; returns the height of its right end."""
    colour, scale = column.colour(method), column.scale
    points = [(point, found) for point in column.of(method) if (found := value(point)) is not None]
    finite = [(scale.place(point.epsilon), found) for point, found in points if math.isfinite(point.epsilon)]
    axes.plot([x for x, _ in finite], [found.mean for _, found in finite], color=colour, zorder=3)
    banded = [(x, found.low, found.high) for x, found in finite if found.low is not None and found.high is not None]
    if banded:
        xs, low, high = zip(*banded, strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.16, linewidth=0, zorder=2)
    for point, found in points:
        x = scale.place(point.epsilon)
        if math.isinf(point.epsilon):
            if finite:
                axes.plot(
                    [finite[-1][0], x], [finite[-1][1].mean, found.mean], color=colour, linewidth=1.1,
                    linestyle=(0, (1, 2)), zorder=3,
                )  # fmt: skip
            if found.low is not None and found.high is not None:
                axes.plot([x, x], [found.low, found.high], color=colour, linewidth=5, alpha=0.22,
                          solid_capstyle="butt", zorder=2)  # fmt: skip
        face = colour if point.private else column.palette.paper
        axes.plot([x], [found.mean], column.marker(method), color=colour, markersize=5.5, markerfacecolor=face,
                  markeredgewidth=1.4, zorder=4)  # fmt: skip
        if told and not point.private and math.isfinite(point.epsilon):
            axes.annotate("not private", (x, found.mean), (0, -12), textcoords="offset points", ha="center",
                          fontsize=7.5, color=colour)  # fmt: skip
    return points[-1][1].mean if points else None


def _utility(axes: Axes, column: _Column) -> None:
    wanted = column.wanted
    ends: list[tuple[str, float, str]] = []
    means, bands = [0.0], [0.0]
    for method in column.here:
        end = _curve(axes, column, method, lambda point: point.metrics.get(wanted), told=True)
        if end is not None:
            ends.append((method, end, column.colour(method)))
        drawn = [one for point in column.of(method) if (one := point.metrics.get(wanted))]
        means += [one.mean for one in drawn]
        bands += [one.high for one in drawn if one.high is not None]
    for label, height, colour in _horizontals(column):
        axes.axhline(height, color=colour, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
        ends.append((label, height, colour))
        means.append(height)
    # Two seeds make bands that would flatten everything else: then they leave the picture, not the lines.
    axes.set_ylim(0.0, min(max(*means, *bands), 1.5 * max(means)) * 1.07 or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_ylabel(f"test {wanted.upper()}, full ranking")
    _labels_at_end(axes, column, ends, 0.058)


def _horizontals(column: _Column) -> list[tuple[str, float, str]]:
    """(label, height, colour) of the baselines; methods that are the same without their server share one line."""
    found: list[tuple[str, float, str]] = []
    local: dict[float, list[Baseline]] = {}
    for line in column.lines:
        value = line.metrics.get(column.wanted)
        if value is None:
            continue
        if not line.method:
            found.append((line.label, value.mean, column.palette.muted))
        elif line.method in column.here:
            local.setdefault(value.mean, []).append(line)
    for height, lines in local.items():
        alone = len(lines) == 1
        label = lines[0].label if alone else "local only"
        found.append((label, height, column.colour(lines[0].method) if alone else column.palette.muted))
    return found


def _attack(axes: Axes, column: _Column) -> None:
    curve = column.curve
    assert curve is not None
    shown = [0.5]
    for method in column.here:
        _curve(axes, column, method, lambda point: point.curves.get(curve))
        shown += [value for point in column.of(method) if (one := point.curves.get(curve))
                  for value in (one.mean, one.low, one.high) if value is not None]  # fmt: skip
    axes.axhline(0.5, color=column.palette.muted, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    low, high = min(0.4, *shown), max(0.6, *shown)
    axes.set_ylim(max(0.0, low - 0.02), min(1.02, high + 0.02))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_ylabel(CURVES[curve].replace(" (", "\n("))
    _labels_at_end(axes, column, [("guessing", 0.5, column.palette.muted)], 0.14)


def _audit(axes: Axes, column: _Column) -> None:
    finite = column.scale.finite
    for method in column.here:
        _curve(axes, column, method, lambda point: point.bounds)
    ends = []
    if finite:
        xs = [column.scale.place(value) for value in finite]
        axes.plot(xs, finite, color=column.palette.muted, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        ends.append(("claimed ε", finite[-1], column.palette.muted))
    axes.set_ylim(bottom=0.0)
    axes.set_ylabel("audit: ε is\nat least")
    _labels_at_end(axes, column, ends, 0.14)


def _noise(axes: Axes, column: _Column) -> None:
    axes.set_yscale("log")
    for method in column.here:
        _curve(axes, column, method, _ratio)
    values = [ratio.mean for point in column.points if (ratio := _ratio(point))]
    if values:
        axes.set_ylim(min(values) / 3.2, max(values) * 4.5)
    else:
        axes.annotate("not recorded", (0.5, 0.5), xycoords="axes fraction", ha="center", color=column.palette.muted)
    for epsilon in column.scale.finite:
        _multipliers(axes, column, epsilon)
    decades = math.log10(axes.get_ylim()[1] / axes.get_ylim()[0])
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 3.0) if decades < 3 else (1.0,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(1.0, color=column.palette.muted, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    axes.set_ylabel("signal to noise\n(σ: noise multiplier)")


def _ratio(point: Point) -> Spread | None:
    """Signal to noise where a logarithmic axis can show it: under local privacy the estimate may be 0."""
    ratio = point.signal_to_noise
    return ratio if ratio is not None and ratio.mean > 0.0 else None


def _multipliers(axes: Axes, column: _Column, epsilon: float) -> None:
    """The noise multipliers beside the points of one budget: above the highest, below the lowest, right of others."""
    here = [
        (found.mean, "σ " + ", ".join(f"{value:.2g}" for value in dict.fromkeys(point.noise)), point.method)
        for point in column.points
        if point.epsilon == epsilon and any(point.noise) and (found := _ratio(point)) is not None
    ]
    drawn: list[tuple[float, str]] = []
    for place, (height, text, method) in enumerate(sorted(here, reverse=True)):
        if any(text == other and height > 0.6 * above for above, other in drawn):
            continue
        drawn.append((height, text))
        way = ((0, 6), "center", "bottom") if not place else ((0, -7), "center", "top")
        if 0 < place < len(here) - 1:
            way = ((7, 0), "left", "center")
        shared = sum(other == text for _, other, _ in here) > 1
        axes.annotate(
            text, (column.scale.place(epsilon), height), way[0], textcoords="offset points", ha=way[1], va=way[2],
            fontsize=7.8, color=column.palette.muted if shared else column.colour(method),
        )  # fmt: skip


def _labels_at_end(axes: Axes, column: _Column, ends: Sequence[tuple[str, float, str]], apart: float) -> None:
    """Texts right of the axes, at their heights, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    rows = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, value, _ in rows:
        wanted = (value - low) / (high - low)
        heights.append(max(wanted, heights[-1] + apart) if heights else wanted)
    overflow = max(0.0, heights[-1] - 0.99) if heights else 0.0
    for (text, _, colour), height in zip(rows, heights, strict=True):
        axes.annotate(text, (1.0, height - overflow), (6, 0), xycoords="axes fraction", textcoords="offset points",
                      va="center", color=colour, fontsize=9, annotation_clip=False)  # fmt: skip


def write_pictures(figure: Figure, folder: Path) -> list[Path]:
    """``budgets.png`` (160 dots an inch) and ``budgets.svg``, the same bytes for the same numbers."""
    with matplotlib.rc_context({"svg.hashsalt": "budgets", "svg.fonttype": "none"}):
        figure.savefig(folder / "budgets.png", dpi=160, metadata={"Software": None})
        figure.savefig(folder / "budgets.svg", metadata={"Date": None})
    return [folder / "budgets.png", folder / "budgets.svg"]


def inline_svg(found: Sequence[Point], lines: Sequence[Baseline], wanted: str, curve: str | None, alt: str) -> str:
    """The same picture as an ``<svg>`` element in the colours of the report's page."""
    figure = draw(found, lines, wanted, curve, "", _PAGE)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        return plots.as_svg(figure, "budgets", alt)
