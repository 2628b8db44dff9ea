# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe of countdown."""

import dataclasses
import pathlib

import pytest

from wlab.recipes import Report, countdown


def test_quick_run(tmp_path: pathlib.Path):
    report = countdown.run(countdown.QUICK, out=tmp_path, progress=False)
    assert [arm.name for arm in report.arms] == ["EGGROLL", "policy gradient"]
    for arm in report.arms:
        assert 0 <= arm.mean("right") <= arm.mean("form") <= 1
        assert arm.curves["right"].steps[-1] == pytest.approx(2 * 64 * 5 / 1e6)
    assert report.arms[0].figures["before"] == report.arms[1].figures["before"]
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_the_best_is_sought_past_the_edge():
    setting = countdown._Setting
    tried = [setting(1.0, 0.1), setting(3.0, 0.1), setting(1.0, 0.2), setting(3.0, 0.2)]
    assert countdown._past_the_edge(tried[3], tried) == setting(9.0, 0.2)
    assert countdown._past_the_edge(tried[0], tried).rate == pytest.approx(1 / 3)
    middle = [setting(1.0), setting(2.0), setting(4.0)]
    assert countdown._past_the_edge(middle[1], middle) == middle[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"updates": 5}, "not a multiple of points=2"),
        ({"population": 60}, "do not divide among population=60"),
        ({"rates": ()}, "at least one of each"),
    ],
)
def test_bad_settings_are_told(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        countdown.run(dataclasses.replace(countdown.QUICK, **changes), progress=False)
