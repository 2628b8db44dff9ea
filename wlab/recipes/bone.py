# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bone and Bat on digits that are turned by a quarter.

One block that all row blocks of a weight share, added (Bone) or multiplied with the
weight as well (Bat), against LoRA at nearly equal numbers (arXiv 2409.15371 claims
faster convergence).
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
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["QUICK", "Config", "run"]

QUICK = dataclasses.replace(BRIEF, only=("Bat", "LoRA r=4"))


_SIDES = (
    Side("full fine-tuning", peft.full(KERNELS), baseline=True),
    Side("LoRA r=2", peft.lora(2, select=KERNELS), baseline=True),
    Side("LoRA r=4", peft.lora(4, select=KERNELS), baseline=True),
    Side("Bat r=8", peft.bone(8, variant="bat", select=KERNELS)),
    Side("Bone r=8", peft.bone(8, select=KERNELS)),
    Side("Bone r=4", peft.bone(4, select=KERNELS)),
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
        "bone",
        "A net that reads digits learns to read them turned",
        "A block guided by the weight converges faster than LoRA at equal numbers.",
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
            "Bat's early loss is below LoRA's by 0.15",
            arms,
            "early",
            "Bat r=8",
            "LoRA r=4",
            lambda a, b: a <= b - 0.15,
        ),
        compared(
            "Bat ends below Bone at equal numbers",
            arms,
            "loss",
            "Bat r=8",
            "Bone r=8",
            lambda a, b: a < b,
        ),
        compared(
            "Bat ends below LoRA (not in the card's trial)",
            arms,
            "loss",
            "Bat r=8",
            "LoRA r=4",
            lambda a, b: a < b,
        ),
    ]
