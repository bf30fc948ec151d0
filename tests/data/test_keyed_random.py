import numpy as np
import pytest

from clip_train.data.keyed_random import keyed_bits, keyed_permutation, keyed_uniforms

_MASK = 2**64 - 1


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def test_published_splitmix64_stream():
    # The first outputs of SplitMix64 seeded with 1234567, as in the tables of its reference implementation.
    outputs, state = [], 1234567
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) & _MASK
        outputs.append(_mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_bits_equal_the_scalar_definition():
    state = 0
    for part in (3, 5, 2**40):
        state = _mix(state ^ _mix((part + 0x9E3779B97F4A7C15) & _MASK))
    expected = [_mix((state + (i + 1) * 0x9E3779B97F4A7C15) & _MASK) for i in range(4)]
    assert keyed_bits(3, 5, 2**40, count=4).tolist() == expected


def test_arrays_of_keys_equal_single_keys():
    together = keyed_uniforms(7, np.arange(5), count=3)
    assert np.array_equal(together, [keyed_uniforms(7, i, count=3) for i in range(5)])


def test_uniforms_are_uniform():
    draws = keyed_uniforms(1, np.arange(10_000), count=10)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert draws.mean() == pytest.approx(0.5, abs=0.005)
    assert draws.var() == pytest.approx(1 / 12, rel=0.02)
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03


def test_permutation_is_one_and_depends_on_every_part_of_the_key():
    assert sorted(keyed_permutation(1, 2, size=100)) == list(range(100))
    assert not np.array_equal(keyed_permutation(1, 2, size=100), keyed_permutation(2, 1, size=100))
