"""Opacus' own DP-SGD behind the interface of the lazy one: the definition that lazy noise is held to.

``GradSampleModule`` in hooks mode gives the per-example gradients of embedding lookups, ``DPOptimizer`` clips, sums,
adds noise to every row and steps. Hooks mode holds a dense gradient of the whole table for every example of a batch,
so it serves small catalogues and comparisons; ghost clipping is not offered, because it counts padding rows in the norm
and fails on empty Poisson batches and on a table that is looked up twice (Opacus 1.6).
"""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fedrec.errors import ConfigError
from privacy.dpsgd import NonFiniteGradient, Schedule, check_batch, check_momentum, check_tables, plan_step, row_numbers

_LIMIT = 2**31  # bytes of dense per-example gradients
_NO_CLIPPING = 1e30  # an infinite norm would make Opacus' noise of deviation 0·∞


class _Lookups(nn.Module):
    """Tables as embeddings. ``forward`` is Σ over tables of ⟨looked-up rows, given gradients⟩, one number an example:
    the gradient of an example's number by its rows is what was given."""

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(tables)
        self.embeddings = nn.ModuleList(
            nn.Embedding(value.shape[0], value.shape[1], _weight=value.detach().clone()) for value in tables.values()
        )

    def forward(self, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
        parts = [
            (embedding(rows[name]) * gradients[name]).flatten(1).sum(1)
            for name, embedding in zip(self.names, self.embeddings, strict=True)
            if name in rows
        ]
        return torch.stack(parts).sum(0)


class OpacusSGD:
    """Opacus' ``GradSampleModule`` and ``DPOptimizer`` (over ``torch.optim.SGD``) on named tables, which are copied.

    The methods and their arguments are those of :class:`privacy.lazy.LazyNoiseSGD`; noise is never pending, so tables
    may be read at any time. The noise comes from torch's generator, whose seed has 64 bits.

    Raises:
        ConfigError: a table is no real matrix, momentum, or a batch too large for dense per-example gradients.
    """

    def __init__(
        self, tables: Mapping[str, Tensor], *, noise_seed: int | Sequence[int] | None = None, momentum: float = 0.0
    ) -> None:
        from opacus import GradSampleModule  # seconds to import; lazy noise does without
        from opacus.optimizers import DPOptimizer

        check_momentum(momentum)
        check_tables(tables)
        entropy = secrets.randbits(256) if noise_seed is None else noise_seed
        seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
        lookups = _Lookups(tables)
        self._weights: dict[str, nn.Parameter] = {
            name: embedding.weight  # type: ignore[misc]
            for name, embedding in zip(lookups.names, lookups.embeddings, strict=True)
        }
        self._module = GradSampleModule(lookups, loss_reduction="sum")
        groups = [{"params": [weight], "lr": 1.0} for weight in self._weights.values()]
        self._optimizer = DPOptimizer(
            torch.optim.SGD(groups, lr=1.0), noise_multiplier=0.0, max_grad_norm=1.0, expected_batch_size=1,
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip

    def read(self, name: str, rows: Tensor) -> Tensor:
        """Copies of rows ``rows`` int64[…]: [*rows.shape, width]."""
        row_numbers(name, rows)
        self._check_rows(name, rows)
        return self._weights[name].detach()[rows]

    def step(
        self, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, learning_rate: Schedule,
        noise_multiplier: float, max_grad_norm: float, expected_batch: float, weight_decay: Schedule = 0.0,
    ) -> None:  # fmt: skip
        """One step of DP-SGD; arguments as of :meth:`privacy.lazy.LazyNoiseSGD.step`."""
        plan = plan_step(self._weights, learning_rate, noise_multiplier, max_grad_norm, expected_batch, weight_decay)
        check_batch({n: (w.shape[1], w.dtype) for n, w in self._weights.items()}, rows, gradients)
        size = next(iter(rows.values())).shape[0] if rows else 0
        self._check_memory(size)
        for name, where in rows.items():
            self._check_rows(name, where)
            if not bool(torch.isfinite(gradients[name]).all()):
                raise NonFiniteGradient("the gradient of an example is not finite; lower the learning rate")
        optimizer = self._optimizer
        optimizer.noise_multiplier = noise_multiplier
        optimizer.max_grad_norm = min(max_grad_norm, _NO_CLIPPING)
        optimizer.expected_batch_size = expected_batch
        for group, name in zip(optimizer.param_groups, self._weights, strict=True):
            rate, keep, _ = plan[name]
            group["lr"], group["weight_decay"] = rate, (1.0 - keep) / rate if rate else 0.0
        optimizer.zero_grad()
        if size:
            with warnings.catch_warnings():
                # Row numbers have no gradient, and torch thinks that worth a warning at every step.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                self._module(rows, gradients).sum().backward()
        for name, weight in self._weights.items():
            if not size or name not in rows:  # nobody touched it: B gradients of zero
                weight.grad_sample = weight.new_zeros(()).expand(size, *weight.shape)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()

    def flush(self) -> None:
        """Nothing: noise is never pending."""

    @property
    def pending(self) -> bool:
        return False

    @property
    def tables(self) -> dict[str, Tensor]:
        """Copies of the tables."""
        return {name: weight.detach().clone() for name, weight in self._weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The same, by torch's name for it."""
        return self.tables

    def release(self) -> dict[str, Tensor]:
        """The tables."""
        return self.tables

    def _check_rows(self, name: str, rows: Tensor) -> None:
        n_rows = self._weights[name].shape[0]
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= n_rows):
            raise ValueError(f"rows of {name!r} outside 0…{n_rows - 1}; there is no padding row")

    def _check_memory(self, size: int) -> None:
        needed = size * sum(weight.numel() * weight.element_size() for weight in self._weights.values())
        if needed > _LIMIT:
            raise ConfigError(
                f"privacy.optimizer=opacus: dense per-example gradients of {size} examples need {needed / 2**30:.1f} "
                "GiB; write privacy.optimizer=lazy"
            )
