# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of reports, drawn without pyplot and its global state."""

import itertools
import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from wlab.recipes._report import Arm, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito: eight colours that colour-blind readers tell apart. Yellow is
# last because it is weak on white.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#F0E442",
)
_MARKERS = "osD^vPX*"
_LINES = ("-", "--", ":", "-.")
_SIZE, _DPI = (16, 7), 100  # inches, dots an inch: 1600 x 700


def styles(report: Report) -> dict[str, dict[str, str]]:
    """Returns the colour, marker and line style of each arm, by its name.

    An arm keeps its style in every picture of the report. Past eight arms the
    colours come again with another line style.

    Args:
      report: What is drawn.
    """
    out = {}
    for index, arm in enumerate(report.arms):
        turn, place = divmod(index, len(_COLOURS))
        out[arm.name] = {
            "color": _COLOURS[place],
            "marker": _MARKERS[(place + turn) % len(_MARKERS)],
            "linestyle": _LINES[turn % len(_LINES)],
        }
    return out


def curves_and_tradeoff(
    report: Report,
    *,
    curve: str,
    x_metric: str,
    y_metric: str,
    x_label: str = "step",
    log_x: bool = False,
    log_y: bool = False,
    y_limits: tuple[float, float] | None = None,
) -> "Figure":
    """Draws a curve of each arm beside one figure against another.

    Left, the curves as they were recorded: the mean over seeds, with a band from
    the smallest to the largest. Right, one point for each arm, with bars from the
    smallest to the largest seed. Nothing is smoothed; what `y_limits` cuts off is
    said above the picture.

    Args:
      report: What is drawn.
      curve: Name of the curve on the left.
      x_metric: Name of the figure on the right's horizontal axis.
      y_metric: Name of the figure on the right's vertical axis.
      x_label: What the curve's steps count.
      log_x: Whether the curve's steps are on a logarithmic axis.
      log_y: Whether both vertical axes are logarithmic.
      y_limits: Range of the left vertical axis; all that there is by default.

    Returns:
      A figure of 1600 x 700 dots.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)  # text can be measured only on a canvas
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1.0))
    figure.suptitle(report.title, fontsize=16)
    left_notes = _draw_curves(left, report, curve, y_limits)
    left.set_xlabel(x_label, fontsize=13)
    left.set_ylabel(report.metrics[curve].title, fontsize=13)
    if log_x:
        left.set_xscale("log")
    points, right_notes = _draw_points(right, report, x_metric, y_metric)
    right.set_xlabel(report.metrics[x_metric].title, fontsize=13)
    right.set_ylabel(report.metrics[y_metric].title, fontsize=13)
    for axes, notes in ((left, left_notes), (right, right_notes)):
        note = textwrap.fill("; ".join(notes), 90)
        axes.set_title(note, fontsize=11, color="0.3", loc="left")
        if log_y:
            axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=12)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        # As many columns as the longest label leaves room for, rows filled evenly.
        most = max(1, min(6, 190 // (8 + max(map(len, labels)))))
        columns = math.ceil(len(labels) / math.ceil(len(labels) / most))
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            fontsize=12,
            frameon=False,
        )
    right.margins(x=0.35, y=0.15)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # labels are placed in a layout that stays
    _place_labels(right, points)
    return figure


def _draw_curves(
    axes: "Axes", report: Report, name: str, limits: tuple[float, float] | None
) -> list[str]:
    """Draws the curve of each arm; returns what the picture does not show."""
    notes, cut = [], 0
    for arm in report.arms:
        if name not in arm.curves:
            continue
        style = styles(report)[arm.name]
        steps = np.asarray(arm.curves[name].steps)
        values = np.asarray(arm.curves[name].values)
        kept = np.isfinite(values).all(axis=0)  # a mean over survivors would flatter
        if not kept.all():
            first = int(np.argmin(kept))
            last = f"step {steps[first - 1]:g}" if first else "the start"
            notes.append(f"{arm.name} diverged after {last}")
        steps, values = steps[kept], values[:, kept]
        if not steps.size:
            continue
        axes.plot(
            steps,
            values.mean(axis=0),
            color=style["color"],
            linestyle=style["linestyle"],
            marker=style["marker"],
            markevery=max(1, len(steps) // 8),
            markersize=6,
            linewidth=2,
            label=_label(arm),
        )
        if len(values) > 1:
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.18, lw=0)
        if limits and not ((limits[0] <= values) & (values <= limits[1])).all():
            cut += 1
    if limits:
        axes.set_ylim(limits)
    if cut:
        notes.append(f"the axis cuts off a part of {cut} of the curves")
    return notes


def _draw_points(
    axes: "Axes", report: Report, x_name: str, y_name: str
) -> tuple[list[tuple[str, float, float]], list[str]]:
    """Draws a point for each arm; returns labels with places, and what is left out."""
    points, missing = [], []
    for arm in report.arms:
        if not (arm.figures.get(x_name) and arm.figures.get(y_name)):
            continue
        x, y = arm.mean(x_name), arm.mean(y_name)
        if not (math.isfinite(x) and math.isfinite(y)):
            missing.append(f"{arm.name} diverged and has no point")
            continue
        style = styles(report)[arm.name]
        x_bar, y_bar = (
            [[mean - min(arm.figures[name])], [max(arm.figures[name]) - mean]]
            for name, mean in ((x_name, x), (y_name, y))
        )
        axes.errorbar(
            x,
            y,
            xerr=x_bar,
            yerr=y_bar,
            color=style["color"],
            capsize=4,
            linewidth=1.5,
            fmt="none",
        )
        axes.scatter(
            x,
            y,
            color=style["color"],
            marker=style["marker"],
            s=110,
            edgecolor="black",
            linewidth=0.8,
            zorder=3,
        )
        points.append((_label(arm), x, y))
    return points, missing


def _label(arm: Arm) -> str:
    """Returns an arm's name, marked if it is the baseline."""
    return arm.name + " (baseline)" * arm.baseline


