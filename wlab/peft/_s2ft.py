# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""S2FT: few heads and channels are trained, densely (reparameterisation).

Of a kernel :math:`K` (in, out) some input units :math:`I`, channels or whole heads, are
chosen, or some output units, and a dense change of these rows or columns is trained,

.. math::

    y = x K + x_I\,\Delta \qquad\text{or}\qquad y = x K, \; y_I \mathrel{+}= x\,\Delta

so that the backward pass needs :math:`x_I`, or the gradient of :math:`y_I`, alone.
Heads couple query, key, value and output kernels, channels the gated layer's three;
`permute` brings chosen units to the front of all of them, where they are slices.

References:
    Yang, Leng, Guo, Zhao, Nakada, Zhang, Yao and Chen, `S2FT: Efficient, Scalable and
    Generalizable LLM Fine-tuning by Structured Sparsity
    <https://arxiv.org/abs/2412.06289>`_, 2024.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import (
    Operator,
    Reparam,
    Select,
    Views,
    fold_path,
    is_weight,
    leaves_with_paths,
    map_with_path,
    typed_key,
)
from wlab.core import select as selected
from wlab.peft._matrices import Attach, Init, Method, Target, matrices, reparam, targets

Side = Literal["in", "out"]
Score = Literal["random", "weight", "activation", "gradient", "product"]

# Layers that read the units of a block, by name; their inputs are chosen by default.
_READERS = re.compile(
    r"(^|/)(o|out|output|o_proj|out_proj|c_proj|wo|down|down_proj|fc2|w2|linear_out)"
    r"/[^/]*$"
)


class Units(eqx.Module):
    """Which units of a leaf are trained: indices of the first axis of a side."""

    index: jax.Array | np.ndarray  # int32, stack + (n,); -1 stands for none
    side: Side = eqx.field(static=True, default="in")


