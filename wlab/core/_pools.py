# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Slices of a parameter tree: which there are, how k are chosen, taken, put back.

A pool holds n slices of one or several leaves: stacked layers, the columns, rows or
entries of matrices, or whole leaves. A choice says which k of them are active. Taking
these from a tree gives arrays of size k, putting such arrays back gives whole leaves.
All shapes are static: only the numbers in the choice change. `wlab.core.subset` is the
transform over pools.
"""

import abc
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from wlab.core import _linalg as linalg
from wlab.core._float32 import accumulated
from wlab.core._tree import (
    Leaf,
    Select,
    Views,
    describe,
    leaves_with_paths,
    stacked_axes,
)
from wlab.core._tree import select as _select

Count = int | Callable[[int], int]
Side = Literal["columns", "rows", "entries"]
Leaves = Mapping[str, jax.Array]  # arrays by path


# --- Rules of choice -------------------------------------------------------------


class Draw(NamedTuple):
    """What a rule of choice may look at; it returns int32 ``[k]``, all different."""

    name: str  # of the pool: a path, or the stack's
    size: int  # n, how many slices there are
    k: int  # how many to choose
    key: jax.Array  # random key of this pool at this choice
    round: jax.Array  # int32, how many choices were made before
    step: jax.Array  # int32, steps done
    norms: jax.Array | None  # float32 [n], of each slice's gradient; None: not known
    previous: jax.Array  # int32 [k], what was active; arbitrary in round 0
    extra: Mapping[str, Any]  # the extra arguments of `update`


Choose = Callable[[Draw], jax.Array]


def at_random(draw: Draw) -> jax.Array:
    """Any k slices, without replacement, ascending."""
    lot = jax.random.uniform(draw.key, (draw.size,))
    if draw.size <= 2**16:
        return jnp.sort(jax.lax.top_k(lot, draw.k)[1])
    # A threshold and no sort: the slices are the entries of a large matrix.
    return jnp.nonzero(lot >= linalg.kth_largest(lot, draw.k), size=draw.k)[0]


def ascending(draw: Draw) -> jax.Array:
    """The next k slices from the first on, round and round."""
    return (draw.round * draw.k + jnp.arange(draw.k)) % draw.size


def descending(draw: Draw) -> jax.Array:
    """The next k slices from the last one back, round and round."""
    return draw.size - 1 - ascending(draw)


def largest(draw: Draw) -> jax.Array:
    """The k slices whose gradients have the largest norms."""
    return jax.lax.top_k(_norms(draw), draw.k)[1]


def in_proportion(draw: Draw) -> jax.Array:
    """A draw without replacement, each in proportion to the norm of its gradient.

    One after another from what is left, as the Gumbel trick does at once. For other
    weights: ``in_proportion(draw._replace(norms=weights))``.
    """
    noise = jax.random.gumbel(draw.key, (draw.size,))
    return jax.lax.top_k(jnp.log(_norms(draw)) + noise, draw.k)[1]


def _norms(draw: Draw) -> jax.Array:
    if draw.norms is None:
        raise ValueError(
            f"this choice of {draw.k} of {draw.size} slices of {draw.name!r} looks at "
            "their gradients, which are not known yet or hold the chosen ones only: "
            "take whole gradients, or a rule such as at_random"
        )
    return draw.norms


def _chosen(rule: Choose, draw: Draw) -> jax.Array:
    """What a rule chooses, checked; all of them need no rule."""
    if draw.k == draw.size:
        return _arange(draw.k)
    found = jnp.asarray(rule(draw))
    if found.shape != (draw.k,) or not jnp.issubdtype(found.dtype, jnp.integer):
        raise ValueError(
            f"the rule {getattr(rule, '__name__', rule)!r} chose {found.dtype} of "
            f"shape {found.shape} for {draw.name!r}; it must return draw.k={draw.k} "
            f"numbers below draw.size={draw.size}, as integers of shape ({draw.k},)"
        )
    return found.astype(jnp.int32)


# --- Pools -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pool(abc.ABC):
    """Slices of one or several leaves, of which k are active.

    A subclass says how they are taken from the leaves and put back. Here are `Along`
    and `Members`; a method may bring its own, with anything for a choice.

    Attributes:
        name: of the pool: its random key is folded by it.
        size: how many slices there are.
        k: how many are active; 0 leaves all to what is outside.
    """

    name: str
    size: int
    k: int

    @property
    @abc.abstractmethod
    def paths(self) -> tuple[str, ...]:
        """The leaves that it holds."""

    @property
    def homes(self) -> tuple[str, ...]:
        """The leaves in whose place the active slices stand in a tree."""
        return self.paths

    @property
    def lead(self) -> int:
        """How many leading axes of what `take` returns have a choice of their own."""
        return 0

    @abc.abstractmethod
    def start(self, leaves: Leaves) -> jax.Array:
        """A choice to begin with, of the right shape."""

    @abc.abstractmethod
    def choose(self, rule: Choose, draw: Draw, grads: Leaves | None) -> jax.Array:
        """The next choice; `draw` lacks the norms, which the gradients give."""

    @abc.abstractmethod
    def take(self, leaves: Leaves, choice: jax.Array) -> dict[str, jax.Array]:
        """The active slices ``[*lead, k, ...]``, by home."""

    @abc.abstractmethod
    def put(
        self,
        slices: Leaves,
        choice: jax.Array,
        leaves: Leaves,
        outside: Callable[[jax.Array], jax.Array],
    ) -> dict[str, jax.Array]:
        """Whole leaves: the active slices, and `outside` of what else is there."""


class Axes(NamedTuple):
    """The axes of a leaf, each counted from the left."""

    stack: tuple[int, ...]  # each of whose places has a choice of its own
    chosen: tuple[int, ...]  # from which is chosen, row-major as one
    others: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Along(Pool):
    """The slices along some axes of each leaf; all leaves share one choice.

    What is taken has the axes of the leaf but for the chosen ones, which are one of
    size k behind the stacked ones.

    Attributes:
        axes: path and axes of each leaf.
        stack: the sizes of the stacked axes: matrices that choose apart.
    """

    axes: tuple[tuple[str, Axes], ...]
    stack: tuple[int, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves that it holds."""
        return tuple(path for path, _ in self.axes)

    @property
    def lead(self) -> int:
        """The stacked axes."""
        return len(self.stack)

    def start(self, leaves: Leaves) -> jax.Array:
        """The first slices."""
        del leaves
        return jnp.broadcast_to(_arange(self.k), (*self.stack, self.k))

    def choose(self, rule: Choose, draw: Draw, grads: Leaves | None) -> jax.Array:
        """By the rule, for each stacked matrix apart."""
        return self.draw(rule, draw._replace(norms=self.norms(grads)))

    def norms(self, grads: Leaves | None) -> jax.Array | None:
        """Of the gradient of each slice: ``[*stack, n]``, whole on every device."""
        if grads is None:
            return None
        squares = []
        for path, axes in self.axes:
            sums = jnp.sum(jnp.square(accumulated(grads[path])), axes.others)
            left = [a for a in range(grads[path].ndim) if a not in axes.others]
            order = [left.index(a) for a in (*axes.stack, *axes.chosen)]
            squares.append(whole(sums.transpose(order)))
        norms = jnp.sqrt(sum(squares)).astype(jnp.float32)
        return norms.reshape(*self.stack, self.size)

    def draw(self, rule: Choose, draw: Draw) -> jax.Array:
        """As `choose`, with the norms in the draw."""
        keys = jax.random.split(draw.key, self.stack) if self.stack else draw.key

        def one(key: jax.Array, norms: jax.Array | None, previous: jax.Array) -> Any:
            return _chosen(rule, draw._replace(key=key, norms=norms, previous=previous))

        for _ in self.stack:
            one = jax.vmap(one)
        return one(keys, draw.norms, draw.previous)

    def take(self, leaves: Leaves, choice: jax.Array) -> dict[str, jax.Array]:
        """The active slices, by one gather."""
        out = {}
        for path, axes in self.axes if self.k else ():
            x, sizes = _front(leaves[path], axes)
            spec = _spec(x)
            rest = self.lead + len(sizes)
            entry = _joined(spec[self.lead : rest])
            spec = [*spec[: self.lead], None, *spec[rest:]]
            taken = _get(x, self._index(choice, sizes), spec)
            shape = (*x.shape[: self.lead], self.k, *x.shape[rest:])
            # The slots are divided as their axes were; if that fails, another axis is.
            for axis in range(self.lead, len(shape)):
                if spec[axis] is None and _divides(x, entry, shape[axis]):
                    spec[axis], entry = entry, None
            out[path] = _placed(taken, spec, x)
        return out

    def put(
        self,
        slices: Leaves,
        choice: jax.Array,
        leaves: Leaves,
        outside: Callable[[jax.Array], jax.Array],
    ) -> dict[str, jax.Array]:
        """Each place reads its slot, if it has one: no buffer is filled."""
        out = {}
        slots = functools.partial(_slots, n=self.size)
        for _ in self.stack:
            slots = jax.vmap(slots)
        for path, axes in self.axes:
            x, sizes = _front(leaves[path], axes)
            new = outside(accumulated(x))
            if self.k and axes.others:
                slot = slots(choice).reshape(*self.stack, *sizes)
                safe = jnp.minimum(slot, self.k - 1)
                grids = _grids(self.stack, len(sizes))
                # Made whole along what it is read by while it is still small.
                rest = self.lead + len(sizes)
                small = [*_spec(x)[: self.lead], None, *_spec(x)[rest:]]
                active = _placed(slices[path], small, x)
                active = _get(active, (*grids, safe), _spec(x))
                mask = jnp.expand_dims(slot < self.k, [*range(slot.ndim, x.ndim)])
                mask = like(jnp.broadcast_to(mask, x.shape), x)
                new = jnp.where(mask, active, new)
            elif self.k:
                # A slot for every entry would be as large as the leaf.
                new = _set(new, self._index(choice, sizes), slices[path])
            back = (*axes.stack, *axes.chosen, *axes.others)
            new = new.transpose([back.index(a) for a in range(x.ndim)])
            out[path] = like(new, leaves[path])
        return out

    def _index(self, choice: jax.Array, sizes: tuple[int, ...]) -> tuple[Any, ...]:
        return (*_grids(self.stack, 1), *jnp.unravel_index(choice, sizes))


