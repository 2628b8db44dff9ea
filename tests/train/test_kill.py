# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is killed, at any moment and again and again, ends with the same bits."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

# Packed weights under ECO with stochastic rounding, momenta, batches with a position,
# evaluations and records: all that a run carries. It sleeps a little at each record
# when it is to be killed, so that it is not over too soon.
SCRIPT = """
import json, pathlib, sys, time
import jax, numpy as np
import wlab
from wlab import data, quant, train

out, pause = pathlib.Path(sys.argv[1]), float(sys.argv[2])
tokens = np.random.default_rng(0).integers(0, 256, 5000)

def begin():
    draw = jax.nn.initializers.normal(0.1)
    shapes = {"in": (256, 32), "mid": (32, 32), "out": (32, 256)}
    params = {k: draw(jax.random.key(i), v) for i, (k, v) in enumerate(shapes.items())}
    return train.init_state(quant.quantize_tree(params, grid="fp8_e4m3"), tx)

apply = lambda p, x: jax.nn.tanh(p["in"][x] @ p["mid"]) @ p["out"]
loss = lambda p, x: train.next_token_loss(apply(p, x[:, :-1]), x)
tx = wlab.optim.eco(1e-2, grid="fp8_e4m3", rounding="stochastic")
state = jax.jit(begin)()
batches = data.windows(tokens, batch=2, length=8, seed=0)
evaluate = train.make_evaluate(loss, data.valid_windows(tokens, batch=2, length=8,
                                                        limit=2))
folder, every = out / "checkpoints", 1 if pause else 39
with train.Checkpoints(folder, keep=2, every=every) as checkpoints:
    state, history = train.resume(checkpoints, state, batches)
    train.rewind_metrics(out / "metrics.jsonl", int(state.step))
    with train.MetricsWriter(out / "metrics.jsonl", append=True) as writer:
        state, history = train.fit(
            train.make_train_step(loss, tx), state, batches, steps=40, every=3,
            evaluate=evaluate, evaluate_every=10, metrics=writer,
            checkpoints=checkpoints, history=history,
            progress=lambda step, record: time.sleep(pause),
        )
is_key = lambda x: jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
state = [
    np.asarray(jax.random.key_data(x) if is_key(x) else x).tobytes().hex()
    for x in jax.tree.leaves(state)
]
history = {k: [str(v.dtype), v.tobytes().hex()] for k, v in history.items()}
(out / "end.json").write_text(json.dumps([state, history]))
"""
STEPS = 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Compiled once for all processes."""
    return tmp_path_factory.mktemp("cache")


def start(folder: pathlib.Path, cache: pathlib.Path, pause: float) -> subprocess.Popen:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-c", SCRIPT, str(folder), str(pause)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def latest(folder: pathlib.Path) -> int:
    """The latest checkpoint, as a bystander sees it."""
    names = [p.name for p in (folder / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def end(child: subprocess.Popen) -> str:
    error = child.communicate(timeout=120)[1]
    assert child.returncode == 0, error
    return error


def test_killed_and_resumed_until_it_is_done(tmp_path, cache):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end(start(whole, cache, pause=0))
    chance = random.Random(0)
    leftovers, lives = 0, []
    # Most kills fall into a save; at least one must.
    while len(lives) < 2 or (not leftovers and len(lives) < 8):
        before = latest(killed)
        child = start(killed, cache, pause=0.1)
        while latest(killed) == before:
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.3))
        assert child.poll() is None, "it ended before it was killed"
        child.send_signal(signal.SIGKILL)
        child.communicate()
        leftovers += len(list((killed / "checkpoints").glob("*.orbax-checkpoint-tmp")))
        lives.append(latest(killed))
    assert leftovers, "no kill fell into a save"
    assert lives == sorted(set(lives)) and lives[-1] < STEPS
    assert "damaged" not in end(start(killed, cache, pause=0.01))
    got, want = (json.loads((f / "end.json").read_text()) for f in (killed, whole))
    assert len(got[0]) > 10 and len(got[1]) == 5
    assert got == want
    records = [(f / "metrics.jsonl").read_text() for f in (killed, whole)]
    assert records[0] == records[1]
    # Nothing of the killed saves is left, and no more is kept than was asked for.
    names = sorted(p.name for p in (killed / "checkpoints").iterdir())
    assert names == [str(STEPS - 1), str(STEPS)]


def test_asked_to_stop_it_saves_first(tmp_path, cache):
    child = start(tmp_path, cache, pause=0.1)
    while latest(tmp_path) < 3:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    error = child.communicate(timeout=60)[1]
    assert "saving after this step" in error
    assert "KeyboardInterrupt: stopped after step" in error
    stopped = int(error.split("stopped after step ")[1].split()[0])
    assert latest(tmp_path) == stopped
    assert f"{tmp_path / 'checkpoints'} holds step {stopped}" in error


def test_a_second_signal_stops_at_once(tmp_path, cache):
    # The record of step 3 takes a minute, so that the first signal alone would wait.
    child = start(tmp_path, cache, pause=60)
    while latest(tmp_path) < 2:
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.01)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    began = time.monotonic()
    child.communicate(timeout=10)
    assert time.monotonic() - began < 5
    assert child.returncode == -signal.SIGINT
