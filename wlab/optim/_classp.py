# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""CLASSP: what past tasks have moved moves less (a transform).

For each weight the powers of its gradients are summed, over all tasks, and divide its
learning rate; a weight whose squared gradient is under a threshold waits. What was
important freezes, what was not stays free, without a Fisher matrix or old weights:

.. math::

    \text{where } g^2 > \theta: \qquad a' = a + |g|^p, \qquad
    w' = w - \eta\, g\, (\epsilon + a')^{-1/p}

and elsewhere neither the weight nor its sum changes. With :math:`p = 2` and no
threshold it is AdaGrad that starts from zero.

The sum takes the gradient of the step itself, and only where it passes the threshold,
as the author's pseudo-code has it; the paper's equation ends one step before.

References:
    Ludwig, `CLASSP: a Biologically-Inspired Approach to Continual Learning through
    Adjustment Suppression and Sparsity Promotion <https://arxiv.org/abs/2405.09637>`_,
    2024.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wlab.core import leaves_with_paths, map_with_path
from wlab.core._tree import stacked_axes

Mode = Literal["paper", "official"]
Value = ArrayLike | optax.Schedule


class ClasspState(NamedTuple):
    """State of `scale_by_classp`; nothing of it is reset when the task changes."""

    count: jax.Array  # int32, steps taken
    accum: Any  # sums of the gradients' powers, float32 at least, like the parameters


def scale_by_classp(
    threshold: Value = 0.5,
    power: ArrayLike = 1.0,
    eps: ArrayLike = 1e-5,
    apply_scaling: Value = True,
    *,
    mode: Mode = "paper",
) -> optax.GradientTransformationExtraArgs:
    """CLASSP without its learning rate; see `classp`.

    Args:
        threshold: as in `classp`.
        power: as in `classp`.
        eps: as in `classp`.
        apply_scaling: as in `classp`.
        mode: as in `classp`.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: as `classp` does.
    """
    _check_mode(mode)
    for name, value in (("power", power), ("eps", eps)):
        if isinstance(value, (int, float)) and not value > 0:
            raise ValueError(f"{name}={value} must be positive")

    def init(params: Any) -> ClasspState:
        # Derived from the leaf, so that it is sharded as the leaf is.
        accum = jax.tree.map(lambda x: jnp.zeros_like(x, dtype=_wide(x)), params)
        return ClasspState(jnp.zeros([], jnp.int32), accum)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params, extra_args
        scaled = jnp.asarray(_at(apply_scaling, state.count)) != 0
        gates = _gates(updates, _at(threshold, state.count), mode)
        official = mode == "official"  # whose sums are of absolute values, always

        def total(g: jax.Array, gate: jax.Array, a: jax.Array) -> jax.Array:
            size = jnp.abs(g.astype(a.dtype))
            more = size if official else _raise(size, power)
            return a + jnp.where(gate, more, 0)

        def direction(g: jax.Array, gate: jax.Array, a: jax.Array) -> jax.Array:
            wide = g.astype(a.dtype)
            root = _root(a + eps, power).astype(a.dtype)
            # Zero only if eps is, and then so is all that was ever summed.
            suppressed = jnp.where(root > 0, wide / root, 0)
            out = jnp.where(scaled, suppressed, wide)
            return jnp.where(gate, out, 0).astype(g.dtype)

        accum = jax.tree.map(total, updates, gates, state.accum)
        out = jax.tree.map(direction, updates, gates, accum)
        return out, ClasspState(jnp.asarray(optax.safe_increment(state.count)), accum)

    return optax.GradientTransformationExtraArgs(init, update)


def classp(
    learning_rate: optax.ScalarOrSchedule,
    threshold: Value = 0.5,
    power: ArrayLike = 1.0,
    eps: ArrayLike = 1e-5,
    apply_scaling: Value = True,
    *,
    mode: Mode = "paper",
) -> optax.GradientTransformationExtraArgs:
    """SGD whose every weight slows down with all that has ever moved it.

    What changes with the task may be a number, an array or a schedule, as
    `classp_task_schedule` makes it. The usual course is a first task with
    ``apply_scaling=False``, plain SGD while the sums fill, and then the others with
    it. The state goes from task to task untouched: to start anew forgets.

    Args:
        learning_rate: a number or a schedule. With `power` 1 the first step of a weight
            that was never moved is about this large, whatever its gradient.
        threshold: of the squared gradient of one weight; what is not over it stays. The
            default, the author's, stops all that is under 0.7, which with losses that
            are means is nearly all: 1e-6 to 1e-4 are of use, and a negative number
            leaves nothing out.
        power: of the gradients in the sum, whose root is taken after.
        eps: added to the sum, under the root.
        apply_scaling: whether the sums divide; else they only fill.
        mode: "paper", or "official" for what the author's published optimiser computes:
            a tensor moves whole where any of its gradients is not zero (and the
            threshold under 1), and sums absolute values for every power. Stacked layers
            are tensors of their own.

    Returns:
        A gradient transformation; its sums take 4 bytes a parameter.

    Raises:
        ValueError: for an unknown mode; for `power` or `eps` that are not positive.

    Examples:
        >>> tx = classp(0.1, threshold=1e-4)
        >>> w = jnp.zeros(3)
        >>> state = tx.init(w)
        >>> updates, state = tx.update(jnp.array([2.0, -0.5, 0.001]), state)
        >>> print(updates.round(3))  # the last one's square is under the threshold
        [-0.1  0.1 -0. ]
        >>> updates, state = tx.update(jnp.array([0.5, 0.5, 0.0]), state)
        >>> print(updates.round(3))  # over sums of 2.5 and 1
        [-0.02 -0.05 -0.  ]
    """
    return optax.chain(
        scale_by_classp(threshold, power, eps, apply_scaling, mode=mode),
        optax.scale_by_learning_rate(learning_rate),
    )


