"""The pictures of an unlearning experiment: one for a README, single charts for the report.

``unlearning.png`` and ``unlearning.svg`` show forgetting against utility first, then where the forgotten stand in the
rankings, or for many requests in a row how the model wears. Texts stay readable at a width of 900 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedrec.experiment import plots
from fedrec.experiment.budgets_plot import PAPER, Palette
from fedrec.experiment.console import name_of
from fedrec.experiment.unlearn import lines, panels
from fedrec.experiment.unlearn.panels import Group
from fedrec.experiment.unlearn.reading import read_unlearning
from fedrec.experiment.unlearn.record import BatchRecord, RequestRow, UnlearningRecord, kinds_label

PAGE = Palette(plots.INK, plots.MUTED, plots.GRID, plots.PAPER, plots.SERIES)
_WIDTH = 9.0  # inches; at 900 pixels a point of the font is 1.39 pixels
_MANY = 4  # batches of one kind from which on a strategy's order matters more than each of them


def groups_of(record: UnlearningRecord) -> dict[tuple[str, ...], list[Group]]:
    """By kind of request, the strategies; one strategy has all its kinds under one key."""
    if len(record.strategies) == 1:
        found: dict[tuple[str, ...], list[BatchRecord]] = {}
        for batch in record.strategies[0].batches:
            found.setdefault(batch.kinds, []).append(batch)
        return {(): [Group(kinds_label(kinds), place, tuple(own)) for place, (kinds, own) in enumerate(found.items())]}
    order = {strategy.name: place for place, strategy in enumerate(record.strategies)}
    return {
        kinds: [Group(name, order[name], tuple(own)) for name, own in batches.items()]
        for kinds, batches in record.groups().items()
    }


def draw(document: Mapping[str, Any], palette: Palette = PAPER) -> Figure | None:
    """The picture of a whole experiment; None where nothing was measured that it could show."""
    record = read_unlearning(document)
    if record is None:
        return None
    several = len(record.strategies) > 1
    columns = {kinds: groups for kinds, groups in groups_of(record).items()
               if panels.can_place(batch for group in groups for batch in group.batches)}  # fmt: skip
    if not columns:
        return None
    with matplotlib.style.context(["default", {**plots.STYLE, **style_of(palette)}]):
        figure = Figure(figsize=(_WIDTH, 4.6))
        figure.set_layout_engine("constrained", h_pad=0.05, w_pad=0.06, hspace=0.04, wspace=0.04)
        figure.suptitle(_title(record, document), color=palette.ink, fontsize=11, x=0.01, ha="left")
        if several and len(columns) > 1:
            axes = figure.subplots(1, min(len(columns), 3), squeeze=False)[0]
            for place, (kinds, groups) in enumerate(list(columns.items())[:3]):
                _forgetting(axes[place], groups, palette, kinds_label(kinds), 5 - min(len(columns), 2))
                axes[place].set_ylabel("" if place else axes[place].get_ylabel())
        else:
            kinds, groups = next(iter(columns.items()))
            _beside(figure, groups, palette, several, kinds_label(kinds) if several else "")
        shown = list(dict.fromkeys((group.label, group.style) for own in columns.values() for group in own))
        _legend(figure, shown, columns, palette)
    return figure


def _title(record: UnlearningRecord, document: Mapping[str, Any]) -> str:
    data, count = name_of(document.get("dataset"), ""), len(record.requests)
    what = record.strategies[0].name if len(record.strategies) == 1 else f"{len(record.strategies)} strategies"
    on = f" on {data}" if data else ""
    return f"Unlearning{on}: {count} request{'' if count == 1 else 's'}, {what}"


def _beside(figure: Figure, groups: Sequence[Group], palette: Palette, several: bool, heading: str) -> None:
    """Forgetting against utility at the left; at the right what there is to say more."""
    rows = _right(groups, several)
    grid = figure.add_gridspec(max(len(rows), 1), 2 if rows else 1, width_ratios=[1.15, 1] if rows else [1])
    _forgetting(figure.add_subplot(grid[:, 0]), groups, palette, heading)
    shared: Axes | None = None
    for place, (kind, chosen) in enumerate(rows):
        axes = figure.add_subplot(grid[place, 1], sharex=shared if kind == "percentiles" else None)
        if kind == "prices":
            lines.prices(axes, chosen, palette)
            axes.set_title("its price (hollow: a gate failed)", **_SMALL, color=palette.ink)
        elif kind == "drift":
            lines.drift(axes, chosen[0], palette)
            axes.set_title("request after request", **_SMALL, color=palette.ink)
        elif kind == "trace":
            lines.trace(axes, chosen[0].batches[0], palette)
            axes.set_title("", **_SMALL)
        else:
            last = place + 1 == len(rows) or rows[place + 1][0] != "percentiles"
            lines.percentiles(axes, chosen, palette, legend=shared is None)
            shared = axes
            label = chosen[0].label if len(groups) > 1 else "rank of the forgotten"
            label += ", last request" if any(kind == "drift" for kind, _ in rows) else ""
            axes.set_title(label, **_SMALL, color=palette.ink)
            axes.set_ylabel("")
            axes.tick_params(labelbottom=last)
            axes.set_xlabel(axes.get_xlabel() if last else "")


_SMALL: dict[str, Any] = {"fontsize": 9.6, "loc": "left"}


def _right(groups: Sequence[Group], several: bool) -> list[tuple[str, list[Group]]]:
    if not several and (long := [group for group in groups if len(group.batches) >= _MANY]):
        drawn = [group for group in long if any(map(lines.has_percentiles, group.batches))]
        return [("drift", [long[0]]), *([("percentiles", [_last(drawn[0])])] if drawn else [])]
    ranked = [group for group in groups if any(map(lines.has_percentiles, group.batches))]
    if several:
        priced = [group for group in groups if lines.has_price(group)]
        return [("prices", priced)] if priced else []
    rows: list[tuple[str, list[Group]]] = [("percentiles", [group]) for group in ranked[:3]]
    traced = [group for group in groups if lines.has_trace(group.batches[0])]
    return [*rows, ("trace", [traced[0]])] if len(rows) < 2 and traced else rows


def _last(group: Group) -> Group:
    return Group(group.label, group.style, group.batches[-1:])


def _forgetting(axes: Axes, groups: Sequence[Group], palette: Palette, heading: str, ticks: int = 5) -> None:
    panels.forgetting(axes, groups, palette, ticks)
    axes.set_title(heading, **_SMALL, color=palette.ink)


def _legend(figure: Figure, shown: Sequence[tuple[str, int]], columns: Mapping[Any, Sequence[Group]],
            palette: Palette, across: int = 7) -> None:  # fmt: skip
    """What the marks mean, below all panels, in as few equal lines as fit."""
    batches = [batch for own in columns.values() for group in own for batch in group.batches]
    names = {name for own in columns.values() for name in panels.attacks_of(b for g in own for b in g.batches)}
    plain: dict[str, Any] = {"linestyle": "none", "markersize": 6.5}
    handles = [Line2D([], [], marker="*", color=palette.ink, label="gold ± sd", **plain | {"markersize": 9})]
    if any(batch.before for batch in batches):
        handles.append(Line2D([], [], marker="o", color=palette.muted, label="before", **plain | {"markersize": 5}))
    for label, style in shown:
        group = Group(label, style, ())
        handles.append(Line2D([], [], marker=group.marker, color=group.colour(palette), label=label, **plain))
    if "fold_in_auc" in names:
        handles.append(Line2D([], [], marker="o", color=palette.ink, markerfacecolor=palette.paper,
                              markeredgewidth=1.4, label="hollow: fold-in attack", **plain))  # fmt: skip
    handles.append(Line2D([], [], marker="s", color=palette.series[2], alpha=0.3, label="shaded: passes", **plain))
    figure.legend(handles=handles, loc="outside lower left", ncols=-(-len(handles) // -(-len(handles) // across)),
                  frameon=False, fontsize=8.8,
                  handletextpad=0.3, columnspacing=1.4, labelcolor=palette.ink)  # fmt: skip


def style_of(palette: Palette) -> dict[str, Any]:
    return {
        "text.color": palette.ink, "axes.labelcolor": palette.muted, "axes.edgecolor": palette.grid,
        "grid.color": palette.grid, "xtick.color": palette.grid, "ytick.color": palette.grid,
        "xtick.labelcolor": palette.muted, "ytick.labelcolor": palette.muted, "figure.facecolor": palette.paper,
        "axes.facecolor": palette.paper, "savefig.facecolor": palette.paper,
    }  # fmt: skip


def write_pictures(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """``unlearning.png`` (160 dots an inch) and ``unlearning.svg``, the same bytes for the same numbers.

    Nothing is written, and the list is empty, where the document holds no measures that could be drawn.
    """
    figure = draw(document)
    if figure is None:
        return []
    with matplotlib.rc_context({"svg.hashsalt": "unlearning", "svg.fonttype": "none"}):
        figure.savefig(folder / "unlearning.png", dpi=160, metadata={"Software": None})
        figure.savefig(folder / "unlearning.svg", metadata={"Date": None})
    return [folder / "unlearning.png", folder / "unlearning.svg"]


def _svg(name: str, alt: str, height: float, panel: Callable[[Axes], object]) -> str:
    """One panel as an ``<svg>`` element in the colours of the report's page; ``height`` in points."""
    with matplotlib.style.context(["default", {**plots.STYLE, **style_of(PAGE)}]):
        figure = Figure(figsize=(390 / 72, height / 72), layout="constrained")
        panel(figure.add_subplot())
        return plots.as_svg(figure, name, alt)