@dataclasses.dataclass(frozen=True)
class Members(Pool):
    """Slices that are leaves, or groups of leaves, apart in the tree.

    The slots stand at the places of the first member's leaves, stacked along a new
    first axis. Members of several shapes share flat slots of the largest one's size,
    for inner transforms that work entry by entry; on a mesh such slots are whole on
    every device.

    Attributes:
        members: the leaves of each slice, in one order.
        shapes: for each leaf of a member, the shapes that it has in all members.
    """

    members: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """The leaves that it holds."""
        return tuple(path for member in self.members for path in member)

    @property
    def homes(self) -> tuple[str, ...]:
        """Those of the first member."""
        return self.members[0]

    def start(self, leaves: Leaves) -> jax.Array:
        """The first slices."""
        del leaves
        return _arange(self.k)

    def choose(self, rule: Choose, draw: Draw, grads: Leaves | None) -> jax.Array:
        """By the rule."""
        norms = None
        if grads is not None:
            norms = jnp.stack(
                [
                    jnp.sqrt(sum(_square_sum(grads[path]) for path in member))
                    for member in self.members
                ]
            ).astype(jnp.float32)
        return _chosen(rule, draw._replace(norms=norms))

    def take(self, leaves: Leaves, choice: jax.Array) -> dict[str, jax.Array]:
        """One slot after another, each from the leaf that it names: n branches."""
        if not self.k:
            return {}

        def gather(home: int) -> jax.Array:
            xs = [leaves[member[home]] for member in self.members]
            dtype = jnp.result_type(*xs)

            def branch(x: jax.Array) -> Callable[[], jax.Array]:
                return lambda: self._slot(x.astype(dtype), home, xs[0])

            branches = [branch(x) for x in xs]
            return jax.lax.map(lambda i: jax.lax.switch(i, branches), choice)

        return {path: gather(home) for home, path in enumerate(self.homes)}

    def put(
        self,
        slices: Leaves,
        choice: jax.Array,
        leaves: Leaves,
        outside: Callable[[jax.Array], jax.Array],
    ) -> dict[str, jax.Array]:
        """Each leaf reads its slot, if it has one."""
        out = {}
        slot = _slots(choice, n=self.size) if self.k else None
        for i, member in enumerate(self.members):
            for home, path in enumerate(member):
                x = leaves[path]
                new = outside(accumulated(x))
                if slot is not None:
                    at = jnp.minimum(slot[i], self.k - 1)
                    held = slices[self.homes[home]]
                    held = jax.lax.dynamic_index_in_dim(held, at, keepdims=False)
                    if self._flat(home):
                        held = whole(held)[: x.size].reshape(x.shape)
                    new = jnp.where(slot[i] < self.k, like(held, x), new)
                out[path] = new
        return out

    def _flat(self, home: int) -> bool:
        return len(set(self.shapes[home])) > 1

    def _slot(self, x: jax.Array, home: int, first: jax.Array) -> jax.Array:
        if not self._flat(home):
            return like(x, first)
        room = max(math.prod(shape) for shape in self.shapes[home])
        flat = whole(x.reshape(-1, **_out(x, [None])))
        return jnp.pad(flat, (0, room - x.size))


