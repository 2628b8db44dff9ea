# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Number grids against every value that they have."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from wlab.quant import GRIDS, Grid, get_grid

FLOATS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
WIDTHS = {1: 2, 2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


def values(grid: Grid) -> np.ndarray:
    """Every value, ascending, in float64; made without the grid's own arithmetic."""
    if grid.kind != "float":
        low = 0 if grid.kind == "uint" else -grid.largest
        return np.arange(low, grid.largest + 1)
    patterns = np.arange(2**grid.bits).astype(np.uint8)
    numbers = patterns.view(FLOATS[grid.name]).astype(np.float64)
    return np.unique(numbers[np.isfinite(numbers)])


def nearest(x: np.ndarray, grid: Grid) -> np.ndarray:
    """By comparison with every value; of two as near, the one whose code is even."""
    v = values(grid)
    code = np.arange(len(v)) - int(np.argmin(abs(v)))
    distance = abs(x[:, None] - v)
    closest = distance == distance.min(axis=1, keepdims=True)
    even = closest & (code % 2 == 0)
    return v[np.where(even.any(axis=1), even.argmax(axis=1), closest.argmax(axis=1))]


@functools.partial(jax.jit, static_argnums=0)
def rounded(grid: Grid, x: jax.Array, noise: jax.Array | None = None) -> jax.Array:
    return grid.round(x, noise)


@pytest.fixture(params=list(GRIDS))
def grid(request: pytest.FixtureRequest) -> Grid:
    return GRIDS[request.param]


def test_values_of_each_grid():
    assert {g.name: len(values(g)) for g in GRIDS.values()} == {
        "fp8_e4m3": 253,  # 256 less NaN twice and one of the zeros
        "fp8_e5m2": 247,
        "fp4_e2m1": 15,
        **{f"int{b}": 2**b - 1 for b in range(2, 9)},
        **{f"uint{b}": 2**b for b in range(1, 9)},
    }
    for grid in GRIDS.values():
        assert values(grid).max() == grid.largest
        if grid.kind == "float":
            assert grid.largest == ml_dtypes.finfo(FLOATS[grid.name]).max


def test_codes_and_back(grid: Grid):
    assert grid.storage == jnp.dtype(f"uint{WIDTHS[grid.bits]}")
    v = values(grid).astype(np.float32)
    patterns = np.arange(2 ** WIDTHS[grid.bits], dtype=np.uint8)

    @jax.jit
    def there_and_back(v: jax.Array, patterns: jax.Array) -> Any:
        codes = grid.encode(v)
        numbers = grid.decode(patterns.astype(grid.storage))
        known = (numbers[:, None] == v[None]).any(1)
        again = grid.encode(jnp.where(known, numbers, 0.0))
        return codes, grid.decode(codes), known, again, grid.decode(codes, jnp.bfloat16)

    codes, back, known, again, narrow = there_and_back(v, patterns)
    assert codes.dtype == grid.storage and codes.shape == v.shape
    assert back.dtype == jnp.float32
    np.testing.assert_array_equal(back, v)
    assert len(set(np.asarray(codes, np.uint8).tolist())) == len(v)
    assert narrow.dtype == jnp.bfloat16
    # Every bit pattern that stands for a value of the grid is written as itself.
    known, again = np.asarray(known), np.asarray(again, np.uint8)
    assert known.sum() >= len(v)
    np.testing.assert_array_equal(again[known], patterns[known])


def test_round_is_to_nearest_ties_to_even_saturating_and_idempotent(grid: Grid):
    v = values(grid)
    middles = (v[1:] + v[:-1]) / 2
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            v,
            middles,
            np.nextafter(middles, np.inf, dtype=np.float32),
            np.nextafter(middles, -np.inf, dtype=np.float32),
            rng.uniform(-1.1, 1.1, 300) * grid.largest,
            rng.normal(size=300) * 2.0 ** rng.integers(-20, 4, 300),
            [1.1 * grid.largest, -1e30, np.inf, -np.inf],
        ]
    ).astype(np.float32)
    got = np.asarray(rounded(grid, x))
    want = nearest(np.clip(x, v.min(), v.max()).astype(np.float64), grid)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(rounded(grid, got), got)


@pytest.mark.parametrize("name", FLOATS)
def test_round_is_the_cast_of_the_dtype(name: str):
    rng = np.random.default_rng(1)
    x = rng.normal(size=20000) * 2.0 ** rng.integers(-20, 18, 20000)
    x = np.clip(x, -GRIDS[name].largest, GRIDS[name].largest).astype(np.float32)
    want = x.astype(FLOATS[name]).astype(np.float32)
    np.testing.assert_array_equal(rounded(GRIDS[name], x), want)


