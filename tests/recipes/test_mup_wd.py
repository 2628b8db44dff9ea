# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The muP recipe: the order of the slopes when small, the whole at full size."""

import dataclasses
import pathlib

import numpy as np
import pytest

from wlab.recipes import Report, mup_wd


def test_quick_run_orders_the_slopes(tmp_path: pathlib.Path):
    report = mup_wd.run(mup_wd.QUICK, out=tmp_path, progress=False)
    names = ["both fixed", "decay ~ 1", "decay ~ sqrt(width)", "decay ~ width"]
    assert [arm.name for arm in report.arms] == [*names, "decay ~ 4 sqrt(width)"]
    for field in ("slope_up", "slope_down", "rms_slope"):
        slopes = [report.arm(name).mean(field) for name in names[1:]]
        assert slopes == sorted(slopes, reverse=True), field
    base = [arm.curves["top"].values for arm in report.arms[:4]]
    for values in base[1:]:  # at the base no rule changes a thing
        np.testing.assert_allclose(np.array(values)[:, 0], np.array(base[0])[:, 0])
    plain, ours = (report.arm(n).curves for n in ("both fixed", "decay ~ sqrt(width)"))
    assert plain["loss_16"] == ours["loss_16"]
    assert plain["loss_32"] != ours["loss_32"]
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").exists()


def test_without_the_decoder(tmp_path: pathlib.Path):
    config = dataclasses.replace(mup_wd.QUICK, steps=2, decoder_widths=())
    report = mup_wd.run(config, out=tmp_path, progress=False)
    assert len(report.findings) == 4
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (32,)}, "a slope needs two or more"),
        ({"widths": (64, 32)}, r"widths=\(64, 32\) must ascend"),
        ({"decoder_widths": (32, 32)}, "must ascend"),
        ({"decoder_widths": (16, 32, 40)}, "width 40 from a base of width 16"),
        ({"decoder_rates": (0.1, -0.1)}, "must be positive"),
        ({"decoder_steps": 3}, "10 decoder_steps or more"),
        ({"seeds": 0}, "seeds and steps must be positive"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        mup_wd.run(dataclasses.replace(mup_wd.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size():
    report = mup_wd.run(mup_wd.Config(), progress=False)
    assert all(finding.holds for finding in report.findings), report.findings
