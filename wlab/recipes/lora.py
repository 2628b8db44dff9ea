# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""LoRA and its kin on digits that are turned by a quarter.

A net that reads upright digits learns to read turned ones, through low-rank changes of
its two hidden kernels (arXiv 2106.09685), with rank-stabilised scale, with magnitudes
trained apart (DoRA), from the leading singular triplets (PiSSA), and with a faster
output factor (LoRA+).
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

QUICK = dataclasses.replace(BRIEF, only=("LoRA r=2", "PiSSA"))


_SIDES = (
    Side("full fine-tuning", peft.full(KERNELS), baseline=True),
    Side("LoRA r=2", peft.lora(2, select=KERNELS)),
    Side("LoRA r=4", peft.lora(4, select=KERNELS)),
    Side("rsLoRA r=4", peft.lora(4, rank_stabilized=True, alpha=4, select=KERNELS)),
    Side("DoRA r=4", peft.lora(4, dora=True, select=KERNELS)),
    Side("PiSSA r=4", peft.lora(4, start="pissa", select=KERNELS)),
    Side("LoRA+ r=4", peft.lora(4, select=KERNELS), faster={"b": 16.0}),
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
        "lora",
        "A net that reads digits learns to read them turned",
        "A change of low rank does almost what full fine-tuning does.",
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
            "LoRA of rank 4 reads at least 93 %",
            arms,
            "accuracy",
            "LoRA r=4",
            "full fine-tuning",
            lambda a, _: a >= 0.93,
        ),
        compared(
            "rank 4 is no worse than rank 2 by a point",
            arms,
            "accuracy",
            "LoRA r=4",
            "LoRA r=2",
            lambda a, b: a >= b - 0.01,
        ),
        compared(
            "PiSSA's early loss is below LoRA's",
            arms,
            "early",
            "PiSSA r=4",
            "LoRA r=4",
            lambda a, b: a < b,
        ),
        compared(
            "LoRA+ ends no higher than LoRA",
            arms,
            "loss",
            "LoRA+ r=4",
            "LoRA r=4",
            lambda a, b: a <= 1.05 * b,
        ),
    ]
