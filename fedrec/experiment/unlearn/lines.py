"""More panels of the unlearning pictures: rankings, rounds of unlearning, requests in time, price, and wear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from fedrec.experiment.budgets_plot import Palette
from fedrec.experiment.unlearn.panels import DOTTED, UTILITY, Group, attacks_of, distance, signed
from fedrec.experiment.unlearn.record import BatchRecord, RequestRow, label_of, mean_of
from fedrec.experiment.unlearn.words import answer_text


def percentiles(axes: Axes, groups: Sequence[Group], palette: Palette, *, legend: bool = True) -> None:
    """Where the forgotten stand in their users' rankings: gold filled, before dashed, after one outline a group."""
    first = next((one for group in groups for one in group.batches if _edges(one.percentiles) is not None), None)
    if first is None:
        return
    edges = _edges(first.percentiles)
    assert edges is not None
    if (gold := _shares(first.percentiles, "gold")) is not None:
        axes.stairs(gold, edges, fill=True, color=palette.muted, alpha=0.28, linewidth=0, label="gold")
    if (before := _shares(first.percentiles, "before")) is not None:
        axes.stairs(before, edges, color=palette.muted, linewidth=1.3, linestyle=(0, (4, 2)), label="before")
    for group in groups:
        batch = next((one for one in group.batches if _edges(one.percentiles) is not None), None)
        after = None if batch is None else _shares(batch.percentiles, "after")
        if after is not None and batch is not None:
            label = "after" if len(groups) == 1 else group.label
            axes.stairs(after, _edges(batch.percentiles), color=group.colour(palette), linewidth=1.6, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.set_xlabel("percentile of the forgotten (1: recommended first)")
    axes.set_ylabel("share")
    if legend:
        axes.legend(loc="best", frameon=False, fontsize=8.5, handlelength=1.4, labelspacing=0.3)


def has_percentiles(batch: BatchRecord) -> bool:
    return _edges(batch.percentiles) is not None and any(_shares(batch.percentiles, key) is not None
                                                         for key in ("before", "after", "gold"))  # fmt: skip


def _edges(drawn: Mapping[str, tuple[float, ...]]) -> npt.NDArray[np.float64] | None:
    edges = drawn.get("edges", ())
    return np.asarray(edges) if len(edges) > 1 else None


def _shares(drawn: Mapping[str, tuple[float, ...]], key: str) -> npt.NDArray[np.float64] | None:
    counts = np.asarray(drawn.get(key, ()), dtype=float)
    if counts.size != len(drawn.get("edges", ())) - 1 or counts.sum() <= 0:
        return None
    return np.asarray(counts / counts.sum())


def has_trace(batch: BatchRecord) -> bool:
    return sum("forget_margin" in entry and isinstance(entry["forget_margin"], int | float)
               for entry in batch.trace) > 1  # fmt: skip


def trace(axes: Axes, batch: BatchRecord, palette: Palette) -> None:
    """Margins over the unlearning rounds; a line where the phase changes, which is where the stop rule halted."""
    last = 0.0
    ends = []
    for key, text, colour in (("forget_margin", "forgotten", palette.series[1]),
                              ("unseen_margin", "never trained on", palette.series[0])):  # fmt: skip
        points = [(float(entry["round"]), float(entry[key])) for entry in batch.trace
                  if all(isinstance(entry.get(name), int | float) for name in ("round", key))]  # fmt: skip
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=2.6)
        ends.append((text, points[-1][1], colour))
        last = max(last, points[-1][0])
    starts: list[tuple[float, str]] = []
    for entry in batch.trace:
        phase, place = str(entry.get("phase") or ""), entry.get("round")
        if isinstance(place, int | float) and (not starts or starts[-1][1] != phase):
            starts.append((float(place), phase))
    top: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 8.5}
    for place, (start, phase) in enumerate(starts):
        if place:
            axes.axvline(start - 0.5, color=palette.muted, linewidth=0.9, linestyle=(0, (4, 2)))
            phase = f"stop, then {phase}" if place == 1 else phase
        axes.annotate(phase, (start - (0.5 if place else 0.0), 1.0), (3, 2), color=palette.muted, **top)
    room = 0.14 * (axes.get_ylim()[1] - axes.get_ylim()[0])
    level = sorted(ends, key=lambda end: end[1])
    heights = [height for _, height, _ in level]
    if len(heights) == 2:
        missing = max(0.0, room - (heights[1] - heights[0])) / 2
        heights = [heights[0] - missing, heights[1] + missing]
    for (text, _, colour), height in zip(level, heights, strict=True):
        axes.annotate(text, (last, height), (5, 0), textcoords="offset points", va="center", color=colour,
                      fontsize=8.8, annotation_clip=False)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("round of unlearning")
    axes.set_ylabel("mean margin")


