"""What an attack is given has the shape that it counts on."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.attacks.views import UserView


def test_views_of_the_wrong_shape_are_refused() -> None:
    rows, values = np.array([1, 4], dtype=np.int32), np.zeros((2, 3), dtype=np.float32)
    with pytest.raises(TypeError, match="int32"):
        UserView(0, 1, rows.astype(np.int64), values)
    with pytest.raises(ValueError, match="2 rows, but values for 1"):
        UserView(0, 1, rows, values[:1])
    with pytest.raises(ValueError, match="ascend"):
        UserView(0, 1, rows[::-1].copy(), values)
    assert UserView(0, 1, rows, values).rows.size == 2