def s2ft(
    ratio: float = 0.03,
    *,
    units: Mapping[str, Units] | None = None,
    columns: Select | None = None,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """Structured sparse fine-tuning; the model is unchanged at the start.

    Trained for each matrix: ``delta``, float32 from zero, of shape (n, in / units, out)
    for rows and (in, n, out / units) for columns, with both sides flattened and the
    stacked axes in front. Frozen: the chosen units. A target becomes an `Operator` that
    gathers n units; entries outside them are never touched.

    Args:
        ratio: which part of each matrix's units is chosen at random, at least one.
        units: which, by the path of the leaf, instead: from `choose_units`.
        columns: the targets whose outputs are chosen and not their inputs.
        select: which leaves. None: those in `units`; else the layers that read a
            block's heads or channels (out, down, fc2, ...), or all linear layers if
            there are none.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose label is "delta".

    Raises:
        ValueError: if `ratio` is not in (0, 1], for units of a path that is no target,
            units that the leaf does not have or has twice, and as all methods of
            `wlab.peft` do.

    Examples:
        >>> params = {"down": {"kernel": jnp.ones((40, 8))}}
        >>> adapter = s2ft(0.1).init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'down/kernel': {'delta': (4, 1, 8)}}
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"s2ft: ratio={ratio} must be above 0 and at most 1")

    def wanted(path: str, leaf: Any) -> bool:
        return path in (units or {})

    def choice(params: Any) -> Select | None:
        if select is not None:
            return select
        if units is not None:
            return wanted
        readers = [p for p, _ in leaves_with_paths(params) if _READERS.search(p)]
        plain = [t.path for t in targets(params, _method({}), None, views)]
        readers = [p for p in readers if p in plain]
        return (lambda path, leaf: path in readers) if readers else None

    def made(params: Any) -> Reparam:
        return reparam(_method(sides(params)), select=choice(params), views=views)

    def sides(params: Any) -> dict[str, Side]:
        known: dict[str, Side] = {p: u.side for p, u in (units or {}).items()}
        if columns is not None:
            marked = leaves_with_paths(selected(params, columns))
            if units is None:
                known = {path: "out" for path, taken in marked if taken}
        return known

    def _method(side_of: Mapping[str, Side]) -> Method:
        def check(target: Target) -> None:
            if units is not None and target.path not in units:
                raise ValueError(f"s2ft: no units are given for {target}")

        def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
            t = given.target
            side = side_of.get(t.path, "in")
            total = (t.inputs if side == "in" else t.outputs)[0]
            if units is not None:
                index = _checked(units[t.path], t)
            else:
                index = _random(given.key, t.stack, total, max(1, int(total * ratio)))
            n = index.shape[-1]
            shape = (
                (n, t.n_in // total, t.n_out)
                if side == "in"
                else (t.n_in, n, t.n_out // total)
            )
            return {"delta": jnp.zeros((*t.stack, *shape))}, {"index": index}

        def attach(given: Attach) -> Any:
            t = given.target
            side = side_of.get(t.path, "in")
            action = Rows() if side == "in" else Columns(t.outputs[0])
            parts = {"delta": given.train["delta"], "index": given.frozen["index"]}
            return Operator(given.base, action, parts, view=t.view, scale=given.scale)

        # A chosen unit may lie on any device: rows are divided by their outputs only.
        return Method(init, attach, {"delta": (None, None, None)}, check=check)

    def init(key: jax.Array | int, params: Any) -> Any:
        strange = set(units or {}) - {p for p, _ in leaves_with_paths(params)}
        if strange:
            raise ValueError(
                f"s2ft: units are given for {sorted(strange)[:3]}, which the model has "
                "not; make them with choose_units on these parameters"
            )
        return made(params).init(key, params)

    return Reparam(
        init,
        lambda adapter, params, scale=None: made(params).attach(adapter, params, scale),
        lambda train: jax.tree.map(lambda _: "delta", train),
        lambda adapter, params, base: made(params).specs(adapter, params, base),
    )


@dataclasses.dataclass(frozen=True)
class Rows:
    """The action of trained rows: their inputs gathered, then a dense product."""

    def __call__(self, parts: Any, shared: Any, x: jax.Array) -> jax.Array:
        """`x` [..., n_in] to [..., n_out]."""
        delta, index = parts["delta"], parts["index"]
        n, each, n_out = delta.shape
        x = x.reshape(*x.shape[:-1], -1, each)
        taken = jnp.where((index >= 0)[:, None], x[..., index, :], 0)
        flat = taken.reshape(*taken.shape[:-2], n * each)
        return flat @ delta.reshape(n * each, n_out)

    def dense(self, parts: Any, shared: Any, n_in: int, n_out: int) -> jax.Array:
        """Zero but for the trained rows."""
        delta, index = parts["delta"], parts["index"]
        each = delta.shape[1]
        out = jnp.zeros((n_in // each, each, n_out), delta.dtype)
        return _added(out, index, delta).reshape(n_in, n_out)


@dataclasses.dataclass(frozen=True)
class Columns:
    """The action of trained columns: a dense product, scattered to their outputs."""

    total: int  # units of the output side

    def __call__(self, parts: Any, shared: Any, x: jax.Array) -> jax.Array:
        """`x` [..., n_in] to [..., n_out]."""
        delta, index = parts["delta"], parts["index"]
        n_in, n, each = delta.shape
        y = (x @ delta.reshape(n_in, n * each)).reshape(*x.shape[:-1], n, each)
        out = jnp.zeros((self.total, *x.shape[:-1], each), y.dtype)
        out = _added(out, index, jnp.moveaxis(y, -2, 0))
        return jnp.moveaxis(out, 0, -2).reshape(*x.shape[:-1], -1)

    def dense(self, parts: Any, shared: Any, n_in: int, n_out: int) -> jax.Array:
        """Zero but for the trained columns."""
        delta, index = parts["delta"], parts["index"]
        each = delta.shape[2]
        out = jnp.zeros((self.total, n_in, each), delta.dtype)
        out = _added(out, index, jnp.moveaxis(delta, 1, 0))
        return jnp.moveaxis(out, 0, 1).reshape(n_in, n_out)


def _added(x: jax.Array, index: jax.Array, change: jax.Array) -> jax.Array:
    """`x` with slices added along axis 0; -1 adds nothing."""
    return x.at[jnp.where(index >= 0, index, x.shape[0])].add(change, mode="drop")


def _random(key: jax.Array, stack: tuple[int, ...], total: int, n: int) -> jax.Array:
    lot = jax.random.uniform(key, (*stack, total))
    return jnp.sort(jax.lax.top_k(lot, n)[1]).astype(jnp.int32)


def _checked(units: Units, target: Target) -> jax.Array:
    total = (target.inputs if units.side == "in" else target.outputs)[0]
    index = jnp.asarray(units.index, jnp.int32)
    if index.shape[:-1] != target.stack or index.shape[-1] > total:
        raise ValueError(
            f"s2ft: units of shape {index.shape} for {target}: give stack + (n,), here "
            f"{target.stack} + (n,) with n at most {total}"
        )
    if not isinstance(units.index, jax.core.Tracer) and index.size:
        rows = np.sort(np.asarray(units.index).reshape(-1, index.shape[-1]))
        twice = (rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] >= 0)
        if rows[:, 0].min() < -1 or rows[:, -1].max() >= total or twice.any():
            raise ValueError(
                f"s2ft: units of {target} must be different and lie in 0..{total - 1} "
                "(-1 for none)"
            )
    return index


# --- Which units -----------------------------------------------------------------


class Coupling(NamedTuple):
    """Leaves whose units are the same: heads of an attention, channels of an MLP."""

    columns: tuple[str, ...]  # paths whose output units they are: up, gate; q, k, v
    rows: tuple[str, ...]  # paths whose input units they are: down; out


def couplings(params: Any) -> dict[str, Coupling]:
    """The attentions and gated layers of a model, found by the names of their layers.

    Args:
        params: a parameter tree, abstract too.

    Returns:
        ``{path of the block + "#heads" or "#channels": Coupling}``.

    Examples:
        >>> params = {"mlp": {n: {"kernel": jnp.ones((4, 4))} for n in ("up", "down")}}
        >>> couplings(params)["mlp#channels"].rows
        ('mlp/down/kernel',)
    """
    found: dict[str, tuple[list[str], list[str]]] = {}
    for path, _ in leaves_with_paths(params):
        parent, _, layer = path.rpartition("/")[0].rpartition("/")
        if not path.endswith("kernel"):
            continue
        for kind, (writers, readers) in _COUPLED.items():
            if layer in writers:
                found.setdefault(f"{parent}#{kind}", ([], []))[0].append(path)
            if layer in readers:
                found.setdefault(f"{parent}#{kind}", ([], []))[1].append(path)
    return {
        name: Coupling(tuple(columns), tuple(rows))
        for name, (columns, rows) in found.items()
        if columns and rows
    }


_COUPLED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "heads": (
        ("q", "k", "v", "query", "key", "value", "q_proj", "k_proj", "v_proj"),
        ("o", "out", "o_proj", "out_proj"),
    ),
    "channels": (
        ("up", "gate", "up_proj", "gate_proj", "fc1", "w1", "w3", "linear_in"),
        ("down", "down_proj", "fc2", "w2", "linear_out"),
    ),
}


def unit_scores(
    params: Any,
    side: Mapping[str, Side],
    *,
    score: Score = "weight",
    grads: Any = None,
    activations: Mapping[str, jax.Array] | None = None,
    key: jax.Array | int | None = None,
    views: Views | None = None,
) -> dict[str, jax.Array]:
    """How much each unit of some leaves matters.

    Args:
        params: a parameter tree.
        side: which side's units, by path.
        score: "random"; "weight": the norm of the unit's weights; "gradient": of their
            gradients; "product": the sum of ``|weight * gradient|``; "activation": the
            mean magnitude of the unit's input (of its output for a column).
        grads: gradients like `params`, for "gradient" and "product".
        activations: for "activation": mean magnitudes by path, stack + (units,).
        key: for "random".
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        By path, float32 of shape stack + (units,).

    Raises:
        ValueError: if what a score needs is not given, or a path is no matrix.
    """
    if score in ("gradient", "product") and grads is None:
        raise ValueError(f"unit_scores: score={score!r} needs grads=")
    if score == "activation" and activations is None:
        raise ValueError("unit_scores: score='activation' needs activations=")
    if score == "random" and key is None:
        raise ValueError("unit_scores: score='random' needs key=")
    draw = typed_key(0 if key is None else key)
    means = activations or {}

    def named(path: str, leaf: Any) -> bool:
        return path in side

    none = Method(lambda given: ({}, {}), lambda given: given.base, {})
    leaves = dict(leaves_with_paths(params))
    moved = dict(leaves_with_paths(grads)) if grads is not None else {}
    out = {}
    for t in targets(params, none, named, views):
        first = (t.inputs if side[t.path] == "in" else t.outputs)[0]

        def per_unit(x: jax.Array, t: Target = t, first: int = first) -> jax.Array:
            if side[t.path] == "in":
                x = x.reshape(*t.stack, first, -1)
            else:
                x = jnp.moveaxis(x.reshape(*t.stack, t.n_in, first, -1), -2, -3)
                x = x.reshape(*t.stack, first, -1)
            return x.sum(-1)

        if score == "random":
            folded = fold_path(draw, t.path)
            out[t.path] = jax.random.uniform(folded, (*t.stack, first))
        elif score == "activation":
            out[t.path] = jnp.asarray(means[t.path], jnp.float32)
        else:
            w = matrices(leaves[t.path], t)
            if score == "weight":
                out[t.path] = jnp.sqrt(per_unit(w**2))
            else:
                g = matrices(moved[t.path], t)
                out[t.path] = (
                    jnp.sqrt(per_unit(g**2))
                    if score == "gradient"
                    else per_unit(jnp.abs(w * g))
                )
    return out


def choose_units(
    scores: Mapping[str, jax.Array],
    ratio: float,
    side: Mapping[str, Side],
    *,
    scope: Literal["layer", "global"] = "layer",
    largest: bool = True,
) -> dict[str, Units]:
    """The units that `s2ft` trains, from their scores.

    Args:
        scores: by path, stack + (units,), from `unit_scores`; for coupled leaves give
            both the same array.
        ratio: which part of all units.
        side: whose units they are, by path.
        scope: "layer": so many of each matrix; "global": of all of them together, so
            that matrices have different counts, or none. Stacked ones are padded to
            the largest count, and so this scope needs concrete scores.
        largest: whether those with the largest scores are chosen, or the smallest.

    Returns:
        `Units` by path, in ascending order.

    Raises:
        ValueError: if `ratio` is not in (0, 1].

    Examples:
        >>> found = choose_units({"w": jnp.arange(4.0)}, 0.5, {"w": "in"})
        >>> found["w"].index.tolist()
        [2, 3]
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"choose_units: ratio={ratio} must be above 0 and at most 1")
    signed = {p: x if largest else -x for p, x in scores.items()}
    out = {}
    if scope == "layer":
        for path, x in signed.items():
            n = max(1, int(x.shape[-1] * ratio))
            index = jnp.sort(jax.lax.top_k(x, n)[1]).astype(jnp.int32)
            out[path] = Units(index, side[path])
        return out
    flat = jnp.concatenate([x.reshape(-1) for x in signed.values()])
    n = int(flat.size * ratio)
    chosen = jnp.zeros(flat.size, bool).at[jax.lax.top_k(flat, n)[1]].set(True)
    start = 0
    for path, x in signed.items():
        mask = chosen[start : start + x.size].reshape(x.shape)
        start += x.size
        most = int(mask.sum(-1).max()) if x.size else 0
        total = x.shape[-1]
        place = jnp.sort(jnp.where(mask, jnp.arange(total), total))[..., :most]
        index = jnp.where(place < total, place, -1).astype(jnp.int32)
        out[path] = Units(index, side[path])
    return out


