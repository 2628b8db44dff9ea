# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a recipe returns: its arms, their figures over seeds, what they show.

A :class:`Report` is plain data. It prints itself as a table and a check list, and
saves itself as ``report.json`` and ``report.png``.
"""

import dataclasses
import json
import math
import numbers
import os
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wlab._files import replacing
from wlab.recipes import _versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass(frozen=True)
class Metric:
    """How one figure is read.

    Attributes:
      label: Its name in tables and on axes.
      unit: Its unit, "" for none.
      lower_is_better: None where neither direction is better: then no arm is
        marked as the best.
      format: Format specification of a value.
    """

    label: str
    unit: str = ""
    lower_is_better: bool | None = True
    format: str = ".4g"

    @property
    def title(self) -> str:
        """Label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    def show(self, value: float) -> str:
        """Formats one value; what is not finite is said in a word."""
        if math.isnan(value):
            return "diverged"
        return format(value, self.format)


@dataclasses.dataclass(frozen=True)
class Curve:
    """A figure over training.

    Attributes:
      steps: Where it was read, shape [points].
      values: What it was, shape [seeds, points].
    """

    steps: Sequence[float]
    values: Sequence[Sequence[float]]

    def __post_init__(self):
        object.__setattr__(self, "steps", _floats(self.steps))
        rows = tuple(_floats(row) for row in self.values)
        object.__setattr__(self, "values", rows)
        for row in rows:
            if len(row) != len(self.steps):
                raise ValueError(
                    f"a curve over {len(self.steps)} steps has a row of {len(row)} "
                    "values; give one value for each step, one row for each seed"
                )


