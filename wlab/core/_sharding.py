# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Where a tree lives on a mesh: rules on paths for what is stored, types for the rest.

A parameter's place follows from its path and its matrix view, or from a rule of the
user's. The parts of a structured weight follow from the weight, and whatever a function
makes of the parameters, such as the state of an optimiser, follows from its types.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from wlab.core._lift import is_weight
from wlab.core._tree import (
    Leaf,
    Pattern,
    describe,
    leaves_with_paths,
    map_with_path,
    matching,
    stacked_axes,
)

AXES = ("data", "fsdp", "tensor", "expert")
# The axes among which the sequences of a batch are divided.
BATCH = ("data", "fsdp", "expert")

Rules: TypeAlias = Sequence[tuple[Pattern, jax.P]]

# Layers that read what is divided over "tensor": they divide their input axis, so that
# the pair needs one sum at its end and nothing between.
_READS_DIVIDED = {
    *("out", "o_proj", "out_proj", "c_proj", "proj", "wo"),
    *("down", "down_proj", "fc2", "w2", "linear_out"),
}


def make_mesh(
    *, devices: Sequence[Any] | None = None, explicit: bool = False, **sizes: int
) -> Mesh:
    """A mesh with the axes data, fsdp, tensor and expert, and any others that you name.

    Along "data" parameters are copies; along "fsdp" they are divided, and both divide
    the batch; along "tensor" each layer's work is divided; along "expert" the experts.

    Args:
        devices: by default all of this run, those of other hosts included.
        explicit: whether shardings are part of the arrays' types (`AxisType.Explicit`)
            or the compiler's to choose (`AxisType.Auto`).
        **sizes: the size of each axis, 1 for the four that are left out; one of them
            may be -1 and takes all the devices that the others leave. With none given,
            data=-1.

    Returns:
        The mesh, laid out along the machine's own connections where jax knows them.

    Raises:
        ValueError: if the sizes do not multiply to the number of devices.

    Examples:
        >>> make_mesh(devices=jax.devices()[:1]).shape["data"]
        1
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1) | (sizes or {"data": -1})
    n = len(devices)
    asked = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
    free = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh {asked}: sizes are positive, and at most one is -1, for the rest"
        )
    if n % known or (not free and known != n):
        raise ValueError(
            f"mesh {asked or 'of one device'} is for {known} devices, and there are "
            f"{n}: choose sizes whose product is {n}, or -1 for one of them"
        )
    for name in free:
        sizes[name] = n // known
    kinds = (AxisType.Explicit if explicit else AxisType.Auto,) * len(sizes)
    shape, names = tuple(sizes.values()), tuple(sizes)
    try:
        return jax.make_mesh(shape, names, axis_types=kinds, devices=devices)
    except AssertionError:
        # Of v4 jax lays out whole chips only, and these are their halves.
        return Mesh(np.asarray(devices).reshape(shape), names, axis_types=kinds)


def specs(params: Any, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> Any:
    """The mesh axes of every leaf.

    What no rule names is divided by its matrix view: the output axis over "tensor" and
    the input axis over "fsdp", or the other way round where a layer's name says that
    it reads what the layer before it has divided (out, down, o_proj, ...) and for
    embeddings; stacked experts over "expert". Where a size does not divide, the axis
    stays whole. Norms, biases and what else is no matrix are copied.

    Args:
        params: parameters, abstract ones too.
        mesh: whose axes are meant.
        rules: patterns over normalised paths, as in `select`, and the spec of the
            leaf's last axes; axes in front of them, such as stacked layers, stay
            whole. The first that matches holds. `P()` copies the leaf.

    Returns:
        A tree of `PartitionSpec` of the structure of `params`, with one for each array
        of a structured weight.

    Raises:
        ValueError: for a rule that matches no leaf, names an axis which the mesh lacks
            or names one twice, has more entries than the leaf has axes, or divides an
            axis whose size does not allow it.

    Examples:
        >>> mesh = make_mesh(devices=jax.devices()[:1])
        >>> found = specs({"w": jnp.ones((4, 2))}, mesh, [("w", jax.P("fsdp"))])
        >>> found["w"] == jax.P()  # the mesh has one device
        True
    """
    sizes = dict(mesh.shape)
    paths = [path for path, _ in leaves_with_paths(params)]
    ruled: dict[str, tuple[Pattern, jax.P]] = {}
    for pattern, spec in rules:
        for path in matching(pattern, paths):
            ruled.setdefault(path, (pattern, spec))
    leaves = {leaf.path: leaf for leaf in describe(params)}
    layers = stacked_axes({path: leaf.shape for path, leaf in leaves.items()})

    def one(path: str, leaf: Any) -> Any:
        known = leaves[path]
        if path in ruled:
            spec = _given(known, *ruled[path], sizes)
        else:
            spec = _by_view(known, layers[path], sizes)
        return of_parts(leaf, spec, mesh) if is_weight(leaf) else spec

    return map_with_path(one, params)


def of_parts(weight: Any, spec: jax.P, mesh: Mesh | AbstractMesh) -> Any:
    """The spec of each array of a structured weight, whose own is `spec`."""
    sizes = dict(mesh.shape)
    # A part may be smaller than the weight, as scales are.
    return jax.tree.map(
        lambda x, s: _where_it_divides(x.shape, s, sizes), weight, weight.specs(spec)
    )


def shardings(params: Any, mesh: Mesh, rules: Rules = ()) -> Any:
    """The `NamedSharding` of every leaf; see `specs`.

    Args:
        params: parameters, abstract ones too.
        mesh: where they shall live.
        rules: as in `specs`.

    Returns:
        A tree for `jax.device_put`, or for `out_shardings` of the jitted function that
        makes the parameters, so that no device ever holds all of them.
    """
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs(params, mesh, rules))


def derive(fn: Callable[..., Any], tree: Any, placed: Any) -> Any:
    """Where the results of a function live, from where its argument lives.

    The function is traced with shardings in types, which is how `jnp.zeros_like` and
    arithmetic hand them on; nothing is computed. So the state of any optax transform
    whose `init` is written in such terms is divided like the parameters.

    Args:
        fn: a function of one pytree, such as `tx.init`.
        tree: its argument, or an abstract one.
        placed: `NamedSharding` of each leaf, on one mesh.

    Returns:
        The tree of `NamedSharding` of the results, on the same mesh.
    """
    mesh = next(iter(jax.tree.leaves(placed))).mesh
    abstract = AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(AxisType.Explicit,) * len(mesh.axis_names),
    )
    typed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(abstract, s.spec)
        ),
        tree,
        placed,
    )
    with jax.sharding.use_abstract_mesh(abstract):
        made = jax.eval_shape(fn, typed)
    return jax.tree.map(
        lambda x: NamedSharding(mesh, _trimmed(x.sharding.spec if x.sharding else ())),
        made,
    )


def with_auto_axes(fn: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Lets the compiler choose inside a function, whatever the axes of the mesh are.

    Models that were not written for Explicit axes run under them in this way; with
    Auto axes or no mesh it is the function itself.

    Args:
        fn: a function of pytrees of arrays.
        out_specs: a tree of specs, or a prefix of one, of its results under Explicit
            axes.

    Returns:
        The function.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return fn
    return jax.sharding.auto_axes(fn, out_sharding=out_specs)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh on which a tree lives; None for one device or abstract arrays."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """The context in which jitted functions know the mesh; none for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_spec(mesh: Mesh | AbstractMesh, lead: int = 0) -> jax.P:
    """The spec of a batch: its first axis, behind `lead` others, over `BATCH`."""
    names = tuple(name for name in BATCH if dict(mesh.shape).get(name, 1) > 1)
    return jax.P(*(None,) * lead, names or None)


