# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""HUT on digits that are turned by a quarter, and on a target it was made for.

A mask of low rank, multiplied with the weight entry by entry, against LoRA at equal
numbers (arXiv 2409.13501); and the change ``diag(a) W diag(b) - W``, which a mask of
rank two is.
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from wlab import peft
from wlab.recipes import Arm, Finding, Report, Run
from wlab.recipes._adapt import (
    BRIEF,
    KERNELS,
    Config,
    Side,
    compared,
    digits_figure,
    fit_task,
    on_digits,
    on_matrix,
    report_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUICK", "Config", "run"]

QUICK = dataclasses.replace(BRIEF, only=("HUT r=2", "LoRA r=2"))


def _rescaled(key: jax.Array, w: jax.Array) -> jax.Array:
    a, b = (1 + 0.5 * jax.random.normal(k, (len(w),)) for k in jax.random.split(key))
    return w * jnp.outer(a, b) - w


_SIDES = (
    Side("full fine-tuning", peft.full(KERNELS), baseline=True),
    Side("LoRA r=2", peft.lora(2, select=KERNELS), baseline=True),
    Side("LoRA r=4", peft.lora(4, select=KERNELS), baseline=True),
    Side(
        "HUT r=2",
        peft.hut(2, start="normal", affine=False, select=KERNELS),
    ),
    Side(
        "HUT r=4",
        peft.hut(4, start="normal", affine=False, select=KERNELS),
    ),
)

_FITS = (
    Side("HUT r=2", peft.hut(2, start="normal", affine=False, select="w")),
    Side("LoRA r=8", peft.lora(8, select="w"), baseline=True),
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train every adapter on both tasks.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """

    def arms(kept: Run, bars: object) -> list[Arm]:
        task = fit_task(config, _rescaled)
        made = on_digits(_SIDES, config, kept, bars)
        return made + on_matrix("rescaled", _FITS, task, config, kept, bars)

    return report_of(
        "hut",
        "Turned digits, and a matrix whose rows and columns are rescaled",
        "A multiplicative change of equal numbers fits no worse than an additive one.",
        config,
        arms,
        _findings,
        out=out,
        progress=progress,
        resume=resume,
        figure=figure,
    )


def figure(report: Report) -> "Figure":
    """The loss over training, and the accuracy against the trained numbers."""
    return digits_figure(report)


def _findings(arms: dict[str, Arm]) -> list[Finding | None]:
    return [
        compared(
            "at equal numbers HUT's loss is at most 0.6 of LoRA's",
            arms,
            "loss",
            "HUT r=2",
            "LoRA r=2",
            lambda a, b: a <= 0.6 * b,
        ),
        compared(
            "its accuracy is within a point, or better",
            arms,
            "accuracy",
            "HUT r=2",
            "LoRA r=2",
            lambda a, b: a >= b - 0.01,
        ),
        compared(
            "rescaled rows and columns: HUT of rank 2 fits, LoRA of rank 8 does not",
            arms,
            "residual",
            "rescaled: HUT r=2",
            "rescaled: LoRA r=8",
            lambda a, b: a < 0.05 < b,
        ),
    ]
