# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Evolution of integers: where noise begins, what moves, and no float anywhere."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab import es
from wlab.es import _integer
from wlab.models import egg

CONFIG = egg.Config(width=4, depth=2)
PARAMS = jax.jit(lambda key: egg.init(key, CONFIG))(jax.random.key(0))
N = 8


def make(limit: int = 0, **options: Any) -> tuple[Any, Any]:
    search = es.integer_eggroll([limit], **({"table_size": 1 << 12} | options))
    return search, jax.jit(search.init)(jax.random.key(1), PARAMS)


def step(search: Any) -> Any:
    """A whole training step: members run, their scores, the update."""

    def run(params: Any, state: Any, tokens: Any, memory: Any) -> Any:
        def score(member: Any, tokens: Any, memory: Any) -> Any:
            tree = search.perturb(state, params, member)
            logits, memory = egg.apply(tree, tokens[:-1], memory)
            return egg.log_likelihood(logits, tokens[1:]).sum(), memory

        scores, memory = jax.vmap(score)(jnp.arange(N), tokens, memory)
        updates, state = search.update(state, params, scores)
        return optax.apply_updates(params, updates), state, memory

    return run


TOKENS = np.random.default_rng(2).integers(0, 256, (N, 5), np.int32)
MEMORY = np.zeros((N, 2, 4), np.int8)


@pytest.mark.parametrize("clt", [True, False])
def test_no_float_in_a_training_step(clt: bool):
    search, state = make(16, use_clt=clt)
    text = str(jax.make_jaxpr(step(search))(PARAMS, state, TOKENS, MEMORY))
    for kind in ("f16", "f32", "f64"):
        assert f"{kind}[" not in text
    new, after, memory = jax.jit(step(search))(PARAMS, state, TOKENS, MEMORY)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, PARAMS)
    assert memory.dtype == jnp.int8 and int(after.epoch) == 1
    moved = jax.tree.map(lambda a, b: np.abs(np.int32(a) - np.int32(b)), new, PARAMS)
    assert {int(x.max()) for x in jax.tree.leaves(moved)} <= {0, 1}
    assert sum(int(x.sum()) for x in jax.tree.leaves(moved)) > 0


def test_pairs_share_noise_with_opposite_signs():
    search, state = make()
    perturb = jax.jit(search.perturb)
    plus, minus, other = (perturb(state, PARAMS, np.int32(i)) for i in (4, 5, 6))
    np.testing.assert_array_equal(plus["emb"].a, -minus["emb"].a)
    np.testing.assert_array_equal(plus["emb"].b, minus["emb"].b)
    assert np.any(plus["emb"].b != other["emb"].b)
    assert np.any(plus["blocks"]["att"]["Wf"].a[0] != plus["blocks"]["att"]["Wf"].a[1])


def test_the_size_and_the_sign_of_noise():
    search, state = make(sigma_shift=2)
    tree, noise = jax.device_get(
        jax.jit(lambda s: (search.perturb(s, PARAMS, 5), search.draw(s, PARAMS, 5)))(
            state
        )
    )
    assert tree["emb"].shift == 6
    # Of an odd member the noise is negative before it is shifted.
    want = np.clip(16 + (-noise["ln_out/scale"] >> 6), -127, 127)
    np.testing.assert_array_equal(tree["ln_out"]["scale"], want)


def test_noise_that_would_pass_the_end_is_the_last_of_the_table():
    params = {"w": jnp.zeros((3, 2), jnp.int8)}
    search = es.integer_eggroll([0], table_size=8)
    state = search.init(0, params)._replace(table=jnp.arange(8, dtype=jnp.int8))
    starts = set()
    draw = jax.jit(lambda pair: search.draw(state, params, es.Member(pair, 1))["w"])
    for pair in range(64):
        a, b = draw(np.int32(pair))
        found = [*b.ravel().tolist(), *a.ravel().tolist()]
        assert found == list(range(found[0], found[0] + 5))
        starts.add(found[0])
    # From 3 on they are moved to 3.
    assert starts == {0, 1, 2, 3}


def test_weights_at_their_ends_stay_there():
    params = {"w": jnp.full((3, 2), 127, jnp.int8).at[0].set(-127)}
    search = es.integer_eggroll([0], table_size=64)
    state = search.init(0, params)
    update = jax.jit(search.update)
    for fitness in (np.arange(N), -np.arange(N)):
        updates, _ = update(state, params, fitness)
        new = np.int32(params["w"]) + np.int32(updates["w"])
        assert np.abs(new).max() <= 127


