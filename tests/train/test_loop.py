# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The loop trains, stops, resumes and reports, and never waits for the device."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab import data
from wlab.models.decoder import Decoder, tiny
from wlab.train import (
    Checkpoints,
    MetricsWriter,
    bits,
    fit,
    init_state,
    make_evaluate,
    make_train_step,
    next_token_loss,
    read_metrics,
)

TX = optax.adam(0.1)
TARGET = jnp.arange(3.0)


def loss_fn(params, batch):
    return jnp.mean((params["w"] - TARGET - batch) ** 2)


def start(w=0.0):
    return init_state({"w": jnp.full(3, w)}, TX)


def noise(seed=0):
    """Batches without end whose position can be saved."""
    draws = np.random.default_rng(seed).normal(size=4000).round(1) * 0.1
    return data.windows((draws * 1000).astype(int), batch=1, length=2, seed=seed)


def scaled(params, batch):
    return loss_fn(params, batch[0].astype(jnp.float32) / 1000)


STEP = make_train_step(scaled, TX)


def test_the_tiny_decoder_learns_pydoc():
    corpus = data.text("pydoc")
    model = Decoder(
        tiny(width=32, depth=2, heads=2, kv_heads=1, head_dim=16, hidden=64)
    )

    def language_loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return next_token_loss(logits, tokens)

    batches = data.windows(corpus.train, batch=8, length=32, seed=0)
    held_out = data.valid_windows(corpus.valid, batch=8, length=32, limit=4)
    params = model.init(jax.random.key(0), held_out[0, :, :-1])["params"]
    evaluate = make_evaluate(language_loss, held_out)
    before = evaluate(params)["loss"]
    tx = optax.adamw(3e-3)
    state, history = fit(
        make_train_step(language_loss, tx),
        init_state(params, tx),
        batches,
        steps=60,
        every=20,
        evaluate=evaluate,
    )
    assert bits(before) > 7
    assert history["valid_step"].tolist() == [60]
    assert bits(history["valid_loss"][0]) < 5
    assert history["loss"][-1] < history["loss"][0] < before
    np.testing.assert_allclose(
        evaluate(state.params)["loss"], history["valid_loss"][0], rtol=1e-6
    )


def test_equals_a_plain_loop():
    want = start()
    step = jax.jit(STEP)
    losses = []
    for batch in itertools.islice(noise(), 7):
        want, metrics = step(want, batch)
        losses.append(metrics["loss"])
    state, history = fit(STEP, start(), noise(), steps=7, every=3)
    chex.assert_trees_all_close(state, want, rtol=1e-6)
    assert state.step == 7
    assert history["step"].tolist() == [3, 6, 7]
    np.testing.assert_allclose(
        history["loss"], np.asarray(losses)[[2, 5, 6]], rtol=1e-6
    )
    assert set(history) == {"step", "loss", "grad_norm"}


def test_traces_once_and_uses_the_state_up():
    state = start()
    fit(chex.assert_max_traces(STEP, 1), state, noise(), steps=5)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


def test_batches_are_taken_ahead_of_the_metrics():
    """The record of one interval is read when the next has been sent off."""
    taken = []
    seen = []

    def counted():
        for i, batch in enumerate(noise()):
            taken.append(i + 1)
            yield batch

    def progress(step, metrics):
        seen.append((step, taken[-1]))

    fit(STEP, start(), counted(), steps=12, every=5, progress=progress)
    assert seen == [(5, 10), (10, 12), (12, 12)]


def test_evaluation_has_its_own_pace():
    def evaluate(params):
        return {"first": params["w"][0]}

    _, history = fit(
        STEP, start(), noise(), steps=5, every=2, evaluate=evaluate, evaluate_every=2
    )
    assert history["step"].tolist() == history["valid_step"].tolist() == [2, 4, 5]
    # Adam's first steps have the length of its learning rate.
    assert history["valid_first"].shape == (3,)
    _, history = fit(STEP, start(), noise(), steps=5, evaluate=evaluate)
    assert history["valid_step"].tolist() == [5]


def test_records_are_written(tmp_path):
    with MetricsWriter(tmp_path / "m.jsonl") as writer:
        _, history = fit(
            STEP,
            start(),
            noise(),
            steps=4,
            every=2,
            metrics=writer,
            evaluate=lambda params: {"w": params["w"]},
        )
    records = read_metrics(tmp_path / "m.jsonl")
    assert [set(r) for r in records] == [
        {"step", "loss", "grad_norm"},
        {"step", "loss", "grad_norm"},
        {"step", "valid_w"},
    ]
    np.testing.assert_allclose(
        [r["loss"] for r in records[:2]], history["loss"], rtol=1e-6
    )
    np.testing.assert_allclose(records[2]["valid_w"], history["valid_w"][0], rtol=1e-6)


def test_batches_that_end_too_soon(tmp_path):
    few = list(itertools.islice(noise(), 3))
    with (
        MetricsWriter(tmp_path / "m.jsonl") as writer,
        pytest.raises(ValueError, match="the batches ended before step 4 of 5"),
    ):
        fit(STEP, start(), few, steps=5, every=2, metrics=writer)
    # What was measured until then is not lost.
    assert [r["step"] for r in read_metrics(tmp_path / "m.jsonl")] == [2]
    state, _ = fit(STEP, start(), few, steps=3)
    assert state.step == 3


def test_no_batch_is_taken_in_vain():
    batches = noise()
    fit(STEP, start(), batches, steps=3)
    assert batches.get_state() == {"next_index": 3}


def test_a_restored_run_ends_as_if_never_stopped(tmp_path):
    want, history = fit(STEP, start(), noise(), steps=10, every=1)
    with Checkpoints(tmp_path, every=4) as checkpoints:
        fit(STEP, start(), noise(), steps=6, checkpoints=checkpoints)
        assert checkpoints.latest_step() == 6
        template = jax.eval_shape(start)
        for number in (4, 6):
            step, state, meta = checkpoints.restore(template, step=number)
            assert step == state.step == number
            batches = noise()
            batches.set_state(meta["data"])
            state, rest = fit(STEP, state, batches, steps=10, every=1)
            chex.assert_trees_all_equal(state, want)
            np.testing.assert_array_equal(rest["loss"], history["loss"][number:])


def test_a_finished_run_has_nothing_to_do():
    state, _ = fit(STEP, start(), noise(), steps=2)
    again, history = fit(STEP, state, [], steps=2)
    assert again.step == 2 and history == {}


def test_seeds_train_together():
    seeds = jax.vmap(lambda w: init_state({"w": jnp.full(3, w)}, TX))(jnp.arange(2.0))
    together = jax.vmap(STEP, in_axes=(0, None))
    state, history = fit(together, seeds, noise(), steps=4, every=2)
    assert history["loss"].shape == (2, 2)
    for i in range(2):
        single, alone = fit(STEP, start(float(i)), noise(), steps=4, every=2)
        mine = jax.tree.map(lambda x, i=i: x[i], state)
        chex.assert_trees_all_close(mine, single, rtol=1e-5)
        np.testing.assert_allclose(history["loss"][:, i], alone["loss"], rtol=1e-5)


def test_seeds_at_different_steps_are_refused():
    seeds = jax.vmap(lambda w: init_state({"w": jnp.full(3, w)}, TX))(jnp.arange(2.0))
    seeds = seeds._replace(step=jnp.asarray([3, 4]))
    with pytest.raises(ValueError, match=r"have done \[3, 4\] steps"):
        fit(STEP, seeds, noise(), steps=9)
