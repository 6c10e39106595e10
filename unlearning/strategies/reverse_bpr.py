"""MMRecUn's reverse BPR, run federated (Sinha, Mandal, Kankanhalli, "Multi-Modal Recommendation Unlearning", 2024,
arXiv 2405.15328).

With x = s_ui − s_uj for a positive i and a drawn negative j, on every device

    L = α · mean over its forget pairs of softplus(x)  +  (1 − α) · mean over its retained pairs of softplus(−x)

Reverse BPR's gradient is strong where a pair is memorised and its loss is bounded below, where gradient ascent's
vanishes and then never stops. What the paper does not say, and what is needed (``docs/unlearning.md``): a rule to stop,
a repair phase of ordinary rounds on the retained data, and the deletion of the accounts and items themselves, last.

Only affected devices see the forget set, each its own; the others take part as sampled. The rule: stop when the forget
pairs' mean centred score has fallen to that of the same users' validation pairs, which were never trained on. Devices
report sums of the two; no retrained model is needed. The round that finds the rule satisfied leaves no trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fedrec import random
from fedrec.algorithms.base import (
    DotProduct,
    Examples,
    GradientRecommender,
    LocalTraining,
    Recommender,
    Tensors,
    TensorSpec,
)
from fedrec.data.interactions import UserItems
from fedrec.errors import ConfigError
from unlearning.federation import ADAM
from unlearning.state import erase
from unlearning.strategies.base import Cost, Forgotten, Guarantee, Setting, Strategy, Task

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReverseBPR(Strategy):
    """Reverse rounds until the rule holds, repair rounds, then the rows of the deleted.

    Attributes:
        alpha: α above.
        item_rate: the server Adam's learning rate in reverse rounds, for requests on single interactions;
            ``user_item_rate`` where whole users go, whose every trace has to be moved.
        private_rate: the devices' SGD rate for private vectors in reverse rounds, ``personal_rate`` for private
            per-item tensors. weight_decay: λ on private tensors, per step (Adam would blow up a shared tensor's).
        negatives: drawn per pair. retained_pairs: so many retained pairs for every forget pair take part.
        max_rounds: reverse rounds at most. repair_rounds: ordinary rounds on the retained data afterwards;
            ``user_repair_rounds`` where whole users go.
    """

    name = "reverse_bpr"
    promise: ClassVar[str] = "approximate"

    alpha: float = 0.3
    item_rate: float = 0.002
    user_item_rate: float = 0.01
    private_rate: float = 0.5
    personal_rate: float = 1.0
    weight_decay: float = 0.0
    negatives: int = 4
    retained_pairs: float = 4.0
    max_rounds: int = 80
    repair_rounds: int = 6
    user_repair_rounds: int = 12

    def __post_init__(self) -> None:
        where = "unlearning.strategies.reverse_bpr"
        if not 0.0 < self.alpha <= 1.0:
            raise ConfigError(f"{where}.alpha={self.alpha}: write a weight in (0, 1]; 0 would forget nothing")
        for name in ("item_rate", "user_item_rate"):
            if not getattr(self, name) > 0.0:
                raise ConfigError(f"{where}.{name}={getattr(self, name)}: write a positive number")
        for name, low in (
            ("private_rate", 0), ("personal_rate", 0), ("weight_decay", 0), ("negatives", 1), ("retained_pairs", 0),
            ("max_rounds", 1), ("repair_rounds", 0), ("user_repair_rounds", 0),
        ):  # fmt: skip
            if not getattr(self, name) >= low:
                raise ConfigError(f"{where}.{name}={getattr(self, name)}: write a number, {low} or more")

    def check(self, setting: Setting) -> None:
        """ConfigError for methods that do not score by a dot product, and under a privacy mechanism."""
        form_of(setting.algorithm)
        if setting.privacy:
            raise ConfigError(
                f"unlearning.strategies.{self.name} with privacy={setting.privacy}: its rounds would be releases that "
                "no budget accounts for; write unlearning=retrain, or privacy=none"
            )

    def forget(self, task: Task) -> Forgotten:
        state, cost, trace, notes = task.state, Cost(), [], []
        # A withdrawn item's own rows are deleted whole, which leaves nothing of it to push away.
        pairs = _outside(task.forget.pairs, task.forget.items)
        if pairs.items.size:
            done = task.federation.train(
                state, task.before, self.max_rounds,
                forget=pairs,
                objective={
                    "_target_": f"{__name__}.ReverseObjective", "alpha": self.alpha, "private_rate": self.private_rate,
                    "personal_rate": self.personal_rate, "weight_decay": self.weight_decay,
                    "negatives": self.negatives, "retained": self._per_device(task, pairs),
                },
                federation={**ADAM, "server_learning_rate": self._rate(task)},
                participants=self._participants(task, pairs),
                halt=forgotten_enough,
            )  # fmt: skip
            state, cost = done.state, cost + done.cost
            trace += [{"phase": "reverse", **margins_of(line)} for line in done.lines]
            if not done.halted:
                notes.append(
                    f"the rule to stop did not hold within unlearning.strategies.{self.name}.max_rounds="
                    f"{self.max_rounds}; the gates decide"
                )
            rounds = self.user_repair_rounds if task.forget.users.size else self.repair_rounds
            repaired = task.federation.train(state, task.after, rounds)
            state, cost = repaired.state, cost + repaired.cost
            trace += [{"phase": "repair", "round": x["round"], "loss": x["loss"]} for x in repaired.lines]
        state = erase(state, task.forget, task.federation.algorithm)
        return Forgotten(state, cost, Guarantee("approximate"), trace, notes)

    def _rate(self, task: Task) -> float:
        return self.user_item_rate if task.forget.users.size else self.item_rate

    def _per_device(self, task: Task, pairs: UserItems) -> int:
        """Retained pairs that a participating device trains on: in all about ``retained_pairs`` per forget pair."""
        if task.forget.users.size:
            return 0  # sampled users bring all of theirs
        return max(1, round(self.retained_pairs * pairs.items.size / max(1, int((pairs.counts > 0).sum()))))

    def _participants(self, task: Task, pairs: UserItems) -> Callable[[int, Int64], Int64]:
        """The affected devices, and of the others enough for ``retained_pairs`` pairs per forget pair."""
        affected = np.flatnonzero(pairs.counts)
        others = np.setdiff1d(np.flatnonzero(task.after.train.counts), affected)
        wanted = self.retained_pairs * pairs.items.size
        here = float(task.after.train.counts[affected].sum())
        there = float(task.after.train.counts[others].sum())
        share = min(max(0.0, wanted - here) / there, 1.0) if there else 0.0

        def take_part(round_number: int, sampled: Int64) -> Int64:
            key = random.stream(task.seed, "reverse", task.number, round_number)
            count = round(share * others.size)
            some = others[random.sample_without_replacement(key, others.size, count)] if count else others[:0]
            return np.union1d(affected, np.intersect1d(some, sampled))

        return take_part


def forgotten_enough(measured: Mapping[str, float]) -> bool:
    """The rule to stop, on the devices' sums: the mean centred score of forget pairs is that of unseen pairs, or less.

    Without unseen pairs nothing says what "never trained on" would score, and 0, a user's own mean, stands for it.
    """
    known, unseen = measured.get("forget_pairs", 0.0), measured.get("unseen_pairs", 0.0)
    if not known:
        return True
    level = measured["unseen_margin"] / unseen if unseen else 0.0
    return measured["forget_margin"] / known <= level


def margins_of(line: Mapping[str, object]) -> dict[str, object]:
    """A round's line as the trace keeps it: the two margins as means."""
    measured = line.get("measured", {})
    assert isinstance(measured, Mapping)
    found: dict[str, object] = {"round": line["round"], "loss": line["loss"]}
    for name in ("forget", "unseen"):
        pairs = measured.get(f"{name}_pairs", 0.0)
        found[f"{name}_margin"] = measured[f"{name}_margin"] / pairs if pairs else None
    return found


def form_of(algorithm: Recommender) -> DotProduct:
    """How the algorithm scores. ConfigError unless by a dot product."""
    form = algorithm.dot_product(0) if isinstance(algorithm, GradientRecommender) else None
    if form is None:
        raise ConfigError(
            f"unlearning.strategies.reverse_bpr: {algorithm.name} does not score pairs by a dot product; "
            "write unlearning=retrain"
        )
    return form


class ReverseObjective(GradientRecommender):
    """The wrapped algorithm while it forgets: L of the module's docstring, one full-batch step a device and round."""

    name = "reverse_bpr"

    def __init__(
        self, inner: GradientRecommender, *, alpha: float, private_rate: float, personal_rate: float,
        weight_decay: float, negatives: int, retained: int,
    ) -> None:  # fmt: skip
        self.inner, self.problem, self.alpha = inner, inner.problem, alpha
        self._form = form_of(inner)
        self._rates, self._decay = (private_rate, personal_rate), weight_decay
        self._local = LocalTraining(1, 2**30, negatives, max_positives=retained, pairwise=True)

    @cached_property
    def shared(self) -> Mapping[str, TensorSpec]:
        return {name: _plain(spec, 1.0, 0.0) for name, spec in self.inner.shared.items()}

    @cached_property
    def private(self) -> Mapping[str, TensorSpec]:
        return {
            name: _plain(spec, self._rates[spec.per_item], self._decay) for name, spec in self.inner.private.items()
        }

    @property
    def local(self) -> LocalTraining:
        return self._local

    def loss(self, params: Tensors, examples: Examples) -> Tensor:
        """L of ONE device."""
        rows = params[self._form.item]
        if self._form.personal:
            rows = rows + params[self._form.personal]
        losses, _ = self._pairs(rows @ params[self._form.user], examples)
        return losses.sum()

    def gradients(self, params: Tensors, examples: Examples) -> tuple[Tensor, Tensors]:
        """The gradients of ``loss`` in closed form, for B devices."""
        form = self._form
        user, rows = params[form.user], params[form.item]
        if form.personal:
            rows = rows + params[form.personal]
        losses, slopes = self._pairs(torch.bmm(rows, user.unsqueeze(2)).squeeze(2), examples)
        assert examples.positive is not None
        assert examples.negative is not None
        by_row = torch.zeros_like(examples.label)
        by_row.scatter_add_(1, examples.positive, slopes)
        by_row.scatter_add_(1, examples.negative, -slopes)
        outer = by_row.unsqueeze(2) * user.unsqueeze(1)
        found: Tensors = {form.item: outer, form.user: torch.bmm(by_row.unsqueeze(1), rows).squeeze(1)}
        if form.personal:
            found[form.personal] = outer
        if form.bias:  # a difference of scores is free of it
            found[form.bias] = torch.zeros_like(params[form.bias])
        return losses.sum(1), found

    def _pairs(self, scores: Tensor, examples: Examples) -> tuple[Tensor, Tensor]:
        """Every pair's loss and its derivative by x = s_pos − s_neg; scores [T] or [B, T], pairs [E] or [B, E]."""
        assert examples.positive is not None
        assert examples.negative is not None
        assert examples.pair_weight is not None
        x = scores.gather(-1, examples.positive) - scores.gather(-1, examples.negative)
        sign = -examples.label.gather(-1, examples.positive)  # +1 pushes away, −1 pulls
        real = (examples.pair_weight > 0).to(x.dtype)
        forget, retain = real * (sign > 0), real * (sign < 0)
        share = self.alpha * forget / forget.sum(-1, keepdim=True).clamp_min(1.0)
        share = share + (1.0 - self.alpha) * retain / retain.sum(-1, keepdim=True).clamp_min(1.0)
        return share * F.softplus(sign * x), share * sign * torch.sigmoid(sign * x)

    def score(self, params: Tensors, history: UserItems) -> Tensor:
        return self.inner.score(params, history)


def _plain(spec: TensorSpec, rate: float, decay: float) -> TensorSpec:
    return dataclasses.replace(spec, learning_rate=rate, weight_decay=decay, round_decay=1.0, step_decay=1.0)


def _outside(pairs: UserItems, items: Int64) -> UserItems:
    keep = ~np.isin(pairs.items, items)
    return UserItems.from_pairs(pairs.users[keep], pairs.items[keep], pairs.n_users)