@dataclasses.dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
      name: Its name in tables and figures.
      figures: Name of a metric to one value for each seed, or to a single value
        where the seed does not matter.
      settings: What sets it apart from the other arms.
      curves: Name of a metric to its course over training.
      baseline: Whether it is what the method is measured against.
    """

    name: str
    figures: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    curves: Mapping[str, Curve] = dataclasses.field(default_factory=dict)
    baseline: bool = False

    def __post_init__(self):
        figures = {name: _floats(values) for name, values in self.figures.items()}
        object.__setattr__(self, "figures", figures)
        object.__setattr__(self, "settings", _plain(dict(self.settings)))
        object.__setattr__(self, "curves", dict(self.curves))

    def mean(self, metric: str) -> float:
        """Returns the mean over seeds; NaN if any seed diverged."""
        values = self.figures[metric]
        if not all(map(math.isfinite, values)):
            return math.nan
        return statistics.fmean(values)

    def spread(self, metric: str) -> float | tuple[float, float] | None:
        """Returns how far the seeds lie apart.

        Args:
          metric: Name of the figure.

        Returns:
          The sample standard deviation of three seeds or more, the smallest and
          the largest value of two; None for one, or where one diverged.
        """
        values = self.figures[metric]
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return None
        if len(values) == 2:
            return min(values), max(values)
        return statistics.stdev(values)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A statement that the run was to check.

    Attributes:
      statement: What is claimed.
      holds: Whether the figures of this run bear it out.
      figures: These figures.
    """

    statement: str
    holds: bool
    figures: str = ""

    def __post_init__(self):
        object.__setattr__(self, "holds", bool(self.holds))


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of a recipe.

    Attributes:
      recipe: Its name on the command line.
      title: One line for the head of the table.
      claim: What it set out to show, in one sentence.
      config: The recipe's configuration, ``dataclasses.asdict`` of it.
      seeds: The seeds, in the order of the values of each figure.
      metrics: Name to how it is read; the order is that of the columns.
      arms: What was compared; the order is that of the rows.
      started: When it began, UTC, ISO 8601.
      seconds: Wall time.
      findings: What the figures show, as they are.
      versions: Name of a package to its version.
      device: Platform, kind and count of the devices, count of CPU cores.

    Raises:
      ValueError: If two arms share a name, or a figure or curve does not fit
        `metrics` or `seeds`.
    """

    recipe: str
    title: str
    claim: str
    config: Mapping[str, Any]
    seeds: Sequence[int]
    metrics: Mapping[str, Metric]
    arms: Sequence[Arm]
    started: str
    seconds: float
    findings: Sequence[Finding] = ()
    versions: Mapping[str, str] = dataclasses.field(default_factory=_versions.versions)
    device: Mapping[str, Any] = dataclasses.field(default_factory=_versions.device)

    def __post_init__(self):
        object.__setattr__(self, "config", _plain(dict(self.config)))
        object.__setattr__(self, "seeds", tuple(map(int, self.seeds)))
        object.__setattr__(self, "metrics", dict(self.metrics))
        object.__setattr__(self, "arms", tuple(self.arms))
        object.__setattr__(self, "seconds", float(self.seconds))
        object.__setattr__(self, "findings", tuple(self.findings))
        object.__setattr__(self, "versions", dict(self.versions))
        object.__setattr__(self, "device", _plain(dict(self.device)))
        _check(self)

    def arm(self, name: str) -> Arm:
        """Returns the arm of a given name.

        Raises:
          KeyError: If there is none; the message lists the names.
        """
        for arm in self.arms:
            if arm.name == name:
                return arm
        names = ", ".join(arm.name for arm in self.arms)
        raise KeyError(f"no arm {name!r}; there are: {names}")

    def best(self, metric: str) -> frozenset[str]:
        """Returns the names of the arms whose mean is the best.

        Args:
          metric: Name of the figure.

        Returns:
          More than one name on a tie; none where no direction is better, or where
          all arms that have the figure are equal.
        """
        lower = self.metrics[metric].lower_is_better
        means = {arm.name: arm.mean(metric) for arm in self.arms if _has(arm, metric)}
        finite = [mean for mean in means.values() if math.isfinite(mean)]
        if lower is None or len(means) < 2 or not finite:
            return frozenset()
        if len(finite) == len(means) and min(finite) == max(finite):
            return frozenset()
        top = min(finite) if lower else max(finite)
        return frozenset(name for name, mean in means.items() if mean == top)

    def to_json(self) -> str:
        """Returns the report as JSON; what is not finite becomes null."""
        fields = _plain(dataclasses.asdict(self))
        return json.dumps(fields, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Returns the report that :meth:`to_json` wrote."""
        fields = json.loads(text)
        fields["metrics"] = {k: Metric(**v) for k, v in fields["metrics"].items()}
        fields["findings"] = [Finding(**finding) for finding in fields["findings"]]
        for arm in fields["arms"]:
            arm["curves"] = {k: Curve(**v) for k, v in arm["curves"].items()}
        fields["arms"] = [Arm(**arm) for arm in fields["arms"]]
        return cls(**fields)

    def table(self) -> Table:
        """Returns a row for each arm, mean and spread of each of its figures."""
        table = Table(
            title=Text(self.title),
            caption=Text(self._caption()),
            caption_justify="left",
            box=box.SIMPLE,
        )
        table.add_column("arm")
        # A metric that only curves have is no column.
        columns = {
            name: metric
            for name, metric in self.metrics.items()
            if any(_has(arm, name) for arm in self.arms)
        }
        best = {name: self.best(name) for name in columns}
        for metric in columns.values():
            head = metric.label + f"\n({metric.unit})" * bool(metric.unit)
            table.add_column(Text(head), justify="right")
        for arm in self.arms:
            row = [Text(arm.name + " (baseline)" * arm.baseline)]
            for name, metric in columns.items():
                cell = _cell(arm, name, metric) if _has(arm, name) else "-"
                won = arm.name in best[name]
                # The star is for those who see no colours; the blank keeps columns.
                mark = " *" if won else "  " if best[name] else ""
                row.append(Text(cell + mark, style="bold green" if won else ""))
            table.add_row(*row)
        return table

    def _caption(self) -> str:
        """Says what the marks in the table mean."""
        count = len(self.seeds)
        if count > 2:
            spread = f", mean ± sample standard deviation of {count} seeds"
        elif count == 2:
            spread = ", mean [smallest, largest] of 2 seeds"
        else:
            spread = ", one seed: no spread"
        return f"* best{spread}"

    def print(self, console: Console | None = None) -> None:
        """Prints the claim, the table, the check list and the run's facts.

        Args:
          console: Where to; standard output by default.
        """
        console = console or _console()
        console.print(Text(self.claim))
        console.print(self.table())
        for finding in self.findings:
            mark = Text(*(("yes", "green") if finding.holds else ("no ", "bold red")))
            figures = f" ({finding.figures})" if finding.figures else ""
            console.print(mark, Text(finding.statement + figures))
        device = self.device
        versions = " ".join(f"{k} {v}" for k, v in self.versions.items())
        console.print(
            Text(
                f"seeds {', '.join(map(str, self.seeds))}; {self.seconds:.1f} s from "
                f"{self.started}; {device['count']} x {device['platform']} "
                f"({device['kind']}), {device['cpus']} CPU cores; {versions}",
                style="dim",
            )
        )

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        figure: "Callable[[Report], Figure] | None" = None,
    ) -> list[pathlib.Path]:
        """Writes ``report.json`` and, given a way to draw it, ``report.png``.

        Each file appears whole or not at all.

        Args:
          directory: Where to; made if it is missing.
          figure: Draws the report.

        Returns:
          The files written.
        """
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        written = [directory / "report.json"]
        with replacing(written[0]) as path:
            path.write_text(self.to_json(), encoding="utf-8")
        if figure is not None:
            written.append(directory / "report.png")
            drawn = figure(self)
            with replacing(written[1]) as path:
                drawn.savefig(path, format="png")
            drawn.clear()
        return written


