# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A run goes on with its state, its batches and its records as they were."""

import itertools
import signal
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab import data
from wlab.train import (
    Checkpoints,
    MetricsWriter,
    fit,
    init_state,
    make_train_step,
    read_metrics,
    resume,
    rewind_metrics,
)
from wlab.train._resume import packed, unpacked

TX = optax.adam(0.1)


def loss_fn(params, batch):
    error = (params["w"] - batch[0].astype(jnp.float32)) ** 2
    return error.mean(), {"narrow": error.max().astype(jnp.bfloat16)}


STEP = make_train_step(loss_fn, TX)


def start():
    return init_state({"w": jnp.zeros(3)}, TX)


def batches():
    return data.windows(np.arange(300) % 7, batch=1, length=2, seed=0)


def evaluate(params):
    return {"w": 2 * params["w"]}


def run(folder, steps, **options):
    """Trains with all that fit offers, from where the folder is."""
    with Checkpoints(folder / "steps", every=4) as checkpoints:
        source = batches()
        state, history = resume(checkpoints, start(), source)
        rewind_metrics(folder / "m.jsonl", int(state.step))
        with MetricsWriter(folder / "m.jsonl", append=True) as metrics:
            return fit(
                STEP,
                state,
                source,
                steps=steps,
                every=3,
                evaluate=evaluate,
                evaluate_every=5,
                metrics=metrics,
                checkpoints=checkpoints,
                history=history,
                **options,
            )


class Cut(Exception):
    """Ends a run like a power cut."""


def cut_after(step):
    def progress(now, record):
        if now >= step:
            raise Cut

    return progress


# Records are written one interval late: at 9 the checkpoint of 8 is there.
@pytest.mark.parametrize("end", [1, 6, 9, 12])
def test_history_and_records_are_those_of_one_run(tmp_path, end):
    want, history = run(tmp_path / "one", 13)
    with pytest.raises(Cut):
        run(tmp_path / "two", 13, progress=cut_after(end))
    got, again = run(tmp_path / "two", 13)
    chex.assert_trees_all_equal(got, want)
    assert again.keys() == history.keys()
    for name, column in history.items():
        assert again[name].dtype == column.dtype, name
        np.testing.assert_array_equal(again[name], column)
    assert history["step"].tolist() == [3, 6, 9, 12, 13]
    records = [(tmp_path / name / "m.jsonl").read_text() for name in ("one", "two")]
    assert records[0] == records[1]


def test_without_a_checkpoint_a_run_begins(tmp_path):
    state = start()
    with Checkpoints(tmp_path) as checkpoints:
        got, history = resume(checkpoints, state, batches())
    assert got is state and history == {}


def test_the_state_of_the_start_is_used_up(tmp_path):
    run(tmp_path, 4)
    state = start()
    with Checkpoints(tmp_path / "steps") as checkpoints:
        got, _ = resume(checkpoints, state, batches())
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    assert got.step == 4


def test_batches_of_another_kind(tmp_path):
    few = list(itertools.islice(batches(), 4))
    with Checkpoints(tmp_path) as checkpoints:
        fit(STEP, start(), few, steps=4, checkpoints=checkpoints)
        with pytest.raises(ValueError, match="does not say where its batches were"):
            resume(checkpoints, start(), batches())
        assert resume(checkpoints, start(), few)[0].step == 4


def test_histories_keep_every_bit():
    history = {
        "step": np.asarray([1, 2]),
        "loss": np.asarray([np.nan, -np.inf], np.float32),
        "seeds": np.random.default_rng(0).normal(size=(2, 3)),
        "narrow": np.asarray(jnp.asarray([1.5, 3], jnp.bfloat16)),
        "flag": np.asarray([True, False]),
    }
    got = unpacked(packed(history))
    assert got.keys() == history.keys()
    for name, column in history.items():
        assert got[name].dtype == column.dtype
        assert got[name].tobytes() == column.tobytes()
        assert got[name].shape == column.shape


def test_rewinding_cuts_what_comes_after(tmp_path):
    path = tmp_path / "m.jsonl"
    rewind_metrics(path, 5)
    assert not path.exists()
    with MetricsWriter(path) as writer:
        for step in (2, 4, 4, 6):
            writer.write(step, {"loss": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    rewind_metrics(path, 4)
    assert [r["step"] for r in read_metrics(path)] == [2, 4, 4]
    rewind_metrics(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(tmp_path, capsys, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def ask(step, record):
        if step == 6:
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt, match="stopped after step 8 of 13"):
        run(tmp_path, 13, progress=ask)
    assert "saving after this step" in capsys.readouterr().err
    with Checkpoints(tmp_path / "steps") as checkpoints:
        assert checkpoints.latest_step() == 8
    assert handlers == [
        signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)
    ]
    want, history = run(tmp_path / "one", 13)
    got, again = run(tmp_path, 13)
    chex.assert_trees_all_equal(got, want)
    np.testing.assert_array_equal(again["loss"], history["loss"])


def test_signals_are_left_alone_where_nothing_is_saved():
    def look(step, record):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    fit(STEP, start(), batches(), steps=2, every=1, progress=look)


def test_another_thread_hears_no_signals(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path, 2)))
    thread.start()
    thread.join()
    assert len(done) == 1


def test_only_the_first_process_reports(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    said = []
    with MetricsWriter(tmp_path / "m.jsonl") as metrics:
        _, history = fit(
            STEP,
            start(),
            batches(),
            steps=3,
            every=1,
            metrics=metrics,
            progress=lambda step, record: said.append(step),
        )
    assert history["step"].tolist() == [1, 2, 3]
    assert not said and (tmp_path / "m.jsonl").read_text() == ""
