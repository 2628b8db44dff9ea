# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""All methods of quantisation after training side by side, on the same decoders.

What is lost on held-out text against the bits that are stored for each weight of the
blocks, scales and all. Every method has the same calibration sequences and the same
groups; ranges are clipped where a method can.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from wlab import train
from wlab.core import materialise, random_hadamard
from wlab.models import decoder_importance, rotated
from wlab.quant import (
    allocate_bits,
    calibrate,
    compressors,
    lim_scores,
    quantlrm_model,
)
from wlab.recipes import Arm, Finding, Report
from wlab.recipes._compress import (
    BRIEF,
    Base,
    Config,
    Side,
    below,
    error_of,
    figure,
    parts_of,
    report_of,
    size_of,
)
from wlab.recipes.awq import awq, groups_of
from wlab.recipes.d2quant import compressed as d2quant
from wlab.recipes.gptq import made_by, rounded

__all__ = ["QUICK", "Config", "figure", "run"]

QUICK = dataclasses.replace(BRIEF, only=("GPTQ, 3", "by LIM"))


def _awq(base: Base, bits: int, group: int) -> tuple[Any, dict[str, float]]:
    made, _ = awq(base, bits, group)
    return made, {}


def _rsq(base: Base, bits: int, group: int) -> Any:
    """Rotated, with tokens that count by the attention that they receive."""
    q = random_hadamard(base.seed, base.model.config.width)
    model, params = rotated(base.model, base.params, q)
    made = calibrate(
        parts_of(base, model),
        params,
        base.calibration,
        compressors.gptq(bits=bits, group=group, block=group, clip=True),
        select=base.kernels,
        importance=decoder_importance(model),
    )
    return made.params, error_of(made.errors), model


def _d2quant(base: Base, bits: int, group: int) -> Any:
    made, own, model = d2quant(dual=True, correct=True)(base, bits, group)
    return made, {"error": own["error"]}, model


@functools.partial(jax.jit, static_argnums=0)
def _touched(model: Any, params: Any, tokens: jax.Array) -> Any:
    """After a little more training on the calibration text, in tiny steps."""
    tx = optax.adam(5e-6)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, batch[:, :-1])
        return train.next_token_loss(logits, batch)

    def step(carry: Any, batch: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, batch), state)
        return (optax.apply_updates(params, updates), state), None

    batches = jnp.tile(tokens, (4, 1, 1))
    return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]


def _quantlrm(base: Base, bits: int, group: int) -> tuple[Any, dict[str, float]]:
    """Of a model that has no base: what further training would change."""
    params = jax.tree.map(jnp.asarray, base.params)
    model: Any = base.model  # hashable, as flax makes its modules
    tuned = _touched(model, params, jnp.asarray(base.calibration))
    made = quantlrm_model(
        parts_of(base),
        params,
        tuned,
        base.calibration,
        groups_of(base),
        dtype=jnp.bfloat16,
        bits=bits,
        group=group,
    )
    return made, {}


def _by_layer(base: Base, bits: int, group: int) -> tuple[Any, dict[str, float]]:
    """Blocks with one bit less and one more, by how much they change their input."""
    parts: Any = parts_of(base)
    params = jax.tree.map(jnp.asarray, base.params)
    x = parts.before(params, base.calibration[0])

    def through(x: jax.Array, layer: Any) -> Any:
        y = parts.block(layer, x, base.calibration[0])
        return y, y

    after = jax.lax.scan(through, x, params["blocks"])[1]
    scores = lim_scores(jnp.concatenate([x[None], after]))
    levels = (bits - 1, bits + 1)
    chosen = jnp.asarray(allocate_bits(scores, bits, levels=levels))
    found = {b: made_by("gptq", clip=True)(base, b, group)[0] for b in levels}
    low, high = (materialise(found[b]) for b in levels)
    wide = chosen == levels[1]

    def mixed(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(wide.reshape(-1, *(1,) * (a.ndim - 1)), b, a)

    tree = high | {"blocks": jax.tree.map(mixed, low["blocks"], high["blocks"])}
    share = float(wide.mean())
    sizes = [size_of(found[b]) for b in levels]
    return tree, {"size": sizes[0] * (1 - share) + sizes[1] * share}


SIDES = (
    Side("RTN", rounded, baseline=True),
    Side("AWQ", _awq),
    Side("QuantLRM", _quantlrm),
    Side("GPTQ", made_by("gptq", clip=True)),
    Side("GPTQ, by activity", made_by("gptq", clip=True, act_order=True)),
    Side("GPTQ, bits by LIM", _by_layer, bits=(3,)),
    Side("RSQ", _rsq),
    Side("GPTAQ", made_by("gptaq", clip=True)),
    Side("ResComp", made_by("rescomp", clip=True)),
    Side("D2Quant", _d2quant, bits=(2, 3)),
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

    def findings(arms: Mapping[str, Arm]) -> Iterable[Finding | None]:
        pairs = (
            ("AWQ", "RTN"),
            ("GPTQ", "RTN"),
            ("GPTQ", "AWQ"),
            ("QuantLRM", "AWQ"),
            ("RSQ", "GPTQ"),
            ("GPTAQ", "GPTQ"),
            ("ResComp", "GPTAQ"),
            ("D2Quant", "GPTAQ"),
            ("GPTQ, bits by LIM", "GPTQ"),
        )
        for b in config.bits:
            for ours, theirs in pairs:
                yield below(
                    f"{b} bits: {ours} loses less than {theirs}",
                    arms,
                    "lost",
                    f"{ours}, {b} bits",
                    f"{theirs}, {b} bits",
                )

    return report_of(
        "ptq",
        "A trained decoder keeps what it knows at 3 bits, if rounding looks at inputs.",
        config,
        SIDES,
        findings,
        out=out,
        progress=progress,
        resume=resume,
    )
