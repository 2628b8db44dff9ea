# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line: answers at once, runs recipes, errs in one line."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
import types
from typing import Literal

import pytest

import wlab
from wlab import cli, methods
from wlab.recipes import Arm, Metric, Report

TO_COME = next(method.slug for method in methods.METHODS if not method.ready)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a recipe that is only there for the tests."""

    steps: int = 100
    """Training steps of each arm."""
    grids: tuple[Literal["fp8_e4m3", "int8", "int4"], ...] = ("fp8_e4m3",)
    """Number grids."""
    rates: tuple[float, ...] = (0.1,)
    """Learning rates."""
    learning_rate: float = 1e-3
    """Peak learning rate."""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be positive, not {self.steps}")


class Recipe(types.ModuleType):
    """A recipe that remembers how it was run."""

    Config = Config
    QUICK = Config(steps=2)

    def __init__(self):
        super().__init__("fake", "What the recipe shows.")
        self.calls: list[tuple[Config, pathlib.Path, bool]] = []
        self.error: BaseException | None = None

    def run(self, config: Config, *, out: pathlib.Path, progress: bool) -> Report:
        self.calls.append((config, out, progress))
        if self.error is not None:
            raise self.error
        report = Report(
            recipe="fake",
            title="A title",
            claim="A claim.",
            config=dataclasses.asdict(config),
            seeds=(0,),
            metrics={"loss": Metric("loss")},
            arms=(Arm("one", {"loss": [1.5]}), Arm("two", {"loss": [2.5]})),
            started="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            versions={"jax": "0"},
            device={"platform": "cpu", "kind": "cpu", "count": 1, "cpus": 2},
        )
        report.save(out)
        return report


@pytest.fixture
def recipe(monkeypatch, tmp_path) -> Recipe:
    fake = Recipe()
    monkeypatch.setitem(methods.RECIPES, "fake", "tests_fake_recipe")
    monkeypatch.setitem(sys.modules, "tests_fake_recipe", fake)
    monkeypatch.chdir(tmp_path)
    return fake


def fails(capsys, *args: str) -> str:
    """Runs a command that must fail; returns the line that it prints."""
    assert cli.main(list(args)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("wlab: ")
    assert captured.err.count("\n") == 1 and captured.err.endswith("\n")
    return captured.err.removeprefix("wlab: ").rstrip()


def spawn(*args: str, **options) -> subprocess.CompletedProcess:
    """Runs the command line in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(wlab.__file__).parents[1])}
    command = [sys.executable, *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


# What there is.


def test_list_names_all_methods_and_what_is_there(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for method in methods.METHODS:
        assert method.summary in rows[method.slug]
        assert (" ready " in rows[method.slug]) == method.ready
        assert (" to come " in rows[method.slug]) != method.ready
    assert "45 of 45 methods" in out


def test_list_selects(capsys):
    assert cli.main(["list", "--family", "quant", "--json"]) == 0
    quant = json.loads(capsys.readouterr().out)
    assert {entry["family"] for entry in quant} == {"quant"}
    assert "awq" in {entry["slug"] for entry in quant}
    assert cli.main(["list", "--ready", "--json"]) == 0
    ready = json.loads(capsys.readouterr().out)
    expected = [method.slug for method in methods.METHODS if method.ready]
    assert [entry["slug"] for entry in ready] == expected


def test_show_tells_what_the_table_holds(capsys):
    assert cli.main(["show", "eco"]) == 0
    out = capsys.readouterr().out
    for part in (
        "ECO: Quantized Training without Full-Precision Master Weights",
        "ICML 2026",
        "https://arxiv.org/abs/2601.22101",
        "transform",
        "wlab.optim",
        "wlab run eco-quadratic",
        "9 bytes a parameter in FP8 with Adam",
    ):
        assert part in out


def test_show_takes_the_name_of_a_recipe(capsys):
    assert cli.main(["show", "eco-quadratic", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["slug"] == "eco"


def test_show_says_what_is_to_come(capsys):
    assert cli.main(["show", TO_COME]) == 0
    assert f"{TO_COME} (to come)" in capsys.readouterr().out


def test_help_and_version(capsys):
    assert cli.main([]) == 0
    bare = capsys.readouterr().out
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    assert all(name in bare for name in ("list", "show", "run"))
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"wlab {wlab.__version__}\n"


@pytest.mark.parametrize("args", [["--help"], ["list"], ["show", "eco"]])
def test_answers_at_once_without_jax(args):
    code = (
        "import sys; from wlab.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or (9 if {'jax', 'tyro', 'numpy'} & set(sys.modules) else 0))"
    )
    spawn("-c", code, *args)  # the first start may have to write bytecode
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = spawn("-c", code, *args)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 1.0


def test_runs_as_a_module():
    done = spawn("-m", "wlab", "list", "--ready")
    assert done.returncode == 0 and "eco" in done.stdout


# Running a recipe.


def test_run_prints_what_the_recipe_saves(recipe, capsys):
    assert cli.main(["run", "fake"]) == 0
    assert recipe.calls == [(Config(), pathlib.Path("runs/fake"), True)]
    out = capsys.readouterr().out
    assert "A claim." in out and "one" in out and "1.5 *" in out
    report = Report.from_json(pathlib.Path("runs/fake/report.json").read_text())
    assert report.config["steps"] == 100
    assert "written to runs/fake" in out


@pytest.mark.parametrize(
    ("args", "config"),
    [
        (["--steps", "7"], Config(steps=7)),
        (["--learning-rate", "1e-2"], Config(learning_rate=1e-2)),
        (["--learning_rate=1e-2"], Config(learning_rate=1e-2)),
        (["--grids", "fp8_e4m3,int4"], Config(grids=("fp8_e4m3", "int4"))),
        (["--grids=fp8_e4m3,int4"], Config(grids=("fp8_e4m3", "int4"))),
        (["--grids", "int8", "int4"], Config(grids=("int8", "int4"))),
        (["--grids", "int8,", "int4"], Config(grids=("int8", "int4"))),
        (["--rates", "-1,2e-1", "--steps", "3"], Config(rates=(-1.0, 0.2), steps=3)),
        (["--quick"], Config(steps=2)),
        (["--grids", "int4", "--quick"], Config(steps=2, grids=("int4",))),
        (["--quick", "--steps", "5"], Config(steps=5)),
    ],
)
def test_run_reads_the_dataclass(recipe, args, config):
    assert cli.main(["run", "fake", *args]) == 0
    assert recipe.calls[0][0] == config


def test_run_passes_folder_and_progress_on(recipe):
    assert cli.main(["run", "fake", "--no-progress", "--out", "deep/down"]) == 0
    assert recipe.calls == [(Config(), pathlib.Path("deep/down"), False)]


def test_run_help_lists_recipes_and_options(recipe, capsys):
    assert cli.main(["run", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in methods.RECIPES)
    assert cli.main(["run", "fake", "--help"]) == 0
    out = capsys.readouterr().out
    assert "What the recipe shows." in out
    for part in ("--steps INT", "Training steps", "--grids", "--out", "--quick"):
        assert part in out
    assert not recipe.calls and not pathlib.Path("runs").exists()


# What bad input gets.


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["lst"], ["'lst'", "did you mean list?"]),
        (["list", "--family", "qunt"], ["'qunt'", "quant", "optim"]),
        (["list", "--jsn"], ["--jsn", "did you mean --json?"]),
        (["show"], ["NAME"]),
        (["show", "frugl"], ["'frugl'", "did you mean frugal?"]),
        (["run"], ["wlab run NAME", "eco-quadratic"]),
        (["run", "--quick", "fake"], ["wlab run NAME", "fake"]),
        (["run", "fakee"], ["'fakee'", "did you mean fake?"]),
        (["run", "zzzzz"], ["'zzzzz'", "there are: ", "eco, eco-quadratic", ", fake"]),
        (["run", TO_COME], [f"{TO_COME} is to come", f"wlab show {TO_COME}"]),
        (["run", "fake", "--step", "3"], ["--step;", "did you mean --steps?"]),
        (["run", "fake", "--wings", "3"], ["no option --wings", "--help"]),
        (["run", "fake", "3"], ["no option 3", "--help"]),
        (["run", "fake", "--steps", "many"], ["--steps", "'many'"]),
        (["run", "fake", "--steps", "0"], ["steps must be positive, not 0"]),
        (["run", "fake", "--steps"], ["--steps", "Missing value"]),
        (["run", "fake", "--grids", "int8,int5"], ["'int5'", "'int4'"]),
        (["run", "fake", "--grids"], ["--grids needs a value"]),
        (["run", "fake", "--grids=,"], ["--grids needs a value"]),
    ],
)
def test_bad_input_is_told_in_one_line(recipe, capsys, args, parts):
    line = fails(capsys, *args)
    for part in parts:
        assert part in line
    assert not recipe.calls


def test_a_long_message_is_whole(recipe, capsys):
    value = "x" * 100 + " y" * 20
    line = fails(capsys, "run", "fake", "--steps", value)
    assert line == (
        "wlab run fake: Error parsing --steps: invalid literal for int() with base "
        f"10: '{value}' (--help lists the options)"
    )


def test_the_box_of_an_error_is_taken_off():
    drawn = "╭─ Bad ──╮\n│ It is  │\n│ bad.   │\n│ ────── │\n│ Advice │\n╰────────╯\n"
    ascii_drawn = " Bad\n ------\n  It is\n  bad.\n  ------\n  Advice\n"
    for box in (drawn, ascii_drawn):
        assert cli._unboxed(box) == "It is bad. (--help lists the options)"


def test_a_folder_that_cannot_be_written_is_told_before_the_run(recipe, capsys):
    pathlib.Path("file").write_text("")
    line = fails(capsys, "run", "fake", "--out", "file/runs")
    assert "cannot write to file/runs" in line and "--out" in line
    assert not recipe.calls


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (ValueError("steps must be\n  positive; give --steps 1"), ["be positive;"]),
        (FileNotFoundError(2, "No such file", "text.txt"), ["text.txt: No such file"]),
        (PermissionError(13, "Permission denied", "a"), ["a: Permission denied"]),
        (ModuleNotFoundError("no", name="gymnax.envs"), ["pip install gymnax"]),
    ],
)
def test_a_bad_setting_that_the_recipe_finds(recipe, capsys, error, parts):
    recipe.error = error
    line = fails(capsys, "run", "fake")
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a bug"),
        RuntimeError("a bug"),
        ModuleNotFoundError("a bug", name="wlab.recipes.lost"),
    ],
)
def test_a_bug_keeps_its_traceback(recipe, error):
    recipe.error = error
    with pytest.raises(type(error)):
        cli.main(["run", "fake"])


def test_debug_keeps_every_traceback(recipe):
    recipe.error = ValueError("bad")
    with pytest.raises(ValueError, match="bad"):
        cli.main(["run", "fake", "--debug"])
    with pytest.raises(cli.UsageError, match="frugl"):
        cli.main(["--debug", "show", "frugl"])


def test_stopping_is_one_line(recipe, capsys):
    recipe.error = KeyboardInterrupt()
    assert cli.main(["run", "fake"]) == 130
    assert capsys.readouterr().err.strip() == "wlab: stopped"


@pytest.mark.parametrize("command", ["list", "list --json", "show eco", "--help"])
def test_a_closed_pipe_is_quiet(command):
    # The reader has left before anything is written.
    code = (
        "import os, subprocess, sys; read, write = os.pipe(); os.close(read); "
        "done = subprocess.run([sys.executable, '-m', 'wlab', *sys.argv[1:]], "
        "stdout=write, stderr=subprocess.PIPE); "
        "sys.exit(done.stderr.decode() or done.returncode not in (0, 1))"
    )
    done = spawn("-c", code, *command.split())
    assert (done.returncode, done.stderr) == (0, "")
