# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipes of the adapters."""

import dataclasses
import importlib
import pathlib
from typing import Any

import pytest

from wlab.recipes import Report

RECIPES = (
    *("lora", "bone", "hut", "tera", "randlora", "wara", "snella", "s2ft", "ist"),
    "peft",
)


def recipe(name: str) -> Any:
    return importlib.import_module(f"wlab.recipes.{name}")


@pytest.mark.parametrize("name", RECIPES)
def test_quick_run(name: str, tmp_path: pathlib.Path):
    module = recipe(name)
    report = module.run(module.QUICK, out=tmp_path, progress=False)
    assert report.recipe == name and len(report.arms) >= 2
    for arm in report.arms:
        for curve in arm.curves.values():
            assert all(row[-1] < row[0] for row in curve.values), arm.name
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_what_low_rank_cannot_fit():
    """The theory: of a flat spectrum rank r leaves 1 - r / n."""
    module = recipe("randlora")
    config = dataclasses.replace(
        module.QUICK, only=("flat: LoRA r=5",), fit_steps=1500, rates=(3e-2,), points=2
    )
    (arm,) = module.run(config, progress=False).arms
    assert arm.mean("residual") == pytest.approx(1 - 5 / 64, abs=0.01)


def test_bad_settings_are_told():
    for name, changes in (
        ("lora", {"points": 7}),
        ("lora", {"rates": ()}),
        ("lora", {"only": ("nothing",)}),
        ("ist", {"damaged": (9,)}),
        ("peft", {"only": ("nothing",)}),
        ("peft", {"width": 60}),
    ):
        module = recipe(name)
        with pytest.raises(
            ValueError, match=r"multiple|at least one|names no|damaged|no"
        ):
            module.run(dataclasses.replace(module.QUICK, **changes), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("hut", "randlora", "wara", "tera"))
def test_the_effect_at_full_size(name: str):
    module = recipe(name)
    report = module.run(module.Config(), progress=False)
    assert report.findings[0].holds, report.findings
