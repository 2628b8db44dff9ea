# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The optimisers side by side: the quick run, and every arm's step in the abstract."""

import dataclasses
import pathlib

import jax
import pytest

from wlab import optim, quant, train
from wlab.models import layered
from wlab.models.decoder import Decoder
from wlab.recipes import Report, optimizers

SHAPE = optimizers._decoder(optimizers.QUICK)
ARMS = optimizers._arms(optimizers.QUICK, SHAPE)


def test_quick_run_writes_a_whole_report(tmp_path: pathlib.Path):
    config = dataclasses.replace(optimizers.QUICK, only=("frugal col", "lisa"))
    report = optimizers.run(config, out=tmp_path, progress=False)
    assert [arm.name for arm in report.arms] == ["FRUGAL columns", "LISA"]
    for arm in report.arms:
        assert all(2 < bits < 9 for bits in arm.figures["bits_per_byte"])
        assert 2 < arm.mean("state") < 7
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_takes_a_step(name: str):
    arm, model = ARMS[name], Decoder(SHAPE)
    tx = arm.make(optimizers._schedule(20, arm.rate))
    loss, active = model.apply, None
    if arm.layers:
        loss, active = layered(model, train.next_token_loss), optim.active_layers
    else:

        def loss(params, batch):
            logits = model.apply({"params": params}, batch[:, :-1])
            return train.next_token_loss(logits, batch)

    step = train.make_train_step(loss, tx, active=active)
    tokens = jax.ShapeDtypeStruct((2, 9), "int32")

    def start():
        params = model.init(jax.random.key(0), jax.numpy.zeros((2, 8), int))["params"]
        if arm.grid is not None:
            params = quant.quantize_tree(params, arm.grid)
        return train.init_state(params, tx)

    state = jax.eval_shape(start)
    after, _ = jax.eval_shape(step, state, tokens)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ("adamm",)}, "no arm is named 'adamm': there are SGD, AdamW"),
        ({"steps": 3}, "steps=3 must be at least 10"),
        ({"rates": ()}, "no rates given"),
        ({"seeds": 0}, "must be positive"),
    ],
)
def test_bad_settings_are_told_before_anything_runs(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        config = dataclasses.replace(optimizers.QUICK, **changes)
        optimizers.run(config, progress=False)


@pytest.mark.slow
def test_the_effects_at_full_size(tmp_path: pathlib.Path):
    report = optimizers.run(optimizers.Config(), out=tmp_path, progress=False)
    failed = {finding.statement for finding in report.findings if not finding.holds}
    # At equal tokens it pays for its cheaper steps.
    assert failed <= {"Drop-Muon: ends below AdamW"}, report.findings
