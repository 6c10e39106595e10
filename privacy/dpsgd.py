"""DP-SGD on embedding tables: what its lazy and its eager kind have in common, and what neither can do rightly.

``privacy.lazy`` lets the noise of a row wait until the row is read; ``privacy.eager`` is Opacus' optimizer. Both give
the guarantee of DP-SGD (Abadi et al., CCS 2016) with Poisson batches, one example added or removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedrec.errors import ConfigError, FedrecError, RunFailed
from privacy.lazy_kernels import NOT_FINITE, NOT_READ, OUT_OF_RANGE, Int64

Schedule = float | Mapping[str, float]


class NoisePending(FedrecError):
    """Tables were asked for while rows still lack noise; what would be released is not covered by the guarantee."""


class NonFiniteGradient(RunFailed):
    """An example's gradient is not finite: no clipping bounds it."""


class DPSGD(Protocol):
    """What private training of embedding tables needs; lazy (here) and eager (``privacy.eager``) are the two kinds."""

    def read(self, name: str, rows: Tensor) -> Tensor:
        """Copies of rows ``rows`` int64[…] of a table as they are now, noise included: [*rows.shape, width]."""

    def step(
        self, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, learning_rate: Schedule,
        noise_multiplier: float, max_grad_norm: float, expected_batch: float, weight_decay: Schedule = 0.0,
    ) -> None:  # fmt: skip
        """One step of DP-SGD on a Poisson batch; see :meth:`LazyNoiseSGD.step`."""

    def flush(self) -> None:
        """Give every row the noise that it lacks."""

    def release(self) -> dict[str, Tensor]:
        """Flush, hand the tables over, and close."""


def check_momentum(momentum: float) -> None:
    """ConfigError for momentum: a row that waits would need its velocity's noise too."""
    if momentum:
        raise ConfigError(
            f"momentum={momentum}: lazy noise holds for plain SGD only (momentum and Adam carry noise from step to "
            "step); write momentum=0, or put momentum or Adam on the server: federation.server_optimizer=adam"
        )


def check_tables(tables: Mapping[str, Tensor]) -> None:
    """ConfigError unless every table is a float32 or float64 matrix in the processor's memory."""
    if not tables:
        raise ConfigError("no tables to train")
    seen: dict[int, str] = {}
    for name, value in tables.items():
        if value.ndim != 2 or value.shape[1] == 0:
            raise ConfigError(
                f"table {name!r} has shape {tuple(value.shape)}: a table is [rows, width]; a dense tensor is "
                "one row, tensor.reshape(1, -1)"
            )
        if value.dtype not in (torch.float32, torch.float64) or value.device.type != "cpu":
            raise ConfigError(f"table {name!r} is {value.dtype} on {value.device}: write float32 or float64 on cpu")
        at = value.data_ptr()
        if value.numel() and at in seen:
            raise ConfigError(
                f"tables {seen[at]!r} and {name!r} are one tensor: name it once and look all its rows up together"
            )
        seen[at] = name


def check_batch(
    tables: Mapping[str, tuple[int, torch.dtype]], rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]
) -> None:
    """ConfigError unless rows [B, T] and gradients [B, T, width] fit the tables' (width, dtype), B in common."""
    if rows.keys() != gradients.keys():
        raise ConfigError(f"rows of {sorted(rows)} but gradients of {sorted(gradients)}: give both for every table")
    sizes = set()
    for name, where in rows.items():
        if name not in tables:
            raise ConfigError(f"no table {name!r}; there are {', '.join(tables)}")
        width, dtype = tables[name]
        if where.ndim != 2:
            raise ConfigError(
                f"rows of {name!r} have shape {tuple(where.shape)}: write [examples, rows of an example], "
                "rows.unsqueeze(1) for one row each"
            )
        gradient = gradients[name]
        if gradient.shape != (*where.shape, width):
            raise ConfigError(
                f"gradients of {name!r} have shape {tuple(gradient.shape)}, expected {(*where.shape, width)}"
            )
        if gradient.dtype != dtype:
            raise ConfigError(f"gradients of {name!r} are {gradient.dtype}, their table is {dtype}")
        sizes.add(where.shape[0])
    if len(sizes) > 1:
        raise ConfigError(f"tables disagree on the number of examples: {sorted(sizes)}")


def plan_step(
    names: Mapping[str, Any], learning_rate: Schedule, noise_multiplier: float, max_grad_norm: float,
    expected_batch: float, weight_decay: Schedule,
) -> dict[str, tuple[float, float, float]]:  # fmt: skip
    """(η, 1 − η·λ, the noise's deviation η·σ·C/B) of each table in one step. ConfigError for values without a right
    result."""
    if not (0.0 <= noise_multiplier < math.inf):
        raise ConfigError(f"noise_multiplier={noise_multiplier}: write 0 (no noise) or more")
    if not max_grad_norm > 0.0 or (max_grad_norm == math.inf and noise_multiplier):
        raise ConfigError(
            f"max_grad_norm={max_grad_norm}: the clipping norm is a positive number (infinite only without noise)"
        )
    if not (0.0 < expected_batch < math.inf):
        raise ConfigError(f"expected_batch={expected_batch}: write the sampling rate times a public number of examples")
    plan = {}
    for name in names:
        rate, decay = _of(learning_rate, name, "learning_rate"), _of(weight_decay, name, "weight_decay")
        if not (0.0 <= rate < math.inf and 0.0 <= decay < math.inf and rate * decay < 1.0):
            raise ConfigError(
                f"learning_rate={rate}, weight_decay={decay} of {name!r}: both are 0 or more, and their product is "
                "below 1 (a step must not shrink a table to nothing); lower one of them"
            )
        noise = noise_multiplier * max_grad_norm if noise_multiplier else 0.0
        plan[name] = (rate, 1.0 - rate * decay, rate * noise / expected_batch)
    return plan


def _of(schedule: Schedule, name: str, what: str) -> float:
    if not isinstance(schedule, Mapping):
        return float(schedule)
    if name not in schedule:
        raise ConfigError(f"{what}: none for table {name!r}")
    return float(schedule[name])


def row_numbers(name: str, rows: Tensor) -> Int64:
    """The NumPy view of row numbers int64[…]; ConfigError for another type."""
    if rows.dtype != torch.int64 or rows.device.type != "cpu":
        raise ConfigError(f"rows of {name!r} are {rows.dtype} on {rows.device}: write int64 on cpu")
    return np.ascontiguousarray(rows.numpy())


def refuse(code: int, name: str, n_rows: int) -> None:
    """Raise what a kernel's answer ``code`` about table ``name`` means; 0 means nothing."""
    if code == OUT_OF_RANGE:
        raise ValueError(f"rows of {name!r} outside 0…{n_rows - 1}; there is no padding row: leave such entries out")
    if code == NOT_READ:
        raise ValueError(
            f"a step on rows of {name!r} that were not read since the last step: their gradient would be that of "
            "values without their noise; call read() on them first"
        )
    if code == NOT_FINITE:
        raise NonFiniteGradient("the gradient of an example is not finite; lower the learning rate")
