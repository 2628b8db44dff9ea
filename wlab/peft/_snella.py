# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""SNELLA: a sparse change from a kernel of low-rank factors (reparameterisation).

Two factors per layer, :math:`P_h` (in, q/2) and :math:`Q_h` (out, q/2) with h of 1, 2,
give a dense change of high rank,

.. math::

    K_{ab} = c \sum_h (-1)^{h+1} \lVert P_{h,a} - Q_{h,b} \rVert_p, \qquad c = 0.1

(SNELL); SNELLA adds :math:`\alpha\,\mathrm{softmax}_b(K / \gamma) + \beta`. Entries of
a layer compete: those with :math:`|K|` at most its quantile t are dropped. Layers
compete for what may be kept: by the sensitivity of their factors, times its
uncertainty.

References:
    Lin, Zhang and others, `SNELLA: Kernelized Sparse Fine-Tuning with Bi-level
    Parameter Competition for Vision Models <https://arxiv.org/abs/2510.24037>`_, 2025.

    Shen, Sun, Ye, Zhang and Wang, `Expanding Sparse Tuning for Low Memory Usage
    <https://arxiv.org/abs/2411.01800>`_, 2024.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core import Adapter, Reparam, Select, Views, linalg
from wlab.peft._matrices import Attach, Init, Method, added, reparam

Kernel = Literal["mix", "distance"]
Value = Literal["signed_square", "keep", "soft"]
_HEADS = 2
_SCALE = 0.1


