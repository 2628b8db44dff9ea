# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Bars are drawn on stderr for a terminal or on demand, and are quiet otherwise."""

import numpy as np

from wlab.train import Progress


def draw(capsys, **flags):
    with Progress(**flags) as progress:
        for name in ("adamw", "eco"):
            bar = progress.add(name, steps=40)
            bar(20, {"loss": np.asarray([1.0, 2.0])})
            bar(40, {"valid_loss": np.asarray(9.0)})
    return capsys.readouterr()


def test_quiet_without_a_terminal(capsys, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert draw(capsys) == ("", "")


def test_shown_on_demand(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    out, err = draw(capsys, show=True)
    assert out == ""
    for name in ("adamw", "eco"):
        (line,) = [line for line in err.splitlines() if line.startswith(name)]
        assert "40/40" in line and "loss 1.5000" in line and "steps/s" in line


def test_quiet_on_demand_even_for_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert draw(capsys, show=False) == ("", "")
    assert "adamw" in draw(capsys).err
