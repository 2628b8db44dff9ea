# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A run's folder: what is done is kept, what is not is done again."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wlab import data, train
from wlab.recipes import Run, _run


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of a recipe that is only there for the tests."""

    steps: int = 30
    rates: tuple[float, ...] = (0.1, float("inf"))


def work(run, name="arm 1", stop=None, calls=None):
    """Trains a little; `stop` ends it like a crash."""

    def make():
        if calls is not None:
            calls.append(name)

        def progress(step, record):
            if stop is not None and step >= stop:
                raise RuntimeError("crash")

        step = train.make_train_step(
            lambda w, x: ((w - x[0].astype(jnp.float32)) ** 2).mean(), optax.adam(0.1)
        )
        _, history = run.fit(
            name,
            step,
            train.init_state(jnp.zeros(3), optax.adam(0.1)),
            data.windows(np.arange(300) % 7, batch=1, length=2, seed=0),
            steps=30,
            every=1,
            progress=progress,
        )
        return {"loss": history["loss"], "odd": [np.nan, float("inf")]}

    return run.once(name, make)


def test_a_finished_run_leaves_results_and_no_checkpoints(tmp_path):
    with Run("demo", Config(), tmp_path) as run:
        result = work(run)
        assert json.loads((tmp_path / "config.json").read_text())["finished"] is False
    assert {p.name for p in tmp_path.iterdir()} == {"arms", "config.json", "metrics"}
    head = json.loads((tmp_path / "config.json").read_text())
    assert head["recipe"] == "demo" and head["finished"] is True
    assert head["config"]["steps"] == 30 and "jax" in head["versions"]
    assert len(train.read_metrics(tmp_path / "metrics" / "arm-1.jsonl")) == 30
    with Run("demo", Config(), None) as nowhere:
        np.testing.assert_equal(work(nowhere), result)


def test_what_is_finished_is_not_run_again_and_the_rest_goes_on(tmp_path):
    with Run("demo", Config(), None) as nowhere:
        want = work(nowhere)
    calls = []
    with pytest.raises(RuntimeError, match="crash"):  # noqa: SIM117
        with Run("demo", Config(), tmp_path) as run:
            first = work(run, "arm 1", calls=calls)
            started = run.watch.started
            work(run, "arm 2", stop=25, calls=calls)
    assert _run.stopped_run(tmp_path) == "demo"
    assert (tmp_path / "checkpoints" / "arm-2" / "20").exists()
    with Run("demo", Config(), tmp_path, resume=True) as run:
        assert run.watch.started == started
        again = work(run, "arm 1", calls=calls)
        second = work(run, "arm 2", calls=calls)
    assert calls == ["arm 1", "arm 2", "arm 2"]
    for got in (first, again, second):
        np.testing.assert_equal(got, want)
    records = [(tmp_path / "metrics" / f"arm-{i}.jsonl").read_text() for i in (1, 2)]
    assert records[0] == records[1]
    assert _run.stopped_run(tmp_path) is None


def test_time_before_counts(tmp_path):
    with Run("demo", Config(), tmp_path) as run:
        run.once("a", dict)
    path = tmp_path / "arms" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 500.0}))
    with Run("demo", Config(), tmp_path, resume=True) as run:
        assert 500 <= run.watch.seconds < 560


def test_a_stopped_run_is_not_written_over(tmp_path):
    with pytest.raises(RuntimeError), Run("demo", Config(), tmp_path) as run:
        run.once("a", dict)
        raise RuntimeError
    with pytest.raises(ValueError, match=r"did not end: go on with it .*--resume"):
        Run("demo", Config(), tmp_path)
    with Run("demo", Config(), tmp_path, resume=True):
        pass
    # One that has ended gives way to a new one.
    with Run("demo", Config(steps=4), tmp_path):
        assert not (tmp_path / "arms").exists()


def test_a_folder_of_somebody_else_is_not_touched(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"checkpoints and config\.json that no run"):
        Run("demo", Config(), tmp_path)
    assert (tmp_path / "checkpoints").exists()
    assert (tmp_path / "config.json").read_text() == "[]"


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (None, "holds no run to resume: it has no config.json"),
        ("{", "is not of a run of wlab"),
        ("{}", "is not of a run of wlab"),
        ('{"recipe": "demo", "format": 9}', "has format 9, and this wlab reads"),
        ('{"recipe": "eco", "format": 1}', "a run of eco, not of demo"),
    ],
)
def test_what_cannot_be_resumed(tmp_path, head, message):
    if head is not None:
        (tmp_path / "config.json").write_text(head)
    with pytest.raises(ValueError, match=message):
        Run("demo", Config(), tmp_path, resume=True)


def test_another_config_is_refused_by_its_fields(tmp_path):
    with Run("demo", Config(), tmp_path):
        pass
    with pytest.raises(ValueError, match=r"config: steps=30 there and 31 here$"):
        Run("demo", Config(steps=31), tmp_path, resume=True)
    with pytest.raises(ValueError, match="needs the folder of the run"):
        Run("demo", Config(), None, resume=True)


def test_other_versions_are_told(tmp_path):
    with pytest.raises(RuntimeError), Run("demo", Config(), tmp_path):
        raise RuntimeError
    path = tmp_path / "config.json"
    head = json.loads(path.read_text())
    head["versions"]["jax"] = "0.0.1"
    path.write_text(json.dumps(head))
    with pytest.warns(RuntimeWarning, match=r"other versions \(jax='0.0.1' there"):
        Run("demo", Config(), tmp_path, resume=True)


def test_the_config_comes_back(tmp_path):
    with Run("demo", Config(), tmp_path):
        pass
    assert _run.stored_config(tmp_path, "demo", Config) == Config()

    @dataclasses.dataclass(frozen=True)
    class Changed:
        steps: int = 30
        width: int = 4

    with pytest.raises(ValueError, match=r"has changed .* in rates, width: go on"):
        _run.stored_config(tmp_path, "demo", Changed)


def test_names_that_would_share_files(tmp_path):
    with Run("demo", Config(), tmp_path) as run:
        run.once("a b", dict)
        with pytest.raises(ValueError, match="'a/b' and 'a b' would share files"):
            run.once("a/b", dict)
