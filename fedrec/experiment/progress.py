"""How far a run is: a live bar in a terminal, plain lines (thinned in long runs) everywhere else."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from fedrec.experiment.console import format_loss, format_seconds, number, part

_FIRST_LINES = 5  # every one of the first rounds is printed: that is when people watch
_LATER_LINES = 20  # the rest of a run of any length gets about this many
_PACE_ROUNDS = 10  # rounds that the pace is averaged over, enough to cover rounds with and without evaluation


class RunProgress:
    """Progress of one run, told round by round with the objects that also go to ``metrics.jsonl``.

    ``total_rounds`` is the last round's number, ``title`` a short name for the run, ``metric`` the validation metric to
    show. Use as a context manager; leaving it, for whatever reason, leaves the last round's facts on the screen.
    """

    def __init__(self, total_rounds: int, title: str, console: Console, *, metric: str = "ndcg@10") -> None:
        self._total = max(1, total_rounds)
        self._title = title
        self._console = console
        self._metric = metric
        self._pace: deque[float] = deque(maxlen=_PACE_ROUNDS)
        self._validation = ""
        self._validation_round = 0
        self._updates = 0
        self._failed_users = 0
        self._loss_was_finite = True
        self._unprinted = ""
        self._facts = "starting"
        self._clock = time.monotonic()
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=None),
            TextColumn("round {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            TaskProgressColumn(),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task(title, total=self._total)

    def __enter__(self) -> RunProgress:
        self._clock = time.monotonic()
        if self._console.is_interactive:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._unprinted:
            self._print(self._unprinted)

    def update(self, line: Mapping[str, Any]) -> None:
        """Take in one round: ``round``, ``loss``, ``validation``, ``wall_s``, ``failed_users``; each may be missing."""
        self._updates += 1
        current = int(number(line.get("round")) or self._updates)
        now = time.monotonic()
        measured, self._clock = now - self._clock, now
        wall = number(line.get("wall_s"))
        self._pace.append(measured if wall is None or not math.isfinite(wall) else wall)
        self._failed_users += int(number(line.get("failed_users")) or 0)
        self._see_validation(line, current)
        loss = number(line.get("loss"))
        self._facts = " · ".join(self._describe(loss, current))
        self._bar.update(self._task, completed=min(current, self._total))
        if self._live is None:
            newly_bad = loss is not None and not math.isfinite(loss) and self._loss_was_finite
            self._loss_was_finite = loss is None or math.isfinite(loss)
            self._plain(current, always=newly_bad)

    def _see_validation(self, line: Mapping[str, Any], current: int) -> None:
        metrics = part(line, "validation")
        name = self._metric if self._metric in metrics else next(iter(metrics), "")
        value = number(metrics.get(name))
        if value is not None:
            self._validation, self._validation_round = f"validation {name} {value:.4f}", current

    def _describe(self, loss: float | None, current: int) -> list[str]:
        pace = sum(self._pace) / len(self._pace)
        facts = [] if loss is None else [f"loss {format_loss(loss)}"]
        if self._validation:
            stale = self._validation_round != current
            facts.append(self._validation + (f" (round {self._validation_round})" if stale else ""))
        if self._failed_users:
            facts.append(f"failed users so far {self._failed_users}")
        facts.append(f"{format_seconds(pace)}/round")
        if current < self._total:
            facts.append(f"{format_seconds(pace * (self._total - current))} left")
        return facts

    def _plain(self, current: int, always: bool) -> None:
        width = len(str(self._total))
        text = f"{self._title}  round {current:>{width}}/{self._total}  {self._facts}"
        step = math.ceil(self._total / _LATER_LINES)
        if always or self._updates <= _FIRST_LINES or current % step == 0 or current >= self._total:
            self._print(text)
            self._unprinted = ""
        else:
            self._unprinted = text

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return Group(self._bar.get_renderable(), Text(self._facts, style="dim", no_wrap=True, overflow="ellipsis"))