def timeline(axes: Axes, requests: Sequence[RequestRow], palette: Palette) -> None:
    """One row a request: dot received, diamond finished, bar at the deadline; late ones in another colour."""
    shown = [request for request in requests if request.received is not None]
    ends = [time for one in shown for time in (one.received, one.deadline, one.finished) if time is not None]
    for place, request in enumerate(shown):
        assert request.received is not None
        late = request.in_time is False
        colour = palette.series[1] if late else palette.series[2] if request.in_time else palette.muted
        start = _day(request.received)
        until = [_day(time) for time in (request.deadline, request.finished) if time is not None]
        axes.plot([start, max([start, *until])], [place] * 2, color=palette.grid, linewidth=5, solid_capstyle="butt",
                  zorder=1)  # fmt: skip
        if request.finished is not None:
            end = _day(request.finished)
            axes.plot([start, end], [place] * 2, color=colour, linewidth=5, solid_capstyle="butt", zorder=2)
            axes.plot([end], [place], "D", color=colour, markersize=6, zorder=4, markeredgecolor=palette.paper)
        axes.plot([start], [place], "o", color=colour, markersize=5, zorder=3, markeredgecolor=palette.paper)
        if request.deadline is not None:
            axes.plot([_day(request.deadline)], [place], "|", color=palette.ink, markersize=13, markeredgewidth=1.6,
                      zorder=5)  # fmt: skip
        if len(shown) <= 24:
            axes.annotate(answer_text(request), (1.0, place), (6, 0), xycoords=("axes fraction", "data"),
                          textcoords="offset points", va="center", fontsize=8.5, annotation_clip=False,
                          color=colour if late else palette.muted)  # fmt: skip
    axes.set_yticks(range(len(shown)), [request.id if len(request.id) < 17 else f"{request.id[:15]}…"
                                        for request in shown], color=palette.ink)  # fmt: skip
    if len(shown) > 24:
        axes.tick_params(axis="y", labelsize=6.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    if ends:
        span = max(_day(max(ends, key=_day)) - _day(min(ends, key=_day)), 1e-4)
        axes.set_xlim(_day(min(ends, key=_day)) - 0.03 * span, _day(max(ends, key=_day)) + 0.03 * span)
    locator = AutoDateLocator(minticks=3, maxticks=6)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]
    axes.grid(visible=False)


def _day(time: datetime) -> float:
    return float(date2num(time))  # type: ignore[no-untyped-call]


def prices(axes: Axes, groups: Sequence[Group], palette: Palette) -> None:
    """CPU time as a share of retraining's, one row a strategy, on a logarithmic axis; hollow where a gate failed."""
    means = [(group, mean_of(batch.ratio() for batch in group.batches)) for group in groups]
    found = [(group, ratio) for group, ratio in means if ratio is not None]
    low = min([0.5 * ratio for _, ratio in found if ratio > 0.0] + [0.05])
    for place, (group, ratio) in enumerate((group, max(ratio, low)) for group, ratio in found):
        colour = group.colour(palette)
        passed = all(not batch.failed for batch in group.batches)
        axes.plot([low, ratio], [place] * 2, color=palette.grid, linewidth=1.2, zorder=1)
        axes.plot([ratio], [place], group.marker, color=colour, markersize=6.5, zorder=3, markeredgecolor=colour,
                  markerfacecolor=colour if passed else palette.paper, markeredgewidth=1.3)  # fmt: skip
    axes.axvline(1.0, color=palette.ink, linewidth=0.9, linestyle=DOTTED, zorder=2)
    axes.set_xscale("log")
    axes.set_xlim(low, 1.6)
    axes.set_yticks(range(len(found)), [group.label for group, _ in found], color=palette.ink)
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(visible=False)
    axes.set_xlabel("CPU time, relative to retraining")


def has_price(group: Group) -> bool:
    return any(batch.ratio() is not None for batch in group.batches)


def drift(axes: Axes, group: Group, palette: Palette) -> None:
    """Whether many requests wear the model down: utility and attack against gold, request after request."""
    for place, name in enumerate((UTILITY, *attacks_of(group.batches))):
        values = [(batch.number, _wear(batch, name)) for batch in group.batches]
        points = [(number, value) for number, value in values if value is not None]
        if points:
            text = "retain NDCG@20 / gold − 1" if name == UTILITY else f"{label_of(name)} − gold"
            axes.plot(*zip(*points, strict=True), color=palette.series[(0, 1, 3)[place]], marker="os^"[place],
                      markersize=3.8, label=text)  # fmt: skip
    axes.axhline(0.0, color=palette.muted, linewidth=0.8, linestyle=DOTTED, zorder=1)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(signed))
    axes.set_xlabel("request, in the order in which they were honoured")
    axes.legend(loc="best", frameon=False, fontsize=8.5, handlelength=1.4, labelspacing=0.3)


def _wear(batch: BatchRecord, name: str) -> float | None:
    if name != UTILITY:
        return distance(batch, name)
    ratio = batch.of_gold(UTILITY)
    return None if ratio is None else ratio - 1.0
