# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""ECO: quantised training without full-precision master weights (a transform).

The weights are stored on a number grid only. What rounding takes away in a step is
put, suitably scaled, into the optimiser's first moment, which so becomes the
accumulator of the error: no copy of the weights, no buffer, no new hyperparameter.

.. math::

    \tilde\theta &= (1 - \eta\lambda)\,\theta - \eta\,U(m), \qquad
    \theta' = q(\tilde\theta), \qquad e = \tilde\theta - \theta' \\
    m' &= m + \tfrac1\eta\,(1 - \tfrac1\beta)\, U_m^{-1}(e)

where :math:`U_m` is the (for a given state linear) map from momentum to update: the
identity for SGD, a division by the root of the second moment for Adam, the
orthogonalisation for Muon.

References:
    Nikdan, Zandieh, Alistarh and Mirrokni, `ECO: Quantized Training without
    Full-Precision Master Weights <https://arxiv.org/abs/2601.22101>`_, 2026.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from wlab.core import (
    Select,
    Views,
    fold_path,
    leaves_with_paths,
    map_with_path,
    typed_key,
)
from wlab.optim._feedback import (
    Direction,
    Injection,
    Scalar,
    Stepped,
    adam_direction,
    feedback_step,
    muon_direction,
    sgd_direction,
)
from wlab.optim._leaves import Plan, checked_gradient, plans, requantise, uniform
from wlab.quant import (
    Granularity,
    Grid,
    Quantized,
    Rounding,
    check_finite,
    get_grid,
)


class EcoState(NamedTuple):
    """State of the ECO transforms; leaves that are not quantised are masked out."""

    count: jax.Array  # int32, steps taken
    key: jax.Array | None  # typed key of the stochastic rounding
    mu: Any  # momentum, float32, like the dense parameters
    nu: Any  # second moment (Adam), likewise; else None
    residual: Any  # error still owed (injection="exact"), likewise; else None
    rest: optax.OptState  # of the optimiser of the leaves in full precision


