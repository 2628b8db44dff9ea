# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""D2Quant on a whole model: dual scales of some kernels, and corrected norms (map).

Blocks are compressed in turn with GPTAQ, down-projections with dual scales. Once a
block's attention is compressed, the mean by which the norm behind it is off becomes its
bias, before anything is calibrated that reads it; the last norm follows at the end.

References:
    `D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs
    <https://arxiv.org/abs/2602.02546>`_, 2026.
"""

import os.path
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wlab.core import Layered, find_layers, leaves_with_paths, lift, map_with_path
from wlab.quant import compressors
from wlab.quant._binary import BinaryCoded
from wlab.quant._calibrate import Calibrated, Correction, calibrate
from wlab.quant._d2quant import Shift, absorb, dac_add, dac_bias, dac_init


def dac(
    norm: str = "mlp_norm/bias",
    *,
    after: str = "attention/out/kernel",
    reader: str = "mlp/up/kernel",
    mask: Callable[[Any], jax.Array] | None = None,
    **options: Any,
) -> Correction:
    """The mean shift of a norm, as a correction for `wlab.quant.calibrate`.

    Args:
        norm: path of the norm's bias within a block.
        after: the kernel whose stage is the last before it.
        reader: a kernel that reads the norm's outputs and nothing else; a router's
            where the others are experts, which see some tokens each.
        mask: ``mask(batch)`` marks the tokens that count, [...rows]; None: all.
        **options: of `wlab.quant.dac_bias`.

    Returns:
        The correction.
    """

    def statistics(now: jax.Array, before: jax.Array, batch: Any) -> Any:
        if now.ndim != 2:
            raise ValueError(
                f"leaf {reader!r} reads arrays of shape {now.shape}, not [rows, in]: "
                "experts see some tokens each, so name their router as the reader"
            )
        start = dac_init(now.shape[-1], now.dtype)
        part = dac_add(start, before, now, None if mask is None else mask(batch))
        # Sums over batches and devices: the mean of a difference is no large number.
        total = part.mean * part.count
        return part.count, total, part.squares + part.mean * total

    def update(layer: Any, sums: Any) -> Any:
        count, total, squares = sums
        mean = total / jnp.maximum(count, 1)
        shift = Shift(count, mean, jnp.maximum(squares - mean * total, 0))
        return _added(layer, norm, dac_bias(shift, **options))

    return Correction(after, reader, statistics, update)


def _added(tree: Any, path: str, more: jax.Array) -> Any:
    if path not in dict(leaves_with_paths(tree)):
        raise ValueError(
            f"there is no leaf {path!r} to correct: give the norm a bias, as "
            "wlab.models.with_norm_bias does for a decoder"
        )

    def one(here: str, x: Any) -> Any:
        return (x.astype(more.dtype) + more).astype(x.dtype) if here == path else x

    return map_with_path(one, tree)


def absorb_tree(
    params: Any, *, up: str = "mlp/up/kernel", down: str = "mlp/down/kernel"
) -> Any:
    """Moves all column scales of binary codes into the kernels before: exact.

    Args:
        params: a parameter tree.
        up: the end of the paths of kernels that take the scales, and whose outputs
            nothing else reads in between.
        down: the end of the paths of kernels that have them; others stay as they are.

    Returns:
        The tree.
    """
    leaves = dict(leaves_with_paths(params))
    new = dict(leaves)
    for path, leaf in leaves.items():
        if not path.endswith(down) or not isinstance(leaf, BinaryCoded):
            continue
        first = path[: -len(down)] + up
        bias = first.rpartition("/")[0] + "/bias"
        if leaf.c is not None:
            made = absorb(leaf, leaves[first], leaves.get(bias))
            new[path], new[first] = made.down, made.up
            if made.bias is not None:
                new[bias] = made.bias
    return map_with_path(lambda path, _: new[path], params)


def d2quant_model(
    parts: Layered,
    params: Any,
    batches: Any,
    *,
    bits: int = 2,
    group: int = 128,
    dual: bool = True,
    correct: bool = True,
    end: Callable[[Any, jax.Array], jax.Array] | None = None,
    up: str = "mlp/up/kernel",
    down: str = "mlp/down/kernel",
    corrections: Sequence[Correction] | None = None,
    mask: Callable[[Any], jax.Array] | None = None,
    **options: Any,
) -> Calibrated:
    """D2Quant on all blocks of a model.

    Args:
        parts: as in `wlab.quant.calibrate`.
        params: parameters, whose blocks hold arrays, and whose norms have biases; see
            `wlab.models.with_norm_bias`. Turn them before (`wlab.models.rotated`).
        batches: calibration batches, as there.
        bits: 2 or 3.
        group: input channels that share ranges.
        dual: whether `down` has dual scales; other kernels have GPTAQ's ranges, clipped
            where that is better.
        correct: whether norms are corrected.
        end: ``end(params, x)`` from what the last block puts out to what the head
            reads, whose bias is ``final_norm/bias``: `wlab.models.final_norm` of a
            decoder. None: that norm is left as it is.
        up: the kernel of a block that takes over the column scales.
        down: the kernel that has them.
        corrections: of a block; None for `dac(mask=mask)`.
        mask: ``mask(batch)`` marks the tokens that count, in every mean and sum; None:
            all.
        **options: others of `wlab.quant.calibrate`.

    Returns:
        The compressed parameters and the errors of the kernels, as `calibrate` does.

    Raises:
        ValueError: as `calibrate` and `wlab.quant.d2quant` do, for norms that have no
            bias, and for `up` and `down` that are not in one module.

    Examples:
        >>> from wlab.models import final_norm, layered, with_norm_bias
        >>> from wlab.models.decoder import Decoder, tiny
        >>> model = Decoder(tiny(depth=1, width=16, hidden=16, heads=2, head_dim=8))
        >>> tokens = jax.random.randint(jax.random.key(0), (1, 4, 8), 0, 256)
        >>> params = jax.jit(model.init)(jax.random.key(1), tokens[0])["params"]
        >>> model, params = with_norm_bias(model, params)
        >>> parts = layered(model, lambda logits, _: logits.mean(), inputs=lambda t: t)
        >>> made = d2quant_model(  # doctest: +SKIP
        ...     parts, params, tokens, bits=2, group=8, end=final_norm(model)
        ... )
        >>> logits = lift(model.apply)(
        ...     {"params": made.params}, tokens[0]
        ... )  # doctest: +SKIP
    """
    methods = {
        "*": compressors.gptaq(
            bits=bits, group=group, block=group, clip=True, act_order="groups"
        )
    }
    if dual:
        methods = {down: compressors.d2quant(bits=bits, group=group)} | methods
    module = os.path.commonpath([up, down])
    if not module:
        raise ValueError(f"{up!r} and {down!r} are not in one module")
    if corrections is None:
        corrections = (dac(mask=mask),)
    if mask is not None:
        options.setdefault("importance", lambda layer, x, b: mask(b).reshape(-1))
    made = calibrate(
        parts,
        params,
        batches,
        methods,
        corrections=corrections if correct else (),
        **options,
    )
    whole = made.params
    if correct and end is not None:
        # The last block's attention is corrected: what is left is its gated layer's.
        shift = _end_shift(parts, params, whole, batches, end, module + "/", mask)
        whole = _added(whole, "final_norm/bias", dac_bias(shift))
    return Calibrated(absorb_tree(whole, up=up, down=down), made.errors)


def _end_shift(
    parts: Layered,
    params: Any,
    made: Any,
    batches: Any,
    end: Callable[[Any, jax.Array], jax.Array],
    kept: str,
    mask: Callable[[Any], jax.Array] | None,
) -> Shift:
    """How far the last norm is off where the kernels of the last block's `kept` are."""
    found = find_layers(made, parts.layers)
    layers, _ = found.take(made)
    fresh, _ = found.take(params)

    def at(tree: Any, i: int) -> Any:
        return jax.tree.map(lambda x: x[i], tree) if found.stacked else tree[i]

    last = at(layers, found.depth - 1)
    exact = dict(leaves_with_paths(at(fresh, found.depth - 1)))
    teacher = map_with_path(
        lambda path, w: exact[path] if path.startswith(kept) else w, last
    )
    block: Any = parts.block[0] if isinstance(parts.block, Sequence) else parts.block

    @jax.jit
    def step(layer: Any, x: Any, batch: Any) -> Any:
        out = lift(block)(layer, x, batch)
        return out[0] if parts.extras else out

    @jax.jit
    def add(shift: Any, params: Any, batch: Any, *outs: jax.Array) -> Shift:
        read = [end(params, x) for x in outs]
        wide = jnp.promote_types(read[0].dtype, jnp.float32)
        start = dac_init(read[0].shape[-1], wide) if shift is None else shift
        return dac_add(start, *read, mask=None if mask is None else mask(batch))

    shift: Any = None
    before = jax.jit(parts.before)
    for batch in batches:
        x = before(made, batch)
        for i in range(found.depth - 1):
            x = step(at(layers, i), x, batch)
        ends = step(teacher, x, batch), step(last, x, batch)
        shift = add(shift, made, batch, *ends)
    return shift
