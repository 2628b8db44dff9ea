# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The FRUGAL recipe at its quick setting, and what bad settings are told."""

import dataclasses
import pathlib

import pytest

from wlab.recipes import Report, frugal


def test_quick_run_shows_what_the_rest_is_worth(tmp_path: pathlib.Path):
    report = frugal.run(frugal.QUICK, out=tmp_path, progress=False)
    assert len(report.arms) == 9 and len(report.findings) == 5
    # AdamW is ahead only after more steps than these.
    assert [f.holds for f in report.findings][1:] == [True] * 4, report.findings
    state = {arm.name: arm.mean("bytes") for arm in report.arms}
    assert state["AdamW"] == pytest.approx(8, abs=0.01)
    assert state["signSGD"] == pytest.approx(0, abs=0.01)
    # All but the kernels, and a quarter, or one of three, of these.
    kernels, others = 3 * 32**2, 2 * 16 * 16 + 3 * 2 * 32 + 33 * 16
    for name, share in (("columns", 1 / 4), ("block", 1 / 3), ("density 0", 0)):
        want = 8 * (others + share * kernels) / (kernels + others)
        assert state[f"FRUGAL {name}"] == pytest.approx(want, abs=0.05)
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 30}, "steps=30 must be a multiple of 20"),
        ({"warmup": 400}, "more than warmup=400"),
        ({"width": 33}, "width=33 must be even"),
        ({"seeds": 0}, "seeds=0 positive"),
        ({"density": 0.1}, r"none of 3 layers active: take one from 0\.167"),
        ({"density": 1.5}, "density=1.5"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        frugal.run(dataclasses.replace(frugal.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size():
    report = frugal.run(frugal.Config(), progress=False)
    assert all(finding.holds for finding in report.findings), report.findings
