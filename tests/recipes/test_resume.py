# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`wlab run` is stopped and killed, goes on, and reports what one run reports."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import pytest

from wlab import cli


def start(*args: str) -> subprocess.Popen:
    env = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", "wlab", "run", "optimizers", "--no-progress"]
    return subprocess.Popen(
        [*command, *args], env=env, text=True, stderr=subprocess.PIPE
    )


def stop_when(child: subprocess.Popen, seen: pathlib.Path, number: int) -> str:
    """Sends a signal when a file is there; returns what the run said."""
    while not seen.exists():
        assert child.poll() is None, child.communicate()
        time.sleep(0.002)
    child.send_signal(number)
    return child.communicate(timeout=120)[1]


def figures(folder: pathlib.Path) -> dict:
    """The report without times."""
    report = json.loads((folder / "report.json").read_text())
    for arm in report["arms"]:
        arm["figures"].pop("ms", None)
    for name in ("started", "seconds"):
        del report[name]
    return report


def test_it_goes_on_to_the_same_report(tmp_path, capsys):
    run = ("run", "optimizers", "--no-progress")
    setting = ("--quick", "--only", "sgd", "eco fp8", "--steps", "30")
    whole, cut = tmp_path / "whole", tmp_path / "cut out"
    assert cli.main([*run, *setting, "--out", str(whole)]) == 0
    checkpoints = cut / "checkpoints"

    child = start(*setting, "--out", str(cut))
    said = stop_when(child, checkpoints / "SGD-0.3-0" / "10", signal.SIGINT)
    assert child.returncode == 130
    assert f"wlab: stopped; go on with: wlab run optimizers --resume '{cut}'" in said
    finished = cut / "arms" / "SGD-0.3-0.json"
    assert not finished.exists()

    child = start("--resume", str(cut))
    stop_when(child, checkpoints / "ECO-FP8-0.003-0" / "10", signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    made = finished.stat().st_mtime_ns
    assert not (cut / "report.json").exists()
    # Not by accident begun anew.
    capsys.readouterr()
    assert cli.main([*run, *setting, "--out", str(cut)]) == 2
    assert "did not end: go on with it" in capsys.readouterr().err

    assert cli.main([*run, *setting, "--resume", str(cut)]) == 0
    assert f"written to {cut}" in capsys.readouterr().out
    assert finished.stat().st_mtime_ns == made, "a finished arm ran again"
    assert figures(cut) == figures(whole)
    for file in (whole / "metrics").iterdir():
        assert (cut / "metrics" / file.name).read_text() == file.read_text(), file
    assert not checkpoints.exists()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--steps", "14"], ["another setting: steps=12 there and 14 here"]),
        (
            ["--width", "8", "--grids", "int4"],
            ["grids=('fp8_e4m3',) there", "width=32"],
        ),
        (["--out", "elsewhere"], ["--out elsewhere beside --resume"]),
    ],
)
def test_options_that_contradict_the_run(tmp_path, capsys, args, parts):
    from wlab.recipes import Run, eco

    with Run("eco", eco.QUICK, tmp_path):
        pass
    assert cli.main(["run", "eco", "--resume", str(tmp_path), *args]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    for part in parts:
        assert part in line


def test_folders_without_such_a_run(tmp_path, capsys):
    assert cli.main(["run", "eco", "--resume", str(tmp_path / "no")]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    short = ["--time", "1", "--seeds", "1", "--rates", "0.1", "--no-progress"]
    run = ["run", "eco-quadratic", *short, "--out", str(tmp_path)]
    assert cli.main(run) == 0
    first = json.loads((tmp_path / "report.json").read_text())["arms"]
    capsys.readouterr()
    assert cli.main(["run", "eco", "--resume", str(tmp_path)]) == 2
    assert "holds a run of eco-quadratic, not of eco" in capsys.readouterr().err
    # A recipe that keeps no steps says so and reports the same.
    assert cli.main(["run", "eco-quadratic", "--resume", str(tmp_path)]) == 0
    assert "eco-quadratic is short" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["arms"] == first and report["config"]["time"] == 1
