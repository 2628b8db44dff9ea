# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What is saved comes back to the bit and of its type, or a sentence says why not."""

import errno
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab import quant
from wlab.core import LowRank
from wlab.train import Checkpoints, init_state, make_train_step


def everything():
    """A tree with leaves and nodes of all kinds."""
    codes = jnp.arange(16).astype(jnp.uint4).reshape(4, 4)
    return {
        "bits": [codes, jnp.arange(5).astype(jnp.int2), codes.astype(jnp.int4)],
        "floats": (
            jnp.asarray([0.5, 6, -3, 0], jnp.float4_e2m1fn),
            jnp.asarray([448, 2**-9], jnp.float8_e4m3fn),
            jnp.asarray([1.5, jnp.inf], jnp.bfloat16),
        ),
        "key": jax.random.key(7),
        "keys": jax.random.split(jax.random.key(7, impl="rbg"), (2, 3)),
        "weight": LowRank(jnp.ones((3, 2)), jnp.ones((3, 1)), jnp.ones((2, 1))),
        "adam": optax.adam(1e-3).init({"w": jnp.ones(3)}),
        "masked": optax.masked(optax.sgd(0.1, 0.9), {"a": True, "b": False}).init(
            {"a": jnp.ones(2), "b": jnp.ones(2)}
        ),
        "nothing": None,
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "scalar": jnp.asarray(3, jnp.int32),
    }


def plain(tree):
    """The same tree with keys as numbers, for comparison."""
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)


@pytest.mark.parametrize("abstract", [True, False])
def test_round_trip_of_every_type(tmp_path, abstract):
    tree = everything()
    template = jax.eval_shape(everything) if abstract else everything()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, tree, {"note": "first", "data": {"next_index": 3}})
    with Checkpoints(tmp_path) as checkpoints:
        step, got, meta = checkpoints.restore(template)
    assert step == 5 and meta == {"note": "first", "data": {"next_index": 3}}
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
    chex.assert_trees_all_equal(plain(got), plain(tree))
    np.testing.assert_array_equal(
        jax.random.normal(got["key"]), jax.random.normal(tree["key"])
    )


def test_a_state_may_be_written_over_while_it_is_saved(tmp_path):
    grow = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = grow(jnp.zeros((500, 500)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        for _ in range(20):
            x = grow(x)
        _, got, _ = checkpoints.restore({"x": x})
    assert (got["x"] == 1).all() and (x == 21).all()


def test_training_goes_on_as_if_never_stopped(tmp_path):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    step = jax.jit(make_train_step(lambda p, x: jnp.mean((x @ p["w"]) ** 2), tx))
    batches = jax.random.normal(jax.random.key(1), (6, 4, 5))

    def init():
        return init_state({"w": jnp.ones((5, 3))}, tx)

    state = init()
    for x in batches:
        state, metrics = step(state, x)
    half = init()
    for x in batches[:3]:
        half, _ = step(half, x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, half)
        number, half, _ = checkpoints.restore(jax.eval_shape(init))
    assert type(half.opt_state) is type(state.opt_state)
    for x in batches[number:]:
        half, last = step(half, x)
    chex.assert_trees_all_equal((half, last), (state, metrics))


def test_restored_arrays_lie_where_the_template_says(tmp_path, mesh):
    sharding = jax.NamedSharding(mesh, jax.P("data", "model"))
    x = jax.device_put(jnp.arange(64, dtype=jnp.uint4).reshape(8, 8), sharding)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        template = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)}
        _, sharded, _ = checkpoints.restore(template)
        template = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}
        _, single, _ = checkpoints.restore(template)
    assert sharded["x"].sharding == sharding
    assert len(single["x"].devices()) == 1
    for got in (sharded, single):
        np.testing.assert_array_equal(got["x"], x)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_run_moves_to_another_mesh_and_back_to_one_device(tmp_path, kind):
    """Packed weights and the state of ECO, saved on (4, 2), restored elsewhere."""
    tx = wlab.optim.eco(1e-2, grid="int4", rounding="stochastic")
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2

    def begin():
        w = jax.random.normal(jax.random.key(0), (16, 32))
        return init_state(quant.quantize_tree({"w": w}, grid="int4"), tx)

    def placed(mesh):
        """The type of the state with every matrix divided both ways."""

        def spec(x):
            return (
                jax.P("data", "model") if x.ndim == 2 and min(x.shape) > 8 else jax.P()
            )

        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec(x))
            ),
            jax.eval_shape(begin),
        )

    meshes = [
        jax.make_mesh(shape, ("data", "model"), axis_types=kinds)
        for shape in ((4, 2), (2, 4))
    ]
    want = begin()
    types = placed(meshes[0])
    state = jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), want, types)
    divided = [x for x in jax.tree.leaves(state) if not x.is_fully_replicated]
    assert {str(x.dtype) for x in divided} == {"uint4", "float32"}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for template in (placed(meshes[1]), types, jax.eval_shape(begin)):
            _, got, _ = checkpoints.restore(template)
            assert jax.tree.structure(got) == jax.tree.structure(want)
            chex.assert_trees_all_equal(plain(got), plain(want))
            for x, form in zip(
                jax.tree.leaves(got), jax.tree.leaves(template), strict=True
            ):
                assert x.dtype == form.dtype
                assert form.sharding in (None, x.sharding)