def eco(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.9,
    b2: Scalar = 0.98,
    eps: Scalar = 1e-9,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    *,
    grid: str | Grid = "fp8_e4m3",
    rounding: Rounding = "nearest",
    granularity: Granularity | None = None,
    injection: Injection = "paper",
    select: Select | None = None,
    views: Views | None = None,
    full_precision: optax.GradientTransformation | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Adam(W) on quantised weights, without a full-precision copy of them.

    The same four lines serve two forms of the parameters. *Packed*: the tree that
    `wlab.quant.quantize_tree` makes, with `Quantized` leaves; an update holds their
    differences in storage, which `optax.apply_updates` adds exactly, and FP8 costs 9
    bytes a parameter with this state. *Dense*: plain arrays whose values lie on the
    grid (to the last rounding of their dtype), for wrappers that need arrays of the
    parameters' shape, such as `optax.MultiSteps`. In both, gradients are taken at
    ``wlab.materialise(params)``. Under `optax.inject_hyperparams` a tree packed in 4
    bits needs ``hyperparam_dtype=jnp.float32``: optax looks for a dtype that all leaves
    promote to, and such codes have none.

    Args:
        learning_rate: a number or a schedule; the same value moves the weights and
            scales the injection.
        b1: decay of the first moment, between 0 and 1, both excluded.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay, times the learning rate.
        mask: which leaves decay, as in `optax.adamw`; None: all.
        grid: the number grid, a `Grid` or its name.
        rounding: "nearest" or "stochastic".
        granularity: "row" (a scale for each output), or "tensor" (one for each
            matrix). None: tensor for int4 and narrower, row for the others.
        injection: what the momentum gets back: "paper", the residual without a factor
            for weight decay; "decayed", times one minus learning rate times decay;
            "virtual", the coefficient that keeps the virtual sequence exact under
            decay; "none", nothing, the naive baseline.
        select: which leaves of a dense tree are quantised, as in `wlab.core.select`;
            None: kernels of linear layers and convolutions, so that embeddings, head,
            norms and biases stay in full precision. In a packed tree the `Quantized`
            leaves are the selection.
        views: which axes of a leaf are inputs and outputs, where names do not tell.
        full_precision: the optimiser of the other leaves; None: `optax.adamw` with
            the same hyperparameters.
        key: a random key or a seed for stochastic rounding.

    Returns:
        A gradient transformation that takes any extra arguments.

    Raises:
        ValueError: at build time for values out of range; at `init` and `update` for a
            pattern that matches nothing, a packed leaf of another grid, a leaf with
            NaN, gradients that do not fit; each names the leaf.
        TypeError: for a selected leaf that is not a float array.

    Examples:
        >>> import wlab
        >>> params = {"dense": {"kernel": jnp.array([[1.0, 0.5], [0.3, -2.0]])}}
        >>> params = wlab.quant.quantize_tree(params, "fp8_e4m3")
        >>> tx = eco(1e-3, grid="fp8_e4m3", rounding="nearest")
        >>> state = tx.init(params)
        >>> loss = lambda p: jnp.sum(p["dense"]["kernel"] ** 2)
        >>> @jax.jit
        ... def step(params, state):
        ...     grads = jax.grad(loss)(wlab.materialise(params))
        ...     updates, state = tx.update(grads, state, params)
        ...     return optax.apply_updates(params, updates), state
        >>> for _ in range(100):
        ...     params, state = step(params, state)
        >>> bool(loss(wlab.materialise(params)) < 5.0)
        True
    """
    _check_rates(b1=b1, b2=b2)
    if injection == "exact":
        raise ValueError(
            "injection='exact' needs the size of the next step, which for Adam depends "
            "on the next gradient: use eco_sgd, or injection='virtual'"
        )
    if full_precision is None:
        full_precision = optax.adamw(
            learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask
        )

    def direction(g: Any, m: Any, v: Any, t: Any, plan: Plan) -> Direction:
        del plan
        return adam_direction(g, m, v, t, b1=b1, b2=b2, eps=eps)

    return _eco(
        learning_rate,
        direction,
        b1=b1,
        weight_decay=weight_decay,
        mask=mask,
        grid=grid,
        rounding=rounding,
        granularity=granularity,
        injection=injection,
        select=select,
        views=views,
        full_precision=full_precision,
        key=key,
        second_moment=True,
    )


def eco_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar = 0.9,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    *,
    grid: str | Grid = "fp8_e4m3",
    rounding: Rounding = "nearest",
    granularity: Granularity | None = None,
    injection: Injection = "paper",
    select: Select | None = None,
    views: Views | None = None,
    full_precision: optax.GradientTransformation | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """SGD with averaged momentum on quantised weights; see `eco`.

    Args:
        learning_rate: a number or a schedule.
        momentum: decay of the average ``m = momentum m + (1 - momentum) g``.
        weight_decay: as in `eco`.
        mask: as in `eco`.
        grid: as in `eco`.
        rounding: as in `eco`.
        granularity: as in `eco`.
        injection: as in `eco`; or "exact", which stores the residual in a buffer of
            the size of the weights and follows training with master weights exactly,
            also under a schedule: the reference that the others approximate.
        select: as in `eco`.
        views: as in `eco`.
        full_precision: the optimiser of the other leaves; None: the same SGD.
        key: as in `eco`.

    Returns:
        A gradient transformation that takes any extra arguments.

    Raises:
        ValueError: as `eco` does.
        TypeError: as `eco` does.
    """
    _check_rates(momentum=momentum)
    if full_precision is None:
        full_precision = optax.chain(
            optax.ema(momentum, debias=False),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )

    def direction(g: Any, m: Any, v: Any, t: Any, plan: Plan) -> Direction:
        del v, t, plan
        return sgd_direction(g, m, b1=momentum)

    return _eco(
        learning_rate,
        direction,
        b1=momentum,
        weight_decay=weight_decay,
        mask=mask,
        grid=grid,
        rounding=rounding,
        granularity=granularity,
        injection=injection,
        select=select,
        views=views,
        full_precision=full_precision,
        key=key,
    )


def eco_muon(
    learning_rate: optax.ScalarOrSchedule,
    b1: Scalar = 0.95,
    weight_decay: Scalar = 0.0,
    mask: Any = None,
    *,
    ns_steps: int = 5,
    grid: str | Grid = "fp8_e4m3",
    rounding: Rounding = "nearest",
    granularity: Granularity | None = None,
    injection: Literal["paper", "decayed", "virtual", "none"] = "decayed",
    select: Select | None = None,
    views: Views | None = None,
    full_precision: optax.GradientTransformation | None = None,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon on quantised weights; see `eco`.

    Each matrix moves along its orthogonalised momentum, scaled by the root of outputs
    over inputs; the residual goes back through the inverse of that map, which costs a
    matrix square root of the smaller side. The paper has no such variant.

    Args:
        learning_rate: a number or a schedule.
        b1: decay of the averaged momentum.
        weight_decay: as in `eco`.
        mask: as in `eco`.
        ns_steps: iterations of the Newton-Schulz orthogonalisation.
        grid: as in `eco`.
        rounding: as in `eco`.
        granularity: as in `eco`.
        injection: as in `eco`.
        select: as in `eco`.
        views: as in `eco`.
        full_precision: the optimiser of the other leaves; None: `optax.adamw` with
            this learning rate.
        key: as in `eco`.

    Returns:
        A gradient transformation that takes any extra arguments.

    Raises:
        ValueError: as `eco` does.
        TypeError: as `eco` does.

    References:
        Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024;
        Cesista, `ECO for matrix norms <https://leloykun.github.io/ponder/eco/>`_, 2026.
    """
    _check_rates(b1=b1)
    if injection == "exact":
        raise ValueError("injection='exact' exists for eco_sgd only")
    if full_precision is None:
        full_precision = optax.adamw(
            learning_rate, weight_decay=weight_decay, mask=mask
        )

    def direction(g: Any, m: Any, v: Any, t: Any, plan: Plan) -> Direction:
        del v, t
        return muon_direction(g, m, plan.view, b1=b1, ns_steps=ns_steps)

    return _eco(
        learning_rate,
        direction,
        b1=b1,
        weight_decay=weight_decay,
        mask=mask,
        grid=grid,
        rounding=rounding,
        granularity=granularity,
        injection=injection,
        select=select,
        views=views,
        full_precision=full_precision,
        key=key,
    )


def _eco(
    learning_rate: optax.ScalarOrSchedule,
    direction: Callable[..., Direction],
    *,
    b1: Scalar,
    weight_decay: Scalar,
    mask: Any,
    grid: str | Grid,
    rounding: Rounding,
    granularity: Granularity | None,
    injection: Injection,
    select: Select | None,
    views: Views | None,
    full_precision: optax.GradientTransformation,
    key: jax.Array | int,
    second_moment: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """The transform of any direction: which leaves, which rate, which state."""
    grid = get_grid(grid)
    if grid.kind == "uint":
        raise ValueError(f"ECO needs a symmetric grid, not {grid.name!r}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding {rounding!r} is neither 'nearest' nor 'stochastic'")
    if injection not in ("paper", "decayed", "virtual", "exact", "none"):
        raise ValueError(
            f"injection {injection!r} is none of 'paper', 'decayed', 'virtual', "
            "'exact', 'none'"
        )
    planned = functools.partial(
        plans, grid=grid, granularity=granularity, select=select, views=views
    )
    rest_tx = optax.with_extra_args_support(full_precision)

    def rest_of(plan: dict[str, Plan]) -> optax.GradientTransformationExtraArgs:
        def others(tree: Any) -> Any:
            return map_with_path(lambda path, _: path not in plan, tree)

        return optax.masked(rest_tx, others, mask_compatible_extra_args=True)

    def init(params: Any) -> Any:
        plan = planned(params)
        for path, leaf in leaves_with_paths(params):
            if path in plan:
                check_finite(path, leaf)

        def zeros() -> Any:
            def zero(path: str, leaf: Any) -> Any:
                if path not in plan:
                    return optax.MaskedNode()
                # Derived from the leaf, so that it is sharded as the leaf is.
                like = leaf.codes if isinstance(leaf, Quantized) else leaf
                return jnp.zeros_like(like, dtype=_accumulator(leaf))

            return map_with_path(zero, params)

        random = rounding == "stochastic"
        return EcoState(
            count=jnp.zeros([], jnp.int32),
            key=typed_key(key) if random else None,
            mu=zeros(),
            nu=zeros() if second_moment else None,
            residual=zeros() if injection == "exact" else None,
            rest=rest_of(plan).init(params),
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("ECO quantises the weights: call update(..., params)")
        plan = planned(params)
        rest, rest_state = rest_of(plan).update(updates, state.rest, params, **extra)
        rest = dict(leaves_with_paths(rest))
        grads = dict(leaves_with_paths(updates))
        mu, nu, owed = (
            dict(leaves_with_paths(tree))
            for tree in (state.mu, state.nu, state.residual)
        )
        decays = _decays(mask, params)
        eta, eta_next = (
            learning_rate(state.count + i) if callable(learning_rate) else learning_rate
            for i in (0, 1)
        )
        step_key = None
        if state.key is not None:
            step_key = jax.random.fold_in(state.key, state.count)

        new: dict[str, tuple[Any, Direction, Stepped]] = {}
        for path, leaf in leaves_with_paths(params):
            if path not in plan:
                continue
            g = checked_gradient(path, grads, leaf)
            theta = leaf.values() if isinstance(leaf, Quantized) else leaf
            theta = theta.astype(mu[path].dtype)
            noise = None
            if step_key is not None:
                noise = uniform(fold_path(step_key, path), theta)
            moved = direction(
                g.astype(theta.dtype),
                mu[path],
                nu.get(path),
                state.count + 1,
                plan[path],
            )
            stored: list[Any] = []

            def quantise(
                x: jax.Array,
                leaf: Any = leaf,
                plan: Plan = plan[path],
                noise: Any = noise,
                stored: list[Any] = stored,
            ) -> jax.Array:
                change, weight = requantise(leaf, x, plan, noise)
                stored.append(change)
                return weight

            stepped = feedback_step(
                theta,
                moved,
                quantise,
                eta=jnp.asarray(eta, theta.dtype),
                b1=b1,
                weight_decay=weight_decay if decays.get(path, True) else 0.0,
                injection=injection,
                residual=owed.get(path),
                eta_next=jnp.asarray(eta_next, theta.dtype),
            )
            new[path] = (stored[0], moved, stepped)

        def tree(pick: Callable[..., Any]) -> Any:
            return map_with_path(
                lambda path, _: pick(*new[path]) if path in new else optax.MaskedNode(),
                params,
            )

        out = map_with_path(
            lambda path, _: new[path][0] if path in new else rest[path], params
        )
        return out, EcoState(
            count=jnp.asarray(optax.safe_increment(state.count)),
            key=state.key,
            mu=tree(lambda _, moved, stepped: stepped.momentum),
            nu=tree(lambda _, moved, stepped: moved.second) if second_moment else None,
            residual=(
                tree(lambda _, moved, stepped: stepped.residual)
                if injection == "exact"
                else None
            ),
            rest=rest_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _accumulator(leaf: Any) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _decays(mask: Any, params: Any) -> dict[str, bool]:
    """Which leaves decay, by path; empty for all."""
    if mask is None:
        return {}
    tree = mask(params) if callable(mask) else mask
    return dict(leaves_with_paths(tree))


def _check_rates(**rates: Any) -> None:
    for name, value in rates.items():
        if isinstance(value, (int, float)) and not 0 < value < 1:
            raise ValueError(f"{name}={value} must lie between 0 and 1, both excluded")