def _place_labels(axes: "Axes", points: list[tuple[str, float, float]]) -> None:
    """Writes labels beside points, none on another label, a point or a line.

    Each label takes the nearest free place left or right of its point, from the
    top down; a thin line leads to those that had to go far. Where all is full, the
    legend alone names the point.
    """
    from matplotlib.path import Path
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent().padded(-4)
    spots = [axes.transData.transform(point[1:]) for point in points]
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in spots]
    lines: list[Path] = []
    shifts = itertools.product((14, 30, 60, 100, 150), range(-280, 281, 7), (1, -1))
    shifts = sorted(shifts, key=lambda shift: math.hypot(*shift[:2]))
    for index in sorted(range(len(points)), key=lambda index: -spots[index][1]):
        label, *_ = points[index]
        x, y = spots[index]
        probe = axes.text(0, 0, label, fontsize=12)
        size = probe.get_window_extent()
        probe.remove()
        # A line cannot but leave through the marks that lie on its own.
        others = [box for box in taken if not box.overlaps(taken[index])]
        for dx, dy, side in shifts:
            start, middle = x + side * dx, y + dy
            left, right = sorted((start, start + side * size.width))
            half = size.height / 2
            box = Bbox.from_extents(left, middle - half, right, middle + half)
            line = Path([(x, y), (start, middle)])
            if (
                frame.x0 <= left
                and right <= frame.x1
                and frame.y0 <= box.y0
                and box.y1 <= frame.y1
                and not box.padded(2).count_overlaps(taken)
                and not any(line.intersects_bbox(other) for other in others)
                and not any(old.intersects_bbox(box) for old in lines)
            ):
                break
        else:
            continue  # no free place: the legend has its mark
        far = math.hypot(dx, dy) > 26
        points_per_dot = 72 / axes.figure.dpi
        axes.annotate(
            label,
            points[index][1:],
            xytext=(side * dx * points_per_dot, dy * points_per_dot),
            textcoords="offset points",
            fontsize=12,
            va="center",
            ha="left" if side > 0 else "right",
            arrowprops={
                "arrowstyle": "-",
                "color": "0.6",
                "linewidth": 0.8,
                "relpos": (0.0 if side > 0 else 1.0, 0.5),
                "shrinkA": 0,
                "shrinkB": 6,
            }
            if far
            else None,
        )
        taken.append(box)
        lines.append(line)
