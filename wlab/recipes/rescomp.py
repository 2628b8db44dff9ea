# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""ResComp against GPTQ and GPTAQ, on a decoder that wlab has trained.

What compensation has moved a channel by is fed back as an error as well (arXiv
2604.07955). In trials on small models this gained nothing over GPTAQ.
"""

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping

from wlab.recipes import Arm, Finding, Report
from wlab.recipes._compress import BRIEF, Config, Side, below, figure, report_of
from wlab.recipes.gptq import gptq, made_by, rounded

__all__ = ["QUICK", "Config", "figure", "run"]

QUICK = dataclasses.replace(BRIEF, only=("RTN, 3", "ResComp, 3"))

SIDES = (
    Side("RTN", rounded, baseline=True),
    Side("GPTQ", gptq, baseline=True),
    Side("GPTAQ", made_by("gptaq"), baseline=True),
    Side("ResComp", made_by("rescomp")),
    Side("ResComp, clipped", made_by("rescomp", clip=True)),
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
            for theirs, factor, said in (
                ("RTN", 0.5, "at most half of what rounding does"),
                ("GPTAQ", 1.5, "at most 1.5 of what GPTAQ does"),
                ("GPTAQ", 1.0, "less than GPTAQ does, as the paper finds"),
            ):
                yield below(
                    f"{b} bits: ResComp loses {said}",
                    arms,
                    "lost",
                    f"ResComp, {b} bits",
                    f"{theirs}, {b} bits",
                    factor,
                )

    return report_of(
        "rescomp",
        "Errors that include what compensation has moved cost less.",
        config,
        SIDES,
        findings,
        out=out,
        progress=progress,
        resume=resume,
    )
