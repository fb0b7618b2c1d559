"""Noise version 1: its values are fixed for ever, and they are normal and independent."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from ddpm_edge.errors import ConfigError
from ddpm_edge.noise import BLOCK, MAX_SEED, VERSION, Draws, Stream, check_seed, standard_normal

START, STEP = Stream.START, Stream.STEP
SIGMAS = 4.0  # a threshold in standard errors: 1 in 16,000 by chance, and the seeds are fixed
SEEDS = (0, 1, 12345, MAX_SEED)

# (seed, stream, sample, row) and the first eight draws. Never change them: a new transform is a
# new version, and bundles name theirs.
GOLDEN = {
    (0, START, 0, 0): """
        0x1.090ce6p-7 0x1.37b082p-3 -0x1.c9887ep-2 -0x1.87feb8p-3
        -0x1.a19586p-3 0x1.29ea06p+0 0x1.349c52p+1 -0x1.b166cap-3""",
    (7, STEP, 3, 11): """
        0x1.3fbdcep-1 -0x1.040f4ep+0 -0x1.4ab9e4p+1 0x1.2108a4p-5
        -0x1.9c46bcp+0 0x1.4a1432p-5 -0x1.f85f4ap-4 0x1.bfd786p-2""",
    (2**64 - 1, STEP, 1, 999): """
        -0x1.23be80p+0 -0x1.1bbcfap+0 0x1.8fdc78p-5 0x1.3f9a50p-3
        0x1.b3a3f2p-2 -0x1.1a4d1cp+0 -0x1.35f70cp+0 0x1.361874p-3""",
    (2**53 - 1, START, 2**40, 0): """
        0x1.901156p-1 -0x1.2ffb5ap-2 -0x1.f9cf04p-2 -0x1.a160e6p+0
        -0x1.ed4648p-2 -0x1.4afc48p+0 0x1.8daa8ep-4 0x1.99ebf2p-2""",
}


def philox4x64(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 in plain integers, from the paper (Salmon et al. 2011, section 3.3)."""
    mask = 2**64 - 1
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 2**64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 2**64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return [c0, c1, c2, c3]


def reference(seed: int, stream: int, sample: int, row: int, count: int) -> list[float]:
    """The draws from the documented construction alone, one pair of words at a time."""
    values: list[float] = []
    block = 1  # NumPy counts up before it makes a block
    while len(values) < count:
        words = philox4x64((block, row, sample, 0), (seed, stream))
        for u, v in (words[:2], words[2:]):
            radius = math.sqrt(-2.0 * math.log1p(-(u >> 11) / 2**53))
            angle = 2.0 * math.pi * ((v >> 11) / 2**53)
            values += [radius * math.cos(angle), radius * math.sin(angle)]
        block += 1
    return values[:count]


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    return abs(float(np.corrcoef(x, y)[0, 1]))


def test_the_version_is_that_of_the_golden_vectors() -> None:
    assert VERSION == 1
    assert (int(START), int(STEP)) == (0, 1)  # the numbers are part of the key


@pytest.mark.parametrize("key", GOLDEN)
def test_golden_vectors(key: tuple[int, Stream, int, int]) -> None:
    drawn = standard_normal(*key, 8)
    assert drawn.dtype == np.float32
    # Exact: an ulp of float64 in cos or log reaches the float32 once in 2**28 values.
    assert drawn.tolist() == [float.fromhex(value) for value in GOLDEN[key].split()]


def test_philox_against_the_authors_known_answers() -> None:
    """The two answers of Random123's own test, kat_vectors, for philox4x64 with 10 rounds."""
    assert philox4x64((0, 0, 0, 0), (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    ones = 2**64 - 1
    assert philox4x64((ones,) * 4, (ones, ones)) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("seed", [*SEEDS, 2**63])
@pytest.mark.parametrize(("stream", "sample", "row"), [(START, 0, 0), (STEP, 9, 0), (STEP, 1, 77)])
def test_the_draws_are_philox_and_box_muller(
    seed: int, stream: Stream, sample: int, row: int
) -> None:
    drawn = standard_normal(seed, stream, sample, row, 23)
    expected = np.array(reference(seed, stream, sample, row, 23), np.float32)
    # One ulp: the C library's and NumPy's cos may round a float64 differently before float32 does.
    np.testing.assert_array_max_ulp(drawn, expected, maxulp=1)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 7, 8, 783])
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(count: int) -> None:
    longer = standard_normal(3, STEP, 2, 1, 784)
    shorter = standard_normal(3, STEP, 2, 1, count)
    assert shorter.shape == (count,)
    assert np.array_equal(shorter, longer[:count])


@pytest.mark.parametrize("cut", [(8,), (1, 7), (3, 3, 2), (1,) * 8])
def test_draws_do_not_depend_on_the_batch(cut: tuple[int, ...]) -> None:
    whole = Draws(11, first=4, shape=(8, 3, 5, 2))(STEP, 6)
    parts, first = [], 4
    for size in cut:
        parts.append(Draws(11, first, (size, 3, 5, 2))(STEP, 6))
        first += size
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("shape", [(4, 2, 3), (1, 5), (2, 200, 100)])
def test_rows_made_ahead_are_those_that_any_order_gives(shape: tuple[int, ...]) -> None:
    draws = Draws(5, first=7, shape=shape)
    for stream, row in [(STEP, 0), (STEP, 1), (STEP, 40), (START, 1), (STEP, 0), (STEP, 2**40)]:
        z = draws(stream, row)
        assert z.shape == shape
        assert z.dtype == np.float32
        for i, sample in enumerate(z):
            expected = standard_normal(5, stream, 7 + i, row, sample.size)
            assert np.array_equal(sample.reshape(-1), expected)


