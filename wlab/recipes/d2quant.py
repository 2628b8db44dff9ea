# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""D2Quant against GPTAQ and rounding, on a decoder that wlab has trained.

Down-projections get a scale of each input channel, which the layer before takes over,
and norms a bias for the mean that compressed attention is off by (arXiv 2602.02546).
Each of the two is also seen alone.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from wlab.core import random_hadamard
from wlab.models import final_norm, rotated, with_norm_bias
from wlab.quant import calibrate, compressors, d2quant_model
from wlab.recipes import Arm, Finding, Metric, Report
from wlab.recipes import _compress as shared
from wlab.recipes._compress import (
    BRIEF,
    Base,
    Side,
    below,
    error_of,
    figure,
    parts_of,
    report_of,
)

__all__ = ["QUICK", "Config", "figure", "run"]


@dataclasses.dataclass(frozen=True)
class Config(shared.Config):
    """A decoder, and how it is compressed; dual scales have 2 or 3 bits."""

    bits: tuple[int, ...] = (2, 3)


QUICK = Config(
    **{
        **dataclasses.asdict(BRIEF),
        "bits": (2,),
        "kernels": ("attention/out/kernel", "mlp/down/kernel"),
        "only": ("RTN", "D2Quant, 2"),
    }
)


def figures(errors: Any) -> dict[str, float]:
    """How well outputs are kept, and those of down-projections alone, in percent."""
    down = [e for e in errors if e.path == "mlp/down/kernel"]
    return error_of(errors) | {"down": error_of(down)["error"]}


def rounded(base: Base, bits: int, group: int) -> tuple[Any, dict[str, float]]:
    """Rounding to nearest, with the same ranges as GPTAQ."""
    method = compressors.rtn(bits=bits, group=group, clip=True)
    made = calibrate(
        parts_of(base), base.params, base.calibration, method, select=base.kernels
    )
    return made.params, figures(made.errors)


def compressed(
    *, dual: bool, correct: bool, turned: bool = False
) -> Callable[[Base, int, int], Any]:
    """A side: which halves of the method it has, and whether the stream is turned."""

    def make(base: Base, bits: int, group: int) -> Any:
        model, params = base.model, base.params
        if turned:
            q = random_hadamard(base.seed, model.config.width)
            model, params = rotated(model, params, q)
        model, params = with_norm_bias(model, params)
        made = d2quant_model(
            parts_of(base, model),
            params,
            base.calibration,
            bits=bits,
            group=group,
            dual=dual,
            correct=correct,
            end=final_norm(model),
            select=base.kernels,
        )
        return made.params, figures(made.errors), model

    return make


SIDES = (
    Side("RTN", rounded, baseline=True),
    Side("GPTAQ", compressed(dual=False, correct=False), baseline=True),
    Side("GPTAQ, dual scales", compressed(dual=True, correct=False)),
    Side("GPTAQ, corrected norms", compressed(dual=False, correct=True)),
    Side("D2Quant", compressed(dual=True, correct=True)),
    Side(
        "GPTAQ rotated",
        compressed(dual=False, correct=False, turned=True),
        baseline=True,
    ),
    Side("D2Quant rotated", compressed(dual=True, correct=True, turned=True)),
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

    def findings(arms: Mapping[str, Arm]) -> list[Finding | None]:
        found = []
        for b in config.bits:
            for said, metric, ours, theirs in (
                (
                    "dual scales lower the error of what down-projections put out",
                    *("down", "GPTAQ, dual scales", "GPTAQ"),
                ),
                (
                    "dual scales lose less than uniform ranges",
                    *("lost", "GPTAQ, dual scales", "GPTAQ"),
                ),
                (
                    "corrected norms lose less than norms as they are",
                    *("lost", "GPTAQ, corrected norms", "GPTAQ"),
                ),
                ("D2Quant loses less than rounding", "lost", "D2Quant", "RTN"),
                (
                    "D2Quant loses less than GPTAQ, as the paper finds",
                    *("lost", "D2Quant", "GPTAQ"),
                ),
                (
                    "D2Quant loses less than GPTAQ, both rotated",
                    *("lost", "D2Quant rotated", "GPTAQ rotated"),
                ),
            ):
                ours, theirs = (f"{name}, {b} bits" for name in (ours, theirs))
                found.append(below(f"{b} bits: {said}", arms, metric, ours, theirs))
        return found

    return report_of(
        "d2quant",
        "Second scales that cost nothing and corrected means make 2 bits bearable.",
        config,
        SIDES,
        findings,
        out=out,
        progress=progress,
        resume=resume,
        metrics={"down": Metric("error of down outputs", "%", format=".3f")},
    )