def classp_task_schedule(
    boundaries: Sequence[int], **values: ArrayLike | Sequence[Any]
) -> dict[str, Any]:
    """Hyperparameters that change with the task, as schedules by name.

    They are what `classp` takes, and what `optax.inject_hyperparams` of it does.

    Args:
        boundaries: the steps at which the second task and those after it begin.
        **values: for each hyperparameter a value for every task, or one for all.

    Returns:
        A schedule for each name: from the count of steps to the task's value.

    Raises:
        ValueError: if the boundaries do not ascend from a positive one, or a
            hyperparameter has not one value for each task.

    Examples:
        >>> tasks = classp_task_schedule(
        ...     [400, 500],
        ...     learning_rate=[0.2, 0.1, 0.05],
        ...     threshold=-1.0,
        ...     apply_scaling=[False, True, True],
        ... )
        >>> [tasks["learning_rate"](step).item() for step in (399, 400)]
        [0.20000000298023224, 0.10000000149011612]
        >>> tx = classp(**tasks)
    """
    steps = [0, *boundaries]
    if any(b <= a for a, b in itertools.pairwise(steps)):
        raise ValueError(
            f"boundaries={list(boundaries)} must ascend from a step over zero: each is "
            "where a task after the first begins"
        )

    def schedule(name: str, value: Any) -> optax.Schedule:
        by_task = jnp.asarray(value)
        if by_task.ndim == 0:
            by_task = jnp.broadcast_to(by_task, (len(steps),))
        if by_task.shape != (len(steps),):
            raise ValueError(
                f"{name}={value!r}: {len(boundaries)} boundaries part "
                f"{len(steps)} tasks; give one value for each, or one for all"
            )

        def at(count: ArrayLike) -> jax.Array:
            task = jnp.searchsorted(jnp.asarray(steps[1:]), count, side="right")
            return by_task[task]

        return at

    return {name: schedule(name, value) for name, value in values.items()}


def classp_open_fraction(
    updates: Any, threshold: ArrayLike, *, mode: Mode = "paper"
) -> jax.Array:
    """The share of all weights that a step with these gradients moves.

    Args:
        updates: gradients, as `classp` gets them.
        threshold: as in `classp`, a number.
        mode: as in `classp`.

    Returns:
        A float32 scalar; NaN for a tree without numbers.

    Examples:
        >>> print(classp_open_fraction({"w": jnp.array([0.1, -2.0])}, 0.5))
        0.5
    """
    _check_mode(mode)
    gates = jax.tree.map(
        lambda g, gate: jnp.broadcast_to(gate, g.shape),
        updates,
        _gates(updates, threshold, mode),
    )
    leaves = jax.tree.leaves(gates)
    size = sum(gate.size for gate in leaves)
    opened = sum((jnp.sum(g, dtype=jnp.float32) for g in leaves), jnp.float32(0))
    return opened / jnp.float32(size)


def _check_mode(mode: str) -> None:
    if mode not in ("paper", "official"):
        raise ValueError(f"mode {mode!r} is neither 'paper' nor 'official'")


def _wide(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _at(value: Any, count: jax.Array) -> Any:
    return value(count) if callable(value) else value


def _gates(updates: Any, threshold: Any, mode: Mode) -> Any:
    """Which entries move: booleans that broadcast against the leaves."""
    if mode == "paper":
        return jax.tree.map(
            lambda g: jnp.square(g.astype(_wide(g))) > threshold, updates
        )
    stacked = stacked_axes({p: g.shape for p, g in leaves_with_paths(updates)})

    def gate(path: str, g: jax.Array) -> jax.Array:
        axes = tuple(range(min(stacked[path], g.ndim), g.ndim))
        nonzero = jnp.square(g.astype(_wide(g))) != 0
        return jnp.any(nonzero, axes, keepdims=True).astype(_wide(g)) > threshold

    return map_with_path(gate, updates)


def _raise(size: jax.Array, power: Any) -> jax.Array:
    if isinstance(power, (int, float)) and power in (1, 2):
        return size if power == 1 else size * size
    return (size**power).astype(size.dtype)


def _root(x: Any, power: Any) -> jax.Array:
    if isinstance(power, (int, float)) and power in (1, 2):
        return x if power == 1 else jnp.sqrt(x)
    return x ** (1 / power)
