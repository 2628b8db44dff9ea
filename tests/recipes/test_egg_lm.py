# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe of the integer language model."""

import dataclasses
import pathlib

import pytest

from wlab.recipes import Report, egg_lm


def test_quick_run(tmp_path: pathlib.Path):
    report = egg_lm.run(egg_lm.QUICK, out=tmp_path, progress=False)
    small, large = report.arms
    assert large.mean("bits") < small.mean("bits") < small.mean("first") + 0.5
    assert report.findings[0].holds
    assert large.mean("told") == 13
    assert len(large.settings["sample"]) == 200
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"populations": (4,)}, "two or more"),
        ({"populations": (3, 4)}, "antithetic pairs"),
        ({"updates": 7}, "multiple of points=3"),
        ({"width": 20}, "no power of 4"),
    ],
)
def test_bad_settings_are_told(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        egg_lm.run(dataclasses.replace(egg_lm.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size():
    report = egg_lm.run(egg_lm.Config(), progress=False)
    assert all(finding.holds for finding in report.findings[:2]), report.findings
