# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Reports: their statistics, their JSON, their table, what they write."""

import dataclasses
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from wlab import recipes
from wlab.recipes import Arm, Curve, Finding, Metric, Report

NAN = math.nan


def report(**changes) -> Report:
    """Returns a small report of three seeds."""
    fields = {
        "recipe": "fake",
        "title": "A title [of sorts]",
        "claim": "Less is more.",
        "config": {"steps": 3, "grids": ("a", "b")},
        "seeds": (0, 1, 2),
        "metrics": {
            "loss": Metric("validation loss", "bits per byte", format=".3f"),
            "accuracy": Metric("accuracy", "%", lower_is_better=False, format=".1f"),
            "ms": Metric("time", "ms", lower_is_better=None),
        },
        "arms": (
            Arm(
                "plain",
                {"loss": [1.0, 2.0, 3.0], "accuracy": [50.0], "ms": [4.0]},
                baseline=True,
            ),
            Arm(
                "ours",
                {"loss": [1.0, 1.5, 2.0], "accuracy": [40.0], "ms": [5.0]},
                settings={"rate": 0.1},
                curves={"loss": Curve([0, 1], [[3, 1], [4, 1.5], [5, 2]])},
            ),
            Arm("lost", {"loss": [1.0, NAN, 0.1]}),
        ),
        "findings": (
            Finding("ours beats plain", True, "1.5 < 2.0"),
            Finding("ours is faster", False, "5 > 4"),
        ),
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.25,
    }
    return Report(**(fields | changes))


def printed(it: Report, width: int = 250) -> str:
    stream = io.StringIO()
    it.print(Console(file=stream, width=width))
    return stream.getvalue()


def test_mean_and_spread():
    arm = Arm("a", {"one": [2.0], "two": [3.0, 1.0], "three": [1.0, 2.0, 6.0]})
    assert [arm.mean(name) for name in ("one", "two", "three")] == [2.0, 2.0, 3.0]
    assert arm.spread("one") is None
    assert arm.spread("two") == (1.0, 3.0)
    # Variance (4 + 1 + 9) / (3 - 1).
    assert arm.spread("three") == pytest.approx(math.sqrt(7.0), rel=1e-12)


def test_a_diverged_seed_is_not_averaged_away():
    arm = Arm("a", {"loss": [1.0, NAN, 3.0], "other": [math.inf, 1.0]})
    assert math.isnan(arm.mean("loss")) and arm.spread("loss") is None
    assert math.isnan(arm.mean("other")) and arm.spread("other") is None


def test_best_follows_the_direction_of_the_metric():
    it = report()
    assert it.best("loss") == {"ours"}  # not the arm that lost a seed
    assert it.best("accuracy") == {"plain"}
    assert it.best("ms") == frozenset()


def test_best_marks_ties_and_nothing_where_all_are_equal():
    metrics = {"m": Metric("m")}
    arms = [Arm("a", {"m": [1.0]}), Arm("b", {"m": [1.0]}), Arm("c", {"m": [2.0]})]
    assert report(metrics=metrics, arms=arms).best("m") == {"a", "b"}
    assert report(metrics=metrics, arms=arms[:2]).best("m") == frozenset()
    assert report(metrics=metrics, arms=arms[:1]).best("m") == frozenset()


def test_json_round_trip():
    arms = report().arms[:2]  # NaN is not equal to itself
    it = report(arms=arms)
    again = Report.from_json(it.to_json())
    assert again == it
    assert again.to_json() == it.to_json()
    assert again.arm("ours").curves["loss"].values == ((3, 1), (4, 1.5), (5, 2))


def test_json_has_null_for_what_is_not_finite():
    curve = Curve([0, 1], [[1.0, math.inf], [NAN, 1.0], [1.0, 1.0]])
    arm = Arm("a", {"loss": [NAN, -math.inf, 1.0]}, curves={"loss": curve})
    text = report(arms=[arm], config={"limit": math.inf}).to_json()

    def refuse(constant):
        raise AssertionError(constant)

    fields = json.loads(text, parse_constant=refuse)
    assert fields["arms"][0]["figures"]["loss"] == [None, None, 1.0]
    assert fields["arms"][0]["curves"]["loss"]["values"][0] == [1.0, None]
    assert fields["config"]["limit"] is None
    again = Report.from_json(text).arm("a")
    assert math.isnan(again.figures["loss"][0])
    assert math.isnan(again.curves["loss"].values[1][0])


def test_takes_arrays_and_paths():
    values = jnp.asarray([1.5, 2.5, 3.5])
    arm = Arm(
        "a",
        {"loss": values, "ms": np.asarray([1, 2, 3])},
        settings={"rate": jnp.float32(0.5), "shape": np.arange(2), "on": np.True_},
    )
    it = report(
        arms=[arm],
        seeds=jnp.arange(3),
        config={"path": pathlib.Path("a/b"), "dtype": jnp.bfloat16.dtype, "none": None},
        findings=[Finding("x", jnp.asarray(True))],
    )
    fields = json.loads(it.to_json())
    assert fields["seeds"] == [0, 1, 2]
    assert fields["arms"][0]["figures"] == {"loss": [1.5, 2.5, 3.5], "ms": [1, 2, 3]}
    assert fields["arms"][0]["settings"] == {"rate": 0.5, "shape": [0, 1], "on": True}
    assert fields["config"] == {"path": "a/b", "dtype": "bfloat16", "none": None}
    assert fields["findings"][0]["holds"] is True


