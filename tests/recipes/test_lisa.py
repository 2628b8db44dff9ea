# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The LISA recipe: all arms learn, and the bytes are those of what they train."""

import dataclasses
import pathlib

import jax
import pytest

from wlab.recipes import lisa


def test_quick_run(tmp_path: pathlib.Path):
    config = lisa.QUICK
    report = lisa.run(config, out=tmp_path, progress=False)
    held = {finding.statement: finding.holds for finding in report.findings}
    assert len(held) == 7
    for statement in ("every arm learns", "LISA keep is better than ends only"):
        assert [h for s, h in held.items() if s.startswith(statement)] == [True]
    params = jax.eval_shape(lambda k: lisa._init(config, k), jax.random.key(0))
    inside = sum(x.size for x in jax.tree.leaves(params["layers"])) // config.depth
    ends = sum(x.size for x in jax.tree.leaves(params)) - config.depth * inside
    layers = {
        "full": config.depth,
        "LISA reset layers": config.active,
        "LISA reset all": config.active,
        "LISA keep": config.depth,
        "static layers": config.active,
        "ends only": 0,
    }
    for name, n in layers.items():
        want = 8 * (ends + n * inside) / 1e3
        assert report.arm(name).mean("state") == pytest.approx(want, abs=0.1)
        trained = config.active if name == "LISA keep" else n
        want = 4 * (ends + trained * inside) / 1e3
        assert report.arm(name).mean("grads") == pytest.approx(want)
    equal = report.arm("LISA reset layers").mean("state")
    assert 0.9 * equal < report.arm("LoRA, equal state").mean("state") <= equal
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"active": 5}, "cannot be trained"),
        ({"interval": 7}, "must be a multiple of interval=7"),
        ({"rates": ()}, "positive"),
    ],
)
def test_bad_settings_are_told(changes: dict, message: str):
    config = dataclasses.replace(lisa.QUICK, **changes)
    with pytest.raises(ValueError, match=message):
        lisa.run(config, progress=False)
