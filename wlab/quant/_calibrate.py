# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Compressing a model block by block, each seeing what the ones before it put out.

A block's kernels are compressed in stages: those that read the same array together, in
the order of the block, with the inputs that the kernels already compressed give. Every
program is compiled once and serves all blocks, whose weights are its arguments.
"""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import (
    Layered,
    Views,
    as_kernel,
    as_matrices,
    capture,
    describe,
    find_layers,
    leaves_with_paths,
    lift,
    map_with_path,
    materialise,
    matrix_views,
    paths_by_stage,
    uses,
)
from wlab.core import select as select_leaves
from wlab.quant._statistics import Moments
from wlab.quant.compressors import Compressor


class LayerError(NamedTuple):
    """How well one kernel's outputs are kept, on the calibration inputs."""

    layer: int  # its block
    path: str  # within the block
    error: float  # |X (W - Q)|^2 / |X W|^2
    nearest: float  # the same with every weight rounded to nearest
    rows: int  # inputs that were not zero; the least of its experts


class Calibrated(NamedTuple):
    """A compressed model."""

    params: Any  # with compressed weights in the place of kernels
    errors: list[LayerError]  # in the order of the model


class Correction(NamedTuple):
    """What is set right in a block as soon as some of its kernels are compressed.

    What a kernel reads before and after is compared on the inputs of the compressed
    model, so that a block makes up for what was lost in it alone.
    """

    after: str  # a kernel within the block: when its stage is done
    reader: str  # the kernel whose inputs are compared

    statistics: Callable[[jax.Array, jax.Array, Any], Any]
    """`statistics(now, before, batch)`: arrays that add up, from what `reader` reads,
    [rows, in], in the block as it is and in the one that is not compressed."""

    update: Callable[[Any, Any], Any]
    """`update(layer, sums)` returns the block."""


