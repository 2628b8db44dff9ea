# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any pytree of arrays, by orbax.

A checkpoint holds the leaves under their paths, so that it does not depend on the
classes of the tree's nodes, and a table of the leaves' types. A template gives the
tree back: NamedTuples, structured weights, typed keys and narrow integers as they were.
"""

import os
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of a run in a directory, written in the background.

    Args:
        directory: made if need be.
        keep: only so many are kept, the latest.
        every: `fit` saves at the multiples of this number of steps.

    Examples:
        >>> import tempfile
        >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
        ...     checkpoints.save(7, {"w": jnp.ones(2)}, {"seed": 0})
        ...     checkpoints.restore({"w": jnp.zeros(2)})
        (7, {'w': Array([1., 1.], dtype=float32)}, {'seed': 0})
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int = 3, every: int = 1000
    ):
        if keep < 1 or every < 1:
            raise ValueError(f"keep={keep} and every={every} must be positive")
        self._directory = pathlib.Path(directory).absolute()
        self._every = every
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
            item_handlers={
                "leaves": ocp.StandardCheckpointHandler(),
                "types": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def due(self, step: int) -> bool:
        """Whether a run saves after this step."""
        return step % self._every == 0

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Starts to save a state; the state may be changed when this returns.

        Args:
            step: the number under which it is saved.
            state: any pytree of arrays.
            meta: what else to remember, in values that JSON knows.

        Raises:
            ValueError: if the directory already holds this step.
        """
        leaves = _by_path(state)
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    leaves=ocp.args.StandardSave(
                        {p: _storable(x) for p, x in leaves.items() if x.size}
                    ),
                    types=ocp.args.JsonSave(
                        {
                            "types": {p: _type_of(x) for p, x in leaves.items()},
                            "keys": {
                                path: str(jax.random.key_impl(leaf))
                                for path, leaf in leaves.items()
                                if _is_key(leaf.dtype)
                            },
                        }
                    ),
                    meta=ocp.args.JsonSave(dict(meta or {})),
                ),
                force=True,
            )
        except ocp.checkpoint_manager.StepAlreadyExistsError as error:
            raise ValueError(
                f"{self._directory} already holds step {step}: restore from it, or "
                "save a new run elsewhere"
            ) from error

    def latest_step(self) -> int | None:
        """The number of the latest checkpoint, or None where there is none."""
        return self._manager.latest_step()

    def restore(
        self, template: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            template: a tree of arrays, or of `jax.ShapeDtypeStruct` as made by
                `jax.eval_shape`, with the structure, shapes and dtypes of what was
                saved; its leaves' shardings, where they have one, say where to put
                the arrays.
            step: which one; by default the latest.

        Returns:
            The step, the state in the form of the template, and the meta.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if what was saved does not fit the template.
        """
        self._manager.wait_until_finished()
        held = sorted(self._manager.all_steps())
        number = held[-1] if step is None and held else step
        if number is None or number not in held:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(
                f"{self._directory} holds no {wanted}; its steps are {held}"
            )
        leaves = _by_path(template)
        found = self._read(
            number, types=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
        )
        types, keys = found["types"]["types"], found["types"]["keys"]
        self._check(number, types, {p: _type_of(x) for p, x in leaves.items()})
        forms = {p: _stored_form(x) for p, x in leaves.items() if x.size}
        stored = self._read(number, leaves=ocp.args.StandardRestore(forms))["leaves"]
        values = [
            _as_before(stored[path], leaf.dtype, keys.get(path))
            if leaf.size
            else jnp.zeros(leaf.shape, leaf.dtype)  # which orbax does not store
            for path, leaf in leaves.items()
        ]
        state = jax.tree.unflatten(jax.tree.structure(template), values)
        return number, state, found["meta"]

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))

    def _check(self, step: int, found: dict[str, str], wanted: dict[str, str]) -> None:
        """One error for all that differs."""
        differ = [
            f"{path} is {found.get(path, 'absent')} there and "
            f"{wanted.get(path, 'absent')} in the template"
            for path in sorted(found.keys() | wanted.keys())
            if found.get(path) != wanted.get(path)
        ]
        if differ:
            more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise ValueError(
                f"checkpoint {step} in {self._directory} does not fit the template: "
                f"{'; '.join(differ[:3])}{more}. Build the template with the model and "
                "the optimiser that were saved"
            )

    def close(self) -> None:
        """Waits until all is saved."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _by_path(tree: Any) -> dict[str, Any]:
    """The leaves under their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _type_of(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _is_key(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _narrow(dtype: Any) -> jnp.dtype | None:
    """The integer whose bit pattern an element has, if it is less than a byte."""
    width = jax.dtypes.itemsize_bits(dtype)
    return jnp.dtype(f"uint{width}") if width in (2, 4) else None


def _storable(leaf: Any) -> jax.Array:
    """The leaf as an array that can be written: keys and less than bytes cannot."""
    if _is_key(leaf.dtype):
        return jax.random.key_data(leaf)
    if (bits := _narrow(leaf.dtype)) is not None:
        return jax.lax.bitcast_convert_type(leaf, bits).astype(jnp.uint8)
    return leaf


def _stored_form(leaf: Any) -> jax.ShapeDtypeStruct:
    """What `_storable` makes of such a leaf, and where to put it."""
    form = jax.eval_shape(_storable, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    elif isinstance(getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        # A type under explicit axes knows the axes, the context knows the devices.
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(
                f"the template has a leaf {_type_of(leaf)} sharded over "
                f"{sharding.mesh.axis_names} of no mesh: restore it within "
                "jax.set_mesh(mesh)"
            )
        sharding = jax.NamedSharding(mesh, sharding.spec)
    return jax.ShapeDtypeStruct(form.shape, form.dtype, sharding=sharding)


def _as_before(stored: jax.Array, dtype: Any, key_impl: str | None) -> jax.Array:
    """The inverse of `_storable`."""
    if key_impl is not None:
        return jax.random.wrap_key_data(stored, impl=key_impl)
    if (bits := _narrow(dtype)) is not None:
        return jax.lax.bitcast_convert_type(stored.astype(bits), dtype)
    return stored