@pytest.mark.parametrize("clt", [True, False])
def test_an_update_follows_the_sums(clt: bool):
    params = {"w": jnp.full((6, 5), 126, jnp.int8), "b": jnp.full(7, -127, jnp.int8)}
    search = es.integer_eggroll([0, 9], table_size=64, use_clt=clt)
    state = search.init(4, params)
    update = jax.jit(search.update)
    draw = jax.jit(jax.vmap(search.draw, (None, None, 0)))
    fitness = np.array([3, 9, 4, 4, 8, 1, 7, 2, 5, 6])
    for epoch, limit, worth in ((0, 0, fitness), (0, 0, 0 * fitness), (1, 9, fitness)):
        state = state._replace(epoch=jnp.int32(epoch))
        pairs = es.Member(np.arange(5), np.ones(5, np.int32))
        noise = draw(state, params, pairs)
        shape = np.int64 if clt else np.sign
        a, b, dense = (shape(np.int64(x)) for x in (*noise["w"], noise["b"]))
        signs = np.sign(np.int64(worth[::2]) - np.int64(worth[1::2]))
        sums = {
            "w": np.einsum("p,por,pir->oi", signs, a, b),
            "b": np.einsum("p,pi->i", signs, dense),
        }
        updates, _ = update(state, params, worth)
        for name, total in sums.items():
            # A sum of zero moves down where nothing holds it.
            step = np.where(total > 0, 1, -1)
            # Of 5 pairs the root is 2.
            step[np.abs(total) * 16 < limit * 2 * (256 if clt else 1)] = 0
            old = np.int64(params[name])
            want = np.clip(old + step, -127, 127) - old
            np.testing.assert_array_equal(updates[name], want)


def test_members_are_told_by_number():
    params = {"w": jnp.zeros((6, 5), jnp.int8)}
    search = es.integer_eggroll([9], table_size=64)
    update = jax.jit(search.update)
    fitness, members = jnp.array([3, 9, 8, 1, 7, 2]), jnp.arange(6)
    state = search.init(4, params)
    want, _ = update(state, params, fitness)
    chex.assert_trees_all_equal(update(state, params, fitness, members)[0], want)
    turned = jnp.roll(members, 2), jnp.roll(fitness, 2)
    chex.assert_trees_all_equal(update(state, params, *turned[::-1])[0], want)
    other, _ = update(state, params, fitness, members + 2)
    assert np.any(other["w"] != want["w"])
    asked = es.ask_tell(search, optax.identity(), 6)
    after, _ = jax.jit(asked.tell)(asked.init(4, params), members, fitness)
    chex.assert_trees_all_equal(after.mean, want)


def test_noise_begins_where_the_keys_by_position_say():
    params = {
        "blocks": {
            "norm": {"scale": jnp.zeros((2, 3), jnp.int8)},
            "w": jnp.zeros((2, 2, 3), jnp.int8),
        },
        "out": jnp.zeros((4, 2), jnp.int8),
    }
    key = jax.random.key(7)
    search = es.integer_eggroll([0], table_size=64, keys="position")
    table = jnp.arange(64, dtype=jnp.int8)
    state = search.init(key, params)._replace(table=table, epoch=jnp.int32(2))
    leaves = jax.random.split(key, 3)

    def begin(key: Any, pair: int, numbers: int) -> int:
        word = int(jax.random.key_data(jax.random.fold_in(key, 2))[0])
        return min((word ^ (pair * 0x45D9F3B)) % 64, 64 - numbers)

    for pair in (1, 6):
        noise = search.draw(state, params, es.Member(pair, 1))
        for layer, k in enumerate(jax.random.split(leaves[1], 2)):
            assert noise["blocks/w"][1][layer, 0, 0] == begin(k, pair, 5)
        for layer, k in enumerate(jax.random.split(leaves[0], 2)):
            at = begin(k, pair, 6)
            want = [(at + i) * (at + i + 1) for i in (0, 2, 4)]
            assert noise["blocks/norm/scale"][layer].tolist() == want
        assert noise["out"][1][0, 0] == begin(leaves[2], pair, 6)


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_the_share_that_moves_under_random_fitness(alpha: float):
    params = {"w": jnp.zeros((64, 64), jnp.int8), "bias": jnp.zeros(512, jnp.int8)}
    search = es.integer_eggroll([_integer.threshold(alpha)], table_size=1 << 18)
    state = search.init(3, params)
    update = jax.jit(search.update)
    shares = []
    for i in range(20):
        fitness = np.random.default_rng(i).integers(0, 1 << 20, 512, np.int32)
        updates, state = update(state, params, fitness)
        shares.append(np.abs(updates["w"]).mean())
    # Truncation makes the noise smaller than 1, and fewer weights move.
    assert 0.5 * alpha < np.mean(shares) < 1.1 * alpha


