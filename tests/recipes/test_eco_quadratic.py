# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The quadratic recipe shows its effect already at the quick setting."""

import dataclasses
import pathlib

import pytest

from wlab.recipes import eco_quadratic


def test_quick_run_shows_the_effect(tmp_path: pathlib.Path):
    report = eco_quadratic.run(eco_quadratic.QUICK, out=tmp_path, progress=False)
    assert all(finding.holds for finding in report.findings), report.findings
    assert len(report.findings) == 4
    assert report.arm("ECO nearest").mean("bytes") == pytest.approx(5.08, abs=0.02)
    assert report.arm("master weights").mean("bytes") == pytest.approx(8, abs=0.02)
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": (0.1, -1.0)}, "must be positive"),
        ({"time": 0.01}, "less than four steps"),
        ({"grid": "fp8"}, "no grid is named 'fp8'; near: fp8_e"),
    ],
)
def test_bad_settings_are_told(changes: dict, message: str):
    config = dataclasses.replace(eco_quadratic.QUICK, **changes)
    with pytest.raises(ValueError, match=message):
        eco_quadratic.run(config, progress=False)
