# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The CLASSP recipe shows its effect already at the quick setting."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.recipes import classp


def test_quick_run_shows_the_effect(tmp_path: pathlib.Path):
    report = classp.run(classp.QUICK, out=tmp_path, progress=False)
    more, keeps, over_ewc, memory, gate = report.findings
    # Whether EWC, a strong baseline, averages less is for the full sweep to say.
    assert "EWC" in over_ewc.statement
    assert more.holds and keeps.holds and memory.holds and gate.holds, report.findings
    sizes = {arm.name: arm.mean("bytes") for arm in report.arms}
    assert sizes["SGD"] < 0.01
    assert sizes["CLASSP"] == pytest.approx(4, abs=0.01)
    assert sizes["EWC"] == pytest.approx(8, abs=0.01)
    # All arms learn the first task alike.
    first = {a.name: np.add(a.figures["first"], a.figures["lost"]) for a in report.arms}
    for values in first.values():
        np.testing.assert_allclose(values, first["SGD"], atol=0.01)
        assert (values > 0.9).all()
    assert (tmp_path / "report.png").exists()


def test_fisher_of_the_baseline():
    """The closed form is the mean over examples of squared gradients."""
    params = classp._init(classp.QUICK, jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (6, 64))
    key = jax.random.key(2)
    labels = jax.random.categorical(key, classp._logits(params, x))
    grads = jax.jit(jax.vmap(jax.grad(classp._loss), (None, 0, 0)))(
        params, x[:, None], labels[:, None]
    )
    got = jax.jit(classp._fisher)(params, x, key)
    for a, g in zip(jax.tree.leaves(got), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, jnp.mean(g**2, 0), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": 1}, "tasks=1 must be two or more"),
        ({"rates": ()}, "rates="),
        ({"strengths": (1.0, -1.0)}, "strengths=.* must be positive numbers"),
        ({"batch": 0}, "batch=0 must be positive"),
        ({"batch": 2000}, "more than the 1500 images"),
    ],
)
def test_bad_settings_are_told(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        classp.run(dataclasses.replace(classp.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size():
    report = classp.run(classp.Config(), progress=False)
    # Not the last: over three tasks a well-tuned EWC is ahead.
    assert all(finding.holds for finding in report.findings[:5]), report.findings
