# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""TeRA on digits that are turned by a quarter.

A random tensor network with trained vectors on its bonds, against VeRA, whose random
factors have low rank, at equal numbers of trained entries (arXiv 2509.03234). The
frozen core is as large as the weight, and more where ranks are above the modes.
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

from wlab import peft
from wlab.recipes import Arm, Finding, Report, Run
from wlab.recipes._adapt import (
    BRIEF,
    KERNELS,
    Config,
    Side,
    compared,
    digits_figure,
    on_digits,
    report_of,
    vera,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUICK", "Config", "run"]

QUICK = dataclasses.replace(BRIEF, only=("R=n", "VeRA r=8"))


_SIDES = (
    Side("TeRA R=n", peft.tera(select=KERNELS)),
    Side("TeRA R=2n", peft.tera(ranks=2.0, select=KERNELS)),
    Side("TeRA R=3n", peft.tera(ranks=3.0, select=KERNELS)),
    Side("VeRA r=8", vera(8, KERNELS), baseline=True),
    Side("VeRA r=64", vera(64, KERNELS), baseline=True),
    Side("LoRA r=2", peft.lora(2, select=KERNELS), baseline=True),
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train every adapter on turned digits.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """

    def arms(kept: Run, bars: object) -> list[Arm]:
        return on_digits(_SIDES, config, kept, bars)

    return report_of(
        "tera",
        "A net that reads digits learns to read them turned",
        "The rank of a change need not cost trained numbers.",
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
            "TeRA trains no more numbers than VeRA of rank 8",
            arms,
            "trained",
            "TeRA R=3n",
            "VeRA r=8",
            lambda a, b: a <= b,
        ),
        compared(
            "and reads 5 points more",
            arms,
            "accuracy",
            "TeRA R=3n",
            "VeRA r=8",
            lambda a, b: a >= b + 0.05,
        ),
        compared(
            "it reads more than VeRA of rank 64, which trains more",
            arms,
            "accuracy",
            "TeRA R=3n",
            "VeRA r=64",
            lambda a, b: a > b,
        ),
    ]
