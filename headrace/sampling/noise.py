"""The noise behind every sampled token: a pure function of (request seed, absolute position, token id).

Owns the published algorithm. Knows nothing of logits, requests or batches, so batch mates, restarts, retries and
replicas cannot change it. The 32-bit words are identical on every device:

    k0, k1, _, _ = Philox4x32-10(counter = (position mod 2^32, position >> 32, 0, 0), key = (seed mod 2^32, seed >> 32))
    word         = lowbias32(lowbias32((token * 0x9E3779B1 + k0) mod 2^32) ^ k1)
    lowbias32(x) : x ^= x >> 16; x *= 0x7feb352d; x ^= x >> 15; x *= 0x846ca68b; x ^= x >> 16      (all mod 2^32)
    gumbel       = -log(-log1p(-v)),  v = (word + 0.5) * 2^-32

The sampled token is the one with the greatest logit / temperature + gumbel (the lowest id among equals), over the
tokens that the processors leave. `position` is that of the new token: a prompt of n tokens samples its first at n.

Test vector (seed, position, token: word, gumbel); tests/sampling/test_noise.py holds more:

    0, 0, 0:                                              0x89579c71    0.262750
    1, 7, 42:                                             0xceb8ad60   -0.499373
    0x0123456789abcdef, 4096, 151935:                     0xf7d55dfe   -1.236962
    0xffffffffffffffff, 2147483647, 128255:               0xb59dbd70   -0.211831

Sources: Philox is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); lowbias32 is Chris
Wellons' 32-bit mixer (public domain); the Gumbel-max trick is due to Gumbel (1954).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
Float64Array = npt.NDArray[np.float64]

TOKEN_MULTIPLIER = np.uint32(0x9E3779B1)
_MIX_1 = np.uint32(0x7FEB352D)
_MIX_2 = np.uint32(0x846CA68B)
_SHIFT_15, _SHIFT_16 = np.uint32(15), np.uint32(16)

_PHILOX_ROUNDS = 10
_PHILOX_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_PHILOX_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint32)
_LOW_32 = 0xFFFFFFFF


def noise_keys(seeds: UInt64Array, positions: npt.NDArray[np.int64]) -> UInt32Array:
    """The key pair (k0, k1) of each row, [s, 2] uint32, from uint64 seeds [s] and int64 positions [s] >= 0."""
    even, odd, keys = np.zeros((3, 2, len(seeds)), np.uint32)
    positions = positions.astype(np.int64)  # a narrower one would not shift by 32
    even[0], odd[0] = positions & _LOW_32, positions >> 32  # counter words 0 and 1; words 2 and 3 are zero
    keys[0], keys[1] = seeds & np.uint64(_LOW_32), seeds >> np.uint64(32)
    for _ in range(_PHILOX_ROUNDS):
        products = np.multiply(even, _PHILOX_MULTIPLIERS, dtype=np.uint64)
        halves = products[::-1].view("<u4").reshape(2, -1, 2)  # low word, high word
        even, odd = halves[:, :, 1] ^ odd ^ keys, halves[:, :, 0]
        keys += _PHILOX_KEY_STEPS
    return np.stack((even[0], odd[0]), axis=1)


def noise_words(keys: UInt32Array, token_ids: npt.NDArray[np.integer]) -> UInt32Array:
    """The noise words of token_ids [..., n] under keys [..., 2], broadcast against each other: uint32 [..., n]."""
    scaled = np.asarray(token_ids).astype(np.uint32) * TOKEN_MULTIPLIER
    words = scaled + keys[..., 0:1]
    scratch = np.empty_like(words)
    mix_in_place(words, scratch)
    words ^= keys[..., 1:2]
    mix_in_place(words, scratch)
    return words


def mix_in_place(words: UInt32Array, scratch: UInt32Array) -> None:
    """lowbias32 of every word, in place; `scratch` has the same shape."""
    np.right_shift(words, _SHIFT_16, out=scratch)
    np.bitwise_xor(words, scratch, out=words)
    np.multiply(words, _MIX_1, out=words)
    np.right_shift(words, _SHIFT_15, out=scratch)
    np.bitwise_xor(words, scratch, out=words)
    np.multiply(words, _MIX_2, out=words)
    np.right_shift(words, _SHIFT_16, out=scratch)
    np.bitwise_xor(words, scratch, out=words)


def exponential_of(words: UInt32Array) -> Float64Array:
    """-log1p(-v) in float64: standard exponential noise, the reciprocal race form of the gumbel."""
    return -np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32)


def gumbel_of(words: UInt32Array) -> Float64Array:
    """-log(-log1p(-v)) in float64: standard Gumbel noise."""
    return -np.log(exponential_of(words))
