# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""RSQ against GPTQ with and without a rotation, on a decoder that wlab has trained.

Rotate the residual stream, scale tokens by the attention that they receive, then
quantise (arXiv 2503.01820); each row of a kernel has one symmetric range. A small
decoder has no channels that stand out, for which rotations were made. In a second form
of the same function three channels behind each norm are eight times as large, and the
kernels that read them take that back. Norms that are fused, which must come before any
rotation, undo this form to the last bit, so that there is one arm of those for both.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from wlab.core import map_with_path, random_hadamard, random_orthogonal
from wlab.models import decoder_importance, rotated
from wlab.quant import calibrate, compressors, decoder_stream
from wlab.recipes import Arm, Finding, Report
from wlab.recipes import _compress as shared
from wlab.recipes._compress import BRIEF, Base, Side, below, figure, parts_of, report_of

__all__ = ["QUICK", "Config", "figure", "run"]


@dataclasses.dataclass(frozen=True)
class Config(shared.Config):
    """A decoder, and how it is compressed.

    Attributes:
      group: input channels that share a range; 0 for all of them.
      outliers: channels that stand out in the second form.
      larger: by how much; a power of two, so that nothing is rounded.
    """

    bits: tuple[int, ...] = (2, 3)
    group: int = 0
    outliers: int = 3
    larger: float = 8.0


QUICK = Config(
    **{**dataclasses.asdict(BRIEF), "group": 0, "only": ("RSQ, 3", "rotated, 3")}
)

Turn = Literal["none", "fused", "hadamard", "orthogonal"]


def standing_out(params: Any, channels: jax.Array, larger: float) -> Any:
    """The same function with a few channels behind each norm of a block enlarged.

    Args:
        params: of a scanned decoder.
        channels: which, integers.
        larger: by how much.
    """
    norms = decoder_stream().norms[:2]
    scales = tuple(f"/{norm}" for norm, _ in norms)
    kernels = tuple(f"/{path}" for _, readers in norms for path in readers)

    def one(path: str, x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        if path.endswith(scales):
            return x.at[:, channels].multiply(larger)
        return x.at[:, channels].divide(larger) if path.endswith(kernels) else x

    return map_with_path(one, params)


def compressed(
    turn: Turn, *, important: bool = False, outliers: tuple[int, float] | None = None
) -> Callable[[Base, int, int], Any]:
    """A side: how the stream is turned, whether tokens count by their importance."""

    def make(base: Base, bits: int, group: int) -> Any:
        model, params = base.model, base.params
        width = model.config.width
        if outliers is not None:
            key = jax.random.key(base.seed)
            channels = jax.random.permutation(key, width)[: outliers[0]]
            params = standing_out(params, channels, outliers[1])
        if turn != "none":
            ways = {"hadamard": random_hadamard, "orthogonal": random_orthogonal}
            q = ways[turn](base.seed, width) if turn in ways else None
            model, params = rotated(model, params, q)
        method = compressors.gptq(
            bits=bits, group=group or None, symmetric=True, clip=True
        )
        weigh = decoder_importance(model) if important else None
        parts = parts_of(base, model)
        made = calibrate(
            parts,
            params,
            base.calibration,
            method,
            select=base.kernels,
            importance=weigh,
        )
        return made.params, {}, model

    return make


def sides(config: Config) -> list[Side]:
    """The arms."""
    far = (config.outliers, config.larger)
    return [
        Side("GPTQ", compressed("none"), baseline=True),
        Side("GPTQ with outliers", compressed("none", outliers=far), baseline=True),
        Side("GPTQ fused", compressed("fused"), baseline=True),
        Side("GPTQ rotated", compressed("hadamard"), baseline=True),
        Side("GPTQ scaled", compressed("none", important=True)),
        Side("RSQ", compressed("hadamard", important=True)),
        Side("RSQ orthogonal", compressed("orthogonal", important=True)),
    ]


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

    def findings(arms: Mapping[str, Arm]) -> list[Finding | None]:
        rotated = "GPTQ rotated"
        found = []
        for b in config.bits:
            for said, ours, theirs, factor in (
                (
                    "with outliers a rotation loses a fifth less than none",
                    *(rotated, "GPTQ with outliers", 0.8),
                ),
                (
                    "a rotation loses less than fused norms alone",
                    *(rotated, "GPTQ fused", 1.0),
                ),
                ("a rotation loses less than none", rotated, "GPTQ", 1.0),
                (
                    "importance alone loses less than none",
                    *("GPTQ scaled", "GPTQ", 1.0),
                ),
                (
                    "RSQ loses at most 5 % more than the rotation alone",
                    *("RSQ", rotated, 1.05),
                ),
                (
                    "RSQ loses less than the rotation alone, as the paper finds",
                    *("RSQ", rotated, 1.0),
                ),
            ):
                ours, theirs = (f"{name}, {b} bits" for name in (ours, theirs))
                said = f"{b} bits: {said}"
                found.append(below(said, arms, "lost", ours, theirs, factor))
        return found

    return report_of(
        "rsq",
        "Rotated decoders whose important tokens count more lose less.",
        config,
        sides(config),
        findings,
        out=out,
        progress=progress,
        resume=resume,
    )