def snella(
    rank: int = 8,
    *,
    kernel: Kernel = "mix",
    norm: float = 2.0,
    threshold: float = 0.0,
    value: Value = "signed_square",
    zero_start: bool = False,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """Kernelised sparse fine-tuning.

    The model is *not* unchanged at the start, unless `zero_start`. Trained for each
    matrix, float32 and with the stacked axes in front: ``p`` (2, in, q/2), ``q``
    (2, out, q/2) and, for "mix", ``alpha``, ``gamma`` and ``beta``. Frozen:
    ``threshold``, a number for each matrix, which `allocate` moves. A target becomes an
    array; the kernel is computed again in the backward pass and never kept.

    Args:
        rank: q, even.
        kernel: "mix" (SNELLA) or "distance" (SNELL).
        norm: p of the distance.
        threshold: the part of entries that is dropped, in [0, 1), before `allocate`
            says otherwise. At 0 all but the smallest are kept for "mix"; for "distance"
            the dense kernel is taken as it is, as in the authors' code.
        value: of an entry that is kept. "signed_square": ``K |K|`` with no gradient
            through ``|K|``, as in the authors' code; "keep": ``K``; "soft":
            ``K (|K| - t)``.
        zero_start: subtract the kernel of the start, a deviation from the paper.
        select: which leaves; None: the kernels of linear layers.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose labels are the names above.

    Raises:
        ValueError: if `rank` is not positive and even, the threshold is not in [0, 1),
            for a kernel or value that is none, and as all methods of `wlab.peft` do.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((6, 4))}}
        >>> adapter = snella(rank=4, kernel="distance").init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'dense/kernel': {'p': (2, 6, 2), 'q': (2, 4, 2)}}
    """
    if rank < 2 or rank % 2:
        raise ValueError(f"snella: rank={rank} must be positive and even")
    if not 0 <= threshold < 1:
        raise ValueError(f"snella: threshold={threshold} must be in [0, 1)")
    if kernel not in ("mix", "distance"):
        raise ValueError(f"snella: kernel={kernel!r} is neither 'mix' nor 'distance'")
    if value not in ("signed_square", "keep", "soft"):
        raise ValueError(
            f"snella: value={value!r} is none of 'signed_square', 'keep', 'soft'"
        )
    dense = kernel == "distance" and threshold == 0

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        t = given.target
        train: dict[str, Any] = {}
        for name, n, key in zip(
            "pq", (t.n_in, t.n_out), jax.random.split(given.key), strict=True
        ):
            bound = 1 / math.sqrt(n * rank / 2)
            shape = (*t.stack, _HEADS, n, rank // 2)
            train[name] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        if kernel == "mix":
            train |= {
                "alpha": jnp.ones(t.stack),
                "gamma": jnp.ones(t.stack),
                "beta": jnp.zeros(t.stack),
            }
        frozen: dict[str, Any] = {"threshold": jnp.full(t.stack, threshold, float)}
        if zero_start:
            # Copies: what is trained is donated.
            frozen["start"] = {"p": jnp.copy(train["p"]), "q": jnp.copy(train["q"])}
        return train, frozen

    def attach(given: Attach) -> Any:
        def change(train: Any, limit: jax.Array) -> jax.Array:
            k = kernel_of(train, kernel=kernel, norm=norm)
            return k if dense else sparsify(k, limit, value=value)

        # In the backward pass again, so that no kernel of the weight's size is kept.
        fn = jax.checkpoint(change)
        for _ in given.target.stack:
            fn = jax.vmap(fn)
        limit = given.frozen["threshold"]
        delta = fn(given.train, limit)
        if zero_start:
            begun = dict(given.frozen["start"])
            if kernel == "mix":
                ones = jnp.ones(given.target.stack)
                begun |= {"alpha": ones, "gamma": ones, "beta": 0 * ones}
            delta = delta - fn(begun, jnp.full(given.target.stack, threshold))
        return added(given, delta)

    axes: dict[str, tuple[str | None, ...]] = {
        "p": (None, "in", None),
        "q": (None, "out", None),
        "alpha": (),
        "gamma": (),
        "beta": (),
    }
    return reparam(Method(init, attach, axes), select=select, views=views)


def kernel_of(
    train: Mapping[str, jax.Array], *, kernel: Kernel = "mix", norm: float = 2.0
) -> jax.Array:
    """The dense kernel of one matrix.

    Args:
        train: ``p`` (2, in, q/2), ``q`` (2, out, q/2) and, for "mix", the numbers
            ``alpha``, ``gamma`` and ``beta``.
        kernel: "mix" or "distance".
        norm: p of the distance.

    Returns:
        [in, out].
    """
    p, q = train["p"], train["q"]
    each = [distances(p[h], q[h], norm) for h in range(_HEADS)]
    k = _SCALE * (each[0] - each[1])
    if kernel == "distance":
        return k
    soft = jax.nn.softmax(k / train["gamma"], axis=-1)
    return k + train["alpha"] * soft + train["beta"]


def distances(p: jax.Array, q: jax.Array, norm: float = 2.0) -> jax.Array:
    """Distances between rows; their gradient at zero is zero.

    Args:
        p: [m, d].
        q: [n, d].
        norm: 2, or any from 1 on.

    Returns:
        [m, n].
    """

    def term(k: Any) -> jax.Array:
        difference = p[:, k, None] - q[None, :, k]
        # Equal numbers have no slope where the power is below two.
        size = jnp.abs(difference)
        return difference**2 if norm == 2 else size**norm

    # Term by term: (m, n, d) numbers would be a multiple of the weight.
    total = term(0)
    for k in range(1, p.shape[1]):
        total = total + term(k)
    apart = total > 0
    return jnp.where(apart, jnp.where(apart, total, 1) ** (1 / norm), 0)


def sparsify(
    k: jax.Array, threshold: jax.Array, *, value: Value = "signed_square"
) -> jax.Array:
    """Competition within one matrix.

    Args:
        k: [in, out].
        threshold: the part that is dropped, a number; the limit is this quantile of
            ``|k|``, by linear interpolation.
        value: as in `snella`.

    Returns:
        [in, out]; zero where ``|k|`` is not above the limit.
    """
    size = jax.lax.stop_gradient(jnp.abs(k))
    limit = quantile(size, threshold)
    kept = size > limit
    if value == "keep":
        return jnp.where(kept, k, 0)
    if value == "soft":
        return k * jnp.where(kept, size - limit, 0)
    return k * jnp.where(kept, size, 0)


def quantile(x: jax.Array, part: jax.Array | float) -> jax.Array:
    """A quantile of all entries by linear interpolation, found without a sort.

    Args:
        x: of any shape.
        part: in [0, 1], may be traced.

    Returns:
        A number of the dtype of `x`.
    """
    place = jnp.asarray(part, x.dtype) * (x.size - 1)
    low = jnp.clip(jnp.floor(place).astype(jnp.int32), 0, x.size - 1)
    below = linalg.kth_largest(x, x.size - low)
    above = linalg.kth_largest(x, jnp.maximum(x.size - low - 1, 1))
    return below + (place - low.astype(x.dtype)) * (above - below)


# --- Competition between layers --------------------------------------------------


class AllocatorState(NamedTuple):
    """What `importance` has seen; trees like `adapter.train`, of ``p`` and ``q``."""

    mean: Any  # float32, moving mean of |parameter * gradient|
    spread: Any  # float32, moving mean of its distance from the mean
    count: jax.Array  # int32, steps seen


def allocator_init(train: Any) -> AllocatorState:
    """The state before the first step.

    Args:
        train: of an adapter that `snella` made.
    """
    zeros = jax.tree.map(jnp.zeros_like, _factors(train))
    return AllocatorState(zeros, zeros, jnp.zeros([], jnp.int32))


def importance(
    state: AllocatorState,
    train: Any,
    grads: Any,
    *,
    mean_decay: float = 0.85,
    spread_decay: float = 0.85,
) -> tuple[AllocatorState, dict[str, jax.Array]]:
    """One step of the layers' importance.

    Args:
        state: from the step before.
        train: parameters of the adapter.
        grads: their gradients; NaN counts as zero.
        mean_decay: of the moving mean.
        spread_decay: of the moving mean of the distance.

    Returns:
        The state, and by path the score of each matrix, of the stacked axes' shape: the
        mean over entries of mean times spread, added over both factors. Not normalised.
    """

    def seen(p: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.nan_to_num(jnp.abs(p * g), nan=0.0)

    now = jax.tree.map(seen, _factors(train), _factors(grads))
    mean = jax.tree.map(
        lambda m, i: mean_decay * m + (1 - mean_decay) * i, state.mean, now
    )
    spread = jax.tree.map(
        lambda u, i, m: spread_decay * u + (1 - spread_decay) * jnp.abs(i - m),
        state.spread,
        now,
        mean,
    )
    scores = {
        path: _score(part["p"], spread[path]["p"])
        + _score(part["q"], spread[path]["q"])
        for path, part in mean.items()
    }
    return AllocatorState(mean, spread, state.count + 1), scores


def allocate(
    scores: Mapping[str, jax.Array],
    sizes: Mapping[str, int],
    volume: jax.Array | float,
) -> dict[str, jax.Array]:
    """Thresholds that share out how many entries may be kept, by importance.

    Each matrix gets its part of the volume, at most all of its entries; what full ones
    leave goes to the others. A pure function of its arguments, which may be traced.

    Args:
        scores: by path, of the stacked axes' shape.
        sizes: entries of each matrix (of one of a stack).
        volume: entries in all.

    Returns:
        By path, the part that is dropped, of the shape of the scores.

    Examples:
        >>> scores = {"a": jnp.float32(3.0), "b": jnp.float32(1.0)}
        >>> found = allocate(scores, {"a": 100, "b": 100}, 160)
        >>> {path: round(float(x), 2) for path, x in found.items()}
        {'a': 0.0, 'b': 0.4}
    """
    paths = list(scores)
    flat = jnp.concatenate([jnp.reshape(scores[p], -1) for p in paths])
    cap = jnp.concatenate(
        [jnp.full(jnp.size(scores[p]), sizes[p], flat.dtype) for p in paths]
    )
    volume = jnp.minimum(jnp.asarray(volume, flat.dtype), cap.sum())
    total = flat.sum()
    share = jnp.where(total > 0, flat / jnp.where(total > 0, total, 1), 1 / flat.size)
    kept = jnp.minimum(jnp.floor(volume * share), cap)

    def more(_: Any, kept: jax.Array) -> jax.Array:
        left = volume - kept.sum()
        open_ = kept < cap
        weight = jnp.where(open_, share, 0)
        sum_ = weight.sum()
        part = jnp.where(sum_ > 0, weight / jnp.where(sum_ > 0, sum_, 1), 0)
        return kept + jnp.minimum(jnp.maximum(left, 0) * part, cap - kept)

    # Each pass fills a matrix or ends: so many passes are enough.
    kept = jax.lax.fori_loop(0, flat.size, more, kept)
    # What is an integer up to rounding stays the integer.
    kept = jnp.floor(kept + 1e-4)
    dropped = jnp.clip(1 - kept / cap, 0, 1)
    out, start = {}, 0
    for p in paths:
        n = jnp.size(scores[p])
        out[p] = dropped[start : start + n].reshape(jnp.shape(scores[p]))
        start += n
    return out


class Budget(NamedTuple):
    """How many entries may be kept at a step, and whether to share them out now."""

    volume: jax.Array
    due: jax.Array  # bool


def budget(
    step: jax.Array | int,
    *,
    initial: float,
    target: float,
    total: int,
    warmup: int = 10,
    final: int = 400,
    every: int = 20,
) -> Budget:
    """The schedule of the volume, from the initial one to the target by a cubic.

    Args:
        step: the step, may be traced.
        initial: entries kept during the warm-up.
        target: entries kept at the end.
        total: steps in all.
        warmup: steps before the volume changes.
        final: steps at the end that keep the target, sharing out at every one.
        every: steps between two allocations in the middle.

    Raises:
        ValueError: if warm-up and final phase leave nothing between them.
    """
    if total - final - warmup <= 0:
        raise ValueError(
            f"budget: of {total} steps, {warmup} of warm-up and {final} at the end "
            "leave none between; lower them"
        )
    step = jnp.asarray(step)
    done = (step - warmup) / (total - final - warmup)
    cubic = jnp.trunc(target + (initial - target) * (1 - done) ** 3)
    first, last = step <= warmup, step > total - final
    volume = jnp.where(first, initial, jnp.where(last, target, cubic))
    due = ~first & (last | (step % every == 0))
    return Budget(volume, due)


def with_thresholds(adapter: Adapter, thresholds: Mapping[str, Any]) -> Adapter:
    """The adapter with other thresholds; nothing compiles again.

    Args:
        adapter: from `snella`.
        thresholds: by path, from `allocate`.

    Returns:
        The adapter.

    Raises:
        ValueError: for a path that the adapter does not have.
    """
    strange = set(thresholds) - set(adapter.train)
    if strange:
        raise ValueError(f"the adapter has no {sorted(strange)[:3]}")
    frozen = {
        path: part | {"threshold": thresholds[path]} if path in thresholds else part
        for path, part in adapter.frozen.items()
    }
    return adapter._replace(frozen=frozen)


def _score(mean: jax.Array, spread: jax.Array) -> jax.Array:
    return jnp.mean(mean * spread, axis=(-3, -2, -1))


def _factors(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {path: {name: part[name] for name in "pq"} for path, part in tree.items()}
