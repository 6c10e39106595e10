"""Forgetting against utility, drawn onto axes that the caller made.

Every vertical distance is to gold, the mean of models retrained without the forgotten data: 0 is a model that never saw
it. Shaded is what the gates let pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedrec.experiment.budgets_plot import Palette
from fedrec.experiment.unlearn.record import BatchRecord, mean_of

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h", "p", "<")
UTILITY = "retain_ndcg@20"
_ATTACKS = ("mia_auc", "fold_in_auc")
DOTTED = (0, (1, 2))


@dataclass(frozen=True)
class Group:
    """Batches that share a colour and a mark: a strategy's, or those of one kind of request."""

    label: str
    style: int
    batches: tuple[BatchRecord, ...]

    def colour(self, palette: Palette) -> str:
        return palette.series[self.style % len(palette.series)]

    @property
    def marker(self) -> str:
        return MARKERS[self.style % len(MARKERS)]


def attacks_of(batches: Iterable[BatchRecord]) -> tuple[str, ...]:
    """What forgetting is seen by: the membership attacks, or for items the percentile where no attack was measured."""
    seen = list(batches)
    found = tuple(name for name in _ATTACKS if any(distance(batch, name) is not None for batch in seen))
    return found or ("percentile",)


def can_place(batches: Iterable[BatchRecord]) -> bool:
    seen = list(batches)
    return any(
        batch.of_gold(UTILITY) is not None and distance(batch, name) is not None
        for batch in seen
        for name in attacks_of(seen)
    )


def distance(batch: BatchRecord, name: str, which: str = "after") -> float | None:
    value, gold = batch.value(name) if which == "after" else batch.before.get(name), batch.gold(name)[0]
    return None if value is None or gold is None else value - gold


def forgetting(axes: Axes, groups: Sequence[Group], palette: Palette, ticks: int = 5) -> None:
    """Utility against forgetting: one mark a batch; a filled one for scores, a hollow one for the fold-in attack.

    Arrows lead from the model before to the one after where there are few enough to follow.
    """
    batches = [batch for group in groups for batch in group.batches]
    names = attacks_of(batches)
    xs, ys = _gold(axes, batches, names, palette)
    drawn: set[tuple[float, float]] = set()
    for group in groups:
        numbered = len(group.batches) > 3
        for batch in group.batches:
            colour = group.colour(palette)
            was, now = batch.of_gold(UTILITY, "before"), batch.of_gold(UTILITY)
            first = batch is group.batches[0] or not numbered
            if was is not None and first:
                for name in names:
                    if (height := distance(batch, name, "before")) is None or (was, height) in drawn:
                        continue
                    drawn.add((was, height))
                    _mark(axes, was, height, group.marker if len(groups) <= 3 else "o", palette.muted, name, palette,
                          small=True)  # fmt: skip
                    xs, ys = [*xs, was], [*ys, height]
            heights = [(name, found) for name in names if (found := distance(batch, name)) is not None]
            if now is None or not heights:
                continue
            if len(heights) > 1:
                axes.plot([now, now], [height for _, height in heights], color=colour, linewidth=0.9, zorder=3)
            for name, height in heights:
                _mark(axes, now, height, group.marker, colour, name, palette)
                start = distance(batch, name, "before")
                if name == names[0] and len(batches) <= 3 and was is not None and start is not None:
                    way = {"arrowstyle": "->", "color": colour, "alpha": 0.45, "shrinkA": 5, "shrinkB": 6, "lw": 1.1}
                    axes.annotate("", (now, height), (was, start), arrowprops=way, zorder=2)
                xs, ys = [*xs, now], [*ys, height]
            if numbered:
                axes.annotate(str(batch.number), (now, heights[0][1]), (0, 5), textcoords="offset points",
                              ha="center", fontsize=7.5, color=colour)  # fmt: skip
    left, right = min(xs), max(xs)
    room = 0.07 * max(right - left, 0.03)
    axes.set_xlim(left - room, right + room)
    low, high = min(ys), max(ys)
    room = 0.09 * max(high - low, 0.05)
    axes.set_ylim(low - room, high + room)
    _gates(axes, batches, names, palette)
    axes.xaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(signed))
    axes.set_xlabel("retain NDCG@20, relative to gold")
    axes.set_ylabel("percentile − gold" if names == ("percentile",) else "attack AUC − gold")


def signed(value: float, _: object = None) -> str:
    return "0" if abs(value) < 1e-9 else f"{value:+.3g}".replace("-", "−")


def _mark(axes: Axes, x: float, y: float, marker: str, colour: str, name: str, palette: Palette,
          small: bool = False) -> None:  # fmt: skip
    hollow = name == "fold_in_auc"
    axes.plot([x], [y], marker, color=colour, markersize=5.0 if small else 6.5, zorder=4 if small else 5,
              markerfacecolor=palette.paper if hollow else colour, markeredgewidth=1.4 if hollow else 0.7,
              markeredgecolor=colour if hollow else palette.paper, clip_on=False)  # fmt: skip


def _gold(
    axes: Axes, batches: Sequence[BatchRecord], names: Sequence[str], palette: Palette
) -> tuple[list[float], list[float]]:
    """Gold at (1, 0), with what it covers of both axes.

    Its bars are the standard deviation over retrainings, the mean of those of several batches.
    """
    relative = mean_of(sd / mean for batch in batches for mean, sd in (batch.gold(UTILITY),) if sd is not None and mean)
    height = mean_of(batch.gold(names[0])[1] for batch in batches)
    axes.errorbar([1.0], [0.0], xerr=relative, yerr=height, color=palette.ink, marker="*", markersize=9, elinewidth=1.1,
                  capsize=2.5, zorder=6, linestyle="none", clip_on=False)  # fmt: skip
    axes.axhline(0.0, color=palette.muted, linewidth=0.8, linestyle=DOTTED, zorder=1)
    wide, tall = relative or 0.0, height or 0.0
    return [1.0 - wide, 1.0 + wide], [-tall, tall]


def _gates(axes: Axes, batches: Sequence[BatchRecord], names: Sequence[str], palette: Palette) -> None:
    """The region that passes: for every attack the narrowest of its gates, right of the utility gate."""
    left, right = axes.get_xlim()
    lows = [gate.low / gate.gold for batch in batches if (gate := batch.gate(UTILITY)) and gate.low and gate.gold]
    start = max(lows, default=left)
    for name in names:
        widths = [
            min(gate.gold - gate.low, gate.high - gate.gold)
            for batch in batches
            if (gate := batch.gate(name))
            and gate.low is not None and gate.high is not None and gate.gold is not None
        ]  # fmt: skip
        if widths and start < right:
            half = min(widths)
            axes.add_patch(
                Rectangle((start, -half), right - start + 1.0, 2 * half, facecolor=palette.series[2], alpha=0.15,
                          linewidth=0, zorder=0)
            )  # fmt: skip
    axes.set_xlim(left, right)