def test_a_template_of_types_needs_the_mesh(tmp_path):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.device_put(jnp.arange(8.0), sharding)
    template = jax.eval_shape(lambda x: {"x": x}, x)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": x})
        with pytest.raises(ValueError, match=r"restore it within jax\.set_mesh"):
            checkpoints.restore(template)
        with jax.set_mesh(mesh):
            _, got, _ = checkpoints.restore(template)
    assert got["x"].sharding == sharding
    np.testing.assert_array_equal(got["x"], x)


def test_only_the_latest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2, every=5) as checkpoints:
        assert checkpoints.latest_step() is None
        assert [s for s in range(1, 16) if checkpoints.due(s)] == [5, 10, 15]
        for step in (5, 10, 15):
            checkpoints.save(step, {"x": jnp.asarray(float(step))})
        assert checkpoints.latest_step() == 15
        template = {"x": jnp.zeros(())}
        assert checkpoints.restore(template)[1]["x"] == 15
        assert checkpoints.restore(template, step=10)[1]["x"] == 10
        with pytest.raises(
            FileNotFoundError, match=r"no checkpoint of step 5; .*10, 15"
        ):
            checkpoints.restore(template, step=5)


def test_a_directory_without_a_checkpoint(tmp_path):
    with (
        Checkpoints(tmp_path / "new") as checkpoints,
        pytest.raises(FileNotFoundError, match="new holds no checkpoint"),
    ):
        checkpoints.restore({"x": jnp.zeros(2)})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            {"a": {"x": jnp.zeros((2, 4))}},
            "a/x is float32[2, 3] there and float32[2, 4]",
        ),
        (
            {"a": {"x": jnp.zeros((2, 3), jnp.bfloat16)}},
            "a/x is float32[2, 3] there and bfloat16[2, 3] in the template",
        ),
        ({"a": {}}, "a/x is float32[2, 3] there and absent in the template"),
        (
            {"a": {"x": jnp.zeros((2, 3)), "y": jax.random.key(0)}},
            "a/y is absent there and key<fry>[] in the template",
        ),
    ],
)
def test_a_template_that_differs(tmp_path, template, message):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": {"x": jnp.zeros((2, 3))}})
        with pytest.raises(ValueError, match=re.escape(message)):
            checkpoints.restore(template)


def test_many_differences_make_one_short_error(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {f"x{i}": jnp.zeros(2) for i in range(9)})
        with pytest.raises(ValueError, match=r"and 6 more\. Build the template"):
            checkpoints.restore({f"x{i}": jnp.zeros(3) for i in range(9)})


def test_a_step_is_saved_once(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)})
        with pytest.raises(ValueError, match="already holds step 1: restore from it"):
            checkpoints.save(1, {"x": jnp.zeros(2)})


def test_a_relative_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("runs/one") as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
    assert os.path.isdir(tmp_path / "runs" / "one" / "1")


@pytest.mark.parametrize("bad", [{"keep": 0}, {"every": 0}, {"keep_every": 0}])
def test_numbers_are_checked(tmp_path, bad):
    with pytest.raises(ValueError, match="must be positive"):
        Checkpoints(tmp_path, **bad)


def test_some_are_kept_for_ever(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=20) as checkpoints:
        for step in range(5, 55, 5):
            checkpoints.save(step, {"x": jnp.zeros(2)})
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [20, 40, 45, 50]


