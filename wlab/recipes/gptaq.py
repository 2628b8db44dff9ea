# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""GPTAQ against GPTQ, on a decoder that wlab has trained.

Rounding aims at the outputs of the original model, whose inputs the compressed one no
longer sees (arXiv 2504.02692).
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

from wlab.recipes import Arm, Finding, Report
from wlab.recipes._compress import BRIEF, Config, Side, below, figure, report_of
from wlab.recipes.gptq import gptq, made_by, rounded

__all__ = ["QUICK", "Config", "figure", "run"]

QUICK = dataclasses.replace(BRIEF, only=("GPTQ, 3", "GPTAQ, 3"))

SIDES = (
    Side("RTN", rounded, baseline=True),
    Side("GPTQ", gptq, baseline=True),
    Side("GPTAQ", made_by("gptaq")),
    Side("GPTQ, by activity", made_by("gptq", act_order=True)),
    Side("GPTAQ, by activity", made_by("gptaq", act_order=True)),
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
        for b in config.bits:
            for order in ("", ", by activity"):
                ours, theirs = (f"{x}{order}, {b} bits" for x in ("GPTAQ", "GPTQ"))
                yield below(
                    f"{b} bits{order}: GPTAQ loses at most 0.95 of what GPTQ does",
                    arms,
                    "lost",
                    ours,
                    theirs,
                    0.95,
                )

    return report_of(
        "gptaq",
        "Aiming at the original model's outputs loses less than GPTQ does.",
        config,
        SIDES,
        findings,
        out=out,
        progress=progress,
        resume=resume,
    )
