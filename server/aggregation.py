"""Replies in, one guarded sum out. A reply that is not a set of finite numbers of the right shape is refused by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Message

from clients.messages import fields_of, named_arrays
from clients.wire import decode, unpack_symmetric
from fedrec.algorithms.base import Recommender, StatisticsRecommender, Tensors
from fedrec.evaluation.sums import EvaluationSums


class BadReply(ValueError):
    """A reply that must not enter the sum; the message says why."""


@dataclass
class RoundSum:
    """The sum over the devices of all good replies of one round."""

    sums: Tensors
    counts: npt.NDArray[np.int64] | None = None
    devices: int = 0
    loss: float = 0.0
    steps: int = 0
    upload_bytes: int = 0
    cpu: dict[str, float] = field(default_factory=dict)
    squared_norm: dict[str, float] = field(default_factory=dict)
    failed_users: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    evaluation: EvaluationSums | None = None
    per_user: list[dict[str, npt.NDArray[Any]]] = field(default_factory=list)
    users: list[npt.NDArray[np.int64]] = field(default_factory=list)
    user_updates: dict[str, list[npt.NDArray[np.float32]]] = field(default_factory=dict)


def add_replies(
    algorithm: Recommender, shared: Tensors, replies: Sequence[Message], nodes: Mapping[int, int]
) -> RoundSum:
    """Sum the replies in node order (floating-point sums must not depend on who answered first).

    ``nodes`` maps Flower node ids to node numbers. Bad replies and errors are named in ``failures``, and left out.
    """
    specs = algorithm.statistics if isinstance(algorithm, StatisticsRecommender) else algorithm.shared
    total = RoundSum({name: torch.zeros(spec.shape) for name, spec in specs.items()})
    for message in sorted(replies, key=lambda m: nodes.get(m.metadata.src_node_id, -1)):
        node = nodes.get(message.metadata.src_node_id, -1)
        if message.has_error():
            total.failures.append(f"node {node}: error {message.error.code}: {_reason(message.error.reason)}")
            continue
        try:
            _add(total, algorithm, shared, message)
        except (BadReply, ValueError, KeyError) as error:
            total.failures.append(f"node {node}: reply refused: {error}")
    return total


def _reason(text: str | None) -> str:
    """The last line of a traceback says what happened."""
    lines = [line.strip() for line in (text or "no reason given").strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no reason given"


def _finite(name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if not np.isfinite(values).all():
        raise BadReply(f"{name} holds {int((~np.isfinite(values)).sum())} values that are NaN or infinite")
    return values


def _add(total: RoundSum, algorithm: Recommender, shared: Tensors, message: Message) -> None:
    content = message.content
    metrics = {
        name: value for name, value in content.metric_records["metrics"].items() if isinstance(value, (int, float))
    }
    arrays = named_arrays(content.array_records["update"])
    update: Tensors = {}
    if metrics["devices"]:
        _finite("the loss", np.asarray(metrics["loss"]))
        update = (
            _statistics(algorithm, arrays)
            if isinstance(algorithm, StatisticsRecommender)
            else _update(algorithm, shared, arrays)
        )
    evaluation = named_arrays(content.array_records["evaluation"])
    evaluated = EvaluationSums.from_arrays(evaluation) if evaluation else None
    # Nothing was added so far: a refused reply leaves no trace in the sum.
    for name, tensor in update.items():
        total.sums[name] += tensor
    total.devices += int(metrics["devices"])
    total.loss += float(metrics["loss"])
    total.steps += int(metrics["steps"])
    total.upload_bytes += int(metrics["upload_bytes"])
    for key, value in metrics.items():
        group, _, name = key.partition(".")
        if group == "cpu":
            total.cpu[name] = total.cpu.get(name, 0.0) + float(value)
        elif group == "squared_norm":
            total.squared_norm[name] = total.squared_norm.get(name, 0.0) + float(value)
    total.failed_users += named_arrays(content.array_records["who"])["failed"].tolist()
    if evaluated is not None:
        total.evaluation = evaluated if total.evaluation is None else total.evaluation + evaluated
    per_user = named_arrays(content.array_records["per_user"])
    if per_user:
        total.per_user.append(per_user)
    if "counts" in content.array_records and metrics["devices"]:
        counts = named_arrays(content.array_records["counts"])["counts"].astype(np.int64)
        total.counts = counts if total.counts is None else total.counts + counts
    if algorithm.needs_user_updates and metrics["devices"]:
        own = named_arrays(content.array_records["users"])
        total.users.append(own.pop("users").astype(np.int64))
        for name, stacked in own.items():
            total.user_updates.setdefault(name, []).append(_finite(name, stacked))


def _update(algorithm: Recommender, shared: Tensors, arrays: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    out: Tensors = {}
    for name, spec in algorithm.shared.items():
        if not spec.per_item:
            values = np.asarray(arrays[name], dtype=np.float32)
            if values.shape != spec.shape:
                raise BadReply(f"{name} has shape {values.shape}, expected {spec.shape}")
            out[name] = torch.from_numpy(np.array(_finite(name, values)))
            continue
        out[name] = torch.from_numpy(_finite(name, decode(fields_of(arrays, name), spec.shape)))
        decay = arrays.get(f"{name}/decay")
        if decay is not None:
            out[name] += float(_finite(f"{name}/decay", decay)[0]) * shared[name]
    return out


def _statistics(algorithm: StatisticsRecommender, arrays: Mapping[str, npt.NDArray[Any]]) -> Tensors:
    out: Tensors = {}
    for name, spec in algorithm.statistics.items():
        values = _finite(name, np.asarray(arrays[name], dtype=np.float32))
        dense = unpack_symmetric(values, spec.shape[0]) if spec.symmetric else values
        if dense.shape != spec.shape:
            raise BadReply(f"{name} has shape {dense.shape}, expected {spec.shape}")
        out[name] = torch.from_numpy(np.array(dense))
    return out


def mean_update(total: RoundSum, algorithm: Recommender, mean: str) -> Tensors:
    """The mean over participants, or of per-item tensors over the devices that touched an item."""
    out = {}
    for name, value in total.sums.items():
        if mean == "contributors" and algorithm.shared[name].per_item and total.counts is not None:
            counts = torch.from_numpy(np.maximum(total.counts, 1)).to(value.dtype)
            out[name] = value / counts.view(-1, *[1] * (value.ndim - 1))
        else:
            out[name] = value / max(total.devices, 1)
    return out