def calibrate(
    parts: Layered,
    params: Any,
    batches: Any,
    compressor: Compressor | Mapping[str, Compressor],
    *,
    select: Any = None,
    views: Views | None = None,
    importance: Callable[[Any, Any, Any], jax.Array] | None = None,
    corrections: Sequence[Correction] = (),
    min_rows: int = 32,
    mesh: jax.sharding.Mesh | None = None,
    axis: str = "data",
    host: bool = False,
    done: Sequence[Any] = (),
    on_block: Callable[[int, Any, list[LayerError]], None] | None = None,
) -> Calibrated:
    """Compresses the kernels of a model's blocks, with inputs of the compressed model.

    Args:
        parts: the model, as `wlab.models.layered` gives a decoder; its `after` is not
            used. Experts must be products that a weight sees: those of a `Decoder`
            with a `capacity` under which no token is dropped.
        params: parameters; the blocks' kernels are arrays.
        batches: calibration batches, all of one shape, as `parts.before` takes them: a
            sequence, or an array whose first axis counts them.
        compressor: the method; or by pattern, ``{"mlp/down/kernel": ..., "*": ...}``,
            where the first that matches a path within a block holds.
        select: kernels of a block to compress, as in `wlab.core.select`; None for all.
        views: which axes of a kernel are inputs and outputs, by pattern, where names
            do not tell.
        importance: ``importance(layer, x, batch)`` weighs the rows of a block's inputs,
            [rows]; None: all alike. It sees the block before it is compressed.
        corrections: what is done between the stages, as `wlab.quant.dac` gives it.
        min_rows: a kernel (an expert) with fewer inputs is rounded to nearest.
        mesh: the rows of each batch are divided over its axis `axis`: every device
            sums its own, and sums are added once for each stage.
        axis: that axis.
        host: keep what goes between the blocks in host memory.
        done: compressed blocks of a run that was stopped, as `on_block` got them; they
            are not compressed again, and give the same numbers.
        on_block: ``on_block(i, layer, errors)`` is called after each block.

    Returns:
        The compressed parameters, and how well each kernel's outputs are kept. Blocks
        that were stacked are stacked again.

    Raises:
        ValueError: for no batches, kernels that are not seen or not finite, or a
            correction that is for none of them.

    Examples:
        >>> from wlab.models import layered
        >>> from wlab.models.decoder import Decoder, tiny
        >>> from wlab.quant import compressors
        >>> model = Decoder(tiny(depth=1, width=32, hidden=32, heads=2, head_dim=16))
        >>> tokens = jax.random.randint(jax.random.key(0), (2, 4, 16), 0, 256)
        >>> params = jax.jit(model.init)(jax.random.key(1), tokens[0])["params"]
        >>> parts = layered(model, lambda logits, _: logits.mean(), inputs=lambda t: t)
        >>> made = calibrate(parts, params, tokens, compressors.gptq(group=32))
        >>> [e.error < e.nearest for e in made.errors].count(True)
        7
    """
    if not len(batches):
        raise ValueError("no calibration batches: give at least one")
    if isinstance(compressor, Compressor):
        compressor = {"*": compressor}
    found = find_layers(params, parts.layers)
    layers, _ = found.take(params)
    blocks = parts.block if isinstance(parts.block, Sequence) else None
    if blocks is not None and len(set(blocks)) > 1:
        raise ValueError(
            "the blocks are different functions: calibrate models whose blocks are one"
        )
    block: Any = blocks[0] if blocks is not None else parts.block

    def apply(layer: Any, x: Any, batch: Any) -> Any:
        out = lift(block)(layer, x, batch)
        return out[0] if parts.extras else out

    def layer_at(i: Any) -> Any:
        return jax.tree.map(lambda x: x[i], layers) if found.stacked else layers[i]

    stored = np.asarray if host else (lambda x: x)
    before = jax.jit(parts.before)
    step = _on_mesh(jax.jit(apply), mesh, axis, 1)
    hidden = [jax.tree.map(stored, before(params, batch)) for batch in batches]
    both = any(c.original for c in compressor.values())
    hidden_fp = list(hidden) if both else None

    first = layer_at(0)
    plan = _plan(apply, first, hidden[0], batches[0], compressor, select, views)
    runs = [_Stage(apply, s, views, importance, min_rows, mesh, axis) for s in plan]
    paths = [path for stage in plan for path in stage.paths]
    for correction in corrections:
        if correction.after not in paths:
            raise ValueError(
                f"a correction after {correction.after!r}: the compressed kernels are "
                + ", ".join(paths)
            )
    fixes = [(c.after, _Correct(apply, c, views, mesh, axis)) for c in corrections]
    out: list[Any] = []
    errors: list[LayerError] = []
    for i in range(found.depth):
        layer = fresh = layer_at(i)
        if i < len(done):
            layer = done[i]
        else:
            mine: list[LayerError] = []
            for run in runs:
                layer, made = run(i, layer, fresh, hidden, hidden_fp, batches)
                mine += made
                for after, fix in fixes:
                    if after in run.group.paths:
                        layer = fix(layer, fresh, hidden, batches)
            errors += mine
            if on_block is not None:
                on_block(i, layer, mine)
        out.append(layer)
        if i + 1 < found.depth:
            pairs = list(zip(hidden, batches, strict=True))
            hidden = [jax.tree.map(stored, step(layer, h, b)) for h, b in pairs]
            if hidden_fp is not None:
                pairs = list(zip(hidden_fp, batches, strict=True))
                hidden_fp = [jax.tree.map(stored, step(fresh, h, b)) for h, b in pairs]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *out) if found.stacked else out
    _, rest = found.take(params)
    return Calibrated(found.put(params, stack, rest), errors)


class _Group(NamedTuple):
    """Kernels that read one array."""

    paths: list[str]
    compressors: list[Compressor]


def _plan(
    apply: Any,
    layer: Any,
    x: Any,
    batch: Any,
    compressor: Mapping[str, Compressor],
    select: Any,
    views: Views | None,
) -> list[_Group]:
    """The stages of a block, in its order."""
    wanted = select
    if select is None:
        roles = ("kernel", "conv")
        known = describe(layer, views=views)
        wanted = [leaf.path for leaf in known if leaf.role in roles]
        wanted = [path for path in wanted if not path.endswith("router/kernel")]
    marks = {p for p, mark in leaves_with_paths(select_leaves(layer, wanted)) if mark}

    def run(layer: Any, x: Any) -> Any:
        return apply(layer, x, batch)

    def of(path: str) -> Compressor:
        for pattern, made in compressor.items():
            if fnmatch.fnmatchcase(path, pattern):
                return made
        raise ValueError(
            f"leaf {path!r} matches none of {list(compressor)}: add a pattern for it, "
            "or leave it out with `select`"
        )

    seen = uses(run, layer, x, select=sorted(marks), views=views)
    stages = paths_by_stage(seen)
    return [_Group(paths, [of(path) for path in paths]) for paths in stages]


