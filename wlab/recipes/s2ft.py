# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""S2FT: what is forgotten when digits are inverted.

A net that reads digits learns to read them dark on bright, and is asked for the old
ones when its loss first falls below a limit. Structured sparse fine-tuning of some
coupled channels (arXiv 2412.06289) against full fine-tuning and LoRA.
"""

import dataclasses
import pathlib
from typing import TYPE_CHECKING

import numpy as np

from wlab import peft
from wlab.recipes import Arm, Finding, Report, Run
from wlab.recipes._adapt import (
    BRIEF,
    KERNELS,
    Config,
    Side,
    at_equal_loss,
    compared,
    digits_figure,
    report_of,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUICK", "Config", "run"]

QUICK = dataclasses.replace(BRIEF, only=("16 of", "full"))


def _channels(n: int) -> peft.Reparam:
    """Columns into, and rows out of, the first channels of the middle layer."""
    chosen = np.arange(n)
    units = {
        "Dense_0/kernel": peft.Units(chosen, "out"),
        "Dense_1/kernel": peft.Units(chosen, "in"),
    }
    return peft.s2ft(units=units)


_SIDES = (
    Side("full fine-tuning", peft.full(KERNELS), baseline=True),
    Side("LoRA r=4", peft.lora(4, select=KERNELS), baseline=True),
    Side("S2FT, 16 of 128", _channels(16)),
    Side("S2FT, 8 of 128", _channels(8)),
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train every adapter on inverted digits, and measure what is left of the old ones.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """

    def arms(kept: Run, bars: object) -> list[Arm]:
        return at_equal_loss(_SIDES, config, kept, bars)

    return report_of(
        "s2ft",
        "A net that reads digits learns to read them inverted",
        "At equal loss on the new task, few channels forget less of the old one.",
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
            "at equal loss S2FT keeps 3 points more of the old task than full tuning",
            arms,
            "source",
            "S2FT, 16 of 128",
            "full fine-tuning",
            lambda a, b: a >= b + 0.03,
        ),
        compared(
            "its accuracy on the new task is within 2 points",
            arms,
            "accuracy",
            "S2FT, 16 of 128",
            "full fine-tuning",
            lambda a, b: a >= b - 0.02,
        ),
    ]