# --- The permuted form -----------------------------------------------------------


def co_order(
    first: Sequence[int], second: Sequence[int], total: int, *, ascending: bool
) -> tuple[list[int], tuple[int, int], tuple[int, int]]:
    """An order in which two choices of units are each a slice.

    Args:
        first: units whose columns are trained.
        second: units whose rows are trained.
        total: how many units there are.
        ascending: whether each group is sorted, as heads are, or keeps the order of its
            list, as channels do (those in both that of `first`).

    Returns:
        The order, ``new[i] = old[order[i]]``: only first, both, only second, the rest
        ascending; and the slices of `first` and of `second` in it.
    """
    a, b = list(dict.fromkeys(first)), list(dict.fromkeys(second))
    only_a = [i for i in a if i not in set(b)]
    both = [i for i in a if i in set(b)]
    only_b = [i for i in b if i not in set(a)]
    if ascending:
        only_a, both, only_b = sorted(only_a), sorted(both), sorted(only_b)
    front = [*only_a, *both, *only_b]
    rest = [i for i in range(total) if i not in set(front)]
    return (
        [*front, *rest],
        (0, len(only_a) + len(both)),
        (len(only_a), len(front)),
    )


def permute(
    params: Any,
    order: Mapping[str, Any],
    *,
    groups: Mapping[str, Coupling] | None = None,
    views: Views | None = None,
) -> Any:
    """The same model with the units of its blocks in another order.

    Output units of `columns`, with their biases, and input units of `rows` move
    together, so that the function does not change. Where queries are grouped, whole
    groups move: the order is that of the key and value heads.

    Args:
        params: a parameter tree of arrays.
        order: by the names of `groups`, how the units move, ``new[i] = old[order[i]]``;
            int, stack + (units,). The inverse order undoes it: ``argsort(order)``.
        groups: from `couplings`, by default those of the model.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        The tree with these leaves permuted.

    Raises:
        ValueError: for a name that is none of the groups, or sizes that do not fit.

    Examples:
        >>> params = {"mlp": {n: {"kernel": jnp.eye(2)} for n in ("up", "down")}}
        >>> moved = permute(params, {"mlp#channels": [1, 0]})
        >>> print(moved["mlp"]["up"]["kernel"] @ moved["mlp"]["down"]["kernel"])
        [[1. 0.]
         [0. 1.]]
    """
    known = couplings(params) if groups is None else groups
    strange = set(order) - set(known)
    if strange:
        raise ValueError(
            f"permute: {sorted(strange)} are none of the groups {sorted(known)}"
        )
    none = Method(lambda given: ({}, {}), lambda given: given.base, {})
    leaves = dict(leaves_with_paths(params))
    new: dict[str, Any] = {}
    for name, units in order.items():
        group, units = known[name], jnp.asarray(units)
        paths = (*group.columns, *group.rows)
        found = {
            t.path: t
            for t in targets(params, none, lambda p, _, s=paths: p in s, views)
        }
        for path in paths:
            t = found[path]
            side = t.view.outputs if path in group.columns else t.view.inputs
            axis = len(t.shape) + side[0]
            new[path] = _moved(leaves[path], units, axis, t)
            if path in group.columns and t.bias is not None:
                bias = leaves[t.bias]
                place = bias.ndim - len(side)
                new[t.bias] = _moved(bias, units, place, t)
    return map_with_path(lambda path, leaf: new.get(path, leaf), params)


def _moved(x: Any, units: jax.Array, axis: int, target: Target) -> jax.Array:
    """`x` with the units of an axis in another order; a unit may be several indices."""
    if is_weight(x):
        raise TypeError(
            f"permute: {target} is a structured weight; permute the dense model first"
        )
    n, size = units.shape[-1], x.shape[axis]
    if size % n or units.shape[:-1] != target.stack:
        raise ValueError(
            f"permute: an order of shape {units.shape} does not fit {target}, whose "
            f"axis has {size}: give stack + (units,) with units that divide it"
        )
    each = size // n
    inside = jnp.arange(each).reshape(*(1,) * units.ndim, each)
    fine = (units[..., None] * each + inside).reshape(*units.shape[:-1], size)
    stacked = units.ndim - 1
    fine = fine.reshape(*fine.shape[:stacked], *(1,) * (axis - stacked), size)
    fine = fine.reshape(*fine.shape, *(1,) * (x.ndim - axis - 1))
    return jnp.take_along_axis(x, fine, axis)


def n_trained(units: Mapping[str, Units]) -> int:
    """How many units are trained in all; padding does not count."""
    return sum(int((u.index >= 0).sum()) for u in units.values())
