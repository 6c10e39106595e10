"""Replies in, one guarded sum out. A reply that is not finite numbers of the right shape is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Message

from clients.messages import Arrays, fields_of, named_arrays
from clients.wire import decode, unpack_symmetric
from fedrec.algorithms.base import Recommender, StatisticsRecommender, Tensors, TensorSpec
from fedrec.evaluation.sums import EvaluationSums


class BadReply(ValueError):
    """A reply that must not enter the sum; the message says why."""


@dataclass
class RoundSum:
    """The sum over the devices of all good replies of one round."""

    sums: Tensors  # without the weight decay of whole tensors, which is ``decay[name]``·(shared tensor)
    decay: dict[str, float] = field(default_factory=dict)
    counts: npt.NDArray[np.int64] | None = None
    devices: int = 0
    unclipped: float = 0.0
    loss: float = 0.0
    steps: int = 0
    upload_bytes: int = 0
    cpu: dict[str, float] = field(default_factory=dict)
    squared_norm: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)  # sums of what devices measured before they trained
    failed_users: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    evaluation: EvaluationSums | None = None
    per_user: list[dict[str, npt.NDArray[Any]]] = field(default_factory=list)
    users: list[npt.NDArray[np.int64]] = field(default_factory=list)
    user_updates: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=dict)
    views: list[Arrays] = field(default_factory=list)
    row_sets: list[Arrays] = field(default_factory=list)


@dataclass(frozen=True)
class _Reply:
    """One node's reply, read and checked as a whole."""

    numbers: dict[str, float]
    update: Tensors
    decay: dict[str, float]
    failed: list[int]
    evaluation: EvaluationSums | None
    counts: npt.NDArray[np.int64] | None
    per_user: Arrays
    users: npt.NDArray[np.int64] | None
    user_updates: Arrays
    views: Arrays
    row_sets: Arrays


def add_replies(
    algorithm: Recommender, replies: Sequence[Message], nodes: Mapping[int, int], round_index: int = 0
) -> RoundSum:
    """Sum the replies in node order (floating-point sums must not depend on who answered first).

    ``nodes`` maps Flower node ids to node numbers. Bad replies and errors are named in ``failures``, and left out as a
    whole.
    """
    specs = algorithm.statistics_in(round_index) if isinstance(algorithm, StatisticsRecommender) else algorithm.shared
    total = RoundSum({name: torch.zeros(spec.shape) for name, spec in specs.items()})
    for message in sorted(replies, key=lambda m: nodes.get(m.metadata.src_node_id, -1)):
        node = nodes.get(message.metadata.src_node_id, -1)
        if message.has_error():
            total.failures.append(f"node {node}: error {message.error.code}: {reason_of(message.error.reason)}")
            continue
        try:
            reply = _read(algorithm, message, round_index)
            evaluation = _both(total.evaluation, reply.evaluation)
        except KeyError as error:
            total.failures.append(f"node {node}: reply refused: it lacks {error.args[0]}")
        except ValueError as error:
            total.failures.append(f"node {node}: reply refused: {error}")
        else:
            # Nothing can fail from here on: a refused reply leaves no trace in the sum.
            total.evaluation = evaluation
            _add(total, reply)
    return total


def reason_of(text: str | None) -> str:
    """The last line of a traceback, or of Ray's account of one: it says what happened."""
    lines = [line.strip() for line in (text or "").replace("\\n", "\n").splitlines() if line.strip(" '>")]
    return lines[-1].rstrip("'>")[:300] if lines else "no reason given"