def test_thresholds_fall_with_the_share_that_moves():
    found = es.noise_thresholds(100, 4.0)
    assert found.dtype == np.int32 and found[0] == 0
    assert np.all(np.diff(found) >= 0)
    share = 1 / (15 * 50 / 100 + 1)
    assert found[50] == _integer.threshold(share)
    assert len(set(es.noise_thresholds(100, 0.0, 0.3).tolist())) == 1
    assert _integer.threshold(0.3) == 16


def test_chunks_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    fitness = np.random.default_rng(3).integers(0, 9, 22, np.int32)
    search, state = make(2)

    def update() -> Any:
        return jax.jit(lambda f: search.update(state, PARAMS, f)[0])(fitness)

    whole = update()
    monkeypatch.setattr(_integer, "_AT_ONCE", 40)
    parts = update()
    chex.assert_trees_all_equal(parts, whole)


def test_noise_is_held_as_told():
    @functools.cache
    def drawn(reuse: int) -> Any:
        search, state = make(noise_reuse=reuse)
        return jax.jit(lambda e: search.draw(state._replace(epoch=e), PARAMS, 0))

    def noise(reuse: int, epoch: int) -> Any:
        return drawn(reuse)(np.int32(epoch))

    chex.assert_trees_all_equal(noise(2, 2), noise(2, 3))
    chex.assert_trees_all_equal(noise(0, 0), noise(0, 7))
    assert np.any(noise(1, 0)["emb"][0] != noise(1, 1)["emb"][0])


def test_ternary_digits_are_five_to_a_byte():
    values = jax.random.randint(jax.random.key(0), (23,), -1, 2)
    packed = es.pack_ternary(values)
    assert packed.dtype == jnp.uint8 and packed.shape == (5,)
    np.testing.assert_array_equal(es.unpack_ternary(packed, 23), values)
    every = np.array([[i // 3**k % 3 - 1 for k in range(5)] for i in range(243)])
    np.testing.assert_array_equal(
        es.unpack_ternary(es.pack_ternary(every.ravel()), 243 * 5), every.ravel()
    )


def test_the_step_that_fit_runs():
    search = es.integer_eggroll(es.noise_thresholds(20, 3.0), table_size=1 << 12)
    tx = es.scale_by_strategy(search, 1)

    def score(params: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = egg.apply(params, tokens[:-1], egg.zero_state(CONFIG))
        return egg.log_likelihood(logits, tokens[1:]).sum()

    step = es.make_evolution_step(score, search, tx, 64)
    state = wlab.train.init_state(PARAMS, tx)
    text = jnp.tile(jnp.array([65, 66], jnp.uint8), 6)
    state, history = wlab.train.fit(step, state, [text] * 20, steps=20, every=1)
    assert history["fitness"][-1] > history["fitness"][0]
    chex.assert_trees_all_equal_shapes_and_dtypes(state.params, PARAMS)
    told = es.ask_tell(search, optax.identity(), 8)
    asked = told.init(jax.random.key(0), PARAMS)
    asked, _ = jax.jit(told.tell)(asked, told.ask(asked), jnp.arange(8))
    assert int(asked.generation) == 1


def test_bad_arguments():
    for bad in ([], [[1]], [-1], [0.9]):
        with pytest.raises(ValueError, match="thresholds: a vector"):
            es.integer_eggroll(bad)
    with pytest.raises(ValueError, match="table_size=100 is no power of two"):
        es.integer_eggroll([0], table_size=100)
    with pytest.raises(ValueError, match="rank=0 is positive"):
        es.integer_eggroll([0], rank=0)
    with pytest.raises(ValueError, match="alpha=0"):
        es.noise_thresholds(10, alpha=0)
    search = es.integer_eggroll([0], table_size=4)
    with pytest.raises(ValueError, match=r"'w' of shape \(3, 2\) has noise of 5"):
        search.init(0, {"w": jnp.zeros((3, 2), jnp.int8)})
    with pytest.raises(TypeError, match=r"'w' of shape \(3,\) holds float32"):
        search.init(0, {"w": jnp.zeros(3)})
    with pytest.raises(ValueError, match="no vector or matrix"):
        search.init(0, {"w": jnp.zeros((3, 2, 2), jnp.int8)})
    search, state = make()
    with pytest.raises(ValueError, match=r"fitness of shape \(3,\)"):
        search.update(state, PARAMS, jnp.arange(3))
    with pytest.raises(TypeError, match="fitness of float32"):
        search.update(state, PARAMS, jnp.ones(4))
    with pytest.raises(ValueError, match="leave noise= out"):
        search.update(state, PARAMS, jnp.arange(4), noise={})
    assert wlab.core.Noisy._fields[0] == "weight"
