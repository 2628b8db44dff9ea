# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""AWQ against rounding to nearest and GPTQ, on a decoder that wlab has trained.

Channels that carry large activations are scaled up before they are rounded, then
groups of weights are clipped (arXiv 2306.00978); scales alone, and with both. Rounding
to nearest is that of AWQ: between the extremes of a group.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from wlab.core import describe, map_with_path, materialise
from wlab.models import decoder_groups
from wlab.models.decoder import Decoder
from wlab.quant import ScaleGroup, awq_model, minmax
from wlab.recipes import Arm, Finding, Metric, Report
from wlab.recipes._compress import (
    BRIEF,
    Base,
    Config,
    Side,
    below,
    figure,
    parts_of,
    report_of,
)
from wlab.recipes.gptq import gptq

__all__ = ["QUICK", "Config", "figure", "run"]

QUICK = dataclasses.replace(BRIEF, only=("RTN", "AWQ, 3"))

METRICS = {"block": Metric("error of a block", "%", format=".3f")}


@functools.partial(jax.jit, static_argnames=("bits", "group", "kernels"))
def round_tree(params: Any, kernels: tuple[str, ...], *, bits: int, group: int) -> Any:
    """Kernels of all blocks, by their paths within one, rounded to nearest."""
    known = {leaf.path: leaf for leaf in describe(params)}
    ends = tuple(f"/{path}" for path in kernels)

    def one(path: str, w: Any) -> Any:
        if not path.endswith(ends):
            return w
        return minmax(w, bits=bits, group=group, view=known[path].view)

    return map_with_path(one, params)


def groups_of(base: Base, **options: Any) -> list[ScaleGroup]:
    """The groups of kernels that are compressed."""
    found = decoder_groups(base.model.config, base.calibration.shape[-1], **options)
    return [one for one in found if set(one.paths) <= set(base.kernels or one.paths)]


def block_error(base: Base, params: Any) -> dict[str, float]:
    """How far the blocks are off, on held-out inputs of the original ones.

    The mean over blocks of the squared error of what they add to their input, over the
    square of that, in percent.
    """
    model: Any = base.model  # hashable, as flax makes its modules
    read = _block_error(model)
    tokens = base.held_out[..., :-1]
    return {"block": 100 * float(read(base.params, materialise(params), tokens))}


@functools.cache
def _block_error(model: Decoder) -> Any:
    def read(params: Any, other: Any, tokens: jax.Array) -> jax.Array:
        parts: Any = parts_of(Base(model, params, None, None, 0))  # type: ignore[arg-type]

        def block(x: jax.Array, layers: Any) -> tuple[jax.Array, jax.Array]:
            want, got = (parts.block(layer, x, None) for layer in layers)
            return want, jnp.stack(
                [jnp.sum((got - want) ** 2), jnp.sum((want - x) ** 2)]
            )

        def batch(tokens: jax.Array) -> jax.Array:
            x = parts.before(params, tokens)
            return jax.lax.scan(block, x, (params["blocks"], other["blocks"]))[1]

        off, all_of = jax.lax.map(batch, tokens).sum(0).T
        return jnp.mean(off / all_of)

    return jax.jit(read)


def rounded(base: Base, bits: int, group: int) -> tuple[Any, dict[str, float]]:
    """Rounding to nearest."""
    kernels = tuple(path for one in groups_of(base) for path in one.paths)
    made = round_tree(base.params, kernels, bits=bits, group=group)
    return made, block_error(base, made)


def awq(base: Base, bits: int, group: int, **options: Any) -> Any:
    """AWQ on every block."""
    made = awq_model(
        parts_of(base),
        base.params,
        base.calibration,
        groups_of(base),
        bits=bits,
        group=group,
        **options,
    )
    return made, block_error(base, made)


def _gptq(base: Base, bits: int, group: int) -> Any:
    made, _ = gptq(base, bits, group)
    return made, block_error(base, made)


SIDES = (
    Side("RTN", rounded, baseline=True),
    Side("AWQ, scales alone", functools.partial(awq, clip=False)),
    Side("AWQ", awq),
    Side("GPTQ", _gptq, baseline=True),
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train decoders, compress them in every way, compare.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """

    def findings(arms: Mapping[str, Arm]) -> Sequence[Finding | None]:
        found = []
        for b in config.bits:
            rtn, scaled, both, other = (f"{side.name}, {b} bits" for side in SIDES)
            cut = f"{b} bits: scales cut the error of a block by 15 % at least"
            more = f"{b} bits: clipping cuts what scales leave of it by 5 % at least"
            found += [
                below(cut, arms, "block", scaled, rtn, 0.85),
                below(more, arms, "block", both, scaled, 0.95),
                below(f"{b} bits: AWQ loses less than RTN", arms, "lost", both, rtn),
                below(f"{b} bits: AWQ loses less than GPTQ", arms, "lost", both, other),
            ]
        return found

    return report_of(
        "awq",
        "Scaling up the channels that carry large activations protects them from "
        "rounding, without gradients or Hessians.",
        config,
        SIDES,
        findings,
        out=out,
        progress=progress,
        resume=resume,
        metrics=METRICS,
    )
