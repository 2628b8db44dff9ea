# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The ECO recipe at its quick setting: what it writes, and what bad input gets."""

import dataclasses
import json
import pathlib

import pytest

from wlab.recipes import Report, eco
from wlab.train import read_metrics


def test_quick_run_writes_a_whole_report(tmp_path: pathlib.Path):
    config = eco.QUICK
    report = eco.run(config, out=tmp_path, progress=False)
    names = [arm.name for arm in report.arms]
    assert names == [
        "FP32",
        "fp8_e4m3 master weights",
        "fp8_e4m3 ECO nearest",
        "fp8_e4m3 ECO stochastic",
        "fp8_e4m3 naive nearest",
        "fp8_e4m3 naive stochastic",
    ]
    for arm in report.arms:
        (bits,) = arm.figures["bits_per_byte"]
        assert 2 < bits < 8.5
    kernels = {arm.name: arm.mean("kernel_bytes") for arm in report.arms}
    assert kernels["FP32"] == kernels["fp8_e4m3 master weights"] == 12
    # One byte a weight, two moments, and four bytes of scale for each output.
    assert 9 < kernels["fp8_e4m3 ECO nearest"] < 9.2
    saved = Report.from_json((tmp_path / "report.json").read_text())
    assert saved == report
    assert json.loads((tmp_path / "report.json").read_text())["config"]["digest"]
    assert (tmp_path / "report.png").stat().st_size > 10_000
    records = read_metrics(tmp_path / "metrics" / "FP32-0.jsonl")
    assert records[-1]["step"] == config.steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": ("fp9",)}, "no grid is named 'fp9'"),
        ({"grids": ("uint4",)}, "grid uint4 has no sign"),
        ({"grids": ()}, "must not be empty"),
        ({"steps": 3}, "steps=3 must be at least 10"),
        ({"text": "novels"}, "novels"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        eco.run(dataclasses.replace(eco.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size(tmp_path: pathlib.Path):
    report = eco.run(eco.Config(), out=tmp_path, progress=False)
    assert all(finding.holds for finding in report.findings), report.findings
