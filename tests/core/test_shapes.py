# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reshapes as groups of axes, windows, and gathers along one axis."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from wlab.core import _shapes


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ((6, 4, 5), (6, 20), [((0,), (0,)), ((1, 2), (1,))]),
        ((6, 20), (6, 4, 5), [((0,), (0,)), ((1,), (1, 2))]),
        ((4, 3), (6, 2), [((0, 1), (0, 1))]),
        ((3, 1, 4), (3, 4), [((0,), (0,)), ((1,), ()), ((2,), (1,))]),
        ((), (1,), [((), (0,))]),
        ((1, 1), (), [((0,), ()), ((1,), ())]),
        ((3, 0), (0, 7), None),
    ],
)
def test_reshape_blocks(old: Any, new: Any, wanted: Any):
    assert _shapes.reshape_blocks(old, new) == wanted


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_are_reshapes_by_themselves(data: st.DataObject):
    """Every axis once, in order, of equal size on both sides, and none smaller."""
    factors = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=7))

    def grouped() -> tuple[int, ...]:
        shape = [1]
        for n in factors:
            shape[-1] *= n
            if data.draw(st.booleans()):
                shape.append(1)
        return tuple(shape)

    old, new = grouped(), grouped()
    blocks = _shapes.reshape_blocks(old, new)
    assert blocks is not None
    for side, shape in enumerate((old, new)):
        assert [a for b in blocks for a in b[side]] == list(range(len(shape)))
    for old_axes, new_axes in blocks:
        left, right = ([s[a] for a in b] for s, b in ((old, old_axes), (new, new_axes)))
        assert math.prod(left) == math.prod(right)
        # No place inside, at which both sides could be cut, but for axes of size one.
        ends = set(np.cumprod(left)[:-1]) & set(np.cumprod(right)[:-1])
        assert ends <= {1, math.prod(left)}


def test_window_is_the_slice():
    x = jnp.arange(60).reshape(5, 12)
    got = _shapes.window(x, (1, 2), (3, 4), (1, 3))
    np.testing.assert_array_equal(got, x[1:4, 2:12:3])
    got = _shapes.window(x, (1, jnp.asarray(2)), (3, 4), None)
    np.testing.assert_array_equal(got, x[1:4, 2:6])
    assert _shapes.window(x, (1, 12), (3, 0), (1, 1)).shape == (3, 0)


def gather_params(jaxpr: Any) -> dict[str, Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive is lax.gather_p:
            return eqn.params
        if "jaxpr" in eqn.params and (found := gather_params(eqn.params["jaxpr"])):
            return found
    return {}


@pytest.mark.parametrize(
    ("fn", "axis"),
    [
        (lambda x, i: jnp.take(x, i, axis=1, mode="clip"), 1),
        (lambda x, i: jnp.take(x, i, axis=0, mode="fill"), 0),
        (lambda x, i: x.at[:, i].get(mode="promise_in_bounds"), 1),
        (lambda x, i: jnp.take_along_axis(x, i[:, :, None], 1, mode="clip"), None),
        (lambda x, i: x.at[i, 0].get(mode="clip"), None),
    ],
)
def test_gather_along_one_axis(fn: Any, axis: int | None):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    indices = jnp.asarray([[1, 0], [0, 1]])
    params = gather_params(jax.make_jaxpr(fn)(x, indices))
    assert _shapes.single_axis_gather(x.shape, params) == axis
    if axis is None:
        return
    taken = _shapes.gather_axis(x, indices[..., None], axis, params)
    kept = [10 + i for i in range(3) if i != axis]
    labels = _shapes.gather_labels(kept, [0, 1], params)
    order = [[0, 1, *kept].index(label) for label in labels]
    np.testing.assert_array_equal(taken.transpose(order), fn(x, indices))