def test_states_versions_and_device():
    it = report()
    names = {"python", "wlab", "jax", "jaxlib", "flax", "optax", "numpy", "quax"}
    assert set(it.versions) == names
    assert it.versions["jax"] == jax.__version__
    assert it.device["platform"] == jax.devices()[0].platform
    assert it.device["count"] == jax.device_count()
    assert it.device["cpus"] >= 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"arms": [Arm("a", {}), Arm("a", {})]},
            "two arms share a name: a, a; rename one",
        ),
        (
            {"arms": [Arm("a", {"los": [1.0]})]},
            "arm 'a' has a figure 'los' that is no metric.*loss, accuracy, ms",
        ),
        (
            {"arms": [Arm("a", {"loss": [1.0, 2.0]})]},
            "arm 'a' has 2 values of 'loss' for 3 seeds",
        ),
        (
            {"arms": [Arm("a", {}, curves={"loss": Curve([0], [[1], [2]])})]},
            r"arm 'a' has 2 values of 'loss \(curve\)' for 3 seeds",
        ),
    ],
)
def test_parts_must_fit(changes, expected):
    with pytest.raises(ValueError, match=expected):
        report(**changes)


def test_a_curve_must_have_a_value_for_each_step():
    with pytest.raises(ValueError, match="2 steps has a row of 3"):
        Curve([0, 1], [[1, 2], [1, 2, 3]])


def test_an_unknown_arm_is_an_error_with_the_names():
    with pytest.raises(KeyError, match="no arm 'our'; there are: plain, ours, lost"):
        report().arm("our")


def test_table_shows_mean_spread_and_the_best():
    lines = printed(report()).splitlines()
    rows = {
        name: next(line for line in lines if line.startswith(f"  {name} "))
        for name in ("plain", "ours", "lost")
    }
    assert "A title [of sorts]" in printed(report())
    assert "plain (baseline)" in rows["plain"]
    assert "2.000 ± 1.000 " in rows["plain"] and "50.0 *" in rows["plain"]
    assert "1.500 ± 0.500 *" in rows["ours"] and "40.0 *" not in rows["ours"]
    assert "diverged 1/3" in rows["lost"] and "*" not in rows["lost"]
    assert "bits per byte" in printed(report())
    assert "sample standard deviation of 3 seeds" in printed(report())


def test_table_of_two_seeds_shows_the_range_and_of_one_none():
    arms = [Arm("a", {"loss": [1.0, 2.0]}), Arm("b", {"loss": [3.0, 3.0]})]
    text = printed(report(seeds=(0, 1), arms=arms))
    assert "1.500 [1.000, 2.000] *" in text
    assert re.search(r"b +3\.000 *$", text, re.MULTILINE)
    # Metrics of which no arm has a figure are no columns.
    arms = [Arm("a", {"loss": [1.0, 2.0], "ms": [4.0]}), Arm("b", {"loss": [3.0]})]
    text = printed(report(seeds=(0, 1), arms=arms))
    assert re.search(r"b +3\.000 +- *$", text, re.MULTILINE)
    assert "[smallest, largest] of 2 seeds" in " ".join(text.split())
    text = printed(report(seeds=(7,), arms=[Arm("a", {"loss": [1.0]})]))
    assert "one seed" in text and "±" not in text


def test_nothing_is_cut_in_a_narrow_terminal():
    text = printed(report(), width=50)
    assert "…" not in text


def test_print_tells_what_holds_and_what_does_not():
    text = printed(report())
    assert "Less is more." in text
    assert "yes ours beats plain (1.5 < 2.0)" in text
    assert "no  ours is faster (5 > 4)" in text
    for part in ("seeds 0, 1, 2", "1.2 s", f"jax {jax.__version__}", "CPU cores"):
        assert part in text


def test_print_to_standard_output(capsys):
    report().print()
    assert "1.500 ± 0.500 *" in capsys.readouterr().out


def test_save_writes_both_files_and_nothing_else(tmp_path):
    it = report()
    figure = Figure(figsize=(2, 1), dpi=50)
    files = it.save(tmp_path / "deep" / "down", figure=lambda given: figure)
    folder = tmp_path / "deep" / "down"
    assert files == [folder / "report.json", folder / "report.png"]
    assert sorted(folder.iterdir()) == files
    assert files[0].read_text() == it.to_json()
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_save_replaces_a_report(tmp_path):
    report().save(tmp_path)
    later = report(seconds=9.0)
    assert later.save(tmp_path) == [tmp_path / "report.json"]
    assert Report.from_json((tmp_path / "report.json").read_text()).seconds == 9.0


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    def good(it):
        return Figure(figsize=(2, 1), dpi=50)

    class Bad(Figure):
        def savefig(self, path, **kwargs):
            path.write_bytes(b"half")
            raise OSError("disk full")

    _, picture = report().save(tmp_path, figure=good)
    before = picture.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        report().save(tmp_path, figure=lambda it: Bad())
    assert picture.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.png"}


def test_reports_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        report().title = "another"


def test_stopwatch():
    watch = recipes.Stopwatch.start()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", watch.started)
    assert 0 <= watch.seconds <= watch.seconds < 60


def test_the_room_is_light_to_import():
    code = "import sys, wlab.recipes; print({'jax', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"
