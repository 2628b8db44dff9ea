# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""RandLoRA on targets of full and of low rank.

A full-rank sum of random products with trained scalings, against LoRA at equal numbers
(arXiv 2502.00987): a random orthogonal change, whose spectrum is flat, and one of low
rank, where LoRA must win.
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
    Config,
    Side,
    compared,
    fit_task,
    matrix_figure,
    on_matrix,
    report_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUICK", "Config", "run"]

QUICK = dataclasses.replace(BRIEF, only=("r=5", "r=8"))


def _flat(key: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.linalg.qr(jax.random.normal(key, w.shape))[0]


def _low(key: jax.Array, w: jax.Array) -> jax.Array:
    a, b = (jax.random.normal(k, (len(w), 5)) for k in jax.random.split(key))
    return a @ b.T / len(w) ** 0.5


_SIDES = (
    Side("LoRA r=5", peft.lora(5, select="w"), baseline=True),
    Side("RandLoRA r=8", peft.randlora(8, alpha=8, select="w")),
    Side("LoRA r=9", peft.lora(9, select="w"), baseline=True),
    Side("RandLoRA r=4", peft.randlora(4, alpha=4, select="w")),
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Fit both targets with every adapter.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """

    def arms(kept: Run, bars: object) -> list[Arm]:
        targets = {"flat": _flat, "low": _low}
        return [
            arm
            for name, target in targets.items()
            for arm in on_matrix(
                name, _SIDES, fit_task(config, target), config, kept, bars
            )
        ]

    return report_of(
        "randlora",
        "The change of a 64 x 64 matrix",
        "For a change of full rank random bases beat low rank at equal numbers.",
        config,
        arms,
        _findings,
        out=out,
        progress=progress,
        resume=resume,
        figure=figure,
    )


def figure(report: Report) -> "Figure":
    """The error over training, and against the trained numbers."""
    return matrix_figure(report)


def _findings(arms: dict[str, Arm]) -> list[Finding | None]:
    return [
        compared(
            "flat spectrum, 576 numbers against 640: RandLoRA fits better by 0.05",
            arms,
            "residual",
            "flat: RandLoRA r=8",
            "flat: LoRA r=5",
            lambda a, b: a <= b - 0.05,
        ),
        compared(
            "flat spectrum, 1088 against 1152: RandLoRA fits better by 0.05",
            arms,
            "residual",
            "flat: RandLoRA r=4",
            "flat: LoRA r=9",
            lambda a, b: a <= b - 0.05,
        ),
        compared(
            "a target of rank 5: LoRA wins",
            arms,
            "residual",
            "low: RandLoRA r=8",
            "low: LoRA r=5",
            lambda a, b: a > b,
        ),
    ]
