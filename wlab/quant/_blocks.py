# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Changing a model block by block, with the inputs that the original model gives.

`wlab.quant.calibrate` is for methods that make up for the errors of the blocks before.
Those that search in full precision, such as AWQ, see the stream of the original model
instead, and the inputs themselves and not sums of them: of one block at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wlab.core import (
    Layered,
    capture,
    describe,
    find_layers,
    leaves_with_paths,
    lift,
    paths_by_stage,
    uses,
)
from wlab.core import select as select_leaves
from wlab.quant._awq import ScaleGroup, awq
from wlab.quant._quantlrm import UpdateStats, quantlrm, update_sizes, update_stats


class BlockInputs(NamedTuple):
    """What a block and its kernels read, over all batches one after the other."""

    x: Any  # the block's own input, [sequences, ...]
    kernels: dict[str, jax.Array]  # [rows, in] by path, float32 at least; stacked
    # kernels of a block (experts) lead with their axes


def map_blocks(
    parts: Layered,
    params: Any,
    batches: Any,
    fn: Callable[..., Any],
    *others: Any,
    select: Any = None,
) -> Any:
    """Applies a function to each block of a model and to what the block reads.

    Args:
        parts: the model, as `wlab.models.layered` gives a decoder; its `after` is not
            used. Blocks are one function.
        params: parameters, of full precision or not: it is these that make the inputs.
        batches: all of one shape, as `parts.before` takes them: a sequence, or an array
            whose first axis counts them.
        fn: ``fn(i, layer, inputs, *other_layers)`` returns the new block, where `i` is
            an int and `inputs` a `BlockInputs`. One that is jitted is compiled once
            for all blocks that are alike, for they are its arguments.
        *others: more trees with such blocks, as in `jax.tree.map`.
        select: the kernels whose inputs are needed, as in `wlab.core.select`, by their
            paths within a block; None: all.

    Returns:
        The parameters with the new blocks. Blocks that were stacked are stacked again.

    Raises:
        ValueError: for no batches, kernels that are not seen, a block that comes back
            with numbers that are not finite, or blocks that cannot be stacked again.

    Examples:
        >>> parts = Layered(
        ...     before=lambda params, batch: batch,
        ...     block=lambda w, x, batch: x @ w["kernel"],
        ...     after=lambda params, x, batch: jnp.sum(x),
        ... )
        >>> params = {"layers": {"kernel": 2 * jnp.ones((3, 1, 1))}}
        >>> def mean(i, layer, inputs):
        ...     return {"kernel": inputs.kernels["kernel"].mean() * layer["kernel"]}
        >>> new = map_blocks(parts, params, jnp.ones((2, 4, 1)), mean)
        >>> new["layers"]["kernel"].ravel().tolist()
        [2.0, 4.0, 8.0]
    """
    if not len(batches):
        raise ValueError("no batches: give at least one")
    blocks = parts.block if isinstance(parts.block, Sequence) else None
    if blocks is not None and len(set(blocks)) > 1:
        raise ValueError(
            "the blocks are different functions: map over models whose blocks are one"
        )
    block: Any = blocks[0] if blocks is not None else parts.block
    block = lift(block)
    trees = [_Blocks(tree, parts.layers) for tree in (params, *others)]
    if len({tree.found.depth for tree in trees}) > 1:
        raise ValueError(
            f"the trees have {[tree.found.depth for tree in trees]} blocks each: give "
            "trees of one model"
        )
    found = trees[0].found

    def apply(layer: Any, x: Any, batch: Any) -> Any:
        out = block(layer, x, batch)
        return out[0] if parts.extras else out

    hidden = list(map(jax.jit(parts.before), [params] * len(batches), batches))
    stages = _stages(apply, trees[0].at(0), hidden[0], batches[0], select)

    @jax.jit
    def see(layer: Any, x: Any, batch: Any) -> Any:
        leads = [paths[0] for paths in stages]
        return capture(lambda p, x: apply(p, x, batch), leads)(layer, x)

    def read(layer: Any, hidden: list[Any]) -> tuple[BlockInputs, list[Any]]:
        x = jax.tree.map(lambda *xs: _joined(xs, 0), *hidden)
        made = [see(layer, x, b) for x, b in zip(hidden, batches, strict=True)]
        kernels: dict[str, jax.Array] = {}
        for paths in stages:
            # Taken out, so that they are not held twice.
            whole = _joined([seen.pop(paths[0]) for _, seen in made], -2)
            kernels |= dict.fromkeys(paths, whole)
        return BlockInputs(x, kernels), [y for y, _ in made]

    out = []
    for i in range(found.depth):
        layer = trees[0].at(i)
        inputs, hidden = read(layer, hidden)
        new = fn(i, layer, inputs, *(tree.at(i) for tree in trees[1:]))
        del inputs  # before there are those of the next block
        _check_finite(i, new)
        out.append(new)
    stack = _stacked(out, parts.layers) if found.stacked else out
    _, rest = found.take(params)
    return found.put(params, stack, rest)


