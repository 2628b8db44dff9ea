# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.data import control


def test_cartpole_by_hand():
    env = control.cartpole()
    x, v, angle, turn = 0.1, -0.2, 0.05, 0.3
    push = -10.0
    pulled = (push + 0.05 * turn**2 * math.sin(angle)) / 1.1
    speeding = (9.8 * math.sin(angle) - math.cos(angle) * pulled) / (
        0.5 * (4 / 3 - 0.1 * math.cos(angle) ** 2 / 1.1)
    )
    moving = pulled - 0.05 * speeding * math.cos(angle) / 1.1
    want = [
        x + 0.02 * v,
        v + 0.02 * moving,
        angle + 0.02 * turn,
        turn + 0.02 * speeding,
    ]
    new, reward, done = env.step(
        jnp.array([x, v, angle, turn]), jnp.int32(0), jax.random.key(0)
    )
    np.testing.assert_allclose(new, want, rtol=1e-5)
    assert float(reward) == 1 and not done
    for state in ([2.39, 2.0, 0.0, 0.0], [0.0, 0.0, 0.209, 1.0]):
        assert env.step(jnp.array(state), jnp.int32(1), jax.random.key(0))[2]


def test_pendulum_by_hand():
    env = control.pendulum()
    new, reward, done = env.step(
        jnp.array([4.0, 1.0]), jnp.array([0.5]), jax.random.key(0)
    )
    off = 4.0 - 2 * math.pi
    np.testing.assert_allclose(-reward, off**2 + 0.1 + 0.001, rtol=1e-5)
    speed = 1.0 + 0.05 * (15 * math.sin(4.0) + 3 * 1.0)
    np.testing.assert_allclose(new, [4.0 + 0.05 * speed, speed], rtol=1e-5)
    assert not done
    np.testing.assert_allclose(
        env.observe(jnp.array([1.0, 2.0])), [math.cos(1), math.sin(1), 2], rtol=1e-6
    )


def test_an_episode_ends_where_the_pole_falls():
    """A hand-made policy holds it up; one that pushes one way loses it soon."""
    env = control.cartpole()
    held = lambda seen: jnp.stack([jnp.zeros(()), seen[2] + 0.5 * seen[3]])  # noqa: E731
    keys = jax.random.split(jax.random.key(0), 4)
    run = jax.jit(jax.vmap(lambda k: control.rollout(env, held, k)))
    assert np.all(run(keys) == 500)
    left = lambda seen: jnp.array([1.0, 0.0])  # noqa: E731
    soon = jax.jit(jax.vmap(lambda k: control.rollout(env, left, k)))(keys)
    assert np.all(soon < 15) and np.all(soon >= 8)


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnax", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wlab\[rl\]'"):
        control.gymnax("Acrobot-v1")


def test_environments_of_gymnax():
    pytest.importorskip("gymnax", reason="the extra rl is not installed")
    for name, discrete, actions in (
        ("Acrobot-v1", True, 3),
        ("MountainCarContinuous-v0", False, 1),
    ):
        env = control.gymnax(name)
        assert (env.discrete, env.actions) == (discrete, actions)
        policy = lambda seen, n=actions: jnp.zeros(n) + seen.sum() * 0  # noqa: E731
        total = jax.jit(
            lambda k, env=env, policy=policy: control.rollout(env, policy, k)
        )(jax.random.key(0))
        assert total.shape == () and np.isfinite(total)
    # The same numbers as ours.
    ours, theirs = control.cartpole(), control.gymnax("CartPole-v1")
    held = lambda seen: jnp.stack([jnp.zeros(()), seen[2] + 0.5 * seen[3]])  # noqa: E731
    for env in (ours, theirs):
        assert float(control.rollout(env, held, jax.random.key(3))) == 500
    with pytest.raises(ValueError, match="gymnax has no environment 'Chess'"):
        control.gymnax("Chess")