# The rules that do not look at a pool's name, and so can draw for many at once.
_NAMELESS: tuple[Choose, ...] = (at_random, largest, in_proportion)


def choose_all(
    pools: Sequence[Pool],
    rule: Choose,
    draws: Sequence[Draw],
    grads: Sequence[Leaves | None],
) -> list[jax.Array]:
    """The next choice of each pool; those alike are drawn in one call.

    A program with a draw for each of hundreds of kernels takes minutes to compile.
    """
    groups: dict[Any, list[int]] = {}
    for i, (pool, given) in enumerate(zip(pools, grads, strict=True)):
        alike = type(pool) is Along and rule in _NAMELESS
        kind = (pool.size, pool.k, pool.stack, given is None) if alike else i
        groups.setdefault(kind, []).append(i)
    out: dict[int, jax.Array] = {}
    for members in groups.values():
        first = members[0]
        if len(members) == 1:
            out[first] = pools[first].choose(rule, draws[first], grads[first])
            continue
        made = [
            draws[i]._replace(norms=pools[i].norms(grads[i]))  # type: ignore[attr-defined]
            for i in members
        ]

        def one(
            key: jax.Array,
            norms: jax.Array | None,
            previous: jax.Array,
            pool: Any = pools[first],
            draw: Draw = made[0],
        ) -> jax.Array:
            new = draw._replace(key=key, norms=norms, previous=previous)
            return pool.draw(rule, new)

        known = [d.norms for d in made if d.norms is not None]
        norms = jnp.stack(known) if known else None
        found = jax.vmap(one)(
            jnp.stack([d.key for d in made]),
            norms,
            jnp.stack([d.previous for d in made]),
        )
        out |= {i: found[j] for j, i in enumerate(members)}
    return [out[i] for i in range(len(pools))]


