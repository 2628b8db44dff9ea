# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The integer language model."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.models import egg

CONFIG = egg.Config(width=16, depth=2)


def test_the_logarithm_is_exact_at_every_step():
    def exact(total: int) -> int:
        return int(16 * math.log2(total / 16))

    largest = 256 * int(egg.EXP2[-1])
    steps = egg._STEPS
    sums = np.concatenate([steps, steps[1:] - 1, steps + 1, [largest]])
    found = np.searchsorted(steps, sums, side="right") - 1
    assert found.tolist() == [exact(int(s)) for s in sums]


def test_log_likelihood_is_that_of_a_softmax_to_a_sixteenth():
    logits = jax.random.randint(jax.random.key(0), (50, 256), -127, 128)
    targets = jax.random.randint(jax.random.key(1), (50,), 0, 256)
    got = egg.log_likelihood(logits.astype(jnp.int8), targets)
    assert got.dtype == jnp.int32
    scores = np.asarray(logits, np.float64) / 16
    total = np.log2(np.exp2(scores).sum(1))
    want = scores[np.arange(50), np.asarray(targets)] - total
    np.testing.assert_allclose(np.asarray(got) / 16, want, atol=0.15)


def test_shapes_dtypes_and_what_clears_the_state():
    params = egg.init(jax.random.key(0), CONFIG)
    d, n = 16, 2
    assert sum(x.size for x in jax.tree.leaves(params)) == 513 * d + n * (
        4 * d + 12 * d * d
    )
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("int8")}
    tokens = jax.random.randint(jax.random.key(1), (9,), 1, 256).at[4].set(0)
    run = jax.jit(egg.apply)
    logits, state = run(params, tokens, egg.zero_state(CONFIG))
    assert logits.shape == (9, 256) and state.shape == (2, 16)
    assert logits.dtype == state.dtype == jnp.int8
    # In two parts, with the state carried over.
    first, middle = egg.apply(params, tokens[:6], egg.zero_state(CONFIG))
    rest, last = egg.apply(params, tokens[6:], middle)
    np.testing.assert_array_equal(jnp.concatenate([first, rest]), logits)
    np.testing.assert_array_equal(last, state)
    # Byte 0 begins anew, whatever was before.
    other, _ = run(params, tokens.at[:4].set(7), egg.zero_state(CONFIG))
    np.testing.assert_array_equal(other[4:], logits[4:])
    assert np.any(other[:4] != logits[:4])


def test_bad_inputs_are_told():
    params, state = egg.init(jax.random.key(0), CONFIG), egg.zero_state(CONFIG)
    with pytest.raises(TypeError, match="tokens of float32"):
        egg.apply(params, jnp.ones(3), state)
    for tokens, memory in ((jnp.zeros((2, 3), int), state), (jnp.arange(3), state[:1])):
        with pytest.raises(ValueError, match=r"one text and \(2, 16\)"):
            egg.apply(params, tokens, memory)


def test_the_norm_of_almost_nothing():
    u = jnp.zeros(16, jnp.int8).at[3].set(5)
    scale = jnp.full(16, 16, jnp.int8)
    assert egg.norm(u, scale).tolist() == [80 if i == 3 else 0 for i in range(16)]
    assert egg.norm(u, scale, least=0).tolist() != egg.norm(u, scale).tolist()
    # Elsewhere it is the same.
    u = u.at[5].set(-90)
    np.testing.assert_array_equal(egg.norm(u, scale, least=0), egg.norm(u, scale))


def test_the_division_is_exact():
    sizes = np.arange(1, 128, dtype=np.int32)[:, None]
    x = np.arange(-(127**2), 127**2 + 1, dtype=np.int32)[None]
    found = jax.jit(jax.vmap(egg._over))(x.repeat(127, 0), sizes)
    np.testing.assert_array_equal(found, np.clip(x // sizes, -127, 127))


@pytest.mark.parametrize("width", [1, 2, 8, 32, 48, 100])
def test_widths_that_have_no_shift(width: int):
    with pytest.raises(
        ValueError, match=rf"width={width} is no power of 4.*: take \d+"
    ):
        egg.Config(width=width)
    with pytest.raises(ValueError, match="depth=0"):
        egg.Config(width=16, depth=0)
