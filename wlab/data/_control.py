# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Control problems as pure functions, and what a policy earns in them.

CartPole and Pendulum are as in gymnasium's CartPole-v1 and Pendulum-v1; `gymnax` gives
any environment of that library.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Environment(NamedTuple):
    """A problem of control; all its functions may be compiled and vmapped."""

    reset: Callable[[jax.Array], Any]
    """`reset(key)` returns a state."""

    observe: Callable[[Any], jax.Array]
    """`observe(state)` returns what a policy sees, float32 `[observation]`."""

    step: Callable[[Any, jax.Array, jax.Array], tuple[Any, jax.Array, jax.Array]]
    """`step(state, action, key)` returns the next state, the reward, and whether the
    episode has ended."""

    observation: int
    """Numbers that a policy sees."""

    actions: int
    """Actions to choose from, or numbers that an action has."""

    discrete: bool
    """Whether an action is one of `actions`, an integer, or numbers in [-1, 1]."""

    limit: int
    """Steps after which an episode ends."""


def cartpole() -> Environment:
    """A pole on a cart, pushed left (0) or right (1): 1 for every step that it stands.

    References:
        Barto, Sutton and Anderson, Neuronlike adaptive elements that can solve
        difficult learning control problems, 1983.
    """
    gravity, cart, pole, half, force, dt = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
    total = cart + pole

    def reset(key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (4,), jnp.float32, -0.05, 0.05)

    def step(state: Any, action: jax.Array, key: jax.Array) -> Any:
        del key
        x, v, angle, turn = state
        push = jnp.where(action == 1, force, -force)
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        pulled = (push + pole * half * turn**2 * sin) / total
        speeding = (gravity * sin - cos * pulled) / (
            half * (4 / 3 - pole * cos**2 / total)
        )
        moving = pulled - pole * half * speeding * cos / total
        new = jnp.stack(
            [x + dt * v, v + dt * moving, angle + dt * turn, turn + dt * speeding]
        )
        fell = (jnp.abs(new[0]) > 2.4) | (jnp.abs(new[2]) > 12 * 2 * jnp.pi / 360)
        return new, jnp.ones((), jnp.float32), fell

    return Environment(reset, lambda state: state, step, 4, 2, True, 500)


def pendulum() -> Environment:
    """A pendulum to be swung up and held: from -16.3 to 0 for every step.

    An action of 1 is a torque of 2.
    """
    gravity, dt, fastest, torque = 10.0, 0.05, 8.0, 2.0

    def reset(key: jax.Array) -> jax.Array:
        high = jnp.array([jnp.pi, 1.0])
        return jax.random.uniform(key, (2,), jnp.float32, -high, high)

    def observe(state: jax.Array) -> jax.Array:
        return jnp.stack([jnp.cos(state[0]), jnp.sin(state[0]), state[1]])

    def step(state: Any, action: jax.Array, key: jax.Array) -> Any:
        del key
        angle, speed = state
        u = torque * jnp.clip(action.reshape(()), -1.0, 1.0)
        off = (angle + jnp.pi) % (2 * jnp.pi) - jnp.pi
        cost = off**2 + 0.1 * speed**2 + 0.001 * u**2
        speed = speed + dt * (1.5 * gravity * jnp.sin(angle) + 3 * u)
        speed = jnp.clip(speed, -fastest, fastest)
        return jnp.stack([angle + dt * speed, speed]), -cost, jnp.zeros((), bool)

    return Environment(reset, observe, step, 3, 1, False, 200)


def gymnax(name: str) -> Environment:
    """An environment of gymnax, such as "Acrobot-v1".

    Raises:
        ModuleNotFoundError: where gymnax is not installed.
        ValueError: for a name that gymnax does not know, or actions that are neither
            one of several nor a vector.
    """
    try:
        library: Any = importlib.import_module("gymnax")
    except ImportError as error:
        raise ModuleNotFoundError(
            f"environment {name!r} is of gymnax: pip install 'wlab[rl]'", name="gymnax"
        ) from error
    if name not in library.registered_envs:
        known = ", ".join(sorted(library.registered_envs))
        raise ValueError(f"gymnax has no environment {name!r}: it has {known}")
    env, params = library.make(name)
    space = env.action_space(params)
    discrete = hasattr(space, "n")
    if not discrete and len(space.shape) != 1:
        raise ValueError(f"environment {name!r} has actions of shape {space.shape}")
    shape = env.observation_space(params).shape
    size = 1
    for n in shape:
        size *= n

    # The state holds what is seen, which gymnax returns and does not compute again.
    def reset(key: jax.Array) -> Any:
        seen, state = env.reset(key, params)
        return seen, state

    def step(state: Any, action: jax.Array, key: jax.Array) -> Any:
        if not discrete:
            low, high = jnp.asarray(space.low), jnp.asarray(space.high)
            action = low + (jnp.clip(action, -1.0, 1.0) + 1) / 2 * (high - low)
        # Releases before 1.0 return the end of an episode as one of five values.
        seen, inner, reward, *ends, _ = env.step_env(key, state[1], action, params)
        done = ends[0] if len(ends) == 1 else ends[0] | ends[1]
        return (seen, inner), jnp.asarray(reward, jnp.float32), done

    return Environment(
        reset,
        lambda state: jnp.asarray(state[0], jnp.float32).reshape(-1),
        step,
        size,
        int(space.n) if discrete else space.shape[0],
        discrete,
        int(params.max_steps_in_episode),
    )


def rollout(
    env: Environment, policy: Callable[[jax.Array], jax.Array], key: jax.Array
) -> jax.Array:
    """The sum of rewards of one episode.

    Args:
        env: where it is played.
        policy: from an observation to scores of the actions, of which the highest is
            taken, or to numbers whose tanh is the action.
        key: of the first state and of chance on the way.

    Returns:
        float32 scalar.
    """
    first, rest = jax.random.split(key)

    def one(carry: Any, i: jax.Array) -> tuple[Any, None]:
        state, total, over = carry
        out = policy(env.observe(state))
        action = jnp.argmax(out) if env.discrete else jnp.tanh(out)
        new, reward, done = env.step(state, action, jax.random.fold_in(rest, i))
        total = total + jnp.where(over, 0.0, reward)
        return (new, total, over | done), None

    start = (env.reset(first), jnp.zeros((), jnp.float32), jnp.zeros((), bool))
    return jax.lax.scan(one, start, jnp.arange(env.limit))[0][1]