def _check(report: Report) -> None:
    """Raises where the parts of a report do not fit together."""
    names = [arm.name for arm in report.arms]
    if len(set(names)) != len(names):
        raise ValueError(f"two arms share a name: {', '.join(names)}; rename one")
    sizes = {1, len(report.seeds)}
    for arm in report.arms:
        rows = {name: len(values) for name, values in arm.figures.items()}
        for name, curve in arm.curves.items():
            rows[f"{name} (curve)"] = len(curve.values)
        for name, count in rows.items():
            if name.removesuffix(" (curve)") not in report.metrics:
                known = ", ".join(report.metrics)
                raise ValueError(
                    f"arm {arm.name!r} has a figure {name!r} that is no metric; "
                    f"describe it in metrics, which has: {known}"
                )
            if count not in sizes:
                raise ValueError(
                    f"arm {arm.name!r} has {count} values of {name!r} for "
                    f"{len(report.seeds)} seeds; give one for each seed, or one"
                )


def _console() -> Console:
    """Returns a console on standard output: wide where no terminal sets a width."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=160)
    return console


def _has(arm: Arm, metric: str) -> bool:
    """Says whether an arm has any value of a figure."""
    return bool(arm.figures.get(metric))


def _cell(arm: Arm, name: str, metric: Metric) -> str:
    """Returns mean and spread as they stand in a table."""
    values = arm.figures[name]
    failed = sum(not math.isfinite(value) for value in values)
    if failed:
        return f"diverged {failed}/{len(values)}" if len(values) > 1 else "diverged"
    mean = metric.show(arm.mean(name))
    spread = arm.spread(name)
    if spread is None or max(values) == min(values):
        return mean
    if isinstance(spread, tuple):
        low, high = map(metric.show, spread)
        return f"{mean} [{low}, {high}]"
    return f"{mean} ± {metric.show(spread)}"


def _floats(values: Any) -> tuple[float, ...]:
    """Returns numbers as Python floats, None (JSON's null) as NaN."""
    return tuple(math.nan if v is None else float(v) for v in values)


def _plain(value: Any) -> Any:
    """Returns a value as JSON has it: no NaN, no arrays, no tuples."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and jax arrays and scalars
        return _plain(np.asarray(value).tolist())
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
