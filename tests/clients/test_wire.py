"""The item view on the wire: what comes out of a codec is what went in, and bytes are what arrays weigh."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clients.wire import Codec, decode, pack_symmetric, unpack_symmetric
from fedrec.errors import ConfigError

Update = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], int]


@st.composite
def updates(draw: st.DrawFn) -> Update:
    """Touched rows (ascending, possibly none), values with zeros and ties among them, and the number of rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_rows, width = draw(st.integers(1, 30)), draw(st.integers(1, 5))
    rows = np.sort(rng.permutation(n_rows)[: draw(st.integers(0, n_rows))]).astype(np.int32)
    scale = draw(st.sampled_from([1e-6, 1.0, 100.0]))
    values = (rng.integers(-3, 4, (rows.size, width)) * scale * draw(st.sampled_from([1.0, 0.1]))).astype(np.float32)
    if draw(st.booleans()):
        values += (rng.normal(size=values.shape) * scale).astype(np.float32)
    return rows, values, n_rows


def _dense(rows: np.ndarray[Any, Any], values: np.ndarray[Any, Any], n_rows: int) -> np.ndarray[Any, Any]:
    out = np.zeros((n_rows, values.shape[1]), dtype=np.float32)
    out[rows] = values
    return out


def _counted(codec: Codec, values: np.ndarray[Any, Any], n_rows: int) -> int:
    touched = torch.tensor([values.shape[0]])
    nonzero = torch.tensor([int(np.count_nonzero(values))])
    return int(codec.device_bytes(n_rows, values.shape[1], touched, nonzero, decay=False)[0])


@given(updates(), st.sampled_from(["dense", "touched", "nonzero"]))
def test_lossless_codecs_give_back_what_went_in(update: Update, kind: Any) -> None:
    rows, values, n_rows = update
    decoded = decode(Codec(kind).encode(rows, values, n_rows), (n_rows, values.shape[1]))
    np.testing.assert_array_equal(decoded, _dense(rows, values, n_rows))
    assert decoded.dtype == np.float32


@given(updates(), st.sampled_from(["dense", "touched", "nonzero"]))
def test_half_precision_rounds_as_numpy_does(update: Update, kind: Any) -> None:
    rows, values, n_rows = update
    codec = Codec(kind, precision="float16")
    expected = values.astype(np.float16).astype(np.float32)
    decoded = decode(codec.encode(rows, values, n_rows), (n_rows, values.shape[1]))
    np.testing.assert_array_equal(decoded, _dense(rows, expected, n_rows))
    if rows.size:
        lossy = codec.lossy(torch.from_numpy(values).unsqueeze(0), n_rows)[0].numpy()
        np.testing.assert_array_equal(lossy, expected)


@given(updates(), st.floats(0.01, 1.0))
def test_topk_keeps_exactly_the_k_largest(update: Update, fraction: float) -> None:
    rows, values, n_rows = update
    if not rows.size:
        return
    codec = Codec("topk", fraction=fraction)
    k = min(codec.top_k(n_rows, values.shape[1]), values.size)
    kept = codec.lossy(torch.from_numpy(values).unsqueeze(0), n_rows)[0].numpy()
    decoded = decode(codec.encode(rows, kept, n_rows), (n_rows, values.shape[1]))
    np.testing.assert_array_equal(decoded, _dense(rows, kept, n_rows))
    survived = kept != 0
    np.testing.assert_array_equal(kept[survived], values[survived])
    # Exactly the k largest magnitudes (zeros among them are not sent), whichever of equal ones.
    magnitudes = np.sort(np.abs(values).ravel())[::-1][:k]
    np.testing.assert_array_equal(np.sort(np.abs(kept[survived]))[::-1], magnitudes[magnitudes > 0])


@given(updates())
def test_topk_does_not_depend_on_the_padding_of_a_chunk(update: Update) -> None:
    rows, values, n_rows = update
    if not rows.size:
        return
    codec, own = Codec("topk", fraction=0.2), torch.from_numpy(values).unsqueeze(0)
    padded = torch.cat([own, torch.zeros(1, 7, values.shape[1])], dim=1)
    assert torch.equal(codec.lossy(own, n_rows), codec.lossy(padded, n_rows)[:, : rows.size])


@given(updates(), st.sampled_from(["dense", "touched", "nonzero", "topk"]), st.sampled_from(["float32", "float16"]))
def test_counted_bytes_are_the_arrays_bytes(update: Update, kind: Any, precision: Any) -> None:
    rows, values, n_rows = update
    codec = Codec(kind, precision, fraction=0.3)
    if rows.size:
        values = codec.lossy(torch.from_numpy(values).unsqueeze(0), n_rows)[0].numpy()
    arrays = codec.encode(rows, values, n_rows)
    assert _counted(codec, values, n_rows) == sum(array.nbytes for array in arrays.values())


@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_packed_triangle_is_half_a_symmetric_matrix(n: int, seed: int) -> None:
    square = np.random.default_rng(seed).normal(size=(n, n)).astype(np.float32)
    symmetric = square + square.T
    packed = pack_symmetric(symmetric)
    assert packed.nbytes == 4 * n * (n + 1) // 2
    np.testing.assert_array_equal(unpack_symmetric(packed, n), symmetric)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"dense": np.zeros((4, 2), np.float32)}, r"shape \(4, 2\), expected \(5, 2\)"),
        ({"rows": np.int32([0, 1]), "values": np.zeros((3, 2), np.float32)}, "2 rows with values of shape"),
        ({"rows": np.int32([0, 1]), "values": np.zeros((2, 3), np.float32)}, "expected width 2"),
        ({"rows": np.int32([0, 5]), "values": np.zeros((2, 2), np.float32)}, "outside 0…4"),
        ({"rows": np.int32([-1, 2]), "values": np.zeros((2, 2), np.float32)}, "outside 0…4"),
        ({"rows": np.int32([2, 2]), "values": np.zeros((2, 2), np.float32)}, "repeated"),
        ({"rows": np.int32([[0], [1]]), "values": np.zeros((2, 2), np.float32)}, "2 rows with values"),
        ({"rows": np.float32([0, 1]), "values": np.zeros((2, 2), np.float32)}, "rows has type float32"),
        ({"index": np.int32([0, 1]), "values": np.zeros(3, np.float32)}, "2 indices with values"),
        ({"index": np.int32([0, 10]), "values": np.zeros(2, np.float32)}, "outside 0…9"),
        ({"index": np.int32([3, 3]), "values": np.zeros(2, np.float32)}, "repeated"),
        ({"values": np.zeros(2, np.float32)}, "no codec sends the arrays values"),
        ({"values": np.array(["x"]), "rows": np.int32([0])}, "values has type"),
        ({}, "missing"),
    ],
)
def test_malformed_arrays_are_refused_with_a_reason(arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode(arrays, (5, 2))


def test_a_triangle_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 6 values"):
        unpack_symmetric(np.zeros(5, np.float32), 3)


@pytest.mark.parametrize(
    "options", [{"kind": "zip"}, {"precision": "float8"}, {"fraction": 0.0}, {"fraction": 1.5}, {"fraction": np.nan}]
)
def test_an_unknown_codec_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="write"):
        Codec(**options)
