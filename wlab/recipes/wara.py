# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""WaRA on digits that are turned by a quarter, and on targets for and against it.

Low-rank factors that the bands of a wavelet transform share, or that stand in the
coarse band alone, against LoRA at equal numbers (arXiv 2506.24092).
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

QUICK = dataclasses.replace(BRIEF, only=("WaRA r=4", "r=3"))


def _core(key: jax.Array, n: int) -> jax.Array:
    a, b = (jax.random.normal(k, (n, 6)) for k in jax.random.split(key))
    return a @ b.T / n**0.5


def _interleaved(key: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.kron(_core(key, len(w) // 2), jnp.eye(2))


def _coarse(key: jax.Array, w: jax.Array) -> jax.Array:
    wanted = jnp.kron(_core(key, len(w) // 2), jnp.ones((2, 2)) / 2)
    noise = jax.random.normal(jax.random.fold_in(key, 1), w.shape)
    return wanted + 0.1 * jnp.std(wanted) * noise


_SIDES = (
    Side("full fine-tuning", peft.full(KERNELS), baseline=True),
    Side("LoRA r=2", peft.lora(2, select=KERNELS), baseline=True),
    Side("WaRA r=4", peft.wara(4, select=KERNELS)),
    Side("WaRA db2 r=4", peft.wara(4, wavelet="db2", select=KERNELS)),
)

_FITS = (
    Side("shared r=6", peft.wara(6, select="w")),
    Side("LL r=6", peft.wara(6, mode="subband", bands=("LL",), select="w")),
    Side("LoRA r=3", peft.lora(3, select="w"), baseline=True),
    Side("LoRA r=6", peft.lora(6, select="w"), baseline=True),
)


def run(
    config: Config,
    *,
    out: pathlib.Path | None = None,
    progress: bool = True,
    resume: bool = False,
) -> Report:
    """Train every adapter on all tasks.

    Args:
      config: the setting.
      out: where report.json and report.png go; None: nowhere.
      progress: whether to show a bar on a terminal.
      resume: whether to go on with the run that `out` holds.

    Returns:
      The report.
    """

    def arms(kept: Run, bars: object) -> list[Arm]:
        made = on_digits(_SIDES, config, kept, bars)
        for name, target in {"interleaved": _interleaved, "coarse": _coarse}.items():
            task = fit_task(config, target)
            made += on_matrix(name, _FITS, task, config, kept, bars)
        return made

    return report_of(
        "wara",
        "Turned digits, and changes of a 64 x 64 matrix",
        "At equal numbers factors in the wavelet domain reach a lower loss than LoRA.",
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
            "at equal numbers WaRA's loss is at most 0.9 of LoRA's",
            arms,
            "loss",
            "WaRA r=4",
            "LoRA r=2",
            lambda a, b: a <= 0.9 * b,
        ),
        compared(
            "interleaved target: the shared form fits, LoRA does not",
            arms,
            "residual",
            "interleaved: shared r=6",
            "interleaved: LoRA r=3",
            lambda a, b: a < 0.05 < b,
        ),
        compared(
            "coarse target: the coarse band fits better than LoRA of equal numbers",
            arms,
            "residual",
            "coarse: LL r=6",
            "coarse: LoRA r=3",
            lambda a, b: a < b,
        ),
        compared(
            "coarse target: the shared form is worse than LoRA (against WaRA)",
            arms,
            "residual",
            "coarse: shared r=6",
            "coarse: LoRA r=3",
            lambda a, b: a > b,
        ),
    ]
