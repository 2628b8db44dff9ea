# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Paths of leaves, selection by pattern, and what each leaf is.

One way to name a leaf serves linen, nnx and plain trees: components joined by '/',
without linen's leading ``params`` and nnx's trailing ``value``.
"""

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core._lift import is_weight
from wlab.core._view import MatrixView

Pattern = str | re.Pattern[str]
Select = Pattern | Sequence[Pattern] | Callable[[str, Any], bool]
Views = Mapping[Pattern, MatrixView | None]

# Names by which Flax models call their layers, matched against whole components.
_NORM = re.compile(r"(?i).*norm(_?\d+)?$|^(ln|bn)(_?\w*)$")
_HEAD = re.compile(r"(?i)^(lm_?head|head|logits?|classifier|unembed(ding)?)(_?\d+)?$")
_CONV = re.compile(r"(?i).*conv(transpose)?(_?\d+)?$|^(stem|patch_?embed\w*)$")
_SPLIT_HEADS = re.compile(r"(?i)^([qkv]|query|key|value)(_?proj)?(_?\d+)?$")
_FUSED_HEADS = re.compile(r"(?i)^qkv(_?proj)?(_?\d+)?$")
_JOIN_HEADS = re.compile(r"(?i)^(o|out|output)(_?proj)?(_?\d+)?$")
_SCANNED = re.compile(r"^(Scan|Vmap)[A-Z]\w*$")
_NOT_MATRIX = re.compile(
    r"(?i)^(bias|scale|b|gamma|beta|mean|var|.*(pos|cls|token).*)$"
)


def path_of(key_path: Sequence[Any]) -> str:
    """The normalised path of a leaf, from the key path that `jax.tree_util` gives.

    Examples:
        >>> tree = {"params": {"Dense_0": {"kernel": 1.0}}}
        >>> [path_of(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
        ['Dense_0/kernel']
    """
    keys = list(key_path)
    # nnx holds the array of a Variable in an attribute, never in a dict.
    if len(keys) > 1 and getattr(keys[-1], "name", None) == "value":
        keys = keys[:-1]
    parts = [jax.tree_util.keystr((k,), simple=True) for k in keys]
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    return "/".join(parts)


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """Normalised path and leaf, for each leaf; a structured weight is one leaf.

    Raises:
        ValueError: if two leaves have the same normalised path.
    """
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_weight)
    named = [(path_of(p), leaf) for p, leaf in flat]
    known: dict[str, Any] = {}
    for (path, _), (key_path, _) in zip(named, flat, strict=True):
        if path in known:
            full = [jax.tree_util.keystr(p) for p in (known[path], key_path)]
            raise ValueError(
                f"two leaves of the tree have the path {path!r}: {full[0]} and "
                f"{full[1]}; rename one, or use one part of the tree alone"
            )
        known[path] = key_path
    return named


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function also gets the path; a weight is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda p, *leaves: fn(path_of(p), *leaves), tree, *rest, is_leaf=is_weight
    )


def select(tree: Any, pattern: Select) -> Any:
    """Which leaves a pattern names, as a tree of booleans.

    Args:
        tree: a parameter tree.
        pattern: a glob over the whole path, in which ``*`` also crosses ``/``; a
            compiled regular expression, searched for; a sequence of these, of which
            one must match (one that begins with ``!`` takes leaves out again); or a
            predicate of (path, leaf).

    Returns:
        A tree of the structure of `tree` with True where selected: a mask for
        `optax.masked`, too.

    Raises:
        ValueError: if the tree has no leaf, or a pattern (or the predicate, or the
            whole) matches none; the message lists the paths that come near.

    Examples:
        >>> tree = {"a": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0}}
        >>> select(tree, ["*kernel", "!head*"])
        {'a': {'bias': False, 'kernel': True}, 'head': {'kernel': False}}
    """
    named = leaves_with_paths(tree)
    paths = [p for p, _ in named]
    if not named:
        raise ValueError(f"nothing to select with {pattern!r}: the tree has no leaf")
    if callable(pattern):
        chosen = {p for p, leaf in named if pattern(p, leaf)}
        _require(chosen, getattr(pattern, "__name__", repr(pattern)), paths)
    else:
        several = not isinstance(pattern, (str, re.Pattern))
        patterns = tuple(pattern) if several else (pattern,)
        chosen = set()
        if patterns and not any(_sign(p)[0] for p in patterns):
            chosen = set(paths)  # only exclusions: out of everything
        for p in patterns:
            positive, positive_pattern = _sign(p)
            hits = {path for path in paths if _matches(positive_pattern, path)}
            _require(hits, p, paths)
            chosen = chosen | hits if positive else chosen - hits
        _require(chosen, pattern, paths)
    return map_with_path(lambda path, _: path in chosen, tree)


def matching(pattern: Pattern, paths: list[str]) -> list[str]:
    """The paths that a pattern matches, in order; at least one.

    Raises:
        ValueError: if it matches none.
    """
    hits = [path for path in paths if _matches(pattern, path)]
    _require(hits, pattern, paths)
    return hits


def _sign(pattern: Pattern) -> tuple[bool, Pattern]:
    if isinstance(pattern, str) and pattern.startswith("!"):
        return False, pattern[1:]
    return True, pattern


def _matches(pattern: Pattern, path: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.search(path) is not None
    return fnmatch.fnmatchcase(path, pattern)


def _require(hits: Any, pattern: Any, paths: list[str]) -> None:
    if hits:
        return
    text = getattr(pattern, "pattern", pattern)
    word = text if isinstance(text, str) else str(text)
    near = difflib.get_close_matches(word.strip("!*"), paths, n=5, cutoff=0.3)
    listed = ", ".join(near or paths[:5])
    raise ValueError(
        f"pattern {text!r} matches no leaf; near: {listed} ({len(paths)} leaves; "
        "wlab.explain(params) lists them)"
    )


class Leaf(NamedTuple):
    """What is known of one leaf of a parameter tree."""

    path: str  # normalised
    shape: tuple[int, ...]
    dtype: Any
    role: str  # kernel, conv, embedding, head, norm, bias or other
    view: MatrixView | None  # None: not a matrix


def describe(params: Any, *, views: Views | None = None) -> list[Leaf]:
    """Path, shape, role and matrix view of each leaf.

    Roles and views are inferred from the names and shapes of Flax's layers: kernels
    of Dense and DenseGeneral (attention's query, key, value and out with their heads),
    convolutions, embeddings. A leading axis that the norm scales nearby also have is a
    stack of scanned layers. What the names do not tell is taken as a stack of
    matrices over the last two axes.

    Args:
        params: a parameter tree of arrays, abstract arrays or structured weights.
        views: patterns and the view that leaves of that name have instead (None: not
            a matrix); the first that matches holds.

    Raises:
        ValueError: for a pattern that matches nothing, or a view that does not fit
            the leaf's shape.
    """
    named = leaves_with_paths(params)
    overrides = dict(views or {})
    for pattern in overrides:
        matching(pattern, [*dict(named)])
    shapes = {p: tuple(jnp.shape(leaf)) for p, leaf in named}
    stacked = stacked_axes(shapes)
    out = []
    for path, leaf in named:
        shape = shapes[path]
        role, view = _infer(path, shape, stacked[path])
        if is_weight(leaf) and leaf.view is not None:
            view = leaf.view
        for pattern, given in overrides.items():
            if _matches(pattern, path):
                view = given and given.check(shape, path)
                if given is not None and role in ("norm", "bias", "other"):
                    role = "kernel"
                break
        out.append(Leaf(path, shape, jnp.result_type(leaf), role, view))
    return out


def matrix_views(
    params: Any, *, views: Views | None = None
) -> dict[str, MatrixView | None]:
    """The matrix view of each leaf, by path; see `describe`."""
    return {leaf.path: leaf.view for leaf in describe(params, views=views)}


def muon_dimension_numbers(params: Any, *, views: Views | None = None) -> Any:
    """The views as the tree that `optax.contrib.muon` takes; None for no matrix.

    Embeddings and heads are no matrices there, since Muon leaves them to Adam.
    """
    known = {leaf.path: leaf for leaf in describe(params, views=views)}

    def dims(path: str, _: Any) -> Any:
        leaf = known[path]
        hidden = leaf.view is not None and leaf.role in ("kernel", "conv")
        return leaf.view.to_optax() if hidden else None  # type: ignore[union-attr]

    return map_with_path(dims, params)


def explain(
    params: Any,
    pattern: Select | None = None,
    *,
    views: Views | None = None,
) -> None:
    """Print path, shape, dtype, role and matrix view of each leaf.

    Args:
        params: a parameter tree.
        pattern: as in `select`; what it takes is marked with ``*``.
        views: as in `describe`.

    Examples:
        >>> explain({"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}})
          path          shape   dtype    role    in -> out
          dense/bias    (2,)    float32  bias    -
          dense/kernel  (3, 2)  float32  kernel  (3) -> (2)
        2 leaves, 8 parameters
    """
    leaves = describe(params, views=views)
    marks: dict[str, bool] = {}
    if pattern is not None:
        marks = dict(leaves_with_paths(select(params, pattern)))
    rows = [(" ", "path", "shape", "dtype", "role", "in -> out")]
    for leaf in leaves:
        text = "-"
        if leaf.view is not None:
            ins, outs = (
                " ".join(str(leaf.shape[a]) for a in side) for side in leaf.view
            )
            text = f"({ins}) -> ({outs})"
            stack = leaf.view.stack(len(leaf.shape))
            if stack:
                text = f"{' '.join(str(leaf.shape[a]) for a in stack)} x {text}"
        mark = "*" if marks.get(leaf.path) else " "
        name = jnp.dtype(leaf.dtype).name
        rows.append((mark, leaf.path, str(leaf.shape), name, leaf.role, text))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for mark, *cells in rows:
        line = "  ".join(c.ljust(w) for c, w in zip(cells, widths[1:], strict=True))
        print(f"{mark} {line}".rstrip())
    total = sum(_size(leaf.shape) for leaf in leaves)
    print(f"{len(leaves)} leaves, {total:,} parameters")


def _size(shape: tuple[int, ...]) -> int:
    out = 1
    for n in shape:
        out *= n
    return out


def stacked_axes(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """How many leading axes of each leaf are stacked layers.

    The scale of a norm has one axis; what it has more is stacked, and so it is for the
    leaves beside and below the norm's parent.
    """
    scale_axes: dict[str, int] = {}  # of a subtree: the stacked axes of its norms
    for path, shape in shapes.items():
        parts = path.split("/")
        if len(parts) > 1 and parts[-1] == "scale":
            for depth in range(1, len(parts)):
                parent = "/".join(parts[:depth])
                extra = max(len(shape) - 1, 0)
                scale_axes[parent] = min(scale_axes.get(parent, extra), extra)
    out = {}
    for path in shapes:
        parts = path.split("/")
        parents = ["/".join(parts[:d]) for d in range(len(parts) - 1, 0, -1)]
        known = [scale_axes[p] for p in parents if p in scale_axes]
        named = sum(bool(_SCANNED.match(part)) for part in parts)
        out[path] = known[0] if known else named
    return out


def _infer(
    path: str, shape: tuple[int, ...], stacked: int
) -> tuple[str, MatrixView | None]:
    *modules, name = path.split("/")
    module = modules[-1] if modules else ""
    ndim = len(shape) - stacked
    if name == "bias":
        return "bias", None
    if name in ("scale", "gamma", "beta") or _NORM.match(module):
        return "norm", None
    if name == "embedding" and ndim >= 2:
        return "embedding", MatrixView.of(1, 1)
    if ndim < 2 or _NOT_MATRIX.match(name):
        return "other", None
    role = "head" if any(map(_HEAD.match, (*modules, name))) else "kernel"
    if ndim >= 3 and (_CONV.match(module) or any(map(_CONV.match, modules))):
        return "conv", MatrixView.of(ndim - 1, 1)
    if ndim >= 3 and (_FUSED_HEADS.match(module) or _FUSED_HEADS.match(name)):
        return role, MatrixView.of(1, ndim - 1)
    # Heads and their channels are two axes: what there is more is stacked.
    if ndim >= 3 and (_SPLIT_HEADS.match(module) or _SPLIT_HEADS.match(name)):
        return role, MatrixView.of(1, 2)
    if ndim >= 3 and (_JOIN_HEADS.match(module) or _JOIN_HEADS.match(name)):
        return role, MatrixView.of(2, 1)
    return role, MatrixView.of(1, 1)
