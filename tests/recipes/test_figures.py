# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The picture of a report shows what was recorded, and its labels are readable."""

import itertools
import math
import sys

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.text import Annotation, Text

from wlab.recipes import Arm, Curve, Metric, Report, curves_and_tradeoff
from wlab.recipes._figures import styles

STEPS = np.arange(0, 100, 10)


def report(arms) -> Report:
    return Report(
        recipe="fake",
        title="A title",
        claim="A claim.",
        config={},
        seeds=(0, 1, 2),
        metrics={"loss": Metric("loss", "bits"), "bytes": Metric("memory", "bytes")},
        arms=arms,
        started="",
        seconds=0.0,
    )


def arm(name: str, level: float, size: float, **changes) -> Arm:
    values = level + np.exp(-STEPS / 30.0) + np.array([[-0.1], [0.0], [0.2]])
    fields = {
        "figures": {"loss": values[:, -1], "bytes": [size]},
        "curves": {"loss": Curve(STEPS, values)},
    }
    return Arm(name, **(fields | changes))


def draw(it: Report, **options):
    return curves_and_tradeoff(
        it, curve="loss", x_metric="bytes", y_metric="loss", **options
    )


def test_left_is_the_mean_with_a_band_of_all_seeds():
    it = report([arm("a", 1.0, 9.0)])
    left, right = draw(it).axes
    values = np.asarray(it.arm("a").curves["loss"].values)
    (line,) = left.get_lines()
    np.testing.assert_allclose(line.get_xdata(), STEPS)
    np.testing.assert_allclose(line.get_ydata(), values.mean(axis=0), rtol=1e-12)
    corners = left.collections[0].get_paths()[0].vertices[:, 1]
    assert corners.max() == pytest.approx(values.max())
    assert corners.min() == pytest.approx(values.min())
    assert left.get_ylabel() == right.get_ylabel() == "loss (bits)"
    assert right.get_xlabel() == "memory (bytes)"


def test_right_has_a_point_for_each_arm():
    it = report([arm("a", 1.0, 9.0), arm("b", 2.0, 12.0, baseline=True)])
    _, right = draw(it).axes
    marks = [one for one in right.collections if isinstance(one, PathCollection)]
    points = [tuple(np.ravel(mark.get_offsets())) for mark in marks]
    expected = [(one.mean("bytes"), one.mean("loss")) for one in it.arms]
    np.testing.assert_allclose(points, expected)


def test_an_arm_has_one_style_everywhere_and_no_two_share_it():
    it = report([arm(f"arm {i}", 1.0, 9.0) for i in range(20)])
    looks = styles(it)
    assert len({tuple(look.values()) for look in looks.values()}) == 20
    left, _ = draw(it).axes
    for line in left.get_lines():
        assert line.get_color() == looks[line.get_label()]["color"]


@pytest.mark.parametrize("log_y", [False, True])
def test_labels_overlap_neither_each_other_nor_a_point(log_y):
    levels = (1.0, 1.01, 1.05, 1.2, 1.21, 3.0)
    arms = [
        arm(f"{grid} arm of level {level}", level, size)
        for grid, size in (("fp8", 9.0), ("int4", 8.5))
        for level in levels
    ]
    figure = draw(report(arms), log_y=log_y)
    _, right = figure.axes
    figure.draw_without_rendering()
    notes = [text for text in right.texts if isinstance(text, Annotation)]
    assert len(notes) == len(arms)
    frame = right.get_window_extent()
    # The words alone, without the line that leads to them.
    extents = [Text.get_window_extent(note) for note in notes]
    for one, two in itertools.combinations(extents, 2):
        assert not one.overlaps(two)
    for box in extents:
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
        for note in notes:
            x, y = right.transData.transform(note.xy)
            assert not box.contains(x, y)


def test_says_what_is_not_shown():
    values = np.ones((3, len(STEPS)))
    values[1, 4:] = np.nan
    lost = Arm(
        "lost",
        {"loss": [1.0, math.nan, 1.0], "bytes": [9.0]},
        curves={"loss": Curve(STEPS, values)},
    )
    left, right = draw(report([arm("a", 1.0, 9.0), lost]), y_limits=(0.5, 1.5)).axes
    told = left.get_title(loc="left")
    assert "lost diverged after step 30" in told
    assert "cuts off a part of 1 of the curves" in told
    assert left.get_ylim() == (0.5, 1.5)
    assert "lost diverged" in right.get_title(loc="left")
    assert len(left.get_lines()[1].get_xdata()) == 4
    whole, _ = draw(report([arm("a", 1.0, 9.0)])).axes
    assert whole.get_title(loc="left") == ""


def test_has_the_size_of_the_report_and_leaves_pyplot_alone(tmp_path):
    it = report([arm("a", 1.0, 9.0)])
    it.save(tmp_path, figure=draw)
    header = (tmp_path / "report.png").read_bytes()[16:24]
    sides = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:], "big")
    assert sides == (1600, 700)
    assert "matplotlib.pyplot" not in sys.modules
