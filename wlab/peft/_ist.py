# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""IST: the layers whose adapters matter most are trained most often (transform).

Each layer has an importance :math:`I`. In every step the adapters of k layers are
trained, drawn without replacement with weights :math:`\sigma(I)`. Every few steps
importance learns from trials: in trial j the adapters of a set :math:`S_j` of layers,
drawn with weights :math:`\sigma(-I)`, are held down, and the loss :math:`l_j` of a
small batch moves

.. math::

    I_i \leftarrow I_i - \eta\, r_j\, p_i (1 - p_i) \quad (i \in S_j), \qquad
    r_j = e^{-l_j} - \mathrm{mean}\, e^{-l}, \quad p = \sigma(-I)

so that a layer whose suppression raises the loss gains. The authors' code holds
:math:`s = -I`.

References:
    Yao, Gao, Xu, Ma and others, `Layer-wise Importance Matters: Less Memory for Better
    Performance in Parameter-efficient Fine-tuning of Large Language Models
    <https://arxiv.org/abs/2410.11772>`_, 2024.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from wlab.core import Draw, Select, subset, subsets


class Importance(NamedTuple):
    """What is known of the layers."""

    importance: jax.Array  # float32 [layers]
    count: jax.Array  # int32, updates made


def ist_init(layers: int) -> Importance:
    """All layers alike.

    Args:
        layers: how many.
    """
    return Importance(jnp.zeros(layers), jnp.zeros([], jnp.int32))


def ist_sample(
    key: jax.Array, state: Importance, n: int, *, suppress: bool = False
) -> jax.Array:
    """Layers without replacement: those to train, or those to hold down.

    Args:
        key: a random key.
        state: the layers' importance.
        n: how many.
        suppress: draw unimportant ones, with weights ``sigmoid(-I)``.

    Returns:
        int32 [n], all different.
    """
    sign = -1 if suppress else 1
    noise = jax.random.gumbel(key, state.importance.shape)
    weights = jax.nn.log_sigmoid(sign * state.importance)
    return jax.lax.top_k(weights + noise, n)[1].astype(jnp.int32)


def ist_update(
    state: Importance, held_down: jax.Array, losses: jax.Array, rate: float = 10.0
) -> Importance:
    """Importance from the losses of trials.

    Args:
        state: the layers' importance.
        held_down: int [trials, n], the layers of each trial.
        losses: [trials].
        rate: the learning rate.

    Returns:
        The state; layers in no trial, and all of them if the losses are equal, stay.
    """
    p = jax.nn.sigmoid(-state.importance)
    value = jnp.exp(-losses)
    reward = (value - value.mean()) * rate
    step = reward[:, None] * (p * (1 - p))[held_down]
    moved = state.importance.at[held_down].add(-step.astype(state.importance.dtype))
    return Importance(moved, state.count + 1)


def ist_probe(
    key: jax.Array,
    state: Importance,
    loss_fn: Callable[[jax.Array], jax.Array],
    *,
    trials: int = 3,
    fraction: float = 0.5,
    factor: float = 0.25,
    rate: float = 10.0,
) -> Importance:
    """Trials of one batch, all in one vmap, and the update they give.

    Args:
        key: a random key.
        state: the layers' importance.
        loss_fn: the loss when the adapter of each layer is multiplied by these numbers,
            [layers]; with a stacked adapter, the `scale` of its `attach`.
        trials: how many.
        fraction: of the layers is held down, at least one.
        factor: to this part of their adapters.
        rate: the learning rate.

    Returns:
        The state.
    """
    layers = state.importance.shape[0]
    n = max(1, int(fraction * layers))
    keys = jax.random.split(key, trials)
    held = jax.vmap(lambda k: ist_sample(k, state, n, suppress=True))(keys)
    scales = jax.vmap(lambda i: jnp.ones(layers).at[i].set(factor))(held)
    return ist_update(state, held, jax.vmap(loss_fn)(scales), rate)


def ist(
    inner: optax.GradientTransformation,
    fraction: float = 0.25,
    *,
    select: Select | None = None,
    rest: optax.GradientTransformation | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Trains the adapters of some layers in each step, the important ones more often.

    A layer that is not drawn keeps parameters, moments and step count to the bit. Each
    layer has its own state, so that `inner` is mapped over the drawn ones.

    Args:
        inner: the optimiser of a layer, such as `optax.adam(2e-4)`.
        fraction: of the layers in each step, at least one.
        select: which leaves of ``adapter.train`` are layers, as in `wlab.core.subset`:
            stacks along their first axis, named by a pattern such as ``blocks/*``.
            None: layers found by their names (``blocks_0``, ``blocks_1``, ...).
        rest: of the leaves that are no layer; None: `inner`.
        key: a random key or a seed for the draws.

    Returns:
        A transform whose `update` takes ``importance=``, float [layers]; without it all
        layers are alike (RST, the paper's baseline).

    Raises:
        ValueError: if `fraction` is not in (0, 1], and as `wlab.core.subset` does.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"ist: fraction={fraction} must be above 0 and at most 1")

    def choose(draw: Draw) -> jax.Array:
        known = draw.extra.get("importance")
        if known is None:
            return subsets.at_random(draw)
        if jnp.shape(known) != (draw.size,):
            raise ValueError(
                f"ist: importance of shape {jnp.shape(known)} for the {draw.size} "
                f"layers of {draw.name!r}"
            )
        state = Importance(jnp.asarray(known), jnp.zeros([], jnp.int32))
        return ist_sample(draw.key, state, draw.k)

    return subset(
        inner,
        lambda n: max(1, int(fraction * n)),
        choose=choose,
        reset="keep",
        rest=inner if rest is None else rest,
        select=select,
        key=key,
    )
