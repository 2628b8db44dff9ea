# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.es import shape_fitness

RAW = np.array([3.0, -1.0, 0.5, 2.0, 7.0, 2.0, 0.0, -4.0], np.float32)
FAILED = np.array([3.0, np.nan, 0.5, 2.0, np.inf, 2.0, 0.0, -4.0], np.float32)


def test_normalise_is_the_formula():
    np.testing.assert_allclose(
        shape_fitness(RAW), (RAW - RAW.mean()) / np.sqrt(RAW.var() + 1e-5), rtol=1e-5
    )


def test_groups_share_the_deviation_of_all():
    means = RAW.reshape(2, 4).mean(1).repeat(4)
    want = (RAW - means) / np.sqrt(RAW.var() + 1e-5)
    np.testing.assert_allclose(shape_fitness(RAW, group_size=4), want, rtol=1e-5)


def test_ranks_and_ties():
    got = shape_fitness(RAW, "ranks")
    want = np.array([6, 1, 3, 4.5, 7, 4.5, 2, 0]) / 7 - 0.5
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_signs_of_pairs():
    got = shape_fitness(np.array([3.0, 1.0, 2.0, 2.0, 0.0, 5.0]), "sign")
    assert got.tolist() == [1, -1, 0, 0, -1, 1]


def test_baseline_has_no_weight():
    got = shape_fitness(RAW, "baseline", 4).reshape(2, 4)
    groups = RAW.reshape(2, 4)
    want = (groups - groups[:, :1]) / (groups.std(1, keepdims=True) + 1e-8)
    want[:, :2] = 0
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("shaping", ["normalise", "ranks", "none"])
def test_who_failed_is_left_out(shaping: str):
    alive = np.isfinite(FAILED)
    got = np.asarray(jax.jit(lambda f: shape_fitness(f, shaping))(FAILED))
    np.testing.assert_allclose(
        got[alive], shape_fitness(FAILED[alive], shaping), rtol=1e-5, atol=1e-6
    )
    assert not got[~alive].any()


def test_a_pair_of_which_one_failed_says_nothing():
    assert shape_fitness(FAILED, "sign").tolist() == [0, 0, -1, 1, 0, 0, 1, -1]


def test_a_failed_baseline_says_nothing():
    fitness = np.concatenate([[np.nan], RAW[1:]])
    assert not np.any(shape_fitness(fitness, "baseline", 4)[:4])


@pytest.mark.parametrize("shaping", ["normalise", "ranks", "sign", "baseline"])
@pytest.mark.parametrize("group", [None, 6])
def test_constant_fitness_says_nothing(shaping: str, group: int | None):
    shape = jax.jit(lambda fitness: shape_fitness(fitness, shaping, group))
    assert not np.any(shape(np.full(12, 0.1, np.float32)))


def test_all_failed():
    assert shape_fitness(jnp.full(4, jnp.nan)).tolist() == [0, 0, 0, 0]


def test_a_function_sees_no_failed_fitness():
    got = shape_fitness(FAILED, lambda f: f + 1)
    want = np.where(np.isfinite(FAILED), FAILED + 1, 0)
    np.testing.assert_array_equal(got, want)


def test_integers_are_fitness():
    np.testing.assert_array_equal(
        shape_fitness(jnp.array([3, 1, 2, 2]), "sign"), [1, -1, 0, 0]
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"group_size=3 does not divide .* 8"):
        shape_fitness(RAW, group_size=3)
    with pytest.raises(ValueError, match="no shaping 'rank'"):
        shape_fitness(RAW, "rank")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"shape \(2, 4\): one number for each"):
        shape_fitness(RAW.reshape(2, 4))
    with pytest.raises(ValueError, match="3 members are no pairs"):
        shape_fitness(RAW[:3], "sign")