# --- The pools of a tree ---------------------------------------------------------


def pools_of(
    tree: Any,
    *,
    k: Count,
    slices: Literal["layers", "leaves"] | Side,
    select: Select | None,
    views: Views | None,
) -> list[Pool]:
    """The pools of a parameter tree; the arguments are those of `subset`.

    Raises:
        ValueError: where there is none, or for a leaf that has no such slices.
    """
    leaves = describe(tree, views=views)
    if select is not None:
        chosen = {path for path, hit in leaves_with_paths(_select(tree, select)) if hit}
    elif slices == "layers":
        chosen = {leaf.path for leaf in leaves}
    else:
        chosen = hidden_kernels(leaves)
    if slices == "layers":
        return _layers(leaves, chosen, k, named=select is not None)
    taken = [leaf for leaf in leaves if leaf.path in chosen]
    if not taken:
        raise ValueError(
            f"no leaf to take {slices} of: none of the {len(leaves)} is the kernel of "
            "a linear layer or convolution; name them with select="
        )
    if slices == "leaves":
        paths = sorted((leaf.path for leaf in taken), key=natural)
        shapes = {leaf.path: leaf.shape for leaf in taken}
        return [member_pool([(path,) for path in paths], shapes, k, "leaves")]
    return [matrix_pool(leaf, slices, k) for leaf in taken]


def matrix_pool(leaf: Leaf, side: Side, k: Count) -> Along:
    """The pool of the columns, rows or entries of one leaf.

    Args:
        leaf: from `wlab.core.describe`.
        side: "columns" (inputs), "rows" (outputs) or "entries" (both, row-major).
        k: how many are active, of each stacked matrix.

    Raises:
        ValueError: if the leaf is no matrix.
    """
    if leaf.view is None:
        raise ValueError(
            f"leaf {leaf.path!r} of shape {leaf.shape} is no matrix and has no {side}: "
            "leave it out of select=, or give it a view in views="
        )
    ndim = len(leaf.shape)
    ins, outs = (tuple(a % ndim for a in axes) for axes in leaf.view)
    chosen = {"columns": ins, "rows": outs}.get(side, (*ins, *outs))
    stack = leaf.view.stack(ndim)
    others = tuple(a for a in (*ins, *outs) if a not in chosen)
    n = math.prod(leaf.shape[a] for a in chosen)
    axes = ((leaf.path, Axes(stack, chosen, others)),)
    sizes = tuple(leaf.shape[a] for a in stack)
    return Along(leaf.path, n, _count(k, n), axes, sizes)