def test_beyond_the_largest_value_is_no_nan():
    """A cast to float8_e4m3fn makes NaN of 500."""
    grid = GRIDS["fp8_e4m3"]
    x = np.array([448.0, 463.0, 465.0, 500.0, -500.0, np.inf], np.float32)
    want = [448.0, 448.0, 448.0, 448.0, -448.0, 448.0]
    for noise in (None, np.full(6, 0.0, np.float32), np.full(6, 0.99, np.float32)):
        np.testing.assert_array_equal(rounded(grid, x, noise), want)


def test_nan_stays_nan(grid: Grid):
    @jax.jit
    def each(x: jax.Array, noise: jax.Array) -> Any:
        both = grid.round(x), grid.round(x, noise)
        coded = grid.name.startswith("fp8")  # the others have no code for it
        return both, [grid.decode(grid.encode(y)) for y in both if coded]

    x = np.array([np.nan, -np.nan], np.float32)
    found = jax.tree.leaves(each(x, np.full(2, 0.5, np.float32)))
    assert np.isnan(jax.device_get(found)).all()


def test_float64_is_rounded_in_float64():
    with jax.enable_x64(True):
        # Above the tie between 1 and 1.125 by less than float32 sees.
        x = np.array([1.0625 + 1e-12, 1.0625 - 1e-12])
        got = rounded(GRIDS["fp8_e4m3"], x)
        assert got.dtype == jnp.float64
        np.testing.assert_array_equal(got, [1.125, 1.0])


def test_stochastic_rounding_takes_the_upper_neighbour_below_the_fraction():
    """Of 1 and 1.125, at a quarter of the way."""
    grid = GRIDS["fp8_e4m3"]
    noise = np.array([0.0, 0.2499, 0.25, 0.999], np.float32)
    x = np.full(4, 1.03125, np.float32)
    np.testing.assert_array_equal(rounded(grid, x, noise), [1.125, 1.125, 1.0, 1.0])
    np.testing.assert_array_equal(rounded(grid, -x, noise), [-1.0, -1.0, -1.0, -1.125])


TINY = 2.0**-9  # the smallest value of e4m3: below 2**-6 its values are equally spaced


@pytest.mark.parametrize(
    ("name", "x"),
    [
        (
            "fp8_e4m3",
            [0.3 * TINY, -1.7 * TINY, 6.9 * TINY, 7.3 * TINY, 0.99, -1.01, 300, 1e-9],
        ),
        ("fp8_e5m2", [0.3 * 2.0**-16, 1.1, -3000.0, 0.49]),
        ("fp4_e2m1", [0.1, -0.4, 1.3, -5.1, 2.2]),
        ("int8", [0.02, -0.98, 126.5, -77.3]),
        ("int4", [0.5, -6.9, 3.1]),
        ("uint2", [0.4, 2.9, 1.5]),
    ],
)
def test_stochastic_rounding_takes_true_neighbours_and_is_unbiased(name: str, x: list):
    grid = GRIDS[name]
    n = 10_000
    x = np.asarray(x, np.float32)
    noise = np.random.default_rng(3).random((n, len(x)), np.float32)
    got = rounded(grid, np.broadcast_to(x, noise.shape), noise)
    got = np.asarray(got, np.float64)
    v = values(grid)
    above = np.searchsorted(v, x, side="left")
    low, high = v[above - 1], v[above]
    assert ((got == low) | (got == high)).all()
    error = np.sqrt((high - x) * (x - low) / n)
    assert (abs(got.mean(axis=0) - x) <= 4 * error).all()
    both = (high - x) * (x - low) > 1e-3 * (high - low) ** 2
    assert ((got == low).any(axis=0) & (got == high).any(axis=0))[both].all()


def test_stochastic_rounding_leaves_the_values_of_the_grid(grid: Grid):
    v = values(grid).astype(np.float32)
    for u in (0.0, 0.999):
        noise = np.full(v.shape, u, np.float32)
        np.testing.assert_array_equal(rounded(grid, v, noise), v)


def test_names_of_grids():
    assert get_grid("int4") is GRIDS["int4"]
    assert get_grid(GRIDS["int4"]) is GRIDS["int4"]
    with pytest.raises(ValueError, match="'fp8_e4m4'; near: fp8_e4m3"):
        get_grid("fp8_e4m4")
    with pytest.raises(ValueError, match=r"'int9'; near: .*int"):
        get_grid("int9")
    with pytest.raises(ValueError, match=r"'zzz'; grids: fp8_e4m3, .*uint8"):
        get_grid("zzz")
