"""Progress says the same facts with and without a terminal, honestly and without flooding a log."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedrec.experiment.progress import RunProgress


def plain(total: int, lines: list[dict[str, Any]], title: str = "fedmf on ml-100k") -> list[str]:
    out = io.StringIO()
    with RunProgress(total, title, Console(file=out, width=80)) as progress:
        for line in lines:
            progress.update(line)
    return out.getvalue().splitlines()


def rounds_said(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := re.search(r"round +(\d+)/", line))]


@given(total=st.integers(1, 3000), stopped_after=st.integers(1, 3000))
@settings(max_examples=40, deadline=None)
def test_plain_lines_are_few_start_with_the_first_rounds_and_end_with_the_last(total: int, stopped_after: int) -> None:
    last = min(total, stopped_after)
    said = rounds_said(plain(total, [{"round": number, "wall_s": 0.1} for number in range(1, last + 1)]))
    assert len(said) <= 26
    assert said[:5] == list(range(1, min(5, last) + 1))
    assert said[-1] == last
    assert said == sorted(set(said))


def test_a_line_has_round_loss_validation_pace_and_time_left() -> None:
    lines = [{"round": r, "loss": 0.5, "wall_s": 2.0, "validation": {"hr@10": 0.2, "ndcg@10": 0.0612}} for r in (1, 2)]
    assert plain(12, lines)[1] == (
        "fedmf on ml-100k  round  2/12  loss 0.5000 · validation ndcg@10 0.0612 · 2.00 s/round · 20.0 s left"
    )


def test_time_left_follows_the_mean_pace_of_the_last_ten_rounds() -> None:
    lines = [{"round": r, "wall_s": 100.0 if r <= 5 else float(r % 2)} for r in range(1, 16)]
    assert "0.50 s/round · 42.5 s left" in plain(100, lines)[-1]


def test_a_metric_of_an_earlier_round_names_that_round() -> None:
    lines = [{"round": 1, "wall_s": 1.0}, {"round": 2, "wall_s": 1.0, "validation": {"ndcg@10": 0.05}}, {"round": 3}]
    said = plain(4, lines)
    assert "validation" not in said[0]
    assert said[1].count("(round") == 0
    assert "validation ndcg@10 0.0500 (round 2)" in said[2]


@pytest.mark.parametrize(
    ("loss", "text"), [(math.nan, "NaN"), (math.inf, "+∞"), (-math.inf, "−∞"), (-2.5e14, "-2.500e+14")]
)
def test_a_diverged_loss_is_shown_as_it_is(loss: float, text: str) -> None:
    assert f"loss {text}" in plain(3, [{"round": 1, "loss": loss}])[0]


def test_the_round_in_which_the_loss_stops_being_finite_is_printed_even_when_lines_are_thinned() -> None:
    lines = [{"round": r, "loss": 1.0 if r < 137 else math.nan, "wall_s": 0.1} for r in range(1, 200)]
    said = rounds_said(plain(1000, lines))
    assert 137 in said
    assert 136 not in said
    assert 138 not in said


def test_failed_users_are_counted_over_the_run() -> None:
    assert "failed users so far 5" in plain(9, [{"round": 1, "failed_users": 2}, {"round": 2, "failed_users": 3}])[1]


def test_an_interrupted_run_leaves_its_last_round_on_the_screen() -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), RunProgress(1000, "run", Console(file=out, width=80)) as progress:  # noqa: PT012
        for number in range(1, 78):
            progress.update({"round": number, "wall_s": 0.1})
        raise KeyboardInterrupt
    assert rounds_said(out.getvalue().splitlines())[-1] == 77


def test_a_resumed_run_goes_on_counting_where_it_was() -> None:
    said = plain(60, [{"round": number, "wall_s": 1.0} for number in range(51, 61)])
    assert rounds_said(said)[0] == 51
    assert "9.00 s left" in said[0]


def test_a_title_is_text_and_not_markup() -> None:
    assert "[red]fedmf[/] " in plain(2, [{}], title="[red]fedmf[/]")[0]


@pytest.mark.parametrize("title", ["fedmf on ml-100k", "[bold]x[/nope]"])
def test_a_terminal_gets_a_live_bar_with_the_same_facts(title: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system=None)
    with RunProgress(40, title, console) as progress:
        for number in range(1, 11):
            progress.update({"round": number, "loss": 0.25, "wall_s": 1.0, "validation": {"ndcg@10": 0.07}})
    last = out.getvalue().rsplit("\r", 1)[-1]
    assert title in last
    assert "round 10/40" in last
    assert "━" in last
    assert "loss 0.2500 · validation ndcg@10 0.0700 · 1.00 s/round · 30.0 s left" in last
