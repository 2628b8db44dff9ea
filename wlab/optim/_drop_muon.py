# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Drop-Muon: Muon on a random suffix of the layers at each step (a transform).

A cut :math:`s` is drawn for every step. The layers from :math:`s` on take a step of
Muon; those below it keep their weights and their momentum as they are, so that neither
their backward pass nor their orthogonalisation need be computed:

.. math::

    M_i &\leftarrow \mu M_i + (1 - \mu)\, G_i, \qquad
    W_i \leftarrow (1 - \eta\lambda)\, W_i - \eta\, c_i\, O_i
    \qquad \text{for } i \ge s

where :math:`O_i` is the orthogonalised momentum, or Nesterov's mix of it with the
gradient. It is no Muon that needs fewer steps: each step is cheaper. The gradients of a
suffix, at the cost of a suffix, are those of `wlab.core.layered_value_and_grad`.

What differs from the paper: its steps are in the sharp operator with a rate for each
layer, of which the unit step ("lmo") with one rate, as its experiments have it, is the
default here; its momentum begins with the first gradient, here with zero as in Muon.

References:
    Gruntkowska, Maziane, Qu and Richtarik, `Drop-Muon: Update Less, Converge Faster
    <https://arxiv.org/abs/2510.02239>`_, 2025; Jordan et al., `Muon
    <https://kellerjordan.github.io/posts/muon/>`_, 2024.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from wlab.core import (
    MatrixView,
    Pattern,
    Select,
    Views,
    as_matrices,
    describe,
    from_matrices,
    is_weight,
    leaves_with_paths,
    linalg,
    map_with_path,
)
from wlab.core import select as selected
from wlab.optim._drop import Sampling, before_layers, drop_with, is_empty

Scalar = float | jax.Array
Scale = Literal["muon", "spectral", "rms", "none"]

_POLAR = (
    (8.1566, -22.4833, 15.8788),
    (4.0429, -2.8089, 0.5000),
    (3.8917, -2.7725, 0.5061),
    (3.2858, -2.3681, 0.4645),
    (2.3465, -1.7098, 0.4232),
)
_COEFFICIENTS: dict[str, Any] = {
    "muon": (3.4445, -4.7750, 2.0315),
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Its singular values must stay below one: divided by 1.02 in the first step.
    "polar_express": (
        tuple(c / 1.02 ** (2 * i + 1) for i, c in enumerate(_POLAR[0])),
        *_POLAR[1:],
    ),
}


class MuonState(NamedTuple):
    """State of Muon in one layer; places of other leaves are None or masked out."""

    count: jax.Array  # int32, steps that were active
    mu: Any  # first moment, float32, like the parameters
    nu: Any  # second moment of the leaves that Adam has, likewise


