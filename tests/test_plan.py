# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of the plan of a run, on devices that are here."""

import functools
import json
import pathlib
import sys
from typing import Any

import pytest

from wlab import plan
from wlab.cli import main
from wlab.models.decoder import tiny


def _small(**overrides: Any) -> Any:
    sizes = {"width": 32, "depth": 2, "hidden": 64, "heads": 4, "head_dim": 16}
    return tiny(**sizes | overrides)


MESH = {"fsdp": 4, "tensor": 2}


@functools.cache
def planned(optimizer: str) -> plan.Plan:
    return plan.plan(_small(scan=True), optimizer, "cpu:8", length=16, mesh=MESH)


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", "eco-int4", "frugal", "lisa"],
)
def test_what_is_planned_is_what_a_device_holds(optimizer: str):
    found = planned(optimizer)
    assert found.measured_state == found.parameters + found.state
    assert found.temporaries is not None
    assert found.total >= found.measured_state + found.temporaries
    assert (found.batch, found.devices, found.mesh) == (4, 8, MESH)
    assert found.fits
    assert found.moved["all-gather"] > 0


def test_eco_holds_less_than_adamw():
    adamw, eco, int4 = map(planned, ("adamw", "eco", "eco-int4"))
    assert adamw.parameters > eco.parameters > int4.parameters
    assert adamw.gradients == eco.gradients == adamw.parameters


def test_a_search_tells_fitness_or_adds_gradients():
    told, added = (
        plan.plan(_small(depth=1), name, "cpu:8", length=16, population=32)
        for name in ("eggroll", "eggroll-sum")
    )
    assert told.batch == 32 and told.mesh == {"population": 8}
    assert told.parameters == told.gradients and told.state < 64
    # Four bytes for every member, and the metrics.
    assert 32 * 4 * 7 / 8 <= sum(told.moved.values()) < 400
    assert sum(added.moved.values()) > added.parameters
    with pytest.raises(ValueError, match="divides its axis 'population'"):
        plan.plan(_small(), "eggroll", "cpu:8", mesh={"fsdp": 8})
    with pytest.raises(ValueError, match="'adamw' is not: choose of"):
        plan.plan(_small(), "adamw", "cpu:8", population=32)


def test_experts_over_their_axis():
    mesh = {"expert": 4, "fsdp": 2}
    config = _small(experts=4)
    found = plan.plan(config, "adamw", "cpu:8", length=16, mesh=mesh)
    assert found.measured_state == found.parameters + found.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2c", "adamw", "cpu:8"), "2c"),
        (("tiny", "adamv", "cpu:8"), "no optimizer 'adamv': choose of"),
        (("tiny", "adamw", "v9:4x4"), "no topology 'v9:4x4': name a chip and a shape"),
        (("tiny", "adamw", "cpu:64"), "this process has 8 cpu devices"),
    ],
)
def test_unknown_names_are_errors(arguments: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        plan.plan(*arguments)


def test_what_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="batch=6 does not divide into the 8 parts"):
        plan.plan(_small(), "adamw", "cpu:8", batch=6)
    with pytest.raises(ValueError, match="data=3 is for 3 devices, and there are 8"):
        plan.plan(_small(), "adamw", "cpu:8", mesh={"data": 3})
    with pytest.raises(ValueError, match="the memory of cpu:8 is not known"):
        plan.largest_batch(_small(), "adamw", "cpu:8")


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'wlab\[plan\]'"):
        plan.plan(_small(), "adamw", "v5e:4x4")


def test_the_largest_batch_is_found_by_bisection(monkeypatch: pytest.MonkeyPatch):
    tried: list[int] = []
    known = plan.plan(_small(), "sgd", "cpu:8", length=16)

    def fake(*_: Any, batch: int, **__: Any) -> plan.Plan:
        tried.append(batch)
        return known._replace(batch=batch, memory=1, total=0 if batch <= 88 else 2)

    def devices(_: str) -> tuple[list[Any], str]:
        return known_devices, "v5e"

    known_devices = plan._devices("cpu:8")[0]
    monkeypatch.setattr(plan, "plan", fake)
    monkeypatch.setattr(plan, "_devices", devices)
    best = plan.largest_batch("tiny", "sgd", "v5e:2x4")
    assert best is not None and best.batch == 88
    assert tried == [8, 16, 32, 64, 128, 96, 80, 88]


def test_the_command(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "plan.json"
    code = main(
        "plan --model tiny --optimizer sgd --topology cpu:8 --seq 16 "
        f"--mesh data=2,fsdp=-1 --remat none --json {file}".split()
    )
    assert code == 0
    out = capsys.readouterr().out
    assert "| tiny | sgd | cpu:8 | 8 x 16 |" in out
    assert "mesh data=2, fsdp=4" in out
    (row,) = json.loads(file.read_text())["plans"]
    assert row["fits"] and row["mesh"] == {"data": 2, "fsdp": 4}
    (loaded,) = plan.load(file)
    assert loaded._asdict() | {"fits": True} == row
    file.write_text("[]")
    with pytest.raises(ValueError, match="holds no plans"):
        plan.load(file)


def test_a_pod_is_planned_by_its_own_compiler():
    """What the compiler counts as arguments is what the plan says is stored."""
    pytest.importorskip("libtpu", reason="the extra plan is not installed")
    found = plan.plan(_small(), "eco", "v5e:2x2", length=64)
    assert (found.devices, found.chips, found.mesh) == (4, 4, {"fsdp": 4})
    assert found.fits and found.memory == 16 * 2**30
    assert found.temporaries is not None
    assert found.total >= found.parameters + found.state + found.temporaries
    assert found.moved["all-gather"] > 0


@pytest.mark.parametrize(
    ("topology", "devices"),
    [("v4:2x2x1", 8), ("v5p:2x2x1", 4), ("v6e:2x2", 4), ("tpu7x:2x2x1", 8)],
)
def test_every_kind_of_chip(topology: str, devices: int):
    """Of v4 and tpu7x jax sees two devices a chip."""
    pytest.importorskip("libtpu", reason="the extra plan is not installed")
    found = plan.plan(_small(), "adamw", topology, length=16)
    assert (found.devices, found.chips) == (devices, 4)
    assert found.fits and found.temporaries is not None


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--mesh", "data:2"]) == 2
    assert "write it as data=2,fsdp=-1" in capsys.readouterr().err


def test_the_command_shows_a_size(capsys: pytest.CaptureFixture[str]):
    assert main(["show", "2b-moe"]) == 0
    out = capsys.readouterr().out
    assert "experts 32, per_token 4" in out
    assert "total     2,014" in out
    assert main(["show", "tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total"] == 1_016_960


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries "
            "(17.5G) exceeds available HBM (15.75G).",
            (None, 17.5 * 2**30),
        ),
        (
            "Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.",
            (20 * 2**30, None),
        ),
        ("Ran out of memory.", (None, None)),
    ],
)
def test_what_a_refusal_tells(text: str, needed: tuple[int | None, int | None]):
    assert plan._needed(text) == needed