def stack_pools(stacked: Mapping[str, tuple[int, ...]], k: Count) -> list[Along]:
    """The pools of leaves that are stacks of layers along their first axis.

    Args:
        stacked: their paths and shapes. Those of one length and one top-level name
            share a pool.
        k: how many layers are active.
    """
    found: dict[tuple[str, int], list[str]] = {}
    for path, shape in stacked.items():
        if not shape:
            raise ValueError(
                f"leaf {path!r} is a scalar and no stack of layers: leave it out of "
                "select="
            )
        found.setdefault((path.split("/")[0], shape[0]), []).append(path)

    def axes(path: str) -> Axes:
        return Axes((), (0,), tuple(range(1, len(stacked[path]))))

    return [
        Along(f"{top}[{n}]", n, _count(k, n), tuple((p, axes(p)) for p in paths))
        for (top, n), paths in found.items()
    ]


def member_pool(
    members: Sequence[Sequence[str]],
    shapes: Mapping[str, tuple[int, ...]],
    k: Count,
    name: str | None = None,
) -> Members:
    """The pool of leaves, or of groups of leaves, that stand apart in the tree.

    Args:
        members: the paths of each slice.
        shapes: of all leaves.
        k: how many are active.
        name: of the pool; None: the first path.
    """
    n = len(members)
    columns = zip(*members, strict=True)
    return Members(
        name or members[0][0],
        n,
        _count(k, n),
        tuple(map(tuple, members)),
        tuple(tuple(shapes[path] for path in column) for column in columns),
    )


def hidden_kernels(leaves: Iterable[Leaf]) -> set[str]:
    """The paths of kernels of linear layers and convolutions, but not of the head."""
    roles = ("kernel", "conv")
    return {leaf.path for leaf in leaves if leaf.view and leaf.role in roles}


def natural(path: str) -> list[Any]:
    """A key for sorting paths in which ``blocks_10`` comes after ``blocks_9``."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path)]


def _count(k: Count, n: int) -> int:
    return k if isinstance(k, int) else int(k(n))


def _layers(
    leaves: Sequence[Leaf], chosen: set[str], k: Count, named: bool
) -> list[Pool]:
    """Stacks along a leading axis, and stacks that are written out."""
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    depth = stacked_axes(shapes)
    stacked = {p: shapes[p] for p in shapes if p in chosen and depth[p]}
    pools: list[Pool] = []
    free = [path for path in shapes if path in chosen and path not in stacked]
    for family, groups in _numbered(free).items():
        members = [groups[number] for number in sorted(groups)]
        first = members[0]
        odd = {
            suffix
            for member in members
            for suffix in (*member, *first)
            if shapes.get(member.get(suffix, "")) != shapes.get(first.get(suffix, ""))
        }
        if not odd and len(members) > 1:
            paths = [[member[suffix] for suffix in sorted(first)] for member in members]
            pools.append(member_pool(paths, shapes, k, family))
            held = set(pools[-1].paths)
            free = [path for path in free if path not in held]
        elif odd and named:
            suffix = min(odd)
            where = [m[suffix] for m in members if suffix in m]
            listed = ", ".join(f"{path!r} {shapes[path]}" for path in where)
            raise ValueError(
                f"the {len(members)} layers {family} are not alike, for there is "
                f"{listed}: select= layers of one structure and shape, or use "
                "slices='leaves'"
            )
    if named:
        stacked |= {path: shapes[path] for path in free}
    pools.extend(stack_pools(stacked, k))
    if not pools:
        raise ValueError(
            "no stack of layers: no leaf has a leading layer axis (nn.scan), and no "
            "numbered siblings (blocks_0, blocks_1) have the same leaves; near: "
            + ", ".join(f"{p} {s}" for p, s in [*shapes.items()][:5])
            + "; name the stacked leaves with select= (wlab.explain lists all)"
        )
    return pools


def _numbered(paths: Iterable[str]) -> dict[str, dict[int, dict[str, str]]]:
    """Leaves below siblings that differ by a number, such as ``blocks_0``.

    For each family of siblings, named ``blocks_*``, its numbers; for each number the
    paths, by what follows it.
    """
    out: dict[str, dict[int, dict[str, str]]] = {}
    for path in paths:
        parts = path.split("/")
        for i, part in enumerate(parts):
            if match := re.fullmatch(r"(.*?)(\d+)", part):
                family = "/".join([*parts[:i], match[1] + "*"])
                group = out.setdefault(family, {}).setdefault(int(match[2]), {})
                group["/".join(parts[i + 1 :])] = path
                break
    return out


# --- Arrays ----------------------------------------------------------------------


def like(x: jax.Array, other: jax.Array, lead: int | None = None) -> jax.Array:
    """Sharded like another array in all or its leading axes, where types say so."""
    mesh = _explicit(other)
    if mesh is None:
        return x
    spec = [*_spec(other)[:lead], *_spec(x)[x.ndim if lead is None else lead :]]
    return jax.reshard(x, NamedSharding(mesh, jax.P(*spec)))


def whole(x: jax.Array) -> jax.Array:
    """On all devices of the mesh whole, where one is known."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    place = jax.reshard if _explicit(x) else jax.lax.with_sharding_constraint
    return place(x, NamedSharding(mesh, jax.P()))


