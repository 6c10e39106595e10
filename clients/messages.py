"""Arrays in and out of Flower records, and the downloaded item view."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord

from clients.wire import Codec, decode
from fedrec.algorithms.base import Tensors, TensorSpec

Arrays = dict[str, npt.NDArray[Any]]


def named_arrays(record: ArrayRecord) -> Arrays:
    """The arrays of a record by name."""
    return {name: array.numpy() for name, array in record.items()}


def record(arrays: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """A record from arrays by name."""
    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in arrays.items()})


def write_view(specs: Mapping[str, TensorSpec], shared: Tensors, codec: Codec) -> Arrays:
    """The arrays that every device downloads: per-item tensors by ``codec``, all others as they are."""
    arrays: Arrays = {}
    for name, spec in specs.items():
        values = shared[name].cpu().numpy()
        if not spec.per_item:
            arrays[name] = values
            continue
        rows = np.arange(spec.shape[0], dtype=np.int32)
        for key, array in codec.encode(rows, values.reshape(spec.shape[0], -1), spec.shape[0]).items():
            arrays[f"{name}/{key}"] = array
    return arrays


def fields_of(arrays: Mapping[str, npt.NDArray[Any]], name: str) -> Arrays:
    """The arrays ``name/…`` without their prefix."""
    return {key.partition("/")[2]: value for key, value in arrays.items() if key.startswith(f"{name}/")}


def read_view(specs: Mapping[str, TensorSpec], view: ArrayRecord) -> Tensors:
    """The shared tensors that :func:`write_view` wrote."""
    arrays = named_arrays(view)
    out: Tensors = {}
    for name, spec in specs.items():
        if spec.per_item:
            out[name] = torch.from_numpy(decode(fields_of(arrays, name), spec.shape))
        elif name in arrays:
            out[name] = torch.from_numpy(np.array(arrays[name], dtype=np.float32))
    return out
