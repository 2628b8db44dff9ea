# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe of EGGROLL on digits."""

import dataclasses
import pathlib

import pytest

from wlab.recipes import Report, eggroll


def test_quick_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(eggroll, "has_evosax", lambda: False)
    report = eggroll.run(eggroll.QUICK, out=tmp_path, progress=False)
    names = [arm.name for arm in report.arms]
    assert names == ["EGGROLL rank 1", "dense ES", "Adam, gradients"]
    ours = report.arms[0]
    (curve,) = ours.curves["accuracy"].values
    assert curve[-1] > 0.4 > 0.25 > curve[0]
    assert ours.settings["sigma"] == 0.1 and len(ours.settings["tried"]) == 1
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_bad_settings_are_told():
    for changes in ({"generations": 7}, {"ranks": ()}, {"seeds": 0}):
        with pytest.raises(ValueError, match=r"multiple of points|at least one"):
            eggroll.run(dataclasses.replace(eggroll.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size():
    report = eggroll.run(eggroll.Config(), progress=False)
    assert all(finding.holds for finding in report.findings[:3]), report.findings