def _square_sum(x: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(accumulated(x)))


def _arange(n: int) -> jax.Array:
    return jnp.arange(n, dtype=jnp.int32)


def _front(x: jax.Array, axes: Axes) -> tuple[jax.Array, tuple[int, ...]]:
    """The leaf as ``[*stack, *chosen, *others]``, and the sizes of the chosen axes."""
    sizes = tuple(x.shape[a] for a in axes.chosen)
    return x.transpose(*axes.stack, *axes.chosen, *axes.others), sizes


def _grids(stack: tuple[int, ...], behind: int) -> tuple[jax.Array, ...]:
    """Indices of the stacked axes, to stand beside one with so many axes behind."""
    ndim = len(stack) + behind
    return tuple(
        _arange(n).reshape([n if i == j else 1 for j in range(ndim)])
        for i, n in enumerate(stack)
    )


def _slots(choice: jax.Array, *, n: int) -> jax.Array:
    """For each of n slices the number of its slot, and k for none."""
    k = choice.shape[0]
    return jnp.full((n,), k, jnp.int32).at[choice].set(_arange(k))


def _explicit(x: jax.Array) -> Any:
    """The mesh of an array, if its shardings are in types."""
    mesh = jax.typeof(x).sharding.mesh
    return mesh if AxisType.Explicit in mesh.axis_types else None


def _spec(x: jax.Array) -> list[Any]:
    """What divides each axis, in the type."""
    spec = [*jax.typeof(x).sharding.spec]
    return [*spec, *[None] * (x.ndim - len(spec))]


def _placed(x: jax.Array, spec: list[Any], like: jax.Array) -> jax.Array:
    """Sharded so, on the mesh of another array."""
    mesh = _explicit(like)
    return x if mesh is None else jax.reshard(x, NamedSharding(mesh, jax.P(*spec)))


def _joined(entries: list[Any]) -> Any:
    """What divides several axes, as one axis has it."""
    names = tuple(
        name
        for entry in entries
        for name in (entry if isinstance(entry, tuple) else (entry,))
        if name is not None
    )
    return names if len(names) > 1 else (names[0] if names else None)


def _divides(x: jax.Array, entry: Any, size: int) -> bool:
    """Whether an axis of this size can be divided by axes of the array's mesh."""
    mesh = _explicit(x)
    if mesh is None or entry is None:
        return False
    names = entry if isinstance(entry, tuple) else (entry,)
    return size % math.prod(mesh.shape[name] for name in names) == 0


def _out(x: jax.Array, spec: list[Any]) -> dict[str, Any]:
    """The argument that says how a result is sharded, where types say so."""
    mesh = _explicit(x)
    return {} if mesh is None else {"out_sharding": NamedSharding(mesh, jax.P(*spec))}


def _get(x: jax.Array, index: tuple[Any, ...], spec: list[Any]) -> jax.Array:
    return jnp.asarray(x).at[index].get(mode="promise_in_bounds", **_out(x, spec))


def _set(x: jax.Array, index: tuple[Any, ...], values: jax.Array) -> jax.Array:
    return (
        jnp.asarray(x)
        .at[index]
        .set(
            values.astype(x.dtype),
            unique_indices=True,
            mode="promise_in_bounds",
            **_out(x, _spec(x)),
        )
    )