def _inputs(
    apply: Any, path: str, layer: Any, x: Any, batch: Any, views: Views | None
) -> jax.Array:
    """What a kernel reads, [rows, in], with stacked axes in front."""
    fn = capture(lambda p, x: apply(p, x, batch), [path], views=views)
    return fn(layer, x)[1][path]


class _Sums:
    """Statistics of all batches added up, by one program for all blocks."""

    def __init__(self, measure: Any, mesh: jax.sharding.Mesh | None, axis: str):
        def add(sums: Any, *args: Any) -> Any:
            return jax.tree.map(lambda s, m: s + m[None], sums, measure(*args))

        self.measure, self.like = measure, None
        self.each = 1 if mesh is None else mesh.shape[axis]
        self.add = _on_mesh(jax.jit(add, donate_argnums=0), mesh, axis, 3)

    def __call__(self, layer: Any, fresh: Any, *streams: Any) -> Any:
        """The sums, with a leading axis of devices."""
        if self.like is None:
            first = [stream[0] for stream in streams]
            self.like = jax.eval_shape(self.measure, layer, fresh, *first)
        sums = jax.tree.map(
            lambda s: jnp.zeros((self.each, *s.shape), s.dtype), self.like
        )
        for args in zip(*streams, strict=True):
            sums = self.add(sums, layer, fresh, *args)
        return sums


def _whole(sums: Any) -> Any:
    return jax.tree.map(lambda s: s.sum(0), sums)


class _Stage:
    """The programs of one stage."""

    def __init__(
        self,
        apply: Any,
        group: _Group,
        views: Views | None,
        importance: Any,
        min_rows: int,
        mesh: jax.sharding.Mesh | None,
        axis: str,
    ):
        self.group = group
        both = any(c.original for c in group.compressors)
        lead = group.paths[0]
        statistics = next(
            (c.statistics for c in group.compressors if c.original),
            group.compressors[0].statistics,
        )

        def measure(layer: Any, fresh: Any, x: Any, x_fp: Any, batch: Any) -> Any:
            read = _inputs(apply, lead, layer, x, batch, views)
            original = _inputs(apply, lead, fresh, x_fp, batch, views) if both else None
            weights = None
            if importance is not None:
                weights = importance(fresh, x, batch)
            fn = statistics
            for _ in range(read.ndim - 2):
                # Experts see rows of their own, which weights of tokens do not name.
                if weights is not None:
                    raise ValueError(
                        f"leaf {lead!r} is a stack of kernels with rows of their own: "
                        "weights of a block's rows do not reach them"
                    )
                fn = jax.vmap(fn, (0, None if original is None else 0, None))
            return fn(read, original, weights)

        self.sums = _Sums(measure, mesh, axis)
        self.solve = jax.jit(
            lambda layer, sums: _solve(layer, _whole(sums), group, views, min_rows)
        )

    def __call__(
        self,
        i: int,
        layer: Any,
        fresh: Any,
        hidden: list[Any],
        hidden_fp: list[Any] | None,
        batches: Any,
    ) -> tuple[Any, list[LayerError]]:
        originals = [None] * len(hidden) if hidden_fp is None else hidden_fp
        sums = self.sums(layer, fresh, hidden, originals, batches)
        made, found = self.solve(layer, sums)
        errors = []
        for path, (error, nearest, rows) in jax.device_get(found).items():
            if not np.isfinite(error):
                raise ValueError(
                    f"block {i}, leaf {path!r}: the inputs or weights are not finite, "
                    "so nothing can be compressed with them"
                )
            errors.append(LayerError(i, path, float(error), float(nearest), int(rows)))
        return map_with_path(lambda path, w: made.get(path, w), layer), errors


