# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""GPTQ against rounding to nearest, on a decoder that wlab has trained.

The channels that are still to come make up for what rounding one does to the outputs
(arXiv 2210.17323), with and without the order of activity.
"""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

from wlab.quant import calibrate, compressors
from wlab.recipes import Report
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
)

__all__ = ["QUICK", "Config", "figure", "run"]

QUICK = dataclasses.replace(BRIEF, only=("RTN", "GPTQ, 3"))


def compressed(base: Base, method: Any) -> tuple[Any, dict[str, float]]:
    """The decoder compressed block by block, and how well outputs are kept."""
    made = calibrate(
        parts_of(base), base.params, base.calibration, method, select=base.kernels
    )
    return made.params, error_of(made.errors)


def made_by(name: str, **options: Any) -> Callable[[Base, int, int], Any]:
    """A side that calibrates with a compressor of `wlab.quant.compressors`."""

    def make(base: Base, bits: int, group: int) -> tuple[Any, dict[str, float]]:
        method = getattr(compressors, name)
        return compressed(base, method(bits=bits, group=group, block=group, **options))

    return make


def rounded(base: Base, bits: int, group: int) -> tuple[Any, dict[str, float]]:
    """Rounding to nearest."""
    return compressed(base, compressors.rtn(bits=bits, group=group))


gptq = made_by("gptq")

SIDES = (
    Side("RTN", rounded, baseline=True),
    Side("GPTQ", gptq),
    Side("GPTQ, clipped", made_by("gptq", clip=True)),
    Side("GPTQ, by activity", made_by("gptq", act_order=True)),
    Side(
        "GPTQ, by activity, clipped, static",
        made_by("gptq", act_order=True, clip=True, static_groups=True),
    ),
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

    def findings(arms: Any) -> Any:
        for b in config.bits:
            yield below(
                f"{b} bits: GPTQ loses less than half of what rounding does",
                arms,
                "lost",
                f"GPTQ, {b} bits",
                f"RTN, {b} bits",
                0.5,
            )

    return report_of(
        "gptq",
        "Rounding errors that later weights make up for cost little.",
        config,
        SIDES,
        findings,
        out=out,
        progress=progress,
        resume=resume,
    )