def test_a_draw_made_in_pieces() -> None:
    count = 2 * BLOCK + 3  # odd, and the last piece is smaller than the others
    expected = np.array(reference(5, STEP, 3, 2, count), np.float32)
    for drawn in Draws(5, first=2, shape=(2, count)).rows(STEP, range(1, 3))[1, 1:]:
        np.testing.assert_array_max_ulp(drawn, expected, maxulp=1)  # as above


def test_a_draw_takes_little_memory_besides_its_own() -> None:
    tracemalloc.start()
    try:
        drawn = Draws(0, 0, (64, 4, 64, 64)).prior()  # 4 MB
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the rest is some arrays of BLOCK float64, 128 KB each; whole ones would take 8 MB each
    assert peak - drawn.nbytes < 2**20


def test_every_part_of_the_key_matters() -> None:
    """256 keys that permute, swap and carry between the parts give 256 different draws."""
    numbers = (0, 1, 2, 2**32)
    keys = [
        (seed, stream, sample, row)
        for seed in numbers
        for stream in (0, 1, 2, 3)
        for sample in numbers
        for row in numbers
    ]
    assert len({standard_normal(*key, 4).tobytes() for key in keys}) == 256


def test_a_long_draw_does_not_run_into_the_next_row_sample_or_stream() -> None:
    pairs = [
        {tuple(pair) for pair in standard_normal(1, stream, sample, row, 20000).reshape(-1, 2)}
        for stream, sample, row in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0))
    ]
    # 40,000 pairs of 2 x 24 random bits: one equal pair by chance in about 10**5 such tests.
    assert len(set().union(*pairs)) == 40000


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", list(Stream))
def test_moments_are_those_of_the_normal(seed: int, stream: Stream) -> None:
    n = 200_000
    z = standard_normal(seed, stream, 0, 0, n).astype(np.float64)
    # Standard errors of the raw moments 1-4 of n normal draws: sqrt(var(z^k) / n), and their means.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) < SIGMAS * math.sqrt(variance / n)


def test_moments_across_samples_and_rows() -> None:
    """The first draw of each key: a key is as good as a place in a long draw."""
    n = 5000
    across = {
        "sample": [standard_normal(1, START, i, 0, 1)[0] for i in range(n)],
        "row": [standard_normal(1, STEP, 0, i, 1)[0] for i in range(n)],
        "seed": [standard_normal(i, START, 0, 0, 1)[0] for i in range(n)],
    }
    for values in across.values():
        z = np.array(values, np.float64)
        for power, mean, variance in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            assert abs((z**power).mean() - mean) < SIGMAS * math.sqrt(variance / n)
        assert correlation(z[1:], z[:-1]) < SIGMAS / math.sqrt(n)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_distribution_is_normal(seed: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    z = standard_normal(seed, STEP, 1, 2, 100_000)
    # p is uniform where the draws are normal: below 1e-3 once in a thousand seeds; these are fixed.
    assert stats.kstest(z, "norm").pvalue > 1e-3
    assert stats.kstest(z[0::2], "norm").pvalue > 1e-3
    assert stats.kstest(z[1::2], "norm").pvalue > 1e-3


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 28, 784])
def test_neighbours_in_a_draw_are_independent(lag: int) -> None:
    z = standard_normal(2, STEP, 0, 0, 200_000).astype(np.float64)
    limit = SIGMAS / math.sqrt(z.size - lag)  # standard error of a correlation of independent draws
    assert correlation(z[lag:], z[:-lag]) < limit
    assert correlation(z[lag:] ** 2, z[:-lag] ** 2) < limit  # the radius that a pair shares


@pytest.mark.parametrize(
    "other",
    [
        (1, STEP, 1, 0),
        (1, STEP, 2**32, 0),
        (1, STEP, 0, 1),
        (1, STEP, 0, 2**32),
        (1, START, 0, 0),
        (0, STEP, 0, 0),
        (2, STEP, 0, 0),
        (1 + 2**32, STEP, 0, 0),
        (1 + 2**63, STEP, 0, 0),
    ],
)
def test_draws_of_neighbouring_keys_are_independent(other: tuple[int, Stream, int, int]) -> None:
    n = 100_000
    x = standard_normal(1, STEP, 0, 0, n).astype(np.float64)
    y = standard_normal(*other, n).astype(np.float64)
    limit = SIGMAS / math.sqrt(n)  # as above
    assert correlation(x, y) < limit
    assert correlation(x**2, y**2) < limit


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(0, 0), (MAX_SEED, MAX_SEED), (np.int32(5), 5), (np.uint64(MAX_SEED), MAX_SEED)],
)
def test_check_seed_accepts_whole_numbers(seed: object, expected: int) -> None:
    checked = check_seed(seed)
    assert type(checked) is int
    assert checked == expected


@pytest.mark.parametrize("seed", [True, False, np.True_, 1.0, np.float64(2), "7", b"7", [1], 1j])
def test_check_seed_refuses_what_is_no_whole_number(seed: object) -> None:
    with pytest.raises(ConfigError) as caught:
        check_seed(seed)
    assert repr(seed) in str(caught.value)
    assert type(seed).__name__ in str(caught.value)


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**64), 10**30])
def test_check_seed_refuses_what_is_out_of_range(seed: int) -> None:
    with pytest.raises(ConfigError, match=rf"0\.\.2\*\*64 - 1; got {seed}$"):
        check_seed(seed)


def test_no_seed_draws_fresh_ones_that_json_keeps() -> None:
    seeds = [check_seed(None) for _ in range(100)]
    assert len(set(seeds)) == 100  # two equal among 100 of 2**53: once in 10**12
    assert all(type(seed) is int and 0 <= seed < 2**53 for seed in seeds)
    assert max(seeds) > 2**45  # all below: once in 2**800