def utility_svg(name: str, alt: str, groups: Sequence[Group]) -> str:
    """Forgetting against utility; the legend stands below the axes."""
    with matplotlib.style.context(["default", {**plots.STYLE, **style_of(PAGE)}]):
        figure = Figure(figsize=(390 / 72, 330 / 72), layout="constrained")
        panels.forgetting(figure.add_subplot(), groups, PAGE)
        _legend(figure, [(group.label, group.style) for group in groups], {"": groups}, PAGE, across=4)
        return plots.as_svg(figure, name, alt)


def percentiles_svg(name: str, alt: str, groups: Sequence[Group]) -> str:
    return _svg(name, alt, 215, lambda axes: lines.percentiles(axes, groups, PAGE))


def trace_svg(name: str, alt: str, batch: BatchRecord) -> str:
    return _svg(name, alt, 215, lambda axes: lines.trace(axes, batch, PAGE))


def timeline_svg(name: str, alt: str, requests: Sequence[RequestRow]) -> str:
    rows = min(len(requests), 60)
    return _svg(name, alt, 45 + (21 if rows <= 24 else 11) * rows,
                lambda axes: lines.timeline(axes, requests, PAGE))  # fmt: skip


def drift_svg(name: str, alt: str, group: Group) -> str:
    return _svg(name, alt, 230, lambda axes: lines.drift(axes, group, PAGE))


def prices_svg(name: str, alt: str, groups: Sequence[Group]) -> str:
    return _svg(name, alt, 60 + 22 * len(groups), lambda axes: lines.prices(axes, groups, PAGE))
