"""Standard normal deviates for privacy noise, several times as fast as NumPy's and torch's."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Words = npt.NDArray[np.uint32]

_F = np.float32
_ZERO, _HALF, _ONE, _TWO = _F(0.0), _F(0.5), _F(1.0), _F(2.0)
_LN2 = _F(0.6931471805599453)
_UNIT = _F(2.0**-32)
_ANGLE = _F(2.0**-32 * np.pi / 2.0)
_ROOT_HALF = np.int32(0x3F3504F3)  # the bits of sqrt(1/2) as a float32
_L3, _L5, _L7, _L9, _L11 = _F(1 / 3), _F(1 / 5), _F(1 / 7), _F(1 / 9), _F(1 / 11)
_S3, _S5, _S7 = _F(-1 / 6), _F(1 / 120), _F(-1 / 5040)
_C2, _C4, _C6, _C8 = _F(-1 / 2), _F(1 / 24), _F(-1 / 720), _F(1 / 40320)


def noise_bits(noise_seed: int | Sequence[int] | None = None) -> np.random.SFC64:
    """The bit generator of all privacy noise: 256 bits of state from the operating system, or a seed that repeats."""
    entropy = secrets.randbits(256) if noise_seed is None else noise_seed
    return np.random.SFC64(np.random.SeedSequence(entropy, pool_size=8))  # the default pool keeps 128 bits


class NoiseSource:
    """Standard normal deviates from a generator seeded by the operating system.

    NumPy's SFC64, whose state of 256 bits is filled from ``secrets``; its words become normals by Box and Muller's
    method in float32 (:func:`box_muller`). A fixed ``noise_seed`` makes them repeatable, and the result not
    private. Like Opacus without its secure mode, this is no cryptographic generator, and takes no precaution against
    attacks on floating-point rounding (Mironov, CCS 2012).
    """

    def __init__(self, noise_seed: int | Sequence[int] | None = None) -> None:
        self._bits = noise_bits(noise_seed)
        self._radius = np.empty(0, dtype=np.float32)
        self._out = np.empty(0, dtype=np.float32)

    def normal(self, count: int) -> Float32:
        """float32[count]: a buffer that the next call overwrites."""
        pairs = (count + 1) // 2
        if self._radius.size < pairs:
            self._radius, self._out = np.empty(pairs, dtype=np.float32), np.empty(2 * pairs, dtype=np.float32)
        words = np.asarray(self._bits.random_raw(pairs)).view(np.uint32)
        radius, out = self._radius[:pairs], self._out[: 2 * pairs]
        box_muller(words, radius.view(np.int32), radius, out)
        return out[:count]

    @property
    def nbytes(self) -> int:
        """Bytes of its buffers."""
        return self._radius.nbytes + self._out.nbytes


@njit(cache=True, fastmath={"contract"}, error_model="numpy")
def box_muller(words: Words, bits: Int32, power: Float32, out: Float32) -> None:
    """Standard normal deviates out of 32-bit random words, both [2n] (Box and Muller 1958).

    ``bits`` and ``power`` are one buffer [n] seen as integers and as floats: a logarithm reads its argument's exponent.
    Loops without calls or branches, so that they vectorise; series are cut at float32's rounding. The first n words
    give radii sqrt(−2·ln u), u in (0, 1) to 2^-33 (so up to 6.76); of the others, 30 bits give an angle in [−π/4, π/4)
    and two bits turn it into the rest of the circle.
    """
    n = words.size >> 1
    for i in range(n):
        power[i] = (_F(words[i]) + _HALF) * _UNIT
    for i in range(n):
        # u = 2^exponent · mantissa, mantissa in [sqrt(1/2), sqrt(2))
        exponent = (bits[i] - _ROOT_HALF) >> np.int32(23)
        bits[i] -= exponent << np.int32(23)
        out[i] = _F(exponent)
    for i in range(n):
        s = (power[i] - _ONE) / (power[i] + _ONE)
        q = s * s
        log = _TWO * s * (((((_L11 * q + _L9) * q + _L7) * q + _L5) * q + _L3) * q + _ONE) + _LN2 * out[i]
        out[i] = np.sqrt(max(-_TWO * log, _ZERO))
    for i in range(n):
        word = words[n + i]
        angle = _F(np.int32(word) >> np.int32(2) << np.int32(2)) * _ANGLE
        q = angle * angle
        sine = angle * (((_S7 * q + _S5) * q + _S3) * q) + angle
        cosine = (((_C8 * q + _C6) * q + _C4) * q + _C2) * q + _ONE
        cosine *= _ONE - _TWO * _F(word & np.uint32(1))
        swap = _F((word >> np.uint32(1)) & np.uint32(1))
        radius, turn = out[i], swap * (cosine - sine)
        out[i] = radius * (sine + turn)
        out[n + i] = radius * (cosine - turn)
