"""Lazy-noise DP-SGD for embedding tables: the noise of a row waits until the row is read.

DP-SGD adds noise to every row of every table at every step, touched or not. A row that nobody reads needs none of it
yet, and the noises it missed add up to one Gaussian (LazyDP: Lim, Kwon, Park, Rhu, ASPLOS 2024, arXiv 2404.08847,
"aggregated noise sampling"). For any schedule of learning rate η, noise multiplier σ, clipping norm C, expected batch B
and weight decay λ, with c_s = η_s·σ_s·C_s/B_s:

    P_t = Π_{s≤t} (1 − η_s·λ_s),   S_t = Σ_{s≤t} c_s²/P_s²,   w ← (P_t/P_l)·w + P_t·sqrt(S_t − S_l)·z,  z ~ N(0, 1)

brings a row from its last catch-up l to step t. Values read, and all values after a flush, have the joint distribution
that eager DP-SGD gives them; the guarantee is that of DP-SGD with Poisson batches, one example added or removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from fedrec.errors import ConfigError
from privacy.dpsgd import (
    NoisePending,
    Schedule,
    check_batch,
    check_momentum,
    check_tables,
    plan_step,
    refuse,
    row_numbers,
)
from privacy.lazy_kernels import (
    OUT_OF_RANGE,
    Float64,
    Int32,
    Int64,
    Real,
    catch_up,
    clip_factors,
    collect,
    descend,
    in_range,
    squared_norms,
)
from privacy.normals import NoiseSource

_CHUNK = 2**16  # normal deviates drawn at a time in a flush
_HISTORY = 2**16  # steps after which a table is flushed, so that its history stays small
_FADED = 1e-9  # a step's variance below this share of the sum would lose digits in S_t − S_l
_TINY = 1e-100  # P_t below it would let c²/P_t² overflow


@dataclass
class _Table:
    """One table, the step at which each row was last caught up, and P and S of the steps since the last rebase."""

    values: Real  # [rows, width]
    last: Int32  # [rows]
    now: int = 0
    product: Float64 = field(default_factory=lambda: np.ones(64))
    variance: Float64 = field(default_factory=lambda: np.zeros(64))

    def needs_rebase(self, keep: float, deviation: float) -> bool:
        """Whether one more step of this decay and noise would not fit the history, in length or in digits."""
        product = self.product[self.now] * keep
        increment = (deviation / product) ** 2 if product > _TINY else 0.0
        faded = 0.0 < increment < _FADED * self.variance[self.now]
        return self.now + 1 >= _HISTORY or product <= _TINY or faded

    def rebase(self) -> None:
        """Count steps from 0 again; every row must be caught up."""
        self.last[:] = 0
        self.now, self.product[0], self.variance[0] = 0, 1.0, 0.0

    def advance(self, keep: float, deviation: float) -> None:
        if self.now + 1 == self.product.size:
            self.product = np.concatenate([self.product, np.ones(self.now + 1)])
            self.variance = np.concatenate([self.variance, np.zeros(self.now + 1)])
        product = self.product[self.now] * keep
        self.now += 1
        self.product[self.now] = product
        self.variance[self.now] = self.variance[self.now - 1] + (deviation / product) ** 2


class LazyNoiseSGD:
    """Lazy-noise DP-SGD on named tables, float32 or float64 [rows, width], which are copied.

    A dense tensor is a table of one row that every example touches. Read rows, compute per-example gradients on what
    was read, step; flush before anything is released. Beside its copy of the tables it holds 4 bytes a row, 16 bytes a
    step (at most 65,536 steps), and buffers as large as the largest batch.

    Raises:
        ConfigError: a table is no real matrix, or momentum is asked for.
        NoisePending: tables are asked for, iterated over, copied or saved after a step and before a flush.
    """

    def __init__(
        self, tables: Mapping[str, Tensor], *, noise_seed: int | Sequence[int] | None = None, momentum: float = 0.0
    ) -> None:
        check_momentum(momentum)
        check_tables(tables)
        self._noise = NoiseSource(noise_seed)
        self._tables = {
            name: _Table(np.array(value.detach().numpy(), order="C"), np.zeros(value.shape[0], dtype=np.int32))
            for name, value in tables.items()
        }
        self._kinds = {name: (value.shape[1], value.dtype) for name, value in tables.items()}
        self._pending = False
        self._broken: str | None = None

    # -- reading and stepping ------------------------------------------------------------------------------------

    def read(self, name: str, rows: Tensor) -> Tensor:
        """Catch rows ``rows`` int64[…] up and return copies of their values, [*rows.shape, width]."""
        self._check_usable()
        table, flat = self._table(name), row_numbers(name, rows).reshape(-1)
        if not in_range(flat, table.last.size):
            refuse(OUT_OF_RANGE, name, table.last.size)
        with self._whole("a read"):
            self._catch_up(table, flat)
        found = torch.from_numpy(table.values).index_select(0, torch.from_numpy(flat))
        return found.view(*rows.shape, table.values.shape[1])

    def step(
        self, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, learning_rate: Schedule,
        noise_multiplier: float, max_grad_norm: float, expected_batch: float, weight_decay: Schedule = 0.0,
    ) -> None:  # fmt: skip
        """One step of DP-SGD: clip each example over all tables together, sum, add noise, divide, descend.

        Args:
            rows: per table int64[B, T], the rows that each of the B examples of a Poisson batch touches; a row may
                occur more than once in an example. B may be 0: noise and weight decay only. A table that is not named
                is touched by nobody, and gets its noise all the same. All must have been read since the last step.
            gradients: per table [B, T, width], of each example's own loss, in the table's dtype.
            learning_rate: η of this step, one for all tables or one by name.
            noise_multiplier: σ; the noise on the sum of clipped gradients has deviation σ·C in every coordinate.
            max_grad_norm: C. The clip factor is min(1, C/(‖g‖ + 1e-6)), as Opacus'.
            expected_batch: what the sum is divided by: the sampling rate times a public number of examples, never the
                size of the batch that happened to be drawn.
            weight_decay: λ, one for all tables or one by name, on all rows as in SGD; η·λ < 1.

        Raises:
            ConfigError: a setting, shape or dtype that has no right result.
            ValueError: a row out of range, or one that was not read since the last step.
            NonFiniteGradient: an example's gradient is not finite. Nothing was changed.
        """
        self._check_usable()
        plan = plan_step(self._tables, learning_rate, noise_multiplier, max_grad_norm, expected_batch, weight_decay)
        batch = self._batch(rows, gradients)
        size = next(iter(batch.values()))[0].shape[0] if batch else 0
        factors = np.zeros(size)
        for name, (where, gradient) in batch.items():
            table = self._tables[name]
            refuse(squared_norms(where, gradient, table.last, table.now, factors), name, table.last.size)
        refuse(clip_factors(factors, max_grad_norm), "", 0)
        self._pending = True
        with self._whole("a step"):
            for name, table in self._tables.items():
                rate, keep, deviation = plan[name]
                if table.needs_rebase(keep, deviation):
                    self._catch_up_all(table)
                    table.rebase()
                if name in batch:
                    where, gradient = batch[name]
                    # This step's own decay and noise stay pending, so its gradient is stored as before that decay.
                    descend(table.values, where, gradient, factors, rate / (expected_batch * keep))
                table.advance(keep, deviation)

    def flush(self) -> None:
        """Give every row of every table the decay and noise that it lacks."""
        self._check_usable()
        with self._whole("a flush"):
            for table in self._tables.values():
                self._catch_up_all(table)
                table.rebase()
        self._pending = False

    # -- releasing -----------------------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether a step was taken since the last flush."""
        return self._pending

    @property
    def tables(self) -> dict[str, Tensor]:
        """Copies of the tables, which must be flushed. They are for release, evaluation and saving."""
        self._check_released("reading whole tables")
        return {name: torch.from_numpy(table.values.copy()) for name, table in self._tables.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The same, by torch's name for it."""
        return self.tables

    def release(self) -> dict[str, Tensor]:
        """Flush, hand the tables over without a copy, and close: nothing can be read or stepped any more."""
        self.flush()
        released = {name: torch.from_numpy(table.values) for name, table in self._tables.items()}
        self._tables, self._broken = {}, "these tables were released; make a new LazyNoiseSGD to train on"
        return released

    def __iter__(self) -> Iterator[str]:
        self._check_released("iterating over tables")
        return iter(list(self._tables))

    def __getitem__(self, name: str) -> Tensor:
        self._check_released("reading a whole table")
        return torch.from_numpy(self._table(name).values.copy())

    def __getstate__(self) -> NoReturn:
        # A copy, or a file of it, would hold rows without their noise and repeat the generator's.
        raise NoisePending("a LazyNoiseSGD is not copied or pickled: flush() it and save its tables")

    @property
    def nbytes(self) -> int:
        """Bytes of tables, row stamps, history and buffers."""
        tables = self._tables.values()
        held = sum(t.values.nbytes + t.last.nbytes + t.product.nbytes + t.variance.nbytes for t in tables)
        return held + self._noise.nbytes

    # -- inside --------------------------------------------------------------------------------------------------

    def _table(self, name: str) -> _Table:
        if name not in self._tables:
            raise ConfigError(f"no table {name!r}; there are {', '.join(self._tables)}")
        return self._tables[name]

    def _catch_up(self, table: _Table, rows: Int64) -> None:
        stale, keep, spread = np.empty(rows.size, dtype=np.int64), np.empty(rows.size), np.empty(rows.size)
        found = collect(rows, table.last, table.now, table.product, table.variance, stale, keep, spread)
        if found:
            noise = self._noise.normal(found * table.values.shape[1])
            catch_up(table.values, stale, found, keep, spread, noise)

    def _catch_up_all(self, table: _Table) -> None:
        rows, size = table.last.size, max(1, _CHUNK // table.values.shape[1])
        for start in range(0, rows, size):
            self._catch_up(table, np.arange(start, min(start + size, rows)))

    def _batch(self, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> dict[str, tuple[Int64, Real]]:
        check_batch(self._kinds, rows, gradients)
        return {
            name: (row_numbers(name, where), np.ascontiguousarray(gradients[name].detach().numpy()))
            for name, where in rows.items()
        }

    @contextmanager
    def _whole(self, what: str) -> Iterator[None]:
        """Rows are marked before their noise is added: if anything comes between, the tables are closed for good."""
        self._broken = f"{what} was interrupted while noise was being added; start again from the tables"
        yield
        self._broken = None

    def _check_usable(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _check_released(self, what: str) -> None:
        self._check_usable()
        if self._pending:
            raise NoisePending(f"{what} with noise pending would release rows without their noise: call flush() first")