def _finite(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        raise BadReply(f"{name} holds {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
    return values


def _both(first: EvaluationSums | None, second: EvaluationSums | None) -> EvaluationSums | None:
    return first + second if first is not None and second is not None else first or second


def _read(algorithm: Recommender, message: Message, round_index: int) -> _Reply:
    """Everything a reply holds. ValueError or KeyError when any of it cannot be used."""
    content = message.content
    found = content.metric_records["metrics"]
    numbers = {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
    for name in ("devices", "loss", "steps", "upload_bytes"):
        _finite(f"the number {name}", np.asarray(numbers[name]))
    for name, value in numbers.items():
        _finite(f"the number {name}", np.asarray(value))
    if numbers["devices"] < 0:
        raise BadReply(f"it counts {numbers['devices']:.0f} devices")
    evaluated = named_arrays(content.array_records["evaluation"])
    evaluation = EvaluationSums.from_arrays(evaluated) if evaluated else None
    failed = named_arrays(content.array_records["who"])["failed"].tolist()
    per_user = named_arrays(content.array_records["per_user"])
    if not numbers["devices"]:
        return _Reply(numbers, {}, {}, failed, evaluation, None, per_user, None, {}, {}, {})
    arrays = named_arrays(content.array_records["update"])
    decay: dict[str, float] = {}
    if isinstance(algorithm, StatisticsRecommender):
        update = _statistics(algorithm.statistics_in(round_index), arrays)
    else:
        update, decay = _update(algorithm, arrays)
    counts = None
    if "counts" in content.array_records:
        counts = _counts(named_arrays(content.array_records["counts"]), algorithm.problem.n_items)
    own: Arrays = {}
    users = None
    if algorithm.needs_user_updates:
        own = named_arrays(content.array_records["users"])
        users = own.pop("users").astype(np.int64)
        for name, spec in algorithm.shared.items():
            if _finite(name, own[name]).shape != (users.size, *spec.shape):
                raise BadReply(f"the devices' {name} has shape {own[name].shape}, expected {(users.size, *spec.shape)}")
    views, row_sets = (
        named_arrays(content.array_records[name]) if name in content.array_records else {}
        for name in ("views", "row_sets")
    )
    return _Reply(numbers, update, decay, failed, evaluation, counts, per_user, users, own, views, row_sets)


def _add(total: RoundSum, reply: _Reply) -> None:
    for name, tensor in reply.update.items():
        total.sums[name] += tensor
    for name, factor in reply.decay.items():
        total.decay[name] = total.decay.get(name, 0.0) + factor
    total.devices += int(reply.numbers["devices"])
    total.unclipped += reply.numbers.get("unclipped", 0.0)
    total.loss += reply.numbers["loss"]
    total.steps += int(reply.numbers["steps"])
    total.upload_bytes += int(reply.numbers["upload_bytes"])
    for key, value in reply.numbers.items():
        group, _, name = key.partition(".")
        if group == "cpu":
            total.cpu[name] = total.cpu.get(name, 0.0) + value
        elif group == "squared_norm":
            total.squared_norm[name] = total.squared_norm.get(name, 0.0) + value
        elif group == "measured":
            total.measured[name] = total.measured.get(name, 0.0) + value
    total.failed_users += reply.failed
    if reply.per_user:
        total.per_user.append(reply.per_user)
    if reply.counts is not None:
        total.counts = reply.counts if total.counts is None else total.counts + reply.counts
    if reply.users is not None:
        total.users.append(reply.users)
        for name, stacked in reply.user_updates.items():
            total.user_updates.setdefault(name, []).append(stacked)
    if reply.views:
        total.views.append(reply.views)
    if reply.row_sets:
        total.row_sets.append(reply.row_sets)


def _update(algorithm: Recommender, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[Tensors, dict[str, float]]:
    """The summed rows, dense float32 per tensor, and the summed decay factors of the tensors that decay."""
    out: Tensors = {}
    decays: dict[str, float] = {}
    for name, spec in algorithm.shared.items():
        if not spec.per_item:
            values = np.asarray(arrays[name], dtype=np.float32)
            if values.shape != spec.shape:
                raise BadReply(f"{name} has shape {values.shape}, expected {spec.shape}")
            out[name] = torch.from_numpy(np.array(_finite(name, values)))
            continue
        fields = fields_of(arrays, name)
        decay = fields.pop("decay", None)
        out[name] = torch.from_numpy(_finite(name, decode(fields, spec.shape)))
        if decay is not None:
            if decay.shape != (1,):
                raise BadReply(f"{name}/decay has shape {decay.shape}, expected one number")
            decays[name] = float(_finite(f"{name}/decay", decay)[0])
    return out, decays


def _statistics(specs: Mapping[str, TensorSpec], arrays: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    out: Tensors = {}
    for name, spec in specs.items():
        values = _finite(name, np.asarray(arrays[name], dtype=np.float32))
        dense = unpack_symmetric(values, spec.shape[0]) if spec.symmetric else values
        if dense.shape != spec.shape:
            raise BadReply(f"{name} has shape {dense.shape}, expected {spec.shape}")
        out[name] = torch.from_numpy(np.array(dense))
    return out


def _counts(arrays: Mapping[str, npt.NDArray[Any]], n_items: int) -> npt.NDArray[np.int64]:
    """Devices that touched each item: counts from a cohort, one bit an item from a single device."""
    if "bitmap" in arrays:
        bits = arrays["bitmap"]
        if bits.dtype != np.uint8 or bits.shape != (-(-n_items // 8),):
            raise BadReply(f"bitmap of {bits.dtype}{bits.shape}, expected uint8({-(-n_items // 8)},)")
        return np.unpackbits(bits, count=n_items).astype(np.int64)
    counts = arrays["counts"].astype(np.int64)
    if counts.shape != (n_items,):
        raise BadReply(f"counts has shape {counts.shape}, expected ({n_items},)")
    return counts


def mean_update(
    total: RoundSum, algorithm: Recommender, shared: Tensors, mean: str, divisor: float | None = None
) -> Tensors:
    """The mean over participants, or of per-item tensors over the devices that touched an item.

    Weight decay acts on every row of every participant, so it is always averaged over all of them.
    ``divisor`` replaces the number of participants (a private mean divides by a public number).
    """
    devices = divisor or max(total.devices, 1)
    out = {}
    for name, value in total.sums.items():
        if mean == "contributors" and algorithm.shared[name].per_item and total.counts is not None:
            counts = torch.from_numpy(np.maximum(total.counts, 1)).to(value.dtype)
            out[name] = value / counts.view(-1, *[1] * (value.ndim - 1))
        else:
            out[name] = value / devices
        if name in total.decay:
            out[name] = out[name] + total.decay[name] / devices * shared[name]
    return out
