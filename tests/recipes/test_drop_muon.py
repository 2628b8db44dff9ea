# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The Drop-Muon recipe counts what it computes, and every run gets there."""

import dataclasses
import pathlib

import numpy as np
import pytest

from wlab.recipes import drop_muon


def test_quick_run(tmp_path: pathlib.Path):
    report = drop_muon.run(drop_muon.QUICK, out=tmp_path, progress=False)
    assert len(report.findings) == 7
    cheaper, compiled = report.findings[4:6]
    assert cheaper.holds and compiled.holds
    cost = {arm.name: arm for arm in report.arms}
    muon, uniform = cost["Muon"], cost["Drop-Muon uniform"]
    assert all(np.isfinite(arm.mean("steps")) for arm in report.arms)
    assert uniform.mean("steps") >= muon.mean("steps")
    every = drop_muon._step_gflop(drop_muon.QUICK, 0)
    np.testing.assert_allclose(
        muon.figures["gflop"], every * np.asarray(muon.figures["steps"]), rtol=1e-5
    )
    shares = np.divide(uniform.figures["gflop"], uniform.figures["steps"]) / every
    assert (shares < 1).all()
    assert (tmp_path / "report.png").exists()


def test_cost_of_the_network_of_the_full_setting():
    """The ratio that the mean step of uniform cuts has to a step of all layers."""
    config = drop_muon.Config()
    cost = [drop_muon._step_gflop(config, s) for s in range(config.depth)]
    assert np.mean(cost) / cost[0] == pytest.approx(0.64, abs=0.01)
    cost = [
        drop_muon._step_gflop(dataclasses.replace(config, batch=256), s)
        for s in range(8)
    ]
    assert np.mean(cost) / cost[0] == pytest.approx(0.59, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rates": ()}, "positive"),
        ({"depth": 1}, "two or more"),
        ({"batch": 2000}, "of 1500 images"),
    ],
)
def test_bad_settings_are_told(changes: dict, message: str):
    config = dataclasses.replace(drop_muon.QUICK, **changes)
    with pytest.raises(ValueError, match=message):
        drop_muon.run(config, progress=False)
