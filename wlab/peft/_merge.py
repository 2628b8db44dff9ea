# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What can be done with any reparameterisation: join, merge, take out, place, keep."""

import pathlib
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding

from wlab.core import (
    Adapter,
    Reparam,
    fold_path,
    leaves_with_paths,
    map_with_path,
    materialise,
    sharding,
    typed_key,
)
from wlab.core._sharding import Rules, _where_it_divides
from wlab.quant import Quantized, quantize_blocks

Tie = Literal["both", "untie"]
_JOINED = "#"  # in front of the number of a joined method; no path begins so


def join(*methods: Reparam) -> Reparam:
    """Several methods in one model, each with targets of its own.

    Args:
        *methods: reparameterisations whose `select` do not overlap.

    Returns:
        A `Reparam` of all of them; its adapters hold the methods' in order, under
        ``"#0"``, ``"#1"``, ...

    Raises:
        ValueError: from `init`, if two methods have a target in common.

    Examples:
        >>> from wlab import peft
        >>> params = {n: {"kernel": jnp.ones((4, 4))} for n in ("q", "up")}
        >>> method = join(peft.lora(2, select="q*"), peft.bone(2, select="up*"))
        >>> jax.tree.map(jnp.shape, method.init(0, params).train)["#1"]
        {'up/kernel': {'d': (2, 4)}}
    """
    names = [f"{_JOINED}{i}" for i in range(len(methods))]

    def init(key: jax.Array | int, params: Any) -> Adapter:
        key = typed_key(key)
        made = {
            name: m.init(fold_path(key, name), params)
            for name, m in zip(names, methods, strict=True)
        }
        owner: dict[str, str] = {}
        for name, adapter in made.items():
            for path in adapter.train:
                if path in owner:
                    raise ValueError(
                        f"methods {owner[path]} and {name} both take the leaf "
                        f"{path!r}: give them select= that do not overlap"
                    )
                owner[path] = name
        return Adapter(
            {name: a.train for name, a in made.items()},
            {name: a.frozen for name, a in made.items()},
            key,
        )

    def part(adapter: Adapter, name: str) -> Adapter:
        return Adapter(adapter.train[name], adapter.frozen[name], adapter.key)

    def attach(adapter: Adapter, params: Any, scale: Any = None) -> Any:
        tree = params
        for name, m in zip(names, methods, strict=True):
            new = dict(leaves_with_paths(m.attach(part(adapter, name), params, scale)))
            old = dict(leaves_with_paths(params))
            moved = {p for p in new if new[p] is not old[p]}
            moved &= _touched(part(adapter, name), old)
            tree = map_with_path(
                lambda path, leaf, new=new, moved=moved: (
                    new[path] if path in moved else leaf
                ),
                tree,
            )
        return tree

    def labels(train: Any) -> Any:
        return {
            name: m.labels(train[name]) for name, m in zip(names, methods, strict=True)
        }

    def specs(adapter: Adapter, params: Any, base: Any) -> Adapter:
        made = {
            name: m.specs(part(adapter, name), params, base)
            for name, m in zip(names, methods, strict=True)
        }
        return Adapter(
            {name: a.train for name, a in made.items()},
            {name: a.frozen for name, a in made.items()},
            jax.P(),
        )

    return Reparam(init, attach, labels, specs)


def _touched(adapter: Adapter, leaves: Mapping[str, Any]) -> set[str]:
    """The targets, and the biases beside them."""
    beside = {path.rpartition("/")[0] + "/bias" for path in adapter.train}
    return set(adapter.train) | {path.lstrip("/") for path in beside} & set(leaves)


class Requantized(NamedTuple):
    """A merge into packed leaves, and what rounding again cost."""

    params: Any
    errors: dict[str, jax.Array]  # by path: |W' - Q(W')| / |W'|, Frobenius