def drop_muon(
    learning_rate: optax.ScalarOrSchedule,
    beta: Scalar = 0.95,
    weight_decay: Scalar = 0.0,
    *,
    layers: str | Sequence[str] | None,
    sampling: Sampling = "uniform",
    progress: Callable[[jax.Array], ArrayLike] | None = None,
    nesterov: bool = True,
    step: Literal["lmo", "sharp"] = "lmo",
    scale: Scale = "muon",
    coefficients: str | Sequence[Any] = "muon",
    ns_steps: int = 5,
    init_momentum: Literal["zero", "gradient"] = "zero",
    before: Select | None = None,
    select: Select | None = None,
    views: Views | None = None,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_b1: Scalar = 0.9,
    adam_b2: Scalar = 0.999,
    adam_eps: Scalar = 1e-8,
    adam_weight_decay: Scalar = 0.0,
    key: jax.Array | int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Muon on the layers from a random cut on; those below it stay to the bit.

    The cut of the next step is in the state, so that the gradients can be taken for it:

        layers = active_layers(state)
        (loss, _), grads = layered_value_and_grad(parts)(params, batch, **layers)
        updates, state = tx.update(grads, state, params, **layers)

    A cut of your own is ``tx.update(..., start=start)``; any layers at all, with their
    compact gradients (`wlab.core.LayerGrads`) or whole ones, are ``chosen=``. Kernels
    of linear layers and convolutions have Muon, in matrices as `wlab.core.describe`
    sees them; all else has Adam, such as norms and biases, which belong to their layer,
    embeddings and the head. What is in no layer is active always, but for `before`.

    Nothing is computed for frozen layers: layers in a list have a branch each, stacked
    ones are looped over from the cut on. Under `jax.vmap` a branch becomes a selection.

    Args:
        learning_rate: a number or a schedule over all steps.
        beta: decay of the averaged momentum.
        weight_decay: decoupled decay of the matrices of active layers.
        layers: where the layers are, as in `wlab.core.Layered`; None: nowhere, and
            all is active always, as in Muon.
        sampling: how the cut is drawn; see `sample_start`.
        progress: for "epoch_shift", from the step to the part of training that is done;
            such as ``lambda step: jnp.minimum(step / 1000, 1)``.
        nesterov: whether the gradient is mixed in once more.
        step: "lmo", along the orthogonalised momentum; "sharp", exactly along
            ``|M|_* U V^T`` with the nuclear norm, by singular values.
        scale: factor of the step by a matrix's shape: "muon", the root of
            ``max(1, out / in)``; "spectral", the root of ``out / in``; "rms", 0.2 times
            the root of the larger; "none".
        coefficients: of the Newton-Schulz iteration: "muon", "dion", "polar_express",
            or numbers `[3]` or `[steps, 3]`.
        ns_steps: iterations with one triple of coefficients; a table has its own.
        init_momentum: whether a layer's momentum begins with "zero" or its first
            "gradient".
        before: leaves in no layer that are active only when all layers are, such as an
            embedding whose gradient `layered_value_and_grad` takes with cut 0 only.
            None: embeddings, if there is a head beside them; else they are the head.
        select: which leaves have Muon, as in `wlab.core.select`, instead of kernels and
            convolutions.
        views: which axes of a leaf are inputs and outputs, where names do not tell.
        adam_learning_rate: of the leaves that Adam has; None: the same.
        adam_b1: decay of Adam's first moment.
        adam_b2: decay of Adam's second moment.
        adam_eps: added to the root of Adam's second moment.
        adam_weight_decay: decoupled decay of Adam's leaves.
        key: a random key or a seed for the cuts.

    Returns:
        A gradient transformation that takes `start`, `chosen` and any other extra
        arguments. Its state has 4 bytes a parameter of the matrices, 8 of the others.

    Raises:
        ValueError: at build time for values out of range; at `init` for layers that are
            not found or a selected leaf that is no matrix; it names the leaf.

    Examples:
        >>> params = {"layers": [{"kernel": jnp.eye(3)}, {"kernel": jnp.eye(3)}]}
        >>> tx = drop_muon(0.1, layers="layers")
        >>> state = tx.init(params)
        >>> updates, state = tx.update(params, state, params, start=1)
        >>> [bool(jnp.any(layer["kernel"])) for layer in updates["layers"]]
        [False, True]
    """
    if step not in ("lmo", "sharp"):
        raise ValueError(f"step {step!r} is neither 'lmo' nor 'sharp'")
    if scale not in _SCALES:
        raise ValueError(f"scale {scale!r} is none of {', '.join(_SCALES)}")
    if init_momentum not in ("zero", "gradient"):
        raise ValueError(f"init_momentum {init_momentum!r}: 'zero' or 'gradient'")
    if isinstance(beta, (int, float)) and not 0 <= beta < 1:
        raise ValueError(f"beta={beta} must lie between 0 and 1, 1 excluded")
    if isinstance(sampling, str) and sampling == "epoch_shift" and progress is None:
        raise ValueError("sampling='epoch_shift' needs progress=, from step to 0..1")
    table = _table(coefficients, ns_steps)
    orthogonal = functools.partial(
        _sharp if step == "sharp" else linalg.orthogonalize,
        **({} if step == "sharp" else {"steps": table[1], "coefficients": table[0]}),
    )

    def inner(params: Any) -> optax.GradientTransformationExtraArgs:
        return _muon(
            _matrices(params, select, views),
            orthogonal=orthogonal,
            factor=_SCALES[scale],
            beta=beta,
            nesterov=nesterov,
            from_gradient=init_momentum == "gradient",
            decay=weight_decay,
            adam=(adam_b1, adam_b2, adam_eps, adam_weight_decay),
        )

    def first(params: Any) -> Any:
        return before_layers(params, before)

    base = drop_with(inner, inner, layers, first, sampling, progress, key)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        if params is None and not is_empty(updates):
            raise ValueError("drop_muon needs the parameters: call update(..., params)")
        rates = [
            rate(state.count) if callable(rate) else rate
            for rate in (learning_rate, adam_learning_rate)
        ]
        rates[1] = rates[0] if rates[1] is None else rates[1]
        return base.update(updates, state, params, **extra, _rates=rates)

    return optax.GradientTransformationExtraArgs(base.init, update)


# --- Muon ------------------------------------------------------------------------


def _ratio(n_in: int, n_out: int) -> float:
    return math.sqrt(n_out / n_in)


_SCALES: dict[str, Callable[[int, int], float]] = {
    "muon": lambda n_in, n_out: max(1.0, _ratio(n_in, n_out)),
    "spectral": _ratio,
    "rms": lambda n_in, n_out: 0.2 * math.sqrt(max(n_in, n_out)),
    "none": lambda n_in, n_out: 1.0,
}


def _table(coefficients: Any, ns_steps: int) -> tuple[Any, int]:
    """The coefficients, and the number of steps."""
    if isinstance(coefficients, str):
        if coefficients not in _COEFFICIENTS:
            raise ValueError(
                f"coefficients {coefficients!r} are none of {', '.join(_COEFFICIENTS)}"
            )
        coefficients = _COEFFICIENTS[coefficients]
    shape = jnp.shape(jnp.asarray(coefficients))
    if shape != (3,) and (len(shape) != 2 or shape[-1] != 3):
        raise ValueError(f"coefficients of shape {shape}: give [3] or [steps, 3]")
    return coefficients, ns_steps if len(shape) == 1 else shape[0]


def _sharp(x: jax.Array) -> jax.Array:
    """The nuclear norm times the orthogonal factor of each matrix."""
    u, s, vt = linalg.svd(x)
    # Directions of no weight are none: zero stays zero.
    kept = s > jnp.finfo(s.dtype).eps * jnp.max(s, -1, keepdims=True)
    u = u * kept[..., None, :].astype(u.dtype)
    norm = jnp.sum(s, -1)[..., None, None]
    return norm * jnp.matmul(u, vt, precision=lax.Precision.HIGHEST)


def _matrices(
    params: Any, select: Select | None, views: Mapping[Pattern, Any] | None
) -> dict[str, MatrixView]:
    """The leaves that have Muon, with their views."""
    if is_empty(params):
        return {}
    for path, leaf in leaves_with_paths(params):
        if is_weight(leaf):
            raise TypeError(
                f"leaf {path!r} of shape {leaf.shape} is a {type(leaf).__name__}, and "
                "drop_muon trains arrays: for Quantized weights take "
                "drop(eco_muon(...), layers), for others train the parts as arrays"
            )
    leaves = describe(params, views=views)
    if select is None:
        hidden = ("kernel", "conv")
        return {x.path: x.view for x in leaves if x.view and x.role in hidden}
    chosen = {p for p, hit in leaves_with_paths(selected(params, select)) if hit}
    out = {}
    for leaf in leaves:
        if leaf.path in chosen:
            if leaf.view is None:
                raise ValueError(
                    f"leaf {leaf.path!r} of shape {leaf.shape} is no matrix: leave it "
                    "out of select=, or give it a view in views="
                )
            out[leaf.path] = leaf.view
    return out


def _muon(
    matrices: Mapping[str, MatrixView],
    *,
    orthogonal: Callable[[jax.Array], jax.Array],
    factor: Callable[[int, int], float],
    beta: Scalar,
    nesterov: bool,
    from_gradient: bool,
    decay: Scalar,
    adam: tuple[Scalar, Scalar, Scalar, Scalar],
) -> optax.GradientTransformationExtraArgs:
    """Muon on matrices and Adam on the other leaves, with rates given at each step."""
    b1, b2, eps, adam_decay = adam

    def init(params: Any) -> MuonState:
        def zeros(path: str, x: Any) -> jax.Array:
            del path
            return jnp.zeros_like(x, dtype=_accumulator(x))

        def second(path: str, x: Any) -> Any:
            return optax.MaskedNode() if path in matrices else zeros(path, x)

        mu, nu = map_with_path(zeros, params), map_with_path(second, params)
        return MuonState(jnp.zeros([], jnp.int32), mu, nu)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        rates = extra["_rates"]
        grads, mu, nu, held = (
            dict(leaves_with_paths(t)) for t in (updates, state.mu, state.nu, params)
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        moved: dict[str, jax.Array] = {}
        groups: dict[Any, list[str]] = {}
        out: dict[str, jax.Array] = {}
        for path, p in held.items():
            m = mu[path]
            if path not in grads or jnp.shape(grads[path]) != jnp.shape(p):
                got = jnp.shape(grads[path]) if path in grads else "missing"
                raise ValueError(
                    f"the gradient of leaf {path!r} of shape {jnp.shape(p)} is {got}"
                )
            g = grads[path].astype(m.dtype)
            if path not in matrices:
                mu[path] = b1 * m + (1 - b1) * g
                nu[path] = b2 * nu[path] + (1 - b2) * jnp.square(g)
                root = jnp.sqrt(nu[path] / _correction(b2, count, m.dtype)) + eps
                out[path] = mu[path] / _correction(b1, count, m.dtype) / root
                continue
            averaged = beta * m + (1 - beta) * g
            if from_gradient:
                averaged = jnp.where(state.count == 0, g, averaged)
            mu[path] = averaged
            u = (1 - beta) * g + beta * averaged if nesterov else averaged
            moved[path] = u
            # Alike in all that a stack needs of its members.
            kind = (u.shape, u.dtype, matrices[path], jax.typeof(u).sharding.spec)
            groups.setdefault(kind, []).append(path)
        for (*_, view, _), paths in groups.items():
            stack = jnp.stack([moved[path] for path in paths])
            new = _on_matrices(orthogonal, factor, stack, view)
            out |= {path: new[i] for i, path in enumerate(paths)}

        def change(path: str, p: Any) -> jax.Array:
            matrix = path in matrices
            u, w = out[path], p.astype(out[path].dtype)
            rate = jnp.asarray(rates[0 if matrix else 1], u.dtype)
            return (-rate * (u + (decay if matrix else adam_decay) * w)).astype(p.dtype)

        def tree(values: Mapping[str, Any]) -> Any:
            return map_with_path(lambda p, _: values.get(p, optax.MaskedNode()), params)

        nu = {path: x for path, x in nu.items() if path not in matrices}
        return map_with_path(change, params), MuonState(count, tree(mu), tree(nu))

    return optax.GradientTransformationExtraArgs(init, update)


def _on_matrices(
    fn: Callable[[jax.Array], jax.Array],
    factor: Callable[[int, int], float],
    x: jax.Array,
    view: MatrixView,
) -> jax.Array:
    """`fn` of all matrices of leaves, times a factor of their shape."""
    axes = (*view.inputs, *view.outputs)

    def on(x: jax.Array) -> jax.Array:
        matrices = as_matrices(x, view)
        new = fn(matrices) * factor(*matrices.shape[-2:])
        return from_matrices(new, view, x.shape)

    return linalg.sharding_safe(on, whole=axes)(x)


def _accumulator(leaf: Any) -> Any:
    return jnp.promote_types(jnp.result_type(leaf), jnp.float32)


def _correction(decay: Scalar, count: jax.Array, dtype: Any) -> jax.Array:
    return 1 - jnp.asarray(decay, dtype) ** count
