"""Server optimisers against Algorithm 2 of Reddi et al. written out, and against torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedrec.errors import ConfigError
from server.optimizers import ServerOptimizer, State

Array = np.ndarray[Any, np.dtype[np.float64]]


def _deltas(seed: int, steps: int, size: int) -> Array:
    """Sparse pseudo-gradients of very different sizes, as untouched items make them."""
    draw = np.random.default_rng(seed)
    scale = 10.0 ** draw.integers(-4, 2, (steps, size))
    return draw.normal(size=(steps, size)) * scale * (draw.random((steps, size)) < 0.7)


def _ours(optimizer: ServerOptimizer, x: Array, deltas: Array) -> Array:
    tensor, state = torch.from_numpy(x.copy()), State()
    for delta in deltas:
        tensor, state = optimizer.step(tensor, torch.from_numpy(delta), state)
    return tensor.numpy()


def _algorithm_2(kind: str, x: Array, deltas: Array, eta: float, beta1: float, beta2: float, tau: float) -> Array:
    """Lines 10-14 of Algorithm 2, entry by entry: m₀ = 0, v₀ = τ²."""
    out = x.copy()
    for i in range(x.size):
        m, v = 0.0, tau**2
        for delta in deltas[:, i]:
            m = beta1 * m + (1 - beta1) * delta
            if kind == "adam":
                v = beta2 * v + (1 - beta2) * delta**2
            else:
                sign = 1.0 if v > delta**2 else -1.0 if v < delta**2 else 0.0
                v = v - (1 - beta2) * delta**2 * sign
            out[i] += eta * m / (v**0.5 + tau)
    return out


@given(
    st.sampled_from(["adam", "yogi"]), st.integers(0, 2**32 - 1), st.floats(0.0, 0.99), st.floats(0.0, 0.999),
    st.floats(1e-4, 0.1),
)  # fmt: skip
@settings(max_examples=40)
def test_adam_and_yogi_are_algorithm_2(kind: str, seed: int, beta1: float, beta2: float, tau: float) -> None:
    x, deltas = np.random.default_rng(seed).normal(size=6), _deltas(seed, 12, 6)
    optimizer = ServerOptimizer(kind, 0.1, beta1, beta2, tau)  # type: ignore[arg-type]
    expected = _algorithm_2(kind, x, deltas, 0.1, beta1, beta2, tau)
    np.testing.assert_allclose(_ours(optimizer, x, deltas), expected, rtol=1e-9, atol=1e-9)


def _torchs(optimizer_class: Any, x: Array, deltas: Array, **options: Any) -> Array:
    parameter = torch.nn.Parameter(torch.from_numpy(x.copy()))
    optimizer = optimizer_class([parameter], **options)
    for delta in deltas:
        parameter.grad = torch.from_numpy(-delta)  # Δ points downhill, a gradient uphill
        optimizer.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_adam_with_bias_correction_is_torchs_step_for_step(steps: int) -> None:
    x, deltas = np.random.default_rng(0).normal(size=50), _deltas(1, steps, 50)
    ours = _ours(ServerOptimizer("adam", 0.05, 0.9, 0.99, 1e-8, bias_correction=True), x, deltas)
    theirs = _torchs(torch.optim.Adam, x, deltas, lr=0.05, betas=(0.9, 0.99), eps=1e-8)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 2, 30])
def test_momentum_is_torchs_sgd_step_for_step(steps: int) -> None:
    x, deltas = np.random.default_rng(0).normal(size=50), _deltas(2, steps, 50)
    ours = _ours(ServerOptimizer("momentum", 0.5, beta1=0.8), x, deltas)
    theirs = _torchs(torch.optim.SGD, x, deltas, lr=0.5, momentum=0.8)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)


def test_averaging_adds_the_mean_update() -> None:
    x, deltas = np.random.default_rng(0).normal(size=50), _deltas(3, 5, 50)
    np.testing.assert_allclose(_ours(ServerOptimizer("average", 1.0), x, deltas), x + deltas.sum(0), rtol=1e-10)


@pytest.mark.parametrize("kind", ["average", "momentum", "adam", "yogi"])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_a_row_that_nobody_ever_touched_stays_where_it_is(kind: str, bias_correction: bool) -> None:
    optimizer = ServerOptimizer(kind, 0.1, bias_correction=bias_correction)  # type: ignore[arg-type]
    x = np.array([1.0, 2.0])
    moved = _ours(optimizer, x, np.array([[0.0, 1.0], [0.0, -0.5]]))
    assert moved[0] == 1.0
    assert moved[1] != 2.0


@pytest.mark.parametrize("kind", ["average", "momentum", "adam", "yogi"])
def test_a_step_changes_nothing_in_place(kind: str) -> None:
    optimizer = ServerOptimizer(kind, 0.1)  # type: ignore[arg-type]
    x, state = optimizer.step(torch.ones(3), torch.ones(3), {})
    before = x.clone(), {name: value.clone() for name, value in state.items()}
    optimizer.step(x, torch.ones(3), state)
    assert torch.equal(x, before[0])
    assert all(torch.equal(state[name], before[1][name]) for name in state)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"kind": "sgd"}, "server_optimizer=sgd"),
        ({"learning_rate": 0.0}, "server_learning_rate"),
        ({"learning_rate": float("nan")}, "server_learning_rate"),
        ({"beta1": 1.0}, "server_beta1"),
        ({"beta2": -0.1}, "server_beta2"),
        ({"tau": 0.0}, "server_tau"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=f"federation.{key}"):
        ServerOptimizer(**options)