def merge(
    method: Reparam,
    adapter: Adapter,
    params: Any,
    *,
    requantize: bool = False,
    tie: Tie | None = None,
) -> Any:
    """The parameters with the adapter in them, dense, of the dtypes that they had.

    Sums are in float32 and rounded once. A packed leaf becomes a dense one, since the
    small change would be lost in its grid.

    Args:
        method: which made the adapter.
        adapter: what is merged.
        params: the base.
        requantize: round packed leaves again, to their own grid with new scales, and
            return a `Requantized` that says what this cost.
        tie: where one array stands in several places of which an adapter takes one:
            "both" puts the merged leaf in all of them, "untie" leaves the others.

    Returns:
        The parameters, or a `Requantized`.

    Raises:
        ValueError: for an array that stands in several places, without `tie`; as
            `attach` does.

    Examples:
        >>> from wlab import peft
        >>> params = {"dense": {"kernel": jnp.ones((4, 3), jnp.bfloat16)}}
        >>> method = peft.lora(2)
        >>> merged = merge(method, method.init(0, params), params)
        >>> merged["dense"]["kernel"].dtype.name
        'bfloat16'
    """
    attached = method.attach(adapter, params)
    before, after = (dict(leaves_with_paths(t)) for t in (params, attached))
    changed = _changed(adapter) | {
        p for p in _beside(adapter, before) if after[p] is not before[p]
    }
    dense = {path: materialise(after[path]) for path in changed}
    for path in sorted(changed):
        twins = [p for p, x in before.items() if x is before[path] and p != path]
        if not twins:
            continue
        if tie is None:
            raise ValueError(
                f"leaf {path!r} of shape {jnp.shape(before[path])} is also {twins}: "
                "say tie='both' to merge into all places, or tie='untie'"
            )
        if tie == "both":
            dense |= {p: dense[path] for p in twins if p not in changed}
    if not requantize:
        return map_with_path(lambda path, leaf: dense.get(path, leaf), params)
    errors: dict[str, jax.Array] = {}
    for path, leaf in before.items():
        if path in dense and isinstance(leaf, Quantized):
            new = dense[path]
            packed = quantize_blocks(
                new, leaf.grid, leaf.block, view=leaf.view, dtype=leaf.dtype
            )
            wide = new.astype(jnp.float32)
            lost = packed.materialise().astype(jnp.float32) - wide
            errors[path] = jnp.linalg.norm(lost) / jnp.linalg.norm(wide)
            dense[path] = packed
    return Requantized(
        map_with_path(lambda path, leaf: dense.get(path, leaf), params), errors
    )


def unmerge(method: Reparam, adapter: Adapter, params: Any) -> Any:
    """The base from merged parameters, if what was added does not depend on it.

    Args:
        method: which made the adapter.
        adapter: what was merged.
        params: the merged parameters, dense.

    Returns:
        The base, exact up to the rounding of the merge.

    Raises:
        ValueError: for a method whose change depends on the base (DoRA, Bat, HUT): keep
            the base instead.
    """
    changed = _changed(adapter)

    @jax.jit
    def changes(adapter: Adapter, params: Any) -> dict[str, Any]:
        """What is added to each leaf, and whether it is the same on another base."""
        one, two = (
            map_with_path(
                lambda path, x, fill=fill: (
                    jnp.full(jnp.shape(x), fill, jnp.float32) if path in changed else x
                ),
                params,
            )
            for fill in (0, 1)
        )
        change, again = (
            dict(leaves_with_paths(materialise(method.attach(adapter, base))))
            for base in (one, two)
        )

        def same(path: str) -> jax.Array:
            moved = jnp.abs(again[path] - 1 - change[path])
            return jnp.all(moved <= 1e-5 * (1 + jnp.abs(change[path])))

        return {path: (change[path], same(path)) for path in changed}

    found = changes(adapter, params)
    for path, (_, same) in found.items():
        if not same:
            raise ValueError(
                f"what the adapter changes in {path!r} depends on the base, so it "
                "cannot be taken out again: keep the base beside the merged model"
            )

    def back(path: str, x: Any) -> Any:
        if path not in changed:
            return x
        return (x.astype(jnp.float32) - found[path][0]).astype(x.dtype)

    return map_with_path(back, params)


