"""The description of a data set: against the published figures, and against independent computations."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedrec.data import Interactions, load_dataset
from fedrec.data.describe import describe, gini
from fedrec.data.show import describe_dataset


def test_ml_100k_is_described_with_its_published_figures(real_data: Callable[[str], Path]) -> None:
    real_data("ml-100k")
    found = describe(load_dataset("ml-100k"))
    assert [round(v) for v in found.activity.values()] == [20, 21, 33, 65, 148, 244, 311, 443, 737]
    assert [round(v) for v in list(found.popularity.values())[1:]] == [1, 6, 27, 80, 169, 230, 369, 583]
    assert found.activity_gini == pytest.approx(0.472, abs=5e-4)
    assert found.popularity_gini == pytest.approx(0.629, abs=5e-4)
    assert found.tied_last == 415
    assert found.density == pytest.approx(100_000 / (943 * 1_682))
    assert found.unit_seconds == 1.0
    assert found.median_user_span is not None
    assert found.median_user_span / 86400 == pytest.approx(0.034, abs=5e-4)
    assert found.attributes["gender"] == {"M": 670, "F": 273}
    assert found.genres["Drama"] == 725


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_gini_is_half_the_relative_mean_absolute_difference(counts: list[int]) -> None:
    x = np.array(counts)
    by_definition = np.abs(x[:, None] - x[None, :]).mean() / (2 * x.mean())
    assert gini(x) == pytest.approx(by_definition, abs=1e-12)


def hand_made(times: list[int] | None) -> Interactions:
    """User 0 has items 0, 1, 2, user 1 items 0, 1, user 2 item 0."""
    return Interactions(
        name="hand-made",
        user=np.array([0, 0, 0, 1, 1, 2], dtype=np.int32),
        item=np.array([0, 1, 2, 0, 1, 0], dtype=np.int32),
        user_ids=["a", "b", "c"],
        item_ids=["x", "y", "z"],
        timestamp=None if times is None else np.array(times, dtype=np.int64),
        licence="free",
        notes=("made by hand",),
    )


def test_ties_count_only_the_last_two_interactions_of_a_user() -> None:
    assert describe(hand_made([1, 1, 2, 5, 5, 9])).tied_last == 1  # user 1; user 0's tie is not at the end
    assert describe(hand_made([1, 2, 2, 5, 5, 9])).tied_last == 2
    assert describe(hand_made(None)).tied_last is None


@pytest.mark.parametrize(
    ("start", "unit"),
    [(881_250_949, 1.0), (881_250_949_000, 1e-3), (881_250_949_000_000_000, 1e-9), (0, None), (-5, None)],
)
def test_clock_times_are_told_from_positions(start: int, unit: float | None) -> None:
    assert describe(hand_made([start, start + 1, start + 2, start, start + 3, start])).unit_seconds == unit


def test_description_is_printed_whole_in_a_narrow_terminal() -> None:
    out = io.StringIO()
    describe_dataset(
        hand_made([86400 * day for day in (4000, 4001, 4002, 4000, 4004, 4000)]), Console(file=out, width=80)
    )
    text = out.getvalue()
    for part in (
        "hand-made: 6 interactions of 3 users with 3 items",
        "density 66.7 %",
        "1980-12-14 to 1980-12-18 (4 days), a user's median span 2 days",
        "0 users (0.0 %) have equal timestamps",
        "licence: free",
        "note: made by hand",
        "per user",
        "Gini",
        "0.222",
    ):
        assert part in text
    assert "…" not in text
