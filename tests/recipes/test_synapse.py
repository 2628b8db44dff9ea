# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The synapse recipe shows its effect already at the quick setting."""

import dataclasses
import pathlib

import pytest

from wlab.recipes import synapse


def test_quick_run_shows_the_effect(tmp_path: pathlib.Path):
    report = synapse.run(synapse.QUICK, out=tmp_path, progress=False)
    assert all(finding.holds for finding in report.findings), report.findings
    assert len(report.findings) == 3
    assert [arm.name for arm in report.arms] == [
        "unidirectional",
        "bidirectional pair",
        "bidirectional single",
        "unidirectional, unlike devices",
        "software SGD",
    ]
    for arm in report.arms:
        assert len(set(arm.figures["accuracy_inf"])) > 1, "seeds are different runs"
        assert all(0.85 < value < 1 for value in arm.figures["accuracy_inf"])
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curvatures": ()}, "curvatures=.* must be positive numbers"),
        ({"curvatures": (1.0, 0.0)}, "curvatures=.* must be positive numbers"),
        ({"levels": 0}, "levels=0 must be positive"),
        ({"images": 2000}, "images=2000 must lie between 1 and 1500"),
    ],
)
def test_bad_settings_are_told(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        synapse.run(dataclasses.replace(synapse.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size():
    report = synapse.run(synapse.Config(), progress=False)
    assert len(report.findings) == 5
    assert all(finding.holds for finding in report.findings), report.findings
