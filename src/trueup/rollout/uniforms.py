"""Random numbers that depend on what they are for, and on nothing else.

A counter-based generator is a function from a counter to random bits. The counter here is (request, completion,
position), the key is the seed: whichever rows are computed together, and in whichever order, each draws its own number.
Source: Philox 4×32 with 10 rounds, Salmon et al. 2011 (doi:10.1145/2063384.2063405).
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 10
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], dtype=np.uint64)
_KEY_STEPS = np.array([0x9E3779B9, 0xBB67AE85], dtype=np.uint32)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counters: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Random bits: uint32 [4, …] counters and uint32 [2] key → uint32 [4, …].

    Of a round, with the 64-bit products h₀l₀ = M₀·c₀ and h₁l₁ = M₁·c₂:

        (c₀, c₁, c₂, c₃) ← (h₁ ⊕ c₁ ⊕ k₀, l₁, h₀ ⊕ c₃ ⊕ k₁, l₀)
    """
    c0, c1, c2, c3 = counters.astype(np.uint32)
    key = key.astype(np.uint32)
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c2 = (
            (second >> _HALF).astype(np.uint32) ^ c1 ^ key[0],
            (first >> _HALF).astype(np.uint32) ^ c3 ^ key[1],
        )
        c1, c3 = (second & _LOW).astype(np.uint32), (first & _LOW).astype(np.uint32)
        key = key + _KEY_STEPS  # modulo 2³²
    return np.stack([c0, c1, c2, c3])


def uniforms(seed: int, requests: np.ndarray, completions: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each token: three integer arrays that broadcast → float64 of the common shape.

    ``seed`` and ``requests`` count modulo 2⁶⁴, ``completions`` and ``positions`` modulo 2³². A number has 53 random
    bits, so that the least likely of 10⁵ tokens still gets its share.
    """
    requests, completions, positions = np.broadcast_arrays(
        *(np.asarray(each, dtype=np.int64).astype(np.uint64) for each in (requests, completions, positions))
    )
    counters = np.stack([positions & _LOW, completions & _LOW, requests & _LOW, requests >> _HALF])
    bits = philox(counters, np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint32))
    high, low = bits[0] >> np.uint32(5), bits[1] >> np.uint32(6)
    return (high.astype(np.float64) * 2.0**26 + low) * 2.0**-53
