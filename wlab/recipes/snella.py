# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""SNELLA on a sparse target, and on digits that are turned by a quarter.

A kernel of low-rank factors whose rank is full, sparsified by competition, against LoRA
at equal numbers (arXiv 2510.24037): a random change with one entry in ten.
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

QUICK = dataclasses.replace(BRIEF, only=("r=16", "q=16", "half"))


def _sparse(key: jax.Array, w: jax.Array) -> jax.Array:
    where, size = jax.random.split(key)
    mask = jax.random.bernoulli(where, 0.1, w.shape)
    return jnp.where(mask, jax.random.normal(size, w.shape), 0)


_SIDES = (
    Side("full fine-tuning", peft.full(KERNELS), baseline=True),
    Side("LoRA r=4", peft.lora(4, select=KERNELS), baseline=True),
    Side("SNELL q=8", peft.snella(8, kernel="distance", select=KERNELS)),
    Side("SNELLA q=8", peft.snella(8, select=KERNELS)),
    Side(
        "SNELL q=8, half",
        peft.snella(8, kernel="distance", threshold=0.5, value="keep", select=KERNELS),
    ),
)

_FITS = (
    Side("LoRA r=8", peft.lora(8, select="w"), baseline=True),
    Side("LoRA r=16", peft.lora(16, select="w"), baseline=True),
    Side("SNELL q=16", peft.snella(16, kernel="distance", select="w")),
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Fit the target and train on digits with every adapter.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """

    def arms(kept: Run, bars: object) -> list[Arm]:
        task = fit_task(config, _sparse)
        made = on_matrix("sparse", _FITS, task, config, kept, bars)
        return made + on_digits(_SIDES, config, kept, bars)

    return report_of(
        "snella",
        "A sparse change of a 64 x 64 matrix, and turned digits",
        "A kernel of low-rank factors fits a sparse change better than their product.",
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
            "at equal numbers the kernel's error is at most 0.6 of LoRA's",
            arms,
            "residual",
            "sparse: SNELL q=16",
            "sparse: LoRA r=16",
            lambda a, b: a <= 0.6 * b,
        ),
        compared(
            "digits: the kernel ends below LoRA of half its numbers (not in the trial)",
            arms,
            "loss",
            "SNELL q=8",
            "LoRA r=4",
            lambda a, b: a < b,
        ),
    ]