def place_batch(batch: Any, mesh: Mesh | None, *, lead: int = 0) -> Any:
    """This host's rows of a batch, as arrays over all the devices of a mesh.

    Args:
        batch: a pytree of numpy arrays `[rows, ...]`, of every host its own rows, in
            the hosts' order; arrays that are on the mesh already stay as they are.
        mesh: the rows are divided over its axes data, fsdp and expert; None leaves the
            batch as it is.
        lead: how many axes are in front of the rows.

    Returns:
        The batch with `rows` times the number of hosts, as `jax.Array`.

    Raises:
        ValueError: if the rows do not divide.
    """
    if mesh is None:
        return batch
    spec = batch_spec(mesh, lead)
    names = _names(spec[-1])
    parts = math.prod(mesh.shape[name] for name in names)
    hosts = jax.process_count()

    def one(path: Any, x: Any) -> Any:
        if isinstance(x, jax.Array) and mesh_of(x) is not None:
            return x
        x = np.asarray(x)
        if x.ndim <= lead or (x.shape[lead] * hosts) % parts:
            name = jax.tree_util.keystr(path) or "the batch"
            rows = "no rows" if x.ndim <= lead else f"{x.shape[lead] * hosts} rows"
            raise ValueError(
                f"{name} of shape {x.shape} has {rows} over {hosts} host(s), which "
                f"{parts} parts ({', '.join(names)}) do not divide: change "
                "the batch size or the mesh"
            )
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x)

    return jax.tree_util.tree_map_with_path(one, batch)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """Says which mesh axes divide each axis of an activation.

    A hint inside a model: it does nothing where there is no mesh, drops the mesh axes
    that are not there or do not divide, and leaves to the types what Explicit axes
    already say.

    Args:
        x: an array.
        *axes: for each of its axes a mesh axis, several, or None for none.

    Returns:
        The same array.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    auto = {
        name: size
        for name, size, kind in zip(
            mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
        )
        if kind == AxisType.Auto
    }
    wanted = jax.P(*(_known(entry, auto) for entry in axes))
    spec = _where_it_divides(x.shape, wanted, auto)
    if not auto or len(auto) < len(mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


class Place(NamedTuple):
    """Where one leaf is, for people."""

    path: str  # normalised
    shape: tuple[int, ...]
    spec: jax.P
    bytes_per_device: int


def places(params: Any, mesh: Mesh | AbstractMesh, rules: Rules = ()) -> list[Place]:
    """Spec and bytes on each device, leaf by leaf; a structured weight's are summed."""
    sizes = dict(mesh.shape)
    found = dict(leaves_with_paths(specs(params, mesh, rules)))
    out = []
    for path, leaf in leaves_with_paths(params):
        parts = zip(jax.tree.leaves(leaf), jax.tree.leaves(found[path]), strict=True)
        held = sum(
            math.prod(x.shape)
            * jax.dtypes.itemsize_bits(x.dtype)
            // math.prod(sizes[name] for entry in spec for name in _names(entry))
            for x, spec in parts
        )
        spec = jax.tree.leaves(found[path])[0]
        out.append(Place(path, tuple(jnp.shape(leaf)), spec, -(-held // 8)))
    return out


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _entry(names: Sequence[str]) -> Any:
    return None if not names else names[0] if len(names) == 1 else tuple(names)


def _known(entry: Any, sizes: Mapping[str, int]) -> Any:
    """The axes of an entry that the mesh has and that divide anything."""
    return _entry([name for name in _names(entry) if sizes.get(name, 1) > 1])


def _trimmed(entries: Sequence[Any]) -> jax.P:
    """Without trailing None: the form in which jax's types have it."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    return jax.P(*entries)


def _where_it_divides(
    shape: tuple[int, ...], spec: jax.P, sizes: Mapping[str, int]
) -> jax.P:
    def fits(n: int, entry: Any) -> bool:
        return n % math.prod(sizes[name] for name in _names(entry)) == 0

    pairs = zip(shape, spec, strict=False)
    return _trimmed([e if fits(n, e) else None for n, e in pairs])


def _given(
    leaf: Leaf, pattern: Pattern, spec: jax.P, sizes: Mapping[str, int]
) -> jax.P:
    """A rule's spec for a leaf, checked."""
    text = getattr(pattern, "pattern", pattern)
    where = f"rule {text!r}: {spec} for leaf {leaf.path!r} of shape {leaf.shape}"
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"{where} has more entries than the leaf has axes: give one for each of "
            "its last axes"
        )
    used = [name for entry in spec for name in _names(entry)]
    if lacking := [name for name in used if name not in sizes]:
        raise ValueError(
            f"{where} names {lacking}, and the mesh has the axes {list(sizes)}: take "
            "one of these"
        )
    if len(set(used)) < len(used):
        raise ValueError(f"{where} names a mesh axis twice: each divides one axis")
    lead = len(leaf.shape) - len(spec)
    for n, entry in zip(leaf.shape[lead:], spec, strict=True):
        parts = math.prod(sizes[name] for name in _names(entry))
        if n % parts:
            raise ValueError(
                f"{where}: the axis of {n} does not divide into {parts} parts; leave "
                "it whole (None), or choose another mesh"
            )
    return _trimmed([*[None] * lead, *(_known(entry, sizes) for entry in spec)])


def _by_view(leaf: Leaf, layers: int, sizes: Mapping[str, int]) -> jax.P:
    """The spec that follows from the matrix view; see `specs`."""
    if leaf.view is None:
        return jax.P()
    ndim = len(leaf.shape)
    entries: list[Any] = [None] * ndim

    def divide(axes: Sequence[int], name: str) -> bool:
        for axis in axes:
            size = sizes.get(name, 1)
            if size > 1 and entries[axis] is None and leaf.shape[axis] % size == 0:
                entries[axis] = name
                return True
        return False

    stack = leaf.view.stack(ndim)
    divide(stack[layers:][-1:], "expert")
    ins, outs = ([a % ndim for a in side] for side in leaf.view)
    reads = leaf.role == "embedding" or (
        leaf.path.rpartition("/")[0].rpartition("/")[2] in _READS_DIVIDED
    )
    tensor, fsdp = (ins, outs) if reads else (outs, ins)
    # Only the first axis: heads, but never the channels of one.
    divide(tensor[:1], "tensor")
    divide([*fsdp, *tensor], "fsdp")
    return _trimmed(entries)