def labels(method: Reparam, params: Any) -> Any:
    """Which leaves of the parameters a method replaces: "train", or "frozen".

    For those who hold one merged tree and use `optax.partition`.

    Args:
        method: a reparameterisation.
        params: the base, abstract too.
    """
    train = jax.eval_shape(lambda: method.init(jax.random.key(0), params)).train
    changed = _changed(Adapter(train, None, None))  # type: ignore[arg-type]
    return map_with_path(
        lambda path, _: "train" if path in changed else "frozen", params
    )


def shardings(
    method: Reparam, adapter: Adapter, params: Any, mesh: Mesh, rules: Rules = ()
) -> Adapter:
    """Where an adapter lives on a mesh, from where its base does.

    Factors are divided as the sides of the base that they multiply; ranks, vectors and
    frozen bases are copied.

    Args:
        method: which made the adapter.
        adapter: it, or what `jax.eval_shape` says of it.
        params: the base, abstract too.
        mesh: where.
        rules: of the base, as in `wlab.core.sharding.specs`.

    Returns:
        The `NamedSharding` of each array of the adapter.
    """
    base = sharding.specs(params, mesh, rules)
    found = method.specs(adapter, params, base)
    sizes = dict(mesh.shape)
    return jax.tree.map(
        lambda x, spec: NamedSharding(mesh, _where_it_divides(x.shape, spec, sizes)),
        adapter,
        found,
    )


def save(folder: str | pathlib.Path, adapter: Adapter, *, frozen: bool = False) -> None:
    """Writes an adapter; what is frozen follows from its key and the base.

    Args:
        folder: must not exist.
        adapter: what is written.
        frozen: write frozen arrays as well, which may be larger than all that is
            trained.
    """
    stored = {"train": adapter.train, "key": jax.random.key_data(adapter.key)}
    if frozen:
        stored["frozen"] = adapter.frozen
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(pathlib.Path(folder).absolute(), stored)


def load(folder: str | pathlib.Path, method: Reparam, params: Any) -> Adapter:
    """Reads what `save` wrote.

    Args:
        folder: the folder.
        method: which made the adapter.
        params: the base; what is frozen is made from it and the key, if it was not
            written.

    Returns:
        The adapter.

    Raises:
        ValueError: if it was made for another model or by another method.
        FileNotFoundError: if there is none.
    """
    path = pathlib.Path(folder).absolute()
    if not path.exists():
        raise FileNotFoundError(f"no adapter in {folder}")
    with ocp.StandardCheckpointer() as checkpointer:
        kept = checkpointer.metadata(path).item_metadata.tree
        abstract = jax.eval_shape(lambda: method.init(jax.random.key(0), params))
        wanted = {
            "train": abstract.train,
            "key": jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))),
        }
        if "frozen" in kept:
            wanted["frozen"] = abstract.frozen
        has = {p: tuple(x.shape) for p, x in leaves_with_paths(kept["train"])}
        needs = {p: tuple(x.shape) for p, x in leaves_with_paths(wanted["train"])}
        if has != needs:
            odd = sorted(set(has.items()) ^ set(needs.items()))[:3]
            raise ValueError(
                f"{folder} holds an adapter for another model or method; differing: "
                f"{odd}"
            )
        stored = checkpointer.restore(path, wanted)
    key = jax.random.wrap_key_data(stored["key"])
    frozen = stored.get("frozen")
    if frozen is None:
        frozen = jax.jit(lambda key: method.init(key, params).frozen)(key)
    return Adapter(stored["train"], frozen, key)


def _changed(adapter: Adapter) -> set[str]:
    """The paths of the base that an adapter's arrays belong to; of joined ones too."""
    joined = all(name.startswith(_JOINED) for name in adapter.train)
    parts = adapter.train.values() if joined else [adapter.train]
    return {path for part in parts for path in part}


def _beside(adapter: Adapter, leaves: Mapping[str, Any]) -> set[str]:
    beside = {path.rpartition("/")[0] + "/bias" for path in _changed(adapter)}
    return {path.lstrip("/") for path in beside} & set(leaves)