def awq_model(
    parts: Layered,
    params: Any,
    batches: Any,
    groups: Sequence[ScaleGroup],
    **options: Any,
) -> Any:
    """AWQ on all blocks of a model, each with the inputs of the original one.

    Args:
        parts: as in `map_blocks`.
        params: parameters, whose blocks hold arrays.
        batches: calibration batches, as in `map_blocks`.
        groups: all kernels of a block to quantise, by their paths within it;
            `wlab.models.decoder_groups` lists those of a decoder.
        **options: bits, group, clip and others, as in `wlab.quant.awq`.

    Returns:
        The parameters with `Quantized` kernels, which run under `wlab.lift`.

    Raises:
        ValueError: as `wlab.quant.awq` and `map_blocks` do.
        TypeError: as `wlab.quant.awq` does.

    Examples:
        >>> from wlab.models import decoder_groups, layered
        >>> from wlab.models.decoder import Decoder, tiny
        >>> config, length = tiny(), 128
        >>> parts = layered(config, lambda logits, _: logits.mean(), inputs=lambda t: t)
        >>> groups = decoder_groups(config, length)
        >>> def compress(params, tokens):  # tokens [batches, sequences, length]
        ...     return awq_model(parts, params, tokens, groups, bits=4, group=32)
    """

    @jax.jit
    def one(i: Any, layer: Any, inputs: BlockInputs) -> Any:
        del i
        return awq(layer, inputs.kernels, groups, **options)

    return map_blocks(parts, params, batches, one, select=_leads(groups))


def quantlrm_model(
    parts: Layered,
    params: Any,
    base: Any,
    batches: Any,
    groups: Sequence[ScaleGroup],
    *,
    stats: UpdateStats | None = None,
    dtype: Any = None,
    **options: Any,
) -> Any:
    """QuantLRM on all blocks of a fine-tuned model.

    Args:
        parts: as in `map_blocks`.
        params: the fine-tuned parameters, whose blocks hold arrays.
        base: those from which they were fine-tuned.
        batches: calibration batches, as in `map_blocks`.
        groups: as in `awq_model`.
        stats: of all updates; None: of those of the kernels in the groups.
        dtype: in which both were stored, as in `wlab.quant.update_sizes`.
        **options: bits, r, group, clip and others, as in `wlab.quant.quantlrm`.

    Returns:
        As `awq_model` does.

    Raises:
        ValueError: as `wlab.quant.quantlrm` and `map_blocks` do, and if no update is
            positive.
        TypeError: as `wlab.quant.awq` does.
    """
    if stats is None:
        inside = find_layers(params, parts.layers).leaves
        ends = tuple(f"/{path}" for one in groups for path in one.paths)
        sizes = update_sizes(
            params,
            base,
            which=lambda path, _: path in inside and path.endswith(ends),
            dtype=dtype,
            views=options.get("views"),
        )
        stats = update_stats(sizes)

    @jax.jit
    def one(i: Any, layer: Any, inputs: BlockInputs, old: Any) -> Any:
        del i
        return quantlrm(
            layer, old, inputs.kernels, groups, stats, dtype=dtype, **options
        )

    return map_blocks(parts, params, batches, one, base, select=_leads(groups))


class _Blocks:
    """The blocks of a tree, by number."""

    def __init__(self, tree: Any, layers: str | Sequence[str]):
        self.found = find_layers(tree, layers)
        self.layers, _ = self.found.take(tree)

    def at(self, i: int) -> Any:
        if self.found.stacked:
            return jax.tree.map(lambda x: x[i], self.layers)
        return self.layers[i]


def _leads(groups: Sequence[ScaleGroup]) -> list[str]:
    """One kernel of each group: the others read the same."""
    return [one.paths[0] for one in groups]


def _stages(apply: Any, layer: Any, x: Any, batch: Any, select: Any) -> list[list[str]]:
    """The chosen kernels; those that read one array together."""
    if select is None:
        roles = ("kernel", "conv")
        select = [leaf.path for leaf in describe(layer) if leaf.role in roles]
    marks = leaves_with_paths(select_leaves(layer, select))
    chosen = sorted({path for path, mark in marks if mark})
    return paths_by_stage(
        uses(lambda p, x: apply(p, x, batch), layer, x, select=chosen)
    )


def _joined(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays, axis)


@jax.jit
def _finite(tree: Any) -> dict[str, jax.Array]:
    def one(leaf: Any) -> jax.Array:
        floats = [
            jnp.isfinite(x).all()
            for x in jax.tree.leaves(leaf)
            if jnp.issubdtype(x.dtype, jnp.floating)
        ]
        return jnp.stack(floats).all() if floats else jnp.array(True)

    return {path: one(leaf) for path, leaf in leaves_with_paths(tree)}


def _check_finite(i: int, layer: Any) -> None:
    bad = [path for path, ok in jax.device_get(_finite(layer)).items() if not ok]
    if bad:
        raise ValueError(
            f"block {i}: {', '.join(bad)} came back with numbers that are not finite: "
            "look for such numbers in its weights and inputs"
        )


def _stacked(blocks: list[Any], name: Any) -> Any:
    kinds = {
        (
            jax.tree.structure(block),
            tuple((x.shape, x.dtype) for x in jax.tree.leaves(block)),
        )
        for block in blocks
    }
    if len(kinds) > 1:
        raise ValueError(
            f"the blocks at {name!r} were stacked and came back in {len(kinds)} forms, "
            "of other bits say: return dense weights (wlab.materialise), or give a "
            "tree whose blocks are a list"
        )
    return jax.tree.map(lambda *x: jnp.stack(x), *blocks)