def test_what_killed_saves_left_is_removed_by_who_saves(tmp_path):
    for step in (2, 3):
        left = tmp_path / f"{step}.orbax-checkpoint-tmp" / "leaves.orbax-checkpoint-tmp"
        left.mkdir(parents=True)
    # A bystander who reads must not spoil the save of a run.
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
    assert left.exists()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"x": jnp.ones(2)})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore({"x": jnp.zeros(2)})[1]["x"].tolist() == [1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["3"]


# What is damaged, or not ours.

BIG = {"x": np.arange(3000.0, dtype=np.float32), "y": np.float32(2)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("two")
    with Checkpoints(folder) as checkpoints:
        for step in (2, 4):
            state = jax.tree.map(lambda x, step=step: jnp.asarray(x) + step, BIG)
            checkpoints.save(step, state, {"at": step})
    return folder


def arrays_file(step: pathlib.Path) -> pathlib.Path:
    """The file that holds the numbers."""
    return max((step / "leaves").rglob("d/*"), key=lambda p: p.stat().st_size)


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "array cut in half": lambda step: halve(arrays_file(step)),
    "array emptied": lambda step: arrays_file(step).write_bytes(b""),
    "array deleted": lambda step: arrays_file(step).unlink(),
    "index deleted": lambda step: (step / "leaves" / "manifest.ocdbt").unlink(),
    "leaves deleted": lambda step: shutil.rmtree(step / "leaves"),
    "types cut in half": lambda step: halve(step / "types" / "metadata"),
    "meta emptied": lambda step: (step / "meta" / "metadata").write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_told_and_the_one_before_offered(tmp_path, two, damage):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    DAMAGES[damage](tmp_path / "4")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"checkpoint 4 in .* is damaged") as error:
            checkpoints.restore(BIG)
        assert "The one of step 2 is whole" in str(error.value)
        assert "restore(template, step=2)" in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        step, got, _ = checkpoints.restore(BIG, step=2)
        assert step == 2 and got["y"] == 4
        # A run that goes on says so, and can save the step again.
        with pytest.warns(RuntimeWarning, match="4 .*damaged.* going on from step 2"):
            step, got, meta = checkpoints.recover(BIG)
        assert (step, meta) == (2, {"at": 2})
        np.testing.assert_array_equal(got["x"], BIG["x"] + 2)
        checkpoints.save(4, got)
    assert {p.name for p in tmp_path.iterdir()} == {"2", "4", "damaged-4"}


def test_none_is_whole(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    for step in ("2", "4"):
        halve(arrays_file(tmp_path / step))
    with Checkpoints(tmp_path) as checkpoints:
        for read in (checkpoints.restore, checkpoints.recover):
            with pytest.raises(ValueError, match=r"4 in .*No earlier one is whole"):
                read(BIG)
    assert (tmp_path / "4").exists()


def test_a_template_that_differs_is_no_damage(tmp_path, two):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"checkpoint 4 .*does not fit"):
            checkpoints.recover({"x": jnp.zeros(3)})
        assert checkpoints.latest_step() == 4


def test_a_folder_of_another_program(tmp_path):
    (tmp_path / "7" / "default").mkdir(parents=True)
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="7 is no checkpoint of wlab: it holds def"),
    ):
        checkpoints.recover(BIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99, "wlab": "9.9"}, "format 99, of wlab 9.9, .*later one"),
        ({"format": 0, "wlab": "0.0.1"}, "format 0, of wlab 0.0.1, .*start anew"),
        ({"format": None, "wlab": None}, "format 0, of an early wlab, .*start anew"),
    ],
)
def test_another_format(tmp_path, two, change, message):
    shutil.copytree(two, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "4" / "types" / "metadata"
    table = json.loads(path.read_text())
    assert (table["format"], table["wlab"]) == (1, wlab.__version__)
    assert table["jax"] == jax.__version__
    table = {k: v for k, v in (table | change).items() if v is not None}
    path.write_text(json.dumps(table))
    with Checkpoints(tmp_path) as checkpoints:
        for read in (checkpoints.restore, checkpoints.recover):
            with pytest.raises(ValueError, match=message):
                read(BIG)


# A disk that fails.


@pytest.mark.parametrize("where", ["save", "wait_until_finished"])
def test_a_full_disk_does_not_end_the_run(tmp_path, monkeypatch, where):
    full = OSError(errno.ENOSPC, "No space left on device")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)})
        checkpoints.wait()

        real = checkpoints._manager.wait_until_finished

        def fail(*args, **kwargs):
            monkeypatch.undo()  # there is room again
            real()
            raise full

        if where == "save":
            monkeypatch.setattr(checkpoints._manager, where, fail)
            with pytest.warns(RuntimeWarning, match="No space left") as told:
                checkpoints.save(2, {"x": jnp.ones(2)})
        else:
            checkpoints.save(2, {"x": jnp.ones(2)})
            monkeypatch.setattr(checkpoints._manager, where, fail)
            with pytest.warns(RuntimeWarning, match="No space left") as told:
                checkpoints.wait()
        (one,) = told
        assert "the checkpoint of step 2" in str(one.message)
        assert str(tmp_path) in str(one.message)
        checkpoints.save(3, {"x": jnp.ones(2)})
    assert (tmp_path / "3").exists()


def test_writes_that_fail_in_the_background(tmp_path):
    """A limit on the size of files: the writes of a real save fail."""
    code = """
import resource, signal, sys
import jax
from wlab.train import Checkpoints
x = {"x": jax.random.normal(jax.random.key(0), (400, 400))}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in 1, 2, 3, 4, 5:
        limit = 100_000 if step in (3, 4) else resource.RLIM_INFINITY
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        checkpoints.save(step, x)
    checkpoints.wait()
    assert checkpoints.latest_step() == 5
    checkpoints.restore(x, step=2)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for step in (3, 4):
        line = f"checkpoint of step {step} could not be written to {tmp_path}: File too"
        assert line in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "5"]


def test_meta_that_json_does_not_know(tmp_path):
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(TypeError, match="not JSON serializable"),
    ):
        checkpoints.save(1, {"x": jnp.ones(2)}, {"a": object()})