class _Correct:
    """The programs of one correction."""

    def __init__(
        self,
        apply: Any,
        correction: Correction,
        views: Views | None,
        mesh: jax.sharding.Mesh | None,
        axis: str,
    ):
        def measure(layer: Any, fresh: Any, x: Any, batch: Any) -> Any:
            now, before = (
                _inputs(apply, correction.reader, tree, x, batch, views)
                for tree in (layer, fresh)
            )
            return correction.statistics(now, before, batch)

        self.sums = _Sums(measure, mesh, axis)
        self.update = jax.jit(
            lambda layer, sums: correction.update(layer, _whole(sums))
        )

    def __call__(self, layer: Any, fresh: Any, hidden: Any, batches: Any) -> Any:
        return self.update(layer, self.sums(layer, fresh, hidden, batches))


def _solve(
    layer: Any, sums: Moments, group: _Group, given: Views | None, min_rows: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The compressed kernels of a stage and how well they do."""
    known = matrix_views(layer, views=given)
    weights = dict(leaves_with_paths(layer))
    made: dict[str, Any] = {}
    found: dict[str, Any] = {}
    joined: dict[Any, list[str]] = {}
    for path, compressor in zip(group.paths, group.compressors, strict=True):
        joined.setdefault(compressor if compressor.independent else path, []).append(
            path
        )
    for paths in joined.values():
        compressor = group.compressors[group.paths.index(paths[0])]
        views: list[Any] = [known[path] for path in paths]
        matrices = [
            as_matrices(weights[path], view)
            for path, view in zip(paths, views, strict=True)
        ]
        whole = jnp.concatenate(matrices, axis=-1) if len(paths) > 1 else matrices[0]

        def one(w: jax.Array, s: Moments, compressor: Compressor = compressor) -> Any:
            exact = w.astype(jnp.promote_types(w.dtype, jnp.float32))
            near = compressor.nearest(w)
            full = compressor.compress(w, s)
            if jax.tree.structure(near) == jax.tree.structure(full):
                few = s.count < min_rows
                full = jax.tree.map(lambda a, b: jnp.where(few, a, b), near, full)

            wrong = [materialise(q).astype(exact.dtype) - exact for q in (full, near)]
            sizes = [jnp.sum(d * (s.h @ d), axis=0) for d in (*wrong, exact)]
            return full, *sizes

        fn = one
        for _ in range(whole.ndim - 2):
            fn = jax.vmap(fn)
        full, lost, near, all_of = fn(whole, sums)
        start = 0
        for path, view, matrix in zip(paths, views, matrices, strict=True):
            n = matrix.shape[-1]
            part = full
            if len(paths) > 1:
                part = full.slice(
                    [0] * (full.ndim - 1) + [start], [*full.shape[:-1], n], None
                )
            made[path] = as_kernel(part, view, weights[path].shape)
            at = slice(start, start + n)
            total = jnp.maximum(all_of[..., at].sum(), 1e-30)
            found[path] = (
                lost[..., at].sum() / total,
                near[..., at].sum() / total,
                sums.count.min(),
            )
            start += n
    return made, found


def _on_mesh(fn: Any, mesh: Any, axis: str, lead: int) -> Any:
    """A step whose last arguments are divided by rows, and with them its result.

    The first `lead` arguments are copied to every device, but for sums in the place of
    the first of several.
    """
    if mesh is None:
        return fn

    copied, divided = jax.P(), jax.P(axis)
    programs: dict[int, Any] = {}

    def run(*args: Any) -> Any:
        specs = [copied] * lead + [divided] * (len(args) - lead)
        if lead > 1:
            specs[0] = divided
        if len(args) not in programs:
            programs[len(args)] = jax.jit(
                jax.shard_map(
                    fn,
                    mesh=mesh,
                    in_specs=tuple(specs),
                    out_specs=divided,
                    check_vma=False,
                )
            )
        placed = [
            jax.device_put(arg, jax.NamedSharding(mesh, spec))
            for arg, spec in zip(args, specs, strict=True)
        ]
        return programs[len(args)](*placed)

    return run
