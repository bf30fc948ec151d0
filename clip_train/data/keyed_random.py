"""Counter-based randomness: every draw is a pure function of its key, on every machine and version.

The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014). It is
written out here because the streams of numpy's and torch's generators may change between releases, and a run that is
resumed after an upgrade must see the same data.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt64

# The first part of every key says what the draw is for, so that two uses never share a stream.
SHARD_ORDER, WINDOW_ORDER, AUGMENTATION, CAPTION_CHOICE, MODEL_NOISE = range(1, 6)
SOURCE_SEED, WORD_DROPOUT, LONG_CAPTION, VALIDATION_SPLIT = range(6, 10)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLIER_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLIER_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLIER_2
    return x ^ (x >> np.uint64(31))


def keyed_bits(*key: int | np.ndarray, count: int) -> UInt64[np.ndarray, "*key count"]:
    """`count` random 64-bit words for each key; parts of the key may be arrays that broadcast."""
    with np.errstate(over="ignore"):
        state = np.zeros((), dtype=np.uint64)
        for part in key:
            state = _mix(state ^ _mix(np.asarray(part).astype(np.uint64) + _GOLDEN))
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        return _mix(state[..., None] + steps)


def keyed_uniforms(*key: int | np.ndarray, count: int) -> Float64[np.ndarray, "*key count"]:
    """`count` numbers in [0, 1) for each key."""
    return (keyed_bits(*key, count=count) >> np.uint64(11)) * 2.0**-53


def keyed_permutation(*key: int, size: int) -> Int64[np.ndarray, " size"]:
    """A permutation of `range(size)`."""
    return np.argsort(keyed_bits(*key, count=size), kind="stable")
