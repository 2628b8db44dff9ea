# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipe of policies, and the peer beside it where it is installed."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import optax
import pytest

from wlab.recipes import Report, _search, es_rl


def test_quick_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(es_rl, "has_evosax", lambda: False)
    report = es_rl.run(es_rl.QUICK, out=tmp_path, progress=False)
    assert [arm.name for arm in report.arms] == ["EGGROLL rank 4", "dense ES"]
    assert [f.statement.split(":")[0] for f in report.findings] == ["CartPole"] * 2
    assert report.findings[1].holds, report.findings
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_bad_settings_are_told():
    bad = dataclasses.replace(es_rl.QUICK, generations=7)
    with pytest.raises(ValueError, match="multiple of points=3"):
        es_rl.run(bad, progress=False)


def test_the_peer_searches_the_same_way():
    pytest.importorskip("evosax", reason="the extra rl is not installed")
    params = {"w": jnp.zeros(3)}
    found = _search.search(
        _search.Search(_search.EVOSAX, 0, 0.1, optax.adam(0.1), 16),
        params,
        lambda tree, _: -jnp.square(tree["w"] - 1).sum(),
        lambda tree: -jnp.square(tree["w"] - 1).sum(),
        generations=20,
        points=2,
        seed=0,
    )
    assert found["curve"][0] == -3 and found["curve"][-1] > -0.5
    assert jax.device_count() >= 1
